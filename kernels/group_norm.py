"""Group-normalised advantages on the device: one program per prompt, rewards stay where they are.

    A_i = (R_i − mean R) / (std R + ε) over the G completions of a prompt, or without the divisor.

Rewards are counted from the largest of their group, so that a group of equal rewards gives exactly
0 and adding a constant to the rewards changes nothing. A deviation is that of distances in units of
the largest, whose squares neither overflow nor vanish.
"""

import torch

from .language import tl, triton
from .launch import launch, unspecialized


@unspecialized
def _group_norm_kernel(
    rewards_ptr,
    advantage_ptr,
    G,
    freedom,
    epsilon,
    SCALE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, BLOCK_G)
    inside = member < G
    rewards = tl.load(rewards_ptr + group * G + member, mask=inside, other=float("-inf"))
    # a quarter, so that the distance of two float32 is one
    rewards = rewards.to(tl.float32) * 0.25
    centred = tl.where(inside, rewards - tl.max(rewards, 0), 0.0)
    if SCALE:
        unit = -tl.min(centred, 0)
        unit = tl.where(unit > 0, unit, 1.0)
        centred = centred / unit
    centred = tl.where(inside, centred - tl.sum(centred, 0) / G, 0.0)
    if SCALE:
        divisor = tl.sqrt(tl.sum(centred * centred, 0) / freedom) + epsilon * 0.25 / unit
        # equal rewards have no deviation, and epsilon may be 0
        advantage = centred / tl.where(divisor > 0, divisor, 1.0)
    else:
        advantage = centred * 4
    tl.store(advantage_ptr + group * G + member, advantage, mask=inside)


def group_norm(
    rewards: torch.Tensor, group_size: int, *, scale: bool, ddof: int, epsilon: float
) -> torch.Tensor:
    """Advantage of every completion within its group of `group_size` neighbours.

    Args:
        rewards: [B] float32 or narrower, contiguous, B a multiple of `group_size`.
        scale: divide by the standard deviation (`ddof` degrees of freedom taken off) + `epsilon`.

    Returns:
        [B] float32; 0 for groups of equal rewards and for groups of one.
    """
    advantage = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    launch(
        _group_norm_kernel,
        rewards.numel() // group_size,
        on=rewards,
        rewards_ptr=rewards,
        advantage_ptr=advantage,
        G=group_size,
        freedom=max(group_size - ddof, 1),
        epsilon=epsilon,
        SCALE=scale,
        BLOCK_G=triton.next_power_of_2(group_size),
    )
    return advantage
