"""Rewards -> advantages, over groups of any size: a baseline and a scale, chosen apart.

    A_i = (R_i − baseline_i) / (std + ε)

| method                            | baseline      | scale   | std is of                     |
|-----------------------------------|---------------|---------|-------------------------------|
| GRPO, arXiv 2402.03300            | group         | group   | the rewards of the group      |
| Dr. GRPO, 2503.20783              | group         | None    |                               |
| RLOO, 2402.14740                  | leave_one_out | None    |                               |
| "Tricks or Traps", 2508.08221     | group         | batch   | all rewards                   |
| REINFORCE++ baseline, 2501.03262  | group         | centred | all R_i − baseline_i          |
| REINFORCE++, 2501.03262           | batch         | batch   | all rewards                   |
| GDPO, 2601.05242                  | `decoupled_advantages`: GRPO per reward function, summed  |

Whatever says "batch" is over this call: under data parallelism gather the rewards first. Advantages
per token (PPO) are in `value`.

Where the papers are silent: a group of one and a group of equal rewards get exactly 0; so does a
masked completion, and it counts for nobody else. Against the frameworks:

- TRL 1.16: the same numbers by default (ddof 1, ε = 1e-4). What no function could score is NaN
  there and `mask` here. RLOO's normalize_advantages: leave_one_out with centred.
- verl 0.9.1: ddof 1, ε = 1e-6. There a group of one keeps its raw reward as advantage (grpo, rloo,
  reinforce_plus_plus_baseline; 0 in rloo_vectorized). What it takes over the batch is over tokens,
  with 1e-8 added to the variance: give `tokens`; ε = 0 is within 5e-7 of it for std >= 0.1.

Computed in float64, so that the order of atomic additions on a GPU drowns in the last rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.objective.validation import (
    check_floats,
    check_ids,
    check_mask,
    is_int,
    is_number,
    must_validate,
)

Baseline = Literal["group", "leave_one_out", "batch"]
Scale = Literal["group", "batch", "centred"]


@dataclass(frozen=True)
class Estimator:
    """How an advantage is made of rewards, see the table above.

    Args:
        baseline: the mean of the group, of the others in the group, or of the batch.
        scale: the standard deviation to divide by, or None.
        ddof: degrees of freedom taken off in it, 0 or 1.
        epsilon: added to it, in units of reward.
    """

    baseline: Baseline = "group"
    scale: Scale | None = "group"
    ddof: int = 1
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if self.baseline not in get_args(Baseline):
            want = get_args(Baseline)
            raise ValueError(f"baseline: expected one of {want}, got {self.baseline!r}")
        if self.scale not in (*get_args(Scale), None):
            want = (*get_args(Scale), None)
            raise ValueError(f"scale: expected one of {want}, got {self.scale!r}")
        if not is_int(self.ddof) or self.ddof not in (0, 1):
            raise ValueError(f"ddof: expected 0 or 1, got {self.ddof!r}")
        if not is_number(self.epsilon) or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon: expected a finite number >= 0, got {self.epsilon!r}")


GROUP_MEAN_STD = Estimator()


@torch.no_grad()
def relative_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    estimator: Estimator = GROUP_MEAN_STD,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """A_i = (R_i − baseline_i) / (std + ε); nothing waits for the device.

    Args:
        rewards: [B] floating point, one per completion.
        groups: completions per prompt, neighbours in `rewards`, a divisor of B; or [B] integer ids
            in [0, B), in any order, groups of any size.
        estimator: baseline and scale.
        tokens: [B], the length of each completion: whatever is over the batch is over its tokens
            then. A group of equal rewards is 0 over completions, but not over tokens when the
            scale is "centred": there the mean over tokens is not 0, and is taken off.
        mask: [B], 0 for completions that do not count, whatever their reward; None means all do.
        validate: look for NaN, infinity and wrong ids; None means on the CPU only. Unseen, a NaN
            spreads over its group (or batch) and a completion with a wrong id is masked.

    Returns:
        [B] float32, or float64 for float64 rewards.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    values, group = _door("rewards", rewards, groups, mask, validate)
    return _advantages(values, group, tokens, estimator).to(_result_dtype(rewards))


