"""Held-out evaluation, greedy or sampled; the training's randomness is not disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from grpo_core.distributed import gathered, joined, rank, world
from grpo_core.monitor import means
from grpo_core.rewards import Reward
from grpo_core.rollout import Problem, Rollout, Sampling, rollout

Draw = Callable[[Sequence[Sequence[int]], Sampling], Rollout]


@dataclass(frozen=True)
class Evaluation:
    """Completions of held-out problems and their mean figures."""

    completions: list[list[int]]
    metrics: dict[str, float]


def evaluate(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    reward: Reward,
    sampling: Sampling,
    *,
    seed: int = 0,
    draw: Draw | None = None,
) -> Evaluation:
    """Answers every problem once; several processes share them, and all get the whole figures.

    Args:
        model: the policy.
        problems: held-out problems; each tag gets its own line for every figure.
        reward: what it scores by; its parts become the figures.
        sampling: temperature 0 for greedy answers.
        seed: of the sampler; the global generator is left as it was found.
        draw: writes the completions in the place of the model, see `rollouts`.

    Returns:
        The completions, and means by name: "reward", each part ("accuracy"), each part by tag
        ("accuracy/trap"), "length" in tokens and "truncated" as a share.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank())
        mine = _equal_share(problems)
        prompts = [problem.prompt for problem in mine]
        drawn = draw(prompts, sampling) if draw else rollout(model, prompts, sampling)
    scores = reward(mine, drawn.completions())
    count = len(problems)
    completions = [ids for theirs in gathered(drawn.completions()) for ids in theirs][:count]
    rewards = {name: joined(part)[:count] for name, part in scores.parts.items()}

    metrics = {"reward": joined(scores.total)[:count].mean().item(), **means(rewards)}
    for tag in sorted({problem.tag for problem in problems} - {""}):
        tagged = torch.tensor([problem.tag == tag for problem in problems])
        parts = {f"{name}/{tag}": part[tagged] for name, part in rewards.items()}
        metrics |= means(parts)
    metrics["length"] = joined(drawn.completion_mask.sum(1))[:count].float().mean().item()
    metrics["truncated"] = joined(drawn.truncated)[:count].float().mean().item()
    return Evaluation(completions, metrics)


def _equal_share(problems: Sequence[Problem]) -> list[Problem]:
    """This process's, as many as any other's; the last ones begin again at the first problem."""
    each = -(-len(problems) // world())
    return [problems[n % len(problems)] for n in range(rank() * each, (rank() + 1) * each)]
