"""Rewards of a group of completions -> advantage of each, relative to its group.

    A_i = (R_i − mean R) / (std R + ε)      (GRPO)
    A_i = R_i − mean R                      (Dr. GRPO)

Source: DeepSeekMath (arXiv 2402.03300, sec. 4.1.2); without the divisor: Dr. GRPO (2503.20783).
The papers leave the estimator of std open; the defaults here are TRL's: n − 1 and ε = 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.objective.estimators import Estimator, relative_advantages
from grpo_core.objective.validation import (
    check_concrete,
    check_floats,
    check_ids,
    is_int,
    is_number,
    must_validate,
)


@dataclass(frozen=True)
class GroupNorm:
    """How rewards are made relative to their group.

    Args:
        scale: divide by the group's standard deviation.
        ddof: degrees of freedom taken off in the standard deviation, 0 or 1.
        epsilon: added to the standard deviation, in units of reward.
    """

    scale: bool = True
    ddof: int = 1
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.scale, bool):
            raise ValueError(f"scale: expected True or False, got {self.scale!r}")
        if not is_int(self.ddof) or self.ddof not in (0, 1):
            raise ValueError(f"ddof: expected 0 or 1, got {self.ddof!r}")
        if not is_number(self.epsilon) or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon: expected a finite number >= 0, got {self.epsilon!r}")


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
    """Advantage of every completion relative to the others of its prompt.

    Groups of equal rewards, and groups of one, get exactly 0; a constant added to the rewards
    changes nothing.

    Args:
        rewards: [B], the completions of one prompt next to each other.
        group_size: G, completions per prompt; divides B.
        scale, ddof, epsilon: see `GroupNorm`.
        backend: "triton", "torch", or None for triton on a GPU and torch elsewhere.
        validate: look for NaN and infinity among the rewards; None means on the CPU only, since
            on a GPU the host would have to wait for the answer.

    Returns:
        [B] float32.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: DeepSeekMath (arXiv 2402.03300, sec. 4.1.2).
    """
    norm = GroupNorm(scale, ddof, epsilon)
    advantage = estimate_advantages(
        rewards, norm, group_size, None, backend=backend, validate=validate
    )
    return advantage.float()


def estimate_advantages(
    rewards: Tensor,
    norm: GroupNorm | Estimator,
    group_size: int | None,
    group_id: Tensor | None,
    *,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Advantages as an objective wants them: neighbours by kernel, all else by `estimators`.

    Rewards of float64 are all else, too: they may be of any size.

    Args:
        rewards: [B] floating point.
        norm: the objective's `advantage`.
        group_size: completions per prompt, neighbours in `rewards`; or instead
        group_id: [B] integers in [0, B), groups of any size in any order.
        backend, validate: as in `group_advantages`.

    Returns:
        [B] float32, or float64 for float64 rewards.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    B = check_rewards(rewards, validate)
    kernels = choose_backend(backend, rewards)
    groups: int | Tensor
    known: Tensor | None = None
    if group_id is None:
        if not is_int(group_size) or group_size < 1 or B % group_size:
            raise ValueError(
                f"group_size: expected an int that divides B = {B}, or group_id, got {group_size!r}"
            )
        groups = group_size
        kernel = getattr(kernels, "group_norm", None)
        if kernel and isinstance(norm, GroupNorm) and rewards.dtype != torch.float64:
            advantage: Tensor = kernel(rewards.detach().contiguous(), group_size, **vars(norm))
            return advantage
    elif group_size is not None:
        raise ValueError("group_size: expected exactly one of it and group_id, got both")
    else:
        groups, known = check_ids("group_id", group_id, "B", B, rewards, validate)
    if isinstance(norm, GroupNorm):
        norm = Estimator("group", "group" if norm.scale else None, norm.ddof, norm.epsilon)
    return relative_advantages(rewards.detach(), groups, norm, mask=known, validate=validate)


def check_rewards(rewards: Tensor, validate: bool | None) -> int:
    """B, once `rewards` is [B] of finite numbers.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    check_concrete(rewards=rewards)
    if check_floats("rewards", rewards).ndim != 1:
        got = f"{list(rewards.shape)} {rewards.dtype}"
        raise ValueError(f"rewards: expected a floating-point tensor [B], got {got}")
    if must_validate(validate, rewards) and not torch.isfinite(rewards).all():
        bad = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise ValueError(f"rewards: expected finite numbers, got {rewards[bad]} at index {bad}")
    return rewards.numel()
