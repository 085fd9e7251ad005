"""Held-out evaluation, greedy or sampled; the training's randomness is not disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from grpo_core.monitor import means
from grpo_core.rewards import Reward
from grpo_core.rollout import Problem, Sampling, rollout


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
) -> Evaluation:
    """Answers every problem once.

    Args:
        model: the policy.
        problems: held-out problems; each tag gets its own line for every figure.
        reward: what it scores by; its parts become the figures.
        sampling: temperature 0 for greedy answers.
        seed: of the sampler; the global generator is left as it was found.

    Returns:
        The completions, and means by name: "reward", each part ("accuracy"), each part by tag
        ("accuracy/trap"), "length" in tokens and "truncated" as a share.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn = rollout(model, [problem.prompt for problem in problems], sampling)
    completions = drawn.completions()
    scores = reward(problems, completions)

    metrics = {"reward": scores.total.mean().item(), **means(scores.parts)}
    for tag in sorted({problem.tag for problem in problems} - {""}):
        tagged = torch.tensor([problem.tag == tag for problem in problems])
        parts = {f"{name}/{tag}": part[tagged] for name, part in scores.parts.items()}
        metrics |= means(parts)
    metrics["length"] = drawn.completion_mask.sum(1).float().mean().item()
    metrics["truncated"] = drawn.truncated.float().mean().item()
    return Evaluation(completions, metrics)
