"""Held-out evaluation, greedy or sampled; the training's randomness is not disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import gathered, joined, rank, world
from grpo_core.trainer.monitor import means
from grpo_core.trainer.rewards import Reward, Scores, score
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, rollout

Draw = Callable[[Sequence[Sequence[int]], Sampling], Rollout]


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems answered, with mean figures.

    Attributes:
        completions: the first answer to each problem.
        scores: what these earned.
        metrics: means over all answers.
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
) -> Evaluation:
    """Answers every problem; several processes share them, and all get the whole figures.

    Args:
        model: the policy.
        problems: held-out problems; each tag gets its own line for every figure.
        reward: what it scores by; its parts become the figures.
        sampling: temperature 0 for greedy answers.
        samples: answers to each problem, one after the other: no more memory than one takes.
        k: of the figures pass@k, each at most `samples`; without any, `samples`.
        seed: of the sampler; the global generator is left as it was found.
        draw: writes the completions in the place of the model, see `rollouts`.

    Returns:
        The first answers, and means by name: "reward", each part ("accuracy"), each part by tag
        ("accuracy/trap"), "length" in tokens and "truncated" as a share. With several samples
        each part is there as "accuracy/avg@8" once more, and as "accuracy/pass@8", see `pass_at`;
        right is what scores 1.

    Raises:
        ValueError: `samples` or a `k` that cannot be, or more than one greedy answer.
    """
    check_samples(samples, k)
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"samples: expected 1 of greedy answers, got {samples}")
    mine, count = _equal_share(problems), len(problems)
    devices = [model.device] if model.device.type == "cuda" else []
    rounds: list[tuple[list[list[int]], Tensor, Tensor]] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank())
        prompts = [problem.prompt for problem in mine]
        for _ in range(samples):
            drawn = draw(prompts, sampling) if draw else rollout(model, prompts, sampling)
            rounds.append((drawn.completions(), drawn.completion_mask.sum(1), drawn.truncated))
    scored = [
        _of_all(score(reward, mine, completions, "held-out problems"), count)
        for completions, *_ in rounds
    ]
    first = [ids for theirs in gathered(rounds[0][0]) for ids in theirs][:count]

    # [samples, P] each
    total = torch.stack([scores.total for scores in scored])
    parts = {
        name: torch.stack([scores.parts[name] for scores in scored]) for name in scored[0].parts
    }
    metrics = {"reward": total.nanmean().item(), **means(parts)}
    if samples > 1:
        metrics |= several(parts, k or (samples,))
    for tag in sorted({problem.tag for problem in problems} - {""}):
        tagged = torch.tensor([problem.tag == tag for problem in problems])
        of_tag = {f"{name}/{tag}": part[:, tagged] for name, part in parts.items()}
        metrics |= means(of_tag)
        if samples > 1:
            metrics |= several(of_tag, k or (samples,))
    lengths = torch.stack([joined(length)[:count] for _, length, _ in rounds])
    truncated = torch.stack([joined(cut)[:count] for *_, cut in rounds])
    metrics["length"] = lengths.float().mean().item()
    metrics["truncated"] = truncated.float().mean().item()
    return Evaluation(first, scored[0], metrics)


def several(parts: Mapping[str, Tensor], k: Sequence[int]) -> dict[str, float]:
    """avg@n and pass@k of each part; those that apply to no problem are not there.

    Args:
        parts: [n, P] each, NaN where it does not apply.
        k: of pass@k.
    """
    found = {}
    for name, part in parts.items():
        answered = ~part.isnan()
        if not answered.any():
            continue
        found[f"{name}/avg@{len(part)}"] = part.nanmean().item()
        tries, right = answered.sum(0).tolist(), (part >= 1).sum(0).tolist()
        for each in k:
            # a problem that the reward left out too often does not tell
            known = [(n, c) for n, c in zip(tries, right, strict=True) if n >= each]
            if known:
                share = math.fsum(pass_at(each, n, c) for n, c in known) / len(known)
                found[f"{name}/pass@{each}"] = share
    return found


def pass_at(k: int, tries: int, right: int) -> float:
    """Probability that one of k answers is right, estimated without bias from n ≥ k tries.

    1 − C(n − c, k) / C(n, k): the share of all choices of k of the tries with a right one in it.

    Args:
        k: answers one would take.
        tries: n, answers that were drawn.
        right: c of them.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1
    (arXiv 2107.03374).
    """
    return 1 - math.comb(tries - right, k) / math.comb(tries, k)


def check_samples(samples: int, k: Sequence[int], *names: str) -> None:
    """Raises ValueError unless pass@k can be estimated from so many samples, for every k.

    Args:
        samples, k: see `evaluate`.
        names: what these two are called where they come from.
    """
    of_samples, of_k = names or ("samples", "k")
    if samples < 1:
        raise ValueError(f"{of_samples}: expected at least 1, got {samples}")
    for each in k:
        if not 1 <= each <= samples:
            raise ValueError(f"{of_k}: expected 1 to {samples}, the {of_samples}, got {each}")


def _of_all(scores: Scores, count: int) -> Scores:
    """Of all processes, without those that fill up the last ones."""
    parts = {name: joined(part)[:count] for name, part in scores.parts.items()}
    return Scores(joined(scores.total)[:count], parts)


def _equal_share(problems: Sequence[Problem]) -> list[Problem]:
    """This process's, as many as any other's; the last ones begin again at the first problem."""
    each = -(-len(problems) // world())
    return [problems[n % len(problems)] for n in range(rank() * each, (rank() + 1) * each)]
