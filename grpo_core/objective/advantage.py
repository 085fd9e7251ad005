"""Rewards to advantages: each completion compared with others, by a baseline and a scale.

    A_i = (R_i − baseline_i) / (std + ε)

| method                            | baseline      | scale   | the std is that of            |
|-----------------------------------|---------------|---------|-------------------------------|
| GRPO, arXiv 2402.03300            | group         | group   | the rewards of the group      |
| Dr. GRPO, 2503.20783              | group         | None    |                               |
| RLOO, 2402.14740                  | leave_one_out | None    |                               |
| "Tricks or Traps", 2508.08221     | group         | batch   | all rewards                   |
| REINFORCE++ baseline, 2501.03262  | group         | centred | all R_i − baseline_i          |
| REINFORCE++, 2501.03262           | batch         | batch   | all rewards                   |
| MaxRL, 2602.02710                 | group         | mean    | none: the divisor is the mean R   |
| ScaleRL, 2510.13786               | group         | centred | all R_i − baseline_i              |
| GDPO, 2601.05242                  | `decoupled_advantages`: GRPO per reward function, summed  |

"batch" means all rewards of one call: under data parallelism, gather the rewards first. Advantages
per token (PPO) are in `value`. Scale "mean" is for rewards >= 0; a mean <= 0 gives 0.

Cases that the papers do not define: a group of one, a group of equal rewards and a masked
completion get exactly 0, and a masked completion counts in no mean. Compared with the frameworks:

- TRL 1.16: the same numbers by default (ddof 1, ε = 1e-4). A completion that no function could
  score is NaN there and `mask` here. RLOO with normalize_advantages is leave_one_out with centred.
- verl 0.9.1: ddof 1, ε = 1e-6. A group of one keeps its raw reward as advantage there (grpo, rloo,
  reinforce_plus_plus_baseline; 0 in rloo_vectorized). Batch statistics are over tokens there, with
  1e-8 added to the variance: give `tokens`; ε = 0 is within 5e-7 of it for std >= 0.1.

Computed in float64 by `groups`; equal groups of neighbours go to a float32 kernel where the backend
has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.objective.groups import Groups, read_rewards
from grpo_core.objective.validation import (
    check_choice,
    check_concrete,
    check_finite,
    check_floats,
    check_ids,
    check_mask,
    check_number,
    check_type,
    check_vector,
    is_int,
)

Baseline = Literal["group", "leave_one_out", "batch"]
Scale = Literal["group", "batch", "centred", "mean"]


@dataclass(frozen=True)
class Estimator:
    """Baseline and scale of an advantage, see the table above.

    Args:
        baseline: the mean of the group, of the others in the group, or of the batch.
        scale: the standard deviation to divide by, "mean" for the mean reward, or None.
        ddof: degrees of freedom subtracted in it, 0 or 1.
        epsilon: added to it, in units of reward.
    """

    baseline: Baseline = "group"
    scale: Scale | None = "group"
    ddof: int = 1
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, get_args(Baseline))
        check_choice("scale", self.scale, (*get_args(Scale), None))
        if not is_int(self.ddof) or self.ddof not in (0, 1):
            raise ValueError(f"ddof: expected 0 or 1, got {self.ddof!r}")
        check_number("a finite number >= 0", epsilon=self.epsilon)


GROUP_MEAN_STD = Estimator()


def GroupNorm(scale: bool = True, ddof: int = 1, epsilon: float = 1e-4) -> Estimator:
    """The estimator of GRPO, or of Dr. GRPO with `scale=False`; others as in `Estimator`."""
    check_type("scale", scale, bool)
    return Estimator("group", "group" if scale else None, ddof, epsilon)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: bool = True,
    ddof: int = 1,
    epsilon: float = 1e-4,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Advantage of every completion relative to its group.

    Groups of equal rewards, and groups of one, get exactly 0. A constant added to the rewards
    changes nothing.

    Args:
        rewards: [B], the completions of one prompt next to each other.
        group_size: G, completions per prompt; divides B.
        scale, ddof, epsilon: see `GroupNorm`.
        backend: as in `fused_loss`.
        validate: check for NaN and infinity; None means on the CPU only.

    Returns:
        [B] float32.
    """
    norm = GroupNorm(scale, ddof, epsilon)
    return estimate_advantages(
        rewards, norm, group_size, None, backend=backend, validate=validate
    ).float()


