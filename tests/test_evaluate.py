"""Held-out figures recomputed from the completions, one problem at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from grpo_core.evaluate import evaluate
from grpo_core.rollout import Problem, Sampling
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
