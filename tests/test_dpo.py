"""DPO on pairs that a model has sampled: which are kept, what is computed, and that it learns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from grpo_core.trainer.baselines.dpo import (
    Pair,
    PreferenceConfig,
    completion_logp,
    sample_pairs,
    train_preferences,
)
from grpo_core.trainer.baselines.supervised import Example, pad_examples
from grpo_core.trainer.rewards import Scores
from grpo_core.trainer.rollout import Problem, Sampling, rollout
from tests.micro import MAX_NEW_TOKENS, SEVEN, draw_problems, micro_model, share_of_sevens

SAMPLING = Sampling(MAX_NEW_TOKENS)


def problems(count: int) -> list[Problem]:
    return draw_problems(count, __import__("random").Random(0))


def test_the_best_and_the_worst_answer_make_a_pair() -> None:
    model, asked = micro_model(), problems(12)
    state = torch.get_rng_state()
    pairs = sample_pairs(model, asked, share_of_sevens, SAMPLING, group_size=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert pairs == sample_pairs(model, asked, share_of_sevens, SAMPLING, group_size=4, seed=1)
    assert 0 < len(pairs) <= 12
    for pair in pairs:
        assert tuple(pair.prompt) in {problem.prompt for problem in asked}
        assert list(pair.chosen).count(SEVEN) > list(pair.rejected).count(SEVEN)


def test_an_answer_without_a_reward_is_in_no_pair() -> None:
    """The most sevens have none; of groups with one reward or none there is no pair."""
    model, asked = micro_model(), problems(12)
    seen: list[torch.Tensor] = []

    def lacking(asked: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        total = share_of_sevens(asked, completions).total.view(-1, 4)
        total[torch.arange(12), total.argmax(1)] = torch.nan
        total[0, 1:], total[1] = torch.nan, torch.nan
        seen.append(total)
        return Scores(total.view(-1), {"sevens": total.view(-1)})

    pairs = sample_pairs(model, asked, lacking, SAMPLING, group_size=4, seed=1)
    (total,) = seen
    expected = []
    for group in range(12):
        scored = [n for n in range(4) if not total[group, n].isnan()]
        ranked = sorted(scored, key=lambda n: float(total[group, n]))
        if scored and total[group, ranked[0]] < total[group, ranked[-1]]:
            shares = [total[group, ranked[0]], total[group, ranked[-1]]]
            expected.append((list(asked[group].prompt), [float(share) for share in shares]))
    got = []
    for pair in pairs:
        shares = [ids.count(SEVEN) / MAX_NEW_TOKENS for ids in (pair.rejected, pair.chosen)]
        got.append((pair.prompt, shares))
    assert got == expected and 0 < len(got) < 10


def test_the_loss_of_one_step_by_hand() -> None:
    """Against plain PyTorch in float64, sequence by sequence; the first margin is exactly 0."""
    model = micro_model()
    pairs = [Pair([3, 4], [7, 7, 1], [5, 1]), Pair([6], [7, 1], [2, 2, 2, 1])]
    config = PreferenceConfig(steps=2, batch_size=2, learning_rate=1e-2, warmup_steps=0, beta=0.5)
    reference = micro_model().double()
    history = train_preferences(model, pairs, config)
    assert history[0]["margin"] == 0
    assert history[0]["loss"] == pytest.approx(-float(logsigmoid(torch.tensor(0.0))), abs=1e-6)
    assert history[1]["accuracy"] == 1

    def total(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        logp = log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        return logp.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].sum()

    with torch.no_grad():
        rows = pad_examples(
            [Example(p.prompt, p.chosen) for p in pairs], False, torch.device("cpu")
        )
        found = completion_logp(reference.float(), rows)
        exact = torch.stack([total(reference.double(), p.prompt, p.chosen) for p in pairs])
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_it_learns_from_its_own_answers() -> None:
    """As far as pairs of one round lead: twice the sevens, and the pairs told apart."""

    def sevens() -> float:
        torch.manual_seed(0)
        drawn = rollout(model, [p.prompt for p in problems(64)], SAMPLING)
        return share_of_sevens(problems(64), drawn.completions()).total.mean().item()

    model = micro_model()
    before = sevens()
    pairs = sample_pairs(model, problems(64), share_of_sevens, SAMPLING, group_size=8)
    config = PreferenceConfig(steps=40, batch_size=16, learning_rate=5e-3)
    history = train_preferences(model, pairs, config)
    assert history[-1]["accuracy"] > 0.9 and history[-1]["loss"] < 0.3
    assert sevens() > 2 * before


def test_nothing_to_learn_from_is_an_error() -> None:
    config = PreferenceConfig(steps=9, batch_size=2, learning_rate=1e-3)
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        train_preferences(micro_model(), [], config)
    long = Pair([3] * 60, [4] * 4, [4] * 5)
    with pytest.raises(ValueError, match=r"prompt \+ completion: expected at most 64 .* 60 \+ 5"):
        train_preferences(micro_model(), [long], config)
    with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
        sample_pairs(micro_model(), problems(1), share_of_sevens, SAMPLING, group_size=1)
    with pytest.raises(ValueError, match="warmup_steps: expected 0 to 2, got 5"):
        PreferenceConfig(steps=3, batch_size=2, learning_rate=1e-3, warmup_steps=5)
