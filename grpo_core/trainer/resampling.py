"""What a step learns from: groups of completions, those that teach nothing left out or replaced.

A completion to which no reward applies (its reward is NaN) leaves the batch and its group. A group
whose rewards are all equal has no advantage. In the batch it pulls the mean towards 0, and the more
so the more of the problems are solved or hopeless. `TrainerConfig.dynamic_sampling`:

| value      | such groups                                                                     |
|------------|---------------------------------------------------------------------------------|
| "off"      | stay; with a KL or an entropy term they have a gradient                         |
| "filter"   | leave: no term of theirs is in a loss, and none is counted in a mean            |
| "resample" | leave, and further prompts are drawn, as many as at first, until there are      |
|            | `prompts_per_step` others or `max_resamples` further rounds are done            |

Over several processes each fills its own share; all draw another round as long as one of them has
too few, so that they stay in step. What is left over is thrown away, and where groups are missing
in the end, the batch is smaller. What a step reports of its completions is of all it has drawn.

What a round draws depends on seed, step and round alone, so a run that goes on from a checkpoint
draws the same.

Source: dynamic sampling of DAPO (arXiv 2503.14476, section 3.2, equation 11), which asks for a
share of right answers between 0 and 1; here it is a variance of the whole reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_core.objective.advantage import estimate_advantages
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.clock import Clock
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.distributed import gathered, joined, rank, world
from grpo_core.trainer.monitor import Metrics, means, rollout_metrics, varied
from grpo_core.trainer.randomness import randomness, shuffled
from grpo_core.trainer.rewards import Scores, score
from grpo_core.trainer.rollout import Problem, Rollout, special_tokens
from grpo_core.trainer.rollout_tensors import end_to_end
from grpo_core.trainer.shares import own_share

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


# problems, the ids of a completion of each, and what they earned
Answered = tuple[list[Problem], list[list[int]], Scores]


@dataclass(frozen=True)
class Collected:
    """S completions of this process, those of a group side by side."""

    drawn: Rollout
    rewards: Tensor  # [S] float32
    order: Tensor  # [S] int64, in which they are dealt out to minibatches
    figures: Metrics  # of all completions that were drawn for them, by all processes
    answered: Answered  # this process's part of the first round


@dataclass(frozen=True)
class _Round:
    """Completions, the rewards that are learnt from, all that they scored, and an order."""

    asked: list[Problem]
    drawn: Rollout
    rewards: Tensor
    scores: Scores
    order: Tensor


def collect(trainer: Trainer, clock: Clock) -> Collected:
    """The completions of a step.

    Raises:
        RuntimeError: an engine has not written them with the weights of now.
    """
    config = trainer.config
    rounds = [_draw(trainer, 0, clock)]
    if config.dynamic_sampling == "resample":
        while len(rounds) <= config.max_resamples and _missing(rounds, config):
            rounds.append(_draw(trainer, len(rounds), clock))
    pad = special_tokens(trainer.model)[0]
    drawn = end_to_end([each.drawn for each in rounds], pad) if len(rounds) > 1 else rounds[0].drawn
    rewards = torch.cat([each.rewards for each in rounds])
    names = rounds[0].scores.parts
    parts = {name: torch.cat([each.scores.parts[name] for each in rounds]) for name in names}
    figures = {
        **rollout_metrics(drawn, joined(rewards), config.group_size),
        **means({name: joined(part) for name, part in parts.items()}),
    }
    if config.dynamic_sampling != "off":
        kept = sum(gathered(min(_varied_groups(rounds, config), _own_groups(config))))
        figures |= {"groups_drawn": len(rounds) * config.prompts_per_step, "groups_kept": kept}
    if config.dynamic_sampling == "resample":
        missing = config.prompts_per_step - kept
        figures |= {"resamples": len(rounds) - 1, "groups_missing": missing}
    if len(rounds) > 1:
        chosen = _chosen(rewards, config)
        drawn, rewards = drawn.select(chosen.to(trainer.model.device)), rewards[chosen]
    first, rewards = rounds[0], rewards.to(trainer.model.device)
    answered = first.asked, first.drawn.completions(), first.scores
    return Collected(drawn, rewards, first.order, figures, answered)


def _draw(trainer: Trainer, again: int, clock: Clock) -> _Round:
    """One round: this process's share of the prompts, answered and scored."""
    config, device = trainer.config, trainer.model.device
    with (
        clock.phase("rollout"),
        randomness(config.seed, trainer.steps_done, device, rank(), again) as rng,
    ):
        problems = trainer.draw_problems(config.prompts_per_step, rng)
        problems = problems[own_share(len(problems))]
        asked = [problem for problem in problems for _ in range(config.group_size)]
        drawn = trainer.draw([problem.prompt for problem in asked], config.sampling)
        order = torch.randperm(len(asked)).to(device)
    where = f"step {trainer.steps_done + 1}"
    scores = score(trainer.reward, asked, drawn.completions(), where)
    rewards = shuffled(scores.total, rng) if config.shuffle_rewards else scores.total
    return _Round(asked, drawn, rewards, scores, order)


