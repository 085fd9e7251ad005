"""Means and standard deviations of rewards over their groups, or over the batch.

Computed in float64, where the order of atomic additions on a GPU changes no float32 result. Nothing
synchronises with the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.objective.validation import check_finite, check_ids, check_mask, check_vector, is_int


@dataclass(frozen=True)
class Groups:
    """The group of each of B numbers, and its weight there."""

    index: Tensor  # [B] int64 in [0, B)
    weight: Tensor  # [B] float64, 0 for a number that does not count

    def merge(self, tokens: Tensor | None) -> Groups:
        """One group of all; a number weighs 1, or its number of tokens."""
        weight = self.weight
        if tokens is not None:
            check_mask("tokens", tokens, tuple(weight.shape), device=weight.device)
            weight = weight * tokens.double()
        return Groups(torch.zeros_like(self.index), weight)

    def sum(self, values: Tensor) -> Tensor:
        """Weighted sum over the group of each: [B]."""
        zeros = torch.zeros_like(self.weight)
        return zeros.scatter_add(0, self.index, self.weight * values)[self.index]

    def size(self) -> Tensor:
        """Sum of the weights in the group of each: [B]."""
        return self.sum(torch.ones_like(self.weight))

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean over the group of each: [B], NaN where none counts."""
        return self.sum(torch.where(self.weight > 0, values, 0.0)) / self.size()

    def largest(self, values: Tensor) -> Tensor:
        """The largest value in the group of each: [B], −inf where none counts."""
        values = torch.where(self.weight > 0, values, -math.inf)
        lowest = torch.full_like(values, -math.inf)
        return lowest.scatter_reduce(0, self.index, values, "amax")[self.index]

    def centre(self, values: Tensor) -> Tensor:
        """Each less the mean of its group: [B], exactly 0 where all of a group are equal."""
        present = self.weight > 0
        # relative to the largest of the group, so that equal values leave no rounding error
        values = torch.where(present, values - self.largest(values), 0.0)
        return torch.where(present, values - self.sum(values) / self.size(), 0.0)

    def scale(self, values: Tensor, centred: Tensor, ddof: int, epsilon: float) -> Tensor:
        """values / (std + ε) with the std of `centred`; 0 where the std is 0, even for ε = 0."""
        freedom = (self.size() - ddof).clamp(min=1)
        # in units of the largest, whose square neither overflows nor underflows
        unit = self.largest(centred.abs())
        unit = torch.where(unit > 0, unit, 1.0)
        std = (self.sum((centred / unit).square()) / freedom).sqrt()
        scaled = (values / unit) / (std + epsilon / unit)
        return torch.where(std == 0, 0.0, scaled)


def read_rewards(
    name: str, rewards: Tensor, groups: int | Tensor, mask: Tensor | None, validate: bool | None
) -> tuple[Tensor, Groups]:
    """(rewards [B] float64, not masked, their groups), checked."""
    B = len(check_vector(name, rewards))
    present = torch.ones_like(rewards, dtype=torch.bool)
    if mask is not None:
        present = check_mask("mask", mask, (B,), device=rewards.device) != 0
    if isinstance(groups, Tensor):
        index, inside = check_ids("groups", groups, "B", B, rewards, validate)
        present = present & inside
    elif not is_int(groups) or groups < 1 or B % groups:
        raise ValueError(f"groups: expected ids or a divisor of B = {B}, got {groups!r}")
    else:
        index = torch.arange(B, device=rewards.device) // groups
    check_finite(name, rewards, present, validate)
    return rewards.double(), Groups(index, present.double())


@torch.no_grad()
def equal_reward_groups(rewards: Tensor, groups: int | Tensor) -> tuple[Tensor, Tensor]:
    """(number of groups whose rewards are all equal, number of groups), 0-dim int64.

    Args:
        rewards: [B] floating point.
        groups: as in `relative_advantages`, where they are checked.
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
