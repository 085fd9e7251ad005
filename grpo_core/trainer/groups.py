"""Groups of completions: random numbers of a step, dynamic sampling, advantages, minibatches.

A completion whose reward is NaN (no reward applies) leaves the batch and its group. A group whose
rewards are all equal has no advantage; in the batch it only shrinks the mean. Such groups are
treated as `TrainerConfig.dynamic_sampling` says: "off" keeps them, so that a KL or entropy term
still has a gradient; "filter" removes them from the losses and from their divisors; "resample" also
draws further rounds of prompts until `prompts_per_step` groups have different rewards.

Every rank fills its own part of the batch, and all ranks draw another round while one of them has
too few groups. Surplus groups are dropped; if groups are missing in the end, the batch is smaller.
Metrics of completions cover all that were drawn.

Source: dynamic sampling of DAPO (arXiv 2503.14476, section 3.2, equation 11), which requires a
share of correct answers between 0 and 1; here the whole reward must vary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_core.objective.advantage import estimate_advantages
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.distributed import all_gather_cat, all_gather_object, world
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.rewards import Scores, mean_scores
from grpo_core.trainer.rollout import Problem, Rollout, concat_rollouts


@contextmanager
def randomness(
    seed: int, step: int, device: torch.device, rank: int = 0, part: str = ""
) -> Iterator[random.Random]:
    """Seeds the random numbers of one part of a step, which depend on the arguments alone.

    Yields a generator that is equal on every rank. Torch's global generator is seeded differently
    on every rank, and restored at the end.
    """
    name = f"{seed}/{step}/{part}" if part else f"{seed}/{step}"
    rng = random.Random(name)
    torch_seed = rng.getrandbits(63)
    if rank:
        torch_seed = random.Random(f"{name}/{rank}").getrandbits(63)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch_seed)
        yield rng


@dataclass(frozen=True)
class Round:
    """S completions of this rank, group by group, and their rewards."""

    problems: list[Problem]  # S
    rollout: Rollout
    scores: Scores
    rewards: Tensor  # [S] float32, CPU: the total scores, or a permutation of them
    order: Tensor  # [S] int64: the random order in which minibatches take sequences


def staleness(rounds: Sequence[Round], step: int) -> float:
    """Steps that the weights after `step` steps are newer than those that sampled; the mean."""
    versions = [each.rollout.weight_version for each in rounds]
    return sum(0 if version is None else step - version for version in versions) / len(rounds)


def needs_more(rounds: Sequence[Round], config: TrainerConfig) -> bool:
    """Whether dynamic sampling draws another round."""
    if config.dynamic_sampling != "resample" or len(rounds) > config.max_resamples:
        return False
    rewards = torch.cat([each.rewards for each in rounds])
    return _kept_groups(rewards, config) < config.prompts_per_step


def merge_rounds(rounds: Sequence[Round], config: TrainerConfig, pad: int) -> tuple[Round, Metrics]:
    """The completions to train on, and the metrics of all completions of all ranks."""
    first, size = rounds[0], config.group_size
    rollout = concat_rollouts([each.rollout for each in rounds], pad)
    rewards = torch.cat([each.rewards for each in rounds])
    of_all = all_gather_cat(rewards)
    metrics: Metrics = {
        "reward": of_all.nanmean().item(),
        **{n: all_gather_cat(v).float().mean().item() for n, v in rollout.counts().items()},
    }
    if config.needs_rewards:
        # share of groups with equal rewards
        metrics["zero_std"] = (~in_varied_group(of_all, size)).float().mean().item()
    if unscored := int(of_all.isnan().sum()):
        metrics["unscored"] = unscored
    for name in first.scores.parts:
        part = all_gather_cat(torch.cat([each.scores.parts[name] for each in rounds]))
        metrics |= mean_scores({name: part})
    if config.dynamic_sampling != "off":
        kept = _kept_groups(rewards, config)
        metrics |= {"groups_drawn": len(rounds) * config.prompts_per_step, "groups_kept": kept}
        if config.dynamic_sampling == "resample":
            missing = config.prompts_per_step - kept
            metrics |= {"resamples": len(rounds) - 1, "groups_missing": missing}
    if len(rounds) > 1:
        # groups with different rewards first, the others fill up
        is_varied = in_varied_group(rewards, size)
        chosen = (~is_varied).long().argsort(stable=True)[: len(first.rewards)]
        rollout, rewards = rollout.select(chosen.to(rollout.prompt.device)), rewards[chosen]
    return replace(first, rollout=rollout, rewards=rewards), metrics


def _kept_groups(rewards: Tensor, config: TrainerConfig) -> int:
    """Groups with different rewards of all ranks, each at most the rank's part of a batch."""
    varied = int(in_varied_group(rewards, config.group_size).sum()) // config.group_size
    return sum(all_gather_object(min(varied, config.prompts_per_step // world())))


def group_advantages(rewards: Tensor, config: TrainerConfig) -> Tensor:
    """Advantages [S] float32 from the rewards [S] of all ranks; 0 for removed sequences."""
    estimator, kept = config.objective.advantage, _is_kept(rewards, config)
    if kept.all():
        return estimate_advantages(rewards, estimator, config.group_size, None)
    advantage = torch.zeros_like(rewards)
    if kept.any():
        groups = torch.arange(len(rewards), device=rewards.device)[kept] // config.group_size
        group_id = groups.unique(return_inverse=True)[1]
        estimated = estimate_advantages(rewards[kept], estimator, None, group_id)
        advantage[kept] = estimated.to(advantage.dtype)
    return advantage


def split_minibatches(
    packed: Batch, rewards: Tensor, order: Tensor, config: TrainerConfig
) -> list[Batch]:
    """Splits the kept of S sequences, in this order, into minibatches; an empty one is a filler.

    For prompt_mean minibatches take whole groups, in the order of their first sequences.
    """
    kept, size = _is_kept(rewards, config), 1
    if config.objective.aggregation == "prompt_mean":
        size, group = config.group_size, packed.rows.sequence // config.group_size
        counts = torch.bincount(group[kept[packed.rows.sequence]], minlength=len(kept))
        packed = replace(packed, group_rows=counts[group])
    units = order[order % size == 0] // size
    if config.dynamic_sampling == "off":
        # split first: every rank then has the same sizes, whichever rewards are NaN
        split = units.chunk(config.minibatches)
    else:
        split = units[kept.view(-1, size).any(1)[units]].tensor_split(config.minibatches)
    members = torch.arange(size, device=order.device)
    parts = [(part[:, None] * size + members).flatten() for part in split]
    parts = [part[kept[part]] for part in parts]
    return [packed.select(part) if len(part) else packed.filler() for part in parts]


def in_varied_group(rewards: Tensor, group_size: int) -> Tensor:
    """[S] bool: whether the rewards of a completion's group, apart from NaN, differ."""
    groups = rewards.view(-1, group_size)
    missing = groups.isnan()
    highest, lowest = (groups.masked_fill(missing, value) for value in (-math.inf, math.inf))
    return (highest.amax(1) > lowest.amin(1)).repeat_interleave(group_size)


def _is_kept(rewards: Tensor, config: TrainerConfig) -> Tensor:
    """[S] bool: whether a completion is trained on."""
    has_reward = ~rewards.isnan()
    if config.dynamic_sampling == "off":
        return has_reward
    return has_reward & in_varied_group(rewards, config.group_size)
