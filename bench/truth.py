"""No speed without correctness: a contender that computes something else is not timed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.batch import Batch, Outcome, Recipe
from grpo_core.loss.reference import reference_loss

# from logits: evenly spaced rows of the first and of the last sequence
SAMPLE_ROWS = 4
# from hidden states: rows of dweight that are compared, beside those of the first targets
SAMPLE_TOKENS = 64
# of the norm of what is right: float32 roundings of a log-probability near 12 nats
ROUNDING = 2e-5
# the same from hidden states in 16 bits, whose logits were rounded
ROUNDED = 5e-2


class WrongResult(AssertionError):
    """A contender's loss, logp, entropy or a gradient is not that of the float64 reference."""


class Truth(NamedTuple):
    """The float64 reference: the loss of all rows, the rest at some rows."""

    rows: Tensor  # [R] int64, rows whose logp, entropy and first gradient are compared
    scored: Tensor  # [R] bool, where logp and entropy mean something
    tokens: Tensor  # [W] int64, rows of the output matrix whose gradient is compared
    values: dict[str, Tensor]  # loss, logp [R], entropy [R], dlogits; or dhidden and dweight
    size: Tensor  # 0-dim, what the loss is a sum of
    limit: float  # of errors, beside the rounding of dlogits to its dtype


def find_truth(batch: Batch, recipe: Recipe = "dapo") -> Truth:
    """A sequence at a time."""
    from_hidden, device = len(batch.inputs) > 1, batch.target.device
    tokens = batch.token[:0]
    if from_hidden:
        sampled, spaced = [*range(batch.B)], torch.arange(batch.T, device=device)
        hidden, lm_head = (tensor.double() for tensor in batch.inputs)
        V = len(lm_head)
        tokens = torch.linspace(0, V - 1, min(SAMPLE_TOKENS, V), device=device).long()
        tokens = torch.cat([tokens, batch.token[:SAMPLE_TOKENS]]).unique()
        dweight = lm_head.new_zeros(len(tokens), lm_head.shape[1])
    else:
        sampled = sorted({0, batch.B - 1})
        spaced = torch.linspace(0, batch.T - 1, min(SAMPLE_ROWS, batch.T), device=device).long()
    losses, vectors = [], []
    for nth in range(batch.B):
        rows = slice(nth * batch.T, (nth + 1) * batch.T)
        logits = hidden[rows] @ lm_head.t() if from_hidden else batch.pristine[rows].double()
        out = reference_loss(
            logits.requires_grad_(nth in sampled),
            batch.target[rows],
            objective=recipe,
            advantage=batch.advantage[rows],
            old_logp=batch.old_logp[rows],
            sequence_id=torch.zeros_like(batch.target[rows]),
            normalizer=float(batch.scored if recipe == "dapo" else batch.B),
        )
        losses.append(out.loss.detach())
        if nth in sampled:
            (gradient,) = torch.autograd.grad(out.loss, logits)
            if from_hidden:
                dweight += gradient[:, tokens].t() @ hidden[rows]
                gradient = gradient @ lm_head
            vectors.append((out.logp[spaced], out.entropy[spaced], gradient[spaced]))
    rows = torch.cat([spaced + nth * batch.T for nth in sampled])
    logp, entropy, gradient = (torch.cat(part) for part in zip(*vectors, strict=True))
    values = {"loss": torch.stack(losses).sum(), "logp": logp, "entropy": entropy}
    values |= {"dhidden": gradient, "dweight": dweight} if from_hidden else {"dlogits": gradient}
    limit = ROUNDED if from_hidden and batch.inputs[0].dtype != torch.float32 else ROUNDING
    return Truth(rows, batch.valid[rows], tokens, values, batch.advantage.abs().mean(), limit)


def refuse_wrong(name: str, outcome: Outcome, truth: Truth) -> dict[str, float]:
    """Errors of everything that a contender returned, relative to the norm of the truth.

    Raises:
        WrongResult: one is more than a rounding; it names the contender and the quantity.
    """
    values = {"loss": outcome.loss, "logp": outcome.logp, "entropy": outcome.entropy}
    names = [name for name in truth.values if name not in values]
    found = {}
    for what, value in (values | dict(zip(names, outcome.gradients, strict=False))).items():
        if value is None:
            continue
        right, limit = truth.values[what], truth.limit
        if what in ("logp", "entropy"):
            value, right = value[truth.rows][truth.scored], right[truth.scored]
        elif what != "loss":
            at = truth.tokens if what == "dweight" else truth.rows
            value = value.view(-1, value.shape[-1])[at]
        if what == "dlogits":
            limit += torch.finfo(value.dtype).eps
        norm = truth.size if what == "loss" else right.norm()
        found[what] = float((value.double() - right).norm() / norm)
        # a NaN is wrong as well
        if not found[what] <= limit:
            raise WrongResult(
                f"{name}: {what}: expected the float64 reference's, off by {found[what]:.1e} of "
                f"its size where {limit:.1e} is allowed"
            )
    return found
