"""The sampler is not the trainer: factors and masks for tokens that another program sampled.

    w_t = π_old(t) / π_sampler(t)        token
    w   = Π_t w_t                        sequence
    w   = (Π_t w_t)^(1 / |o|)            geometric

| action     | where w is outside [low, high]               | known as                             |
|------------|----------------------------------------------|--------------------------------------|
| "truncate" | factor = the nearer bound                    | TIS; TRL *_truncate, verl rollout_is |
| "zero"     | factor = 0, the token counts in every mean   | IcePop, MIS; TRL *_mask, verl lo_hi  |
| "reject"   | factor = 0, the token leaves the mask        | MIS; without weights: `rejection`    |

`factor` multiplies the advantage, which is how it scales the policy term and never the KL. Tokens
of which one log-probability is NaN or infinite leave the mask and are counted; a product or a mean
goes over the others. (TRL 1.16 keeps such tokens with w_t = 1; verl 0.9.1 lets the NaN through.)

Log-ratios of a token, or of a sequence once summed, are held within ±80 nats, so that float32 can
hold w; verl holds them within ±20, which differs only for bounds above e²⁰. Bounds are inclusive.

Source: TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(2025); IcePop: Ring-1T (arXiv 2510.18855); sequence level: 2512.23075; off-policy sequence mask:
DeepSeek-V3.2 (2512.02556, sec. 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.objective.validation import check_floats, check_ids, check_mask, is_number

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "zero", "reject"]


@dataclass(frozen=True)
class SamplerCorrection:
    """How w = π_old / π_sampler is taken and bounded, see the table above.

    Args:
        level: one w per token, or one per sequence, as a product or a geometric mean.
        action: what happens outside the bounds.
        low, high: bounds of w, 0 <= low <= high; inclusive.

    Raises:
        ValueError: an unknown name, or bounds in the wrong order.
    """

    level: Level = "token"
    action: Action = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in (("level", Level), ("action", Action)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")
        numbers = is_number(self.low) and is_number(self.high)
        if not numbers or not 0 <= self.low <= self.high:
            raise ValueError(f"low: expected 0 <= low <= high, got {self.low!r} and {self.high!r}")


# e⁸⁰ is within the range of float32, e⁸⁹ is not
MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Correction:
    """What multiplies the advantage, and the tokens that are left; nothing carries a gradient.

    Attributes:
        factor: shaped like the mask given, float32, 0 where that is 0.
        mask: the same shape, bool.
        nonfinite: 0-dim int64, tokens dropped for a log-probability that is NaN or infinite.
        truncated: 0-dim int64, tokens whose factor was moved to a bound.
        rejected: 0-dim int64, tokens whose factor was set to 0.
    """

    factor: Tensor
    mask: Tensor
    nonfinite: Tensor
    truncated: Tensor
    rejected: Tensor


@torch.no_grad()
def sampler_correction(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    *,
    level: Level = "token",
    action: Action = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    sequence_id: Tensor | None = None,
    validate: bool | None = None,
) -> Correction:
    """Importance weights w = π_old / π_sampler with what is too far off cut back or left out.

    Args:
        old_logp: [B, T] or packed [N], the trainer's, nats.
        sampler_logp: the same shape, the inference engine's, nats.
        mask: the same shape, 0 means masked.
        level: one w per token, or one per sequence, as a product or a geometric mean.
        action: what happens outside the bounds, see the table above.
        low, high: bounds of w, 0 <= low <= high.
        sequence_id: [N] integers in [0, N), needed for packed tokens unless the level is "token".
        validate: look for wrong ids; None means on the CPU only. Unseen, their tokens are masked.

    Returns:
        `Correction`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    SamplerCorrection(level, action, low, high)
    log_ratio, kept, nonfinite = _log_ratio(old_logp, "sampler_logp", sampler_logp, mask)
    if level != "token":
        log_ratio, kept = _per_sequence(
            log_ratio, kept, sequence_id, mean=level == "geometric", validate=validate
        )
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside = kept & ((ratio < low) | (ratio > high))
    count, none = outside.sum(), torch.zeros_like(nonfinite)
    if action == "truncate":
        factor = torch.where(kept, ratio.clamp(low, high), 0.0)
        return Correction(factor.float(), kept, nonfinite, truncated=count, rejected=none)
    factor = torch.where(kept & ~outside, ratio, 0.0).float()
    left = kept & ~outside if action == "reject" else kept
    return Correction(factor, left, nonfinite, truncated=none, rejected=count)


