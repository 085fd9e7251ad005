"""Held-out figures recomputed from the completions, one problem at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from grpo_core.trainer.evaluate import evaluate, pass_at
from grpo_core.trainer.rewards import RewardError, Scores
from grpo_core.trainer.rollout import Problem, Sampling
from tests.micro import EOS, SEVEN, draw_problems, micro_model, share_of_sevens

SAMPLED = Sampling(8)


def problems() -> list[Problem]:
    drawn = draw_problems(30, random.Random(0))
    return [replace(p, tag="even" if len(p.prompt) % 2 == 0 else "odd") for p in drawn]


def test_figures_are_means_over_the_completions() -> None:
    asked = problems()
    got = evaluate(micro_model(), asked, share_of_sevens, SAMPLED)

    shares = [ids.count(SEVEN) / 8 for ids in got.completions]
    expected = {"reward": sum(shares) / 30, "sevens": sum(shares) / 30}
    for tag in ("even", "odd"):
        tagged = [s for s, problem in zip(shares, asked, strict=True) if problem.tag == tag]
        expected[f"sevens/{tag}"] = sum(tagged) / len(tagged)
    expected["length"] = sum(map(len, got.completions)) / 30
    expected["truncated"] = sum(EOS not in ids for ids in got.completions) / 30
    assert got.metrics == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["truncated"] < 1 and expected["sevens/even"] != expected["sevens/odd"]


def test_repeatable_and_without_a_trace() -> None:
    model = micro_model()
    before = torch.get_rng_state()

    first = evaluate(model, problems(), share_of_sevens, SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert evaluate(model, problems(), share_of_sevens, SAMPLED) == first
    other = evaluate(model, problems(), share_of_sevens, SAMPLED, seed=1)
    assert other.completions != first.completions


@pytest.mark.parametrize("tries", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(tries: int) -> None:
    for right in range(tries + 1):
        verdicts = [True] * right + [False] * (tries - right)
        for k in range(1, tries + 1):
            choices = [any(chosen) for chosen in combinations(verdicts, k)]
            assert pass_at(k, tries, right) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_k_of_many_tries_is_that_of_a_coin() -> None:
    """Numbers that no float holds, C(100 000, 500) among them."""
    assert pass_at(500, 100_000, 100) == pytest.approx(1 - 0.995**100, rel=1e-2)


def test_avg_and_pass_at_k_over_the_answers() -> None:
    """Recomputed from every answer to every problem, right or wrong; some have no verdict."""
    asked = problems()
    calls: list[list[float]] = []

    def verdict(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        found = [
            math.nan if len(problem.prompt) == 5 else float(SEVEN in ids or EOS in ids)
            for problem, ids in zip(problems, completions, strict=True)
        ]
        calls.append(found)
        part = torch.tensor(found)
        return Scores(part.nan_to_num(), {"verdict": part, "none": torch.full_like(part, math.nan)})

    model = micro_model()
    got = evaluate(model, asked, verdict, SAMPLED, samples=4, k=(1, 3))
    answers = [[call[place] for call in calls] for place in range(30)]
    assert len(calls) == 4 and any(0 < sum(mine) < 4 for mine in answers)

    def expected(tag: str, k: int) -> float:
        shares = []
        for problem, mine in zip(asked, answers, strict=True):
            if problem.tag.startswith(tag) and not math.isnan(mine[0]):
                choices = [max(chosen) for chosen in combinations(mine, k)]
                shares.append(sum(choices) / len(choices))
        return sum(shares) / len(shares)

    figures = got.metrics
    for tag in ("", "odd", "even"):
        name = f"verdict/{tag}" if tag else "verdict"
        assert figures[f"{name}/avg@4"] == pytest.approx(expected(tag, 1), rel=1e-6)
        assert figures[f"{name}/pass@1"] == pytest.approx(expected(tag, 1), rel=1e-6)
        assert figures[f"{name}/pass@3"] == pytest.approx(expected(tag, 3), rel=1e-6)
        assert figures[name] == figures[f"{name}/avg@4"] < figures[f"{name}/pass@3"] < 1
    assert not any(name.startswith("none") for name in figures)
    assert got.completions == evaluate(model, asked, verdict, SAMPLED).completions
    assert "verdict/pass@4" in evaluate(model, asked, verdict, SAMPLED, samples=4).metrics


def test_an_answer_without_a_reward_is_in_no_mean() -> None:
    asked = problems()

    def some(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        total = share_of_sevens(problems, completions).total
        total[::3] = math.nan
        return Scores(total, {"sevens": total})

    got = evaluate(micro_model(), asked, some, SAMPLED)
    shares = [ids.count(SEVEN) / 8 for n, ids in enumerate(got.completions) if n % 3]
    assert got.metrics["reward"] == pytest.approx(sum(shares) / 20, rel=1e-6)
    assert got.metrics["reward"] == got.metrics["sevens"]


def test_a_reward_that_fails_is_named() -> None:
    with pytest.raises(RewardError, match=r"^held-out problems: reward 'bad' raised KeyError: 3$"):
        evaluate(micro_model(), problems(), bad, SAMPLED)


def bad(problems: Any, completions: Any) -> Scores:
    raise KeyError(3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"samples": 4, "k": (1, 8)}, "k: expected 1 to 4, the samples, got 8"),
        ({"samples": 4, "k": (0,)}, "k: expected 1 to 4, the samples, got 0"),
        ({"samples": 2, "sampling": Sampling(8, 0.0)}, "samples: expected 1 of greedy answers"),
    ],
)
def test_samples_that_cannot_be(more: dict[str, Any], message: str) -> None:
    given = {"sampling": SAMPLED, **more}
    with pytest.raises(ValueError, match=message):
        evaluate(micro_model(), problems(), share_of_sevens, **given)