@torch.no_grad()
def decoupled_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    weights: Tensor | None = None,
    estimator: Estimator = GROUP_MEAN_STD,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """A_i = Z_i / (std Z + ε) with Z_i = Σ_f w_f·A_if: every reward function is normalised alone.

    Args:
        rewards: [B, F] floating point, one column per reward function.
        weights: [F], None means 1 each.
        estimator: of every A_f; its ddof and epsilon are those of std Z, too.
        mask: [B], 0 for completions that do not count, or [B, F], 0 where a function has no score:
            its A_if is 0 then, and a completion without any does not count.
        groups, tokens, validate: as in `relative_advantages`.

    Returns:
        [B] float32, or float64 for float64 rewards.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: GDPO (arXiv 2601.05242); TRL's multi_objective_aggregation="normalize_then_sum".
    """
    if check_floats("rewards", rewards).ndim != 2 or not rewards.shape[1]:
        got = list(rewards.shape)
        raise ValueError(f"rewards: expected a floating-point tensor [B, F >= 1], got {got}")
    B, F = rewards.shape
    if weights is None:
        weights = torch.ones(F, device=rewards.device)
    check_mask("weights", weights, (F,), device=rewards.device)
    scored: list[Tensor | None] = [mask] * F
    if mask is not None and check_mask("mask", mask, (B,), (B, F), device=rewards.device).ndim == 2:
        scored, mask = list((mask != 0).unbind(1)), (mask != 0).any(1)
    total = torch.zeros(B, dtype=torch.float64, device=rewards.device)
    for f in range(F):
        values, group = _door(f"rewards[:, {f}]", rewards[:, f], groups, scored[f], validate)
        total += weights[f].double() * _advantages(values, group, tokens, estimator)
    _, group = _door("rewards", total, groups, mask, validate)
    return _over_batch(total, group, tokens, estimator).to(_result_dtype(rewards))


@torch.no_grad()
def equal_reward_groups(rewards: Tensor, groups: int | Tensor) -> tuple[Tensor, Tensor]:
    """(groups whose rewards are all equal, groups), both 0-dim int64; nothing waits.

    Args:
        rewards: [B] floating point.
        groups: as in `relative_advantages`, checked there.
    """
    B = len(rewards)
    if not isinstance(groups, Tensor):
        groups = torch.arange(B, device=rewards.device) // groups
    index = groups.long().clamp(0, max(B - 1, 0))
    extremes = torch.full((2, B), -math.inf, dtype=torch.float64, device=rewards.device)
    for extreme, sign in zip(extremes, (1, -1), strict=True):
        extreme.scatter_reduce_(0, index, sign * rewards.double(), "amax")
    present = extremes[0] > -math.inf
    return (present & (extremes[0] == -extremes[1])).sum(), present.sum()