@torch.no_grad()
def off_policy_mask(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    delta: float,
    sequence_id: Tensor | None = None,
    validate: bool | None = None,
) -> Correction:
    """Factor 0 where A < 0 and mean_t(old_logp − logp) > δ over the sequence, else 1.

    What the policy has already made unlikely is not pushed down further. Such tokens still count
    in every mean, as in the paper. TRL counts a NaN as difference 0, here it leaves the mean.

    Args:
        logp: [B, T] or packed [N], of the policy being trained, nats.
        old_logp: the same shape: the sampler's where there is one, the trainer's otherwise.
        advantage: the same shape, or [B].
        mask: the same shape, 0 means masked.
        delta: nats per token.
        sequence_id, validate: as in `sampler_correction`.

    Returns:
        `Correction`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: DeepSeek-V3.2 (arXiv 2512.02556, sec. 3.1); TRL's off_policy_mask_threshold.
    """
    if not is_number(delta) or not -math.inf < delta <= math.inf:
        raise ValueError(f"delta: expected a number, got {delta!r}")
    shape = tuple(check_floats("logp", logp).shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"logp: expected shape [B, T] or [N], got {list(shape)}")
    check_floats("advantage", advantage, shape, shape[:1], device=logp.device)
    drift, kept, nonfinite = _log_ratio(old_logp, "logp", logp, mask)
    drift, kept = _per_sequence(drift, kept, sequence_id, mean=True, validate=validate)
    if advantage.ndim < logp.ndim:
        advantage = advantage[:, None]
    rejected = kept & (advantage < 0) & (drift > delta)
    factor = (kept & ~rejected).float()
    none = torch.zeros_like(nonfinite)
    return Correction(factor, kept, nonfinite, truncated=none, rejected=rejected.sum())


def _log_ratio(
    upper: Tensor, name: str, lower: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(upper − lower float64, the mask where it is finite, how often it is not)."""
    if check_floats("old_logp", upper).ndim not in (1, 2):
        got = list(upper.shape)
        raise ValueError(f"old_logp: expected floating point [B, T] or [N], got {got}")
    shape, device = tuple(upper.shape), upper.device
    check_floats(name, lower, shape, device=device)
    check_mask("mask", mask, shape, device=device)
    present = mask != 0
    kept = present & upper.isfinite() & lower.isfinite()
    difference = torch.where(kept, upper.double() - lower.double(), 0.0)
    return difference, kept, (present & ~kept).sum()


def _per_sequence(
    vector: Tensor,
    kept: Tensor,
    sequence_id: Tensor | None,
    *,
    mean: bool,
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    """Sum or mean over the kept tokens of each sequence, for each of its tokens; and the kept."""
    if vector.ndim == 2:
        if sequence_id is not None:
            raise ValueError("sequence_id: expected None for [B, T], got a tensor")
        total, length = vector.sum(1, keepdim=True), kept.sum(1, keepdim=True)
        return (total / length.clamp(min=1) if mean else total).expand_as(vector), kept
    if sequence_id is None:
        raise ValueError("sequence_id: expected [N] for packed tokens, got None")
    N = len(vector)
    sequence, inside = check_ids("sequence_id", sequence_id, "N", N, vector, validate)
    kept = kept & inside
    zeros = torch.zeros_like(vector)
    total = zeros.scatter_add(0, sequence, torch.where(kept, vector, 0.0))
    length = zeros.scatter_add(0, sequence, kept.double()).clamp(min=1)
    return (total / length if mean else total)[sequence], kept
