"""The one rule of tolerance, and the one home of its numbers.

Our error against float64 is at most that of the honest baseline plus FLOOR times the size of what
is measured. Honest is `reference_loss` on the same logits: float32 log_softmax, autograd. The
tests, `grpo_core.verify` and the bench all measure by it.

For confident tokens that rule asks for little: log_softmax returns logp = 0, whose absolute error
is small. They are held to the error relative to their own size instead. Everything about them is a
power, e^−m, which float32 knows as well as it knows m: to FLOOR · max(1, m) of its size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.objective import Objective

# a few float32 roundings of a number of size 1
FLOOR = 8 * torch.finfo(torch.float32).eps
VECTORS = ("loss", "logp", "entropy", "ratio", "kl")
QUANTITIES = (*VECTORS, "dlogits")


class Comparison(NamedTuple):
    """A quantity measured against float64, at its worst element."""

    quantity: str
    error: float  # ours; dlogits and confident tokens: relative, all others: absolute
    baseline: float  # that of the honest baseline
    share: float  # ours, of what is allowed

    @property
    def ok(self) -> bool:
        """Whether the rule holds."""
        return self.share <= 1


class Result(NamedTuple):
    """A loss and the gradient of its logits."""

    out: LossOutput
    dlogits: Tensor


class ExactTokens(NamedTuple):
    """Statistics of N tokens in float64, every digit of a confident one included."""

    logp: Tensor  # [N] nats
    entropy: Tensor  # [N] nats
    slope: Tensor  # [N, V], dlogp/dlogits


def worst(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error; infinite if a NaN or infinity stands where the truth is finite."""
    value, truth = value.to(truth.device).double(), truth.double()
    error = torch.where(value == truth, 0.0, (value - truth).abs())
    return float(error.nan_to_num(nan=math.inf).amax()) if error.numel() else 0.0


def compare(
    quantity: str,
    ours: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    size: float = 1.0,
    terms: int = 1,
) -> Comparison:
    """The rule, for sums of so many `terms` as large as the largest of the truth, or as `size`."""
    assert ours.shape == truth.shape, f"{quantity}: {list(ours.shape)}, not {list(truth.shape)}"
    largest = float(truth.abs().nan_to_num(posinf=0).amax()) if truth.numel() else 0.0
    error, honest = worst(ours, truth), worst(baseline, truth)
    share = _share(error, honest + FLOOR * terms * max(size, largest))
    unit = largest if size == 0 and largest else 1.0
    return Comparison(quantity, error / unit, honest / unit, share)


def compare_losses(
    objective: Objective, longest: int, ours: Result, baseline: Result, truth: Result
) -> list[Comparison]:
    """Everything that a loss returns, and its gradient relative to its own size.

    `longest` is the number of tokens of the longest sequence.
    """
    logp = truth.out.logp
    largest = max(1.0, float(logp.abs().nan_to_num(posinf=0).amax())) if logp.numel() else 1.0
    # what is a sum of terms of either sign cannot be better than its largest term
    sums = ("loss",) if objective.is_token_level else ("loss", "ratio")
    # nor the exponential of a sum better than the sum
    terms = longest if objective.ratio_level == "sequence_sum" else 1
    found = []
    for name in VECTORS:
        mine, honest, exact = (getattr(r.out, name).detach() for r in (ours, baseline, truth))
        size, steps = (largest, terms) if name in sums else (1.0, 1)
        found.append(compare(name, mine, honest, exact, size=size, terms=steps))
    mine, honest, exact = (r.dlogits for r in (ours, baseline, truth))
    return [*found, compare("dlogits", mine, honest, exact, size=0.0, terms=terms)]


def compare_confident(
    quantity: str, ours: Tensor, baseline: Tensor, truth: Tensor, unit: float = 1.0
) -> Comparison:
    """Every element relative to its own size; a float16 or bfloat16 tensor may round it once.

    Args:
        ours, baseline, truth: of any shape; the truth is finite and nowhere 0.
        unit: what the numbers were multiplied by.
    """
    rounding = torch.finfo(ours.dtype)
    size = truth.abs()
    floor = FLOOR * (size / unit).log().abs().clamp(min=1)
    allowed = (floor + rounding.eps) * size + rounding.smallest_normal * rounding.eps
    errors = [(x.double() - truth).abs().nan_to_num(nan=math.inf) for x in (ours, baseline)]
    # numbers too small for the dtype have no relative error to speak of
    normal = size >= rounding.smallest_normal
    mine, honest = (float((error[normal] / size[normal]).amax()) for error in errors)
    return Comparison(quantity, mine, honest, float((errors[0] / allowed).amax()))


def exact_tokens(logits: Tensor, target: Tensor) -> ExactTokens:
    """log π(y) = −log(1 + Σ_{j≠y} exp(x_j − x_y)), and what follows; for finite logits `[N, V]`."""
    at = target[:, None]
    gap = logits.double() - logits.double().gather(1, at)
    others = gap.exp().scatter(1, at, 0.0)
    rest = others.sum(1, keepdim=True)
    logp = -torch.log1p(rest)
    log_pi = gap + logp
    entropy = -(log_pi.exp() * log_pi).sum(1)
    slope = (-others / (1 + rest)).scatter(1, at, rest / (1 + rest))
    return ExactTokens(logp.squeeze(1), entropy, slope)


def _share(error: float, allowed: float) -> float:
    """Error over allowed, where both may be 0."""
    return error / allowed if allowed else math.inf if error else 0.0
