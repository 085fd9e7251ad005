"""The rule of tolerance and its constants, for the tests, `grpo_core.verify` and the bench.

The error against float64 is at most that of the baseline plus FLOOR times the size of the measured
quantity. The baseline is `reference_loss` on the same logits: float32 log_softmax and autograd.

For confident tokens this rule is weak: log_softmax returns logp = 0 with a small absolute error.
Their error is measured relative to their own size instead. Their quantities are proportional to
e^−m, whose relative accuracy in float32 is that of m: FLOOR · max(1, m).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.objective import Objective

# a few float32 rounding errors of a number of size 1
FLOOR = 8 * torch.finfo(torch.float32).eps
QUANTITIES = ("loss", "logp", "entropy", "ratio", "kl", "dlogits")


class Comparison(NamedTuple):
    """The error of a quantity against float64, at its worst element."""

    quantity: str
    error: float  # relative for dlogits and confident tokens, absolute for all others
    baseline: float  # error of the baseline
    share: float  # error / allowed error

    @property
    def ok(self) -> bool:
        """Whether the rule holds."""
        return self.share <= 1


class Result(NamedTuple):
    """A loss and the gradient of its logits."""

    out: LossOutput
    dlogits: Tensor

    def quantity(self, name: str) -> Tensor:
        """One of QUANTITIES."""
        value: Tensor = self.dlogits if name == "dlogits" else getattr(self.out, name)
        return value.detach()


class ExactTokens(NamedTuple):
    """Statistics of N tokens in float64, with full relative accuracy for confident tokens."""

    logp: Tensor  # [N] nats
    entropy: Tensor  # [N] nats
    slope: Tensor  # [N, V], dlogp/dlogits


def worst(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error; infinite for a NaN or infinity where the truth is finite."""
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
    """Applies the rule to a sum of `terms` numbers no larger than `size` or the largest truth."""
    assert ours.shape == truth.shape, f"{quantity}: {list(ours.shape)}, not {list(truth.shape)}"
    largest = float(truth.abs().nan_to_num(posinf=0).amax()) if truth.numel() else 0.0
    error, honest = worst(ours, truth), worst(baseline, truth)
    allowed = honest + FLOOR * terms * max(size, largest)
    # both may be 0
    share = error / allowed if allowed else math.inf if error else 0.0
    unit = largest if size == 0 and largest else 1.0
    return Comparison(quantity, error / unit, honest / unit, share)


def compare_losses(
    objective: Objective, longest: int, ours: Result, baseline: Result, truth: Result
) -> list[Comparison]:
    """Compares the vectors of a loss, and its gradient relative to the largest element.

    `longest` is the number of tokens of the longest sequence.
    """
    logp = truth.out.logp
    largest = max(1.0, float(logp.abs().nan_to_num(posinf=0).amax())) if logp.numel() else 1.0
    # a sum of terms of either sign is no more accurate than its largest term
    sums = ("loss",) if objective.is_token_level else ("loss", "ratio")
    # the exponential of a sum is no more accurate than the sum
    terms = longest if objective.ratio_level == "sequence_sum" else 1
    rules = dict.fromkeys(QUANTITIES, (1.0, 1)) | dict.fromkeys(sums, (largest, terms))
    rules["dlogits"] = (0.0, terms)
    return [
        compare(name, *(r.quantity(name) for r in (ours, baseline, truth)), size=size, terms=steps)
        for name, (size, steps) in rules.items()
    ]


def compare_confident(
    quantity: str, ours: Tensor, baseline: Tensor, truth: Tensor, unit: float = 1.0
) -> Comparison:
    """Compares relative errors; a float16 or bfloat16 tensor may round each element once.

    Args:
        ours, baseline, truth: of any shape; the truth is finite and nowhere 0.
        unit: the factor of the numbers.
    """
    rounding = torch.finfo(ours.dtype)
    size = truth.abs()
    floor = FLOOR * (size / unit).log().abs().clamp(min=1)
    allowed = (floor + rounding.eps) * size + rounding.smallest_normal * rounding.eps
    errors = [(x.double() - truth).abs().nan_to_num(nan=math.inf) for x in (ours, baseline)]
    # numbers that underflow have no useful relative error
    normal = size >= rounding.smallest_normal
    value, honest = (float((error[normal] / size[normal]).amax()) for error in errors)
    return Comparison(quantity, value, honest, float((errors[0] / allowed).amax()))


def exact_tokens(logits: Tensor, target: Tensor) -> ExactTokens:
    """log π(y) = −log(1 + Σ_{j≠y} exp(x_j − x_y)) and its gradient, for finite logits `[N, V]`."""
    at = target[:, None]
    gap = logits.double() - logits.double().gather(1, at)
    others = gap.exp().scatter(1, at, 0.0)
    sum_others = others.sum(1, keepdim=True)
    logp = -torch.log1p(sum_others)
    log_pi = gap + logp
    entropy = -(log_pi.exp() * log_pi).sum(1)
    slope = (-others / (1 + sum_others)).scatter(1, at, sum_others / (1 + sum_others))
    return ExactTokens(logp.squeeze(1), entropy, slope)