@dataclass(frozen=True)
class _Groups:
    """Which group each of B numbers belongs to, and how much it counts there."""

    index: Tensor  # [B] int64 in [0, B)
    weight: Tensor  # [B] float64, 0 for a number that is left out

    def whole(self, tokens: Tensor | None) -> _Groups:
        """All in one group, each counting once or as often as it has tokens."""
        weight = self.weight
        if tokens is not None:
            check_mask("tokens", tokens, tuple(weight.shape), device=weight.device)
            weight = weight * tokens.double()
        return _Groups(torch.zeros_like(self.index), weight)

    def sum(self, values: Tensor) -> Tensor:
        """Weighted sum over the group of each: [B]."""
        zeros = torch.zeros_like(self.weight)
        return zeros.scatter_add(0, self.index, self.weight * values)[self.index]

    def size(self) -> Tensor:
        """Sum of the weights in the group of each: [B]."""
        return self.sum(torch.ones_like(self.weight))

    def centre(self, values: Tensor) -> Tensor:
        """Each less the mean of its group: [B], exactly 0 where all of a group are equal."""
        present = self.weight > 0
        # counted from the largest of the group, so that equal values leave no rounding behind
        top = torch.full_like(values, -math.inf)
        top = top.scatter_reduce(0, self.index, torch.where(present, values, -math.inf), "amax")
        values = torch.where(present, values - top[self.index], 0.0)
        return torch.where(present, values - self.sum(values) / self.size(), 0.0)

    def scale(self, values: Tensor, centred: Tensor, estimator: Estimator) -> Tensor:
        """values / (std + ε), std that of `centred`; 0 where it is 0, even for ε = 0."""
        freedom = (self.size() - estimator.ddof).clamp(min=1)
        # in units of the largest, whose square neither overflows nor vanishes
        size = torch.where(self.weight > 0, centred.abs(), 0.0)
        unit = torch.zeros_like(size).scatter_reduce(0, self.index, size, "amax")[self.index]
        unit = torch.where(unit > 0, unit, 1.0)
        std = (self.sum((centred / unit).square()) / freedom).sqrt()
        scaled = (values / unit) / (std + estimator.epsilon / unit)
        return torch.where(std == 0, 0.0, scaled)


def _advantages(
    values: Tensor, group: _Groups, tokens: Tensor | None, estimator: Estimator
) -> Tensor:
    """[B] float64, 0 where a reward does not count."""
    batch = group.whole(tokens)
    centred = (batch if estimator.baseline == "batch" else group).centre(values)
    if estimator.baseline == "leave_one_out":
        # R_i − Σ_{j≠i} R_j / (n − 1) = (R_i − mean R)·n / (n − 1)
        size = group.size()
        centred = centred * size / (size - 1).clamp(min=1)
    if estimator.scale == "group":
        return group.scale(centred, group.centre(values), estimator)
    if estimator.scale == "batch":
        return batch.scale(centred, batch.centre(values), estimator)
    if estimator.scale == "centred":
        return _over_batch(centred, group, tokens, estimator)
    return centred


def _over_batch(
    centred: Tensor, group: _Groups, tokens: Tensor | None, estimator: Estimator
) -> Tensor:
    """Divides what has mean 0 over the batch by its std there, or over tokens, less its mean."""
    batch = group.whole(tokens)
    if tokens is not None:
        centred = batch.centre(centred)
    return batch.scale(centred, centred, estimator)


def _result_dtype(rewards: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _door(
    name: str, rewards: Tensor, groups: int | Tensor, mask: Tensor | None, validate: bool | None
) -> tuple[Tensor, _Groups]:
    """Rewards [B] float64, anything where they do not count, and their groups; checked."""
    if check_floats(name, rewards).ndim != 1:
        got = f"{list(rewards.shape)} {rewards.dtype}"
        raise ValueError(f"{name}: expected a floating-point tensor [B], got {got}")
    B, validate = len(rewards), must_validate(validate, rewards)
    present = torch.ones_like(rewards, dtype=torch.bool)
    if mask is not None:
        present = check_mask("mask", mask, (B,), device=rewards.device) != 0
    if isinstance(groups, Tensor):
        index, inside = check_ids("groups", groups, "B", B, rewards, validate)
        present = present & inside
    else:
        if not is_int(groups) or groups < 1 or B % groups:
            raise ValueError(f"groups: expected ids or a divisor of B = {B}, got {groups!r}")
        index = torch.arange(B, device=rewards.device) // groups
    if validate and (present & ~rewards.isfinite()).any():
        at = int((present & ~rewards.isfinite()).nonzero()[0, 0])
        raise ValueError(f"{name}: expected finite numbers, got {rewards[at]} at index {at}")
    return rewards.double(), _Groups(index, present.double())