def batch_advantages(rewards: Tensor, config: TrainerConfig) -> Tensor:
    """[S] float32 advantages of all processes' rewards [S]; 0 for those that leave the batch."""
    estimator, kept = config.objective.advantage, _staying(rewards, config)
    if kept.all():
        return estimate_advantages(rewards, estimator, config.group_size, None)
    advantage = torch.zeros_like(rewards)
    if kept.any():
        groups = torch.arange(len(rewards), device=rewards.device)[kept] // config.group_size
        group_id = groups.unique(return_inverse=True)[1]
        found = estimate_advantages(rewards[kept], estimator, None, group_id)
        advantage[kept] = found.to(advantage.dtype)
    return advantage


def _staying(rewards: Tensor, config: TrainerConfig) -> Tensor:
    """[S] bool: the completions that are learnt from."""
    scored = ~rewards.isnan()
    if config.dynamic_sampling == "off":
        return scored
    return scored & varied(rewards, config.group_size)


def dealt_out(packed: Batch, rewards: Tensor, order: Tensor, config: TrainerConfig) -> list[Batch]:
    """As many minibatches as asked for, of the sequences that stay.

    A minibatch that none is left for has a filler, for the forward that other processes wait in.

    Args:
        packed: S sequences.
        rewards: [S] float32.
        order: [S] int64, in which they are dealt out.
        config: the run.
    """
    stays = _staying(rewards, config)
    hands = order[stays[order]].tensor_split(config.minibatches)
    if config.dynamic_sampling == "off":
        # as many as on every other process, whatever was scored here
        hands = tuple(hand[stays[hand]] for hand in order.chunk(config.minibatches))
    return [packed.select(hand) if len(hand) else packed.filler() for hand in hands]


def _own_groups(config: TrainerConfig) -> int:
    """How many a process learns from."""
    return config.prompts_per_step // world()


def _varied_groups(rounds: list[_Round], config: TrainerConfig) -> int:
    """How many of this process have rewards that differ."""
    rewards = torch.cat([each.rewards for each in rounds])
    return int(varied(rewards, config.group_size).sum()) // config.group_size


def _missing(rounds: list[_Round], config: TrainerConfig) -> bool:
    """Whether a process has too few."""
    return min(gathered(_varied_groups(rounds, config))) < _own_groups(config)


def _chosen(rewards: Tensor, config: TrainerConfig) -> Tensor:
    """Indices of a step's completions: the first groups that vary, then others to fill up."""
    stays = varied(rewards, config.group_size)
    indices = torch.arange(len(rewards))
    ranked = torch.cat([indices[stays], indices[~stays]])
    return ranked[: _own_groups(config) * config.group_size]
