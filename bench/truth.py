"""No speed without correctness: a contender that computes something else is not timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.paths import Batch, Outcome
from grpo_core.reference import reference_loss

SAMPLE_ROWS = 8
# float32 roundings of a log-probability near 12 nats and of what is computed from it
RELATIVE = 2e-5
# of the largest number: a hundredth of the gradient at a word of average probability
ABSOLUTE = 1e-7


class WrongResult(AssertionError):
    """A contender's loss, logp, entropy or dlogits is not that of the float64 reference."""


class Truth(NamedTuple):
    """The float64 reference over a whole batch; vectors and gradient at `rows` only."""

    rows: Tensor  # [SAMPLE_ROWS] int64
    loss: Tensor  # 0-dim
    logp: Tensor  # [SAMPLE_ROWS]
    entropy: Tensor  # [SAMPLE_ROWS]
    dlogits: Tensor  # [SAMPLE_ROWS, V]


def find_truth(batch: Batch) -> Truth:
    """Loss of every row, a few at a time, and the gradient of evenly spaced ones."""
    N = batch.target.numel()
    sample = torch.arange(0, N, max(1, N // SAMPLE_ROWS), device=batch.target.device)[:SAMPLE_ROWS]
    chunks = torch.arange(N, device=batch.target.device).split(2 * SAMPLE_ROWS)
    loss = torch.stack([_reference(batch, rows, gradient=False)[0] for rows in chunks]).sum()
    return Truth(sample, loss, *_reference(batch, sample, gradient=True)[1:])


def refuse_wrong(name: str, outcome: Outcome, truth: Truth) -> None:
    """Raises WrongResult, naming the contender and the quantity, unless `outcome` is right."""
    _compare(f"{name}: loss", outcome.loss, truth.loss, torch.float32)
    _compare(f"{name}: logp", outcome.logp[truth.rows], truth.logp, torch.float32)
    if outcome.entropy is not None:
        _compare(f"{name}: entropy", outcome.entropy[truth.rows], truth.entropy, torch.float32)
    if outcome.dlogits is not None:
        dlogits = outcome.dlogits[truth.rows]
        _compare(f"{name}: dlogits", dlogits, truth.dlogits, dlogits.dtype)


def _reference(batch: Batch, rows: Tensor, *, gradient: bool) -> tuple[Tensor, ...]:
    """(loss, logp, entropy, dlogits) of some rows as part of the whole batch's mean."""
    logits = batch.pristine[rows].double().requires_grad_(gradient)
    out = reference_loss(
        logits,
        batch.target[rows],
        objective="dapo",
        advantage=batch.advantage[rows],
        old_logp=batch.old_logp[rows],
        sequence_id=torch.zeros_like(rows),
        normalizer=float(batch.target.numel()),
    )
    dlogits = torch.autograd.grad(out.loss, logits) if gradient else ()
    return out.loss.detach(), out.logp, out.entropy, *dlogits


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
