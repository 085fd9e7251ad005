"""Evaluation on held-out problems, greedy or sampled; torch's global generator is restored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import all_gather_cat, all_gather_object, rank, world
from grpo_core.trainer.environment import Draw, Episodes, complete
from grpo_core.trainer.rewards import Reward, Scores, mean_scores, score
from grpo_core.trainer.rollout import Problem, Sampling, rollout


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        completions: the first completion of each problem.
        scores: of these completions.
        metrics: means over all completions.
    """

    completions: list[list[int]]
    scores: Scores = field(compare=False)
    metrics: dict[str, float]


def evaluate(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    reward: Reward,
    sampling: Sampling,
    *,
    samples: int = 1,
    k: Sequence[int] = (),
    seed: int = 0,
    draw: Draw | None = None,
    environment: Episodes | None = None,
) -> Evaluation:
    """Completes every problem; ranks share the problems, and all get the metrics of all.

    Args:
        model: the policy.
        problems: held-out problems; metrics are reported per tag as well.
        reward: scores the completions.
        sampling: temperature 0 for greedy completions.
        samples: completions per problem, drawn one after the other to bound memory.
        k: for pass@k, each at most `samples`; `samples` by default.
        seed: of the sampler.
        draw: samples the completions; None for the model itself.
        environment: answers their turns, see `environment`.

    Returns:
        The first completions, and means by name: "reward", each part ("accuracy"), each part by tag
        ("accuracy/trap"), "length" in tokens and "truncated" as a share, see `Rollout.counts`. With
        several samples also "accuracy/avg@8" and "accuracy/pass@8", see `pass_at`; a score of 1 is
        correct.

    Raises:
        ValueError: `samples` or `k` out of range, or several greedy completions.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    for each in k:
        if not 1 <= each <= samples:
            raise ValueError(f"k: expected 1 to {samples}, the samples, got {each}")
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"samples: expected 1 of greedy answers, got {samples}")
    local, count = _rank_problems(problems), len(problems)
    draw, where = draw or partial(rollout, model), "held-out problems"
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed + rank())
        drawn = [complete(model, draw, local, sampling, environment, where) for _ in range(samples)]
    completions = [each.completions() for each in drawn]
    first = [ids for of_rank in all_gather_object(completions[0]) for ids in of_rank][:count]
    scores = [
        score(reward, local, ids, where, each.earned)
        for ids, each in zip(completions, drawn, strict=True)
    ]

    def gather(vectors: Iterable[Tensor]) -> Tensor:
        """[samples, P] from a vector of this rank's problems for each sample."""
        return torch.stack([all_gather_cat(vector)[:count] for vector in vectors])

    total = gather(each.total for each in scores)
    parts = {name: gather(each.parts[name] for each in scores) for name in scores[0].parts}
    metrics = {"reward": total.nanmean().item()}
    for tag in ["", *sorted({problem.tag for problem in problems} - {""})]:
        of_tag = parts
        if tag:
            is_tagged = torch.tensor([problem.tag == tag for problem in problems])
            of_tag = {f"{name}/{tag}": part[:, is_tagged] for name, part in parts.items()}
        metrics |= mean_scores(of_tag)
        if samples > 1:
            metrics |= sampled_metrics(of_tag, k or (samples,))
    counts = [each.counts() for each in drawn]
    for name in counts[0]:
        metrics[name] = gather(each[name] for each in counts).float().mean().item()
    first_scores = Scores(total[0], {name: part[0] for name, part in parts.items()})
    return Evaluation(first, first_scores, metrics)


def sampled_metrics(parts: Mapping[str, Tensor], k: Sequence[int]) -> dict[str, float]:
    """avg@n and pass@k of each part [n, P] that applies to any problem; NaN where it does not."""
    metrics = {}
    for name, part in parts.items():
        applies = ~part.isnan()
        if not applies.any():
            continue
        metrics[f"{name}/avg@{len(part)}"] = part.nanmean().item()
        tries, correct = applies.sum(0).tolist(), (part >= 1).sum(0).tolist()
        for each in k:
            # problems with fewer than k scores cannot be used
            counts = [(n, c) for n, c in zip(tries, correct, strict=True) if n >= each]
            if counts:
                share = math.fsum(pass_at(each, n, c) for n, c in counts) / len(counts)
                metrics[f"{name}/pass@{each}"] = share
    return metrics


def pass_at(k: int, tries: int, correct: int) -> float:
    """Unbiased estimate of the probability that one of k completions is correct.

    1 − C(n − c, k) / C(n, k): the share of the choices of k from n tries, c of which are correct,
    with a correct one.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1
    (arXiv 2107.03374).
    """
    return 1 - math.comb(tries - correct, k) / math.comb(tries, k)


def _rank_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Equally many problems for every rank; the last ranks repeat the first problems."""
    each = -(-len(problems) // world())
    return [problems[n % len(problems)] for n in range(rank() * each, (rank() + 1) * each)]