def estimate_advantages(
    rewards: Tensor,
    norm: Estimator,
    group_size: int | None,
    group_id: Tensor | None,
    *,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Advantages for an objective: by a kernel where one serves, else by `relative_advantages`.

    Args:
        rewards: [B] floating point.
        norm: the objective's `advantage`.
        group_size: completions per prompt, neighbours in `rewards`; or instead
        group_id: [B] integers in [0, B), groups of any size in any order.
        backend, validate: as in `group_advantages`.

    Returns:
        [B] float32, or float64 for float64 rewards.
    """
    check_concrete(rewards=rewards)
    B = len(check_vector("rewards", rewards))
    if group_id is not None:
        if group_size is not None:
            raise ValueError("group_size: expected exactly one of it and group_id, got both")
        ids, inside = check_ids("group_id", group_id, "B", B, rewards, validate)
        return relative_advantages(rewards.detach(), ids, norm, mask=inside, validate=validate)
    if not is_int(group_size) or group_size < 1 or B % group_size:
        raise ValueError(
            f"group_size: expected an int that divides B = {B}, or group_id, got {group_size!r}"
        )
    kernel = getattr(choose_backend(backend, rewards), "group_norm", None)
    within_groups = norm.baseline == "group" and norm.scale in ("group", None)
    # float64 rewards may exceed the range of float32
    if kernel is None or not within_groups or rewards.dtype == torch.float64:
        return relative_advantages(rewards.detach(), group_size, norm, validate=validate)
    check_finite("rewards", rewards, torch.ones_like(rewards, dtype=torch.bool), validate)
    values, scaled = rewards.detach().contiguous(), norm.scale is not None
    return kernel(values, group_size, scale=scaled, ddof=norm.ddof, epsilon=norm.epsilon)  # type: ignore[no-any-return]


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
    """A_i = (R_i − baseline_i) / (std + ε); without synchronising with the device.

    Args:
        rewards: [B] floating point, one per completion.
        groups: completions per prompt, neighbours in `rewards`, a divisor of B; or [B] integer ids
            in [0, B), in any order, groups of any size.
        estimator: baseline and scale.
        tokens: [B], the length of each completion: batch statistics are then over tokens. With
            scale "centred" the mean over tokens is subtracted as well, and a group of equal
            rewards is then not 0.
        mask: [B], 0 for completions that do not count, whatever their reward; None means all do.
        validate: check for NaN, infinity and wrong ids; None means on the CPU only. Unchecked, a
            NaN spreads over its group (or batch), and a completion with a wrong id is masked.

    Returns:
        [B] float32, or float64 for float64 rewards.
    """
    values, group = read_rewards("rewards", rewards, groups, mask, validate)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return _advantages(values, group, tokens, estimator).to(dtype)


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
    """A_i = Z_i / (std Z + ε), Z_i = Σ_f w_f·A_if: every reward function is normalised alone.

    Args:
        rewards: [B, F] floating point, one column per reward function.
        weights: [F], None means 1 each.
        estimator: of every A_f; its ddof and epsilon also apply to std Z.
        mask: [B], 0 for completions that do not count; or [B, F], 0 where a function gave no
            score: A_if is then 0, and a completion without any score does not count.
        groups, tokens, validate: as in `relative_advantages`.

    Returns:
        [B] float32, or float64 for float64 rewards.

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
        name = f"rewards[:, {f}]"
        values, group = read_rewards(name, rewards[:, f], groups, scored[f], validate)
        total += weights[f].double() * _advantages(values, group, tokens, estimator)
    _, group = read_rewards("rewards", total, groups, mask, validate)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return _scale_by_batch(total, group, tokens, estimator).to(dtype)


def _advantages(
    values: Tensor, group: Groups, tokens: Tensor | None, estimator: Estimator
) -> Tensor:
    """[B] float64, 0 where a reward does not count."""
    batch = group.merge(tokens)
    centred = (batch if estimator.baseline == "batch" else group).centre(values)
    if estimator.baseline == "leave_one_out":
        # R_i − Σ_{j≠i} R_j / (n − 1) = (R_i − mean R)·n / (n − 1)
        size = group.size()
        centred = centred * size / (size - 1).clamp(min=1)
    if estimator.scale == "group":
        return group.scale(centred, group.centre(values), estimator.ddof, estimator.epsilon)
    if estimator.scale == "batch":
        return batch.scale(centred, batch.centre(values), estimator.ddof, estimator.epsilon)
    if estimator.scale == "mean":
        mean = (batch if estimator.baseline == "batch" else group).mean(values)
        return torch.where(mean > 0, centred / (mean + estimator.epsilon), 0.0)
    if estimator.scale == "centred":
        return _scale_by_batch(centred, group, tokens, estimator)
    return centred


def _scale_by_batch(
    centred: Tensor, group: Groups, tokens: Tensor | None, estimator: Estimator
) -> Tensor:
    """Values of mean 0 over their std in the batch; over tokens, their mean is subtracted first."""
    batch = group.merge(tokens)
    if tokens is not None:
        centred = batch.centre(centred)
    return batch.scale(centred, centred, estimator.ddof, estimator.epsilon)
