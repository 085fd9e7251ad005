"""No speed without correctness: a contender that computes something else is not timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.batch import Batch, Outcome, Recipe
from grpo_core.loss.reference import reference_loss

# evenly spaced ones of the first and of the last sequence
SAMPLE_ROWS = 4
# float32 roundings of a log-probability near 12 nats and of what is computed from it
RELATIVE = 2e-5
# of the largest number: a hundredth of the gradient at a word of average probability
ABSOLUTE = 1e-7


class WrongResult(AssertionError):
    """A contender's loss, logp, entropy or dlogits is not that of the float64 reference."""


class Truth(NamedTuple):
    """The float64 reference over a whole batch; vectors and gradient at `rows` only."""

    rows: Tensor  # [R] int64
    valid: Tensor  # [R] bool, where logp and entropy mean something
    loss: Tensor  # 0-dim
    logp: Tensor  # [R]
    entropy: Tensor  # [R]
    dlogits: Tensor  # [R, V]


def find_truth(batch: Batch, recipe: Recipe = "dapo") -> Truth:
    """Loss of every row, a sequence at a time, and the gradient of some rows of two sequences."""
    spaced = torch.linspace(0, batch.T - 1, min(SAMPLE_ROWS, batch.T)).long()
    sampled = [0] if batch.B == 1 else [0, batch.B - 1]
    losses, vectors = [], []
    for nth in range(batch.B):
        loss, *sample = _reference(batch, nth, recipe, spaced if nth in sampled else None)
        losses.append(loss)
        vectors += [sample] if sample else []
    rows = torch.cat([spaced + nth * batch.T for nth in sampled]).to(batch.target.device)
    logp, entropy, dlogits = (torch.cat(part) for part in zip(*vectors, strict=True))
    return Truth(rows, batch.valid[rows], torch.stack(losses).sum(), logp, entropy, dlogits)


def refuse_wrong(name: str, outcome: Outcome, truth: Truth) -> None:
    """Raises WrongResult, naming the contender and the quantity, unless `outcome` is right."""
    _compare(f"{name}: loss", outcome.loss, truth.loss, torch.float32)
    for what, found, right in (
        ("logp", outcome.logp, truth.logp),
        ("entropy", outcome.entropy, truth.entropy),
    ):
        if found is not None:
            scored = truth.valid
            _compare(f"{name}: {what}", found[truth.rows][scored], right[scored], torch.float32)
    if outcome.dlogits is not None:
        dlogits = outcome.dlogits.view(-1, outcome.dlogits.shape[-1])[truth.rows]
        _compare(f"{name}: dlogits", dlogits, truth.dlogits, dlogits.dtype)


def _reference(batch: Batch, nth: int, recipe: Recipe, sample: Tensor | None) -> tuple[Tensor, ...]:
    """Loss of a sequence as part of the batch's mean; logp, entropy, dlogits of sampled rows."""
    rows = slice(nth * batch.T, (nth + 1) * batch.T)
    logits = batch.pristine[rows].double().requires_grad_(sample is not None)
    out = reference_loss(
        logits,
        batch.target[rows],
        objective=recipe,
        advantage=batch.advantage[rows],
        old_logp=batch.old_logp[rows],
        sequence_id=torch.zeros_like(batch.target[rows]),
        normalizer=float(batch.scored if recipe == "dapo" else batch.B),
    )
    if sample is None:
        return (out.loss,)
    (dlogits,) = torch.autograd.grad(out.loss, logits)
    at = sample.to(logits.device)
    return out.loss.detach(), out.logp[at], out.entropy[at], dlogits[at]


def _compare(what: str, value: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Raises WrongResult unless every number is right to the roundings of its dtype."""
    size = truth.abs()
    floor = ABSOLUTE * (size.amax() if truth.ndim > 1 else max(1.0, float(size.amax())) * 100)
    allowed = (RELATIVE + torch.finfo(dtype).eps) * size + floor
    error = (value.double() - truth).abs()
    if not bool((error <= allowed).all()):
        raise WrongResult(
            f"{what}: expected the float64 reference's, off by up to {float(error.max()):.2e} "
            f"where {float(allowed.min()):.2e} or more is allowed"
        )
