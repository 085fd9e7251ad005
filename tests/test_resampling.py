"""Groups without variance leave the batch, or others are drawn in their place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core import RECIPES
from grpo_core.trainer.baselines.ppo import PPOTrainer
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.checkpoint import save_trainer
from grpo_core.trainer.data import Epochs
from grpo_core.trainer.groups import group_advantages, in_varied_group, split_minibatches
from grpo_core.trainer.rewards import RewardError, Scores
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, rollout
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.engines import GivenEngine
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model
from tests.test_trainer import without_times

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

G = 4


def config(**changes: Any) -> TrainerConfig:
    """Four groups of four, one minibatch gone through twice."""
    settings: dict[str, Any] = {
        "objective": RECIPES["dapo"],
        "steps": 3,
        "prompts_per_step": 4,
        "group_size": G,
        "minibatches": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_grad_norm": 1e9,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    return TrainerConfig(**settings | changes)


def only_even(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
    """Prompts that begin with an odd token are hopeless; the others' completions all differ."""
    total = [
        0.0 if problem.prompt[0] % 2 else sum(n * i for n, i in enumerate(ids, 1)) / 100
        for problem, ids in zip(problems, completions, strict=True)
    ]
    return Scores(torch.tensor(total), {"hopeful": torch.tensor(total)})


def given(problems: Sequence[Problem]) -> Rollout:
    """What the untrained model answers, a group to each."""
    torch.manual_seed(3)
    prompts = [problem.prompt for problem in problems for _ in range(G)]
    return rollout(micro_model(), prompts, Sampling(MAX_NEW_TOKENS))


PROBLEMS = [Problem((3, 4)), Problem((4, 5, 6)), Problem((5, 5)), Problem((8, 2))]
HOPEFUL = [1, 3]


def run_on(problems: Sequence[Problem], drawn: Rollout, **changes: Any) -> Trainer:
    """A step on completions that are given, by SGD."""
    settings = config(prompts_per_step=len(problems), **changes)
    run = Trainer(
        micro_model(),
        lambda count, rng: problems[:count],
        only_even,
        settings,
        engine=GivenEngine(drawn),
    )
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    return run


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("dapo", 40), ("grpo", 0), ("dr_grpo", 40), ("reinforce_plus_plus", 0), ("gspo", 0)],
)
def test_what_leaves_is_as_if_it_had_not_been_drawn(name: str, tokens: int) -> None:
    """In every mean, and in statistics over the batch; a KL of theirs would be a gradient."""
    objective = RECIPES[name].replace(beta=0.1, kl="k3")
    changes = {"objective": objective, "tokens_per_microbatch": tokens}
    drawn = given(PROBLEMS)
    everything = run_on(PROBLEMS, drawn, dynamic_sampling="filter", **changes)
    metrics = everything.step()
    few = torch.cat([torch.arange(n * G, n * G + G) for n in HOPEFUL])
    expected = run_on([PROBLEMS[n] for n in HOPEFUL], drawn.select(few), **changes)
    theirs = expected.step()

    assert metrics["tokens"] == theirs["tokens"]
    assert (metrics["groups_drawn"], metrics["groups_kept"]) == (4, 2)
    # of all that were drawn
    assert metrics["zero_std"] == 0.5 and metrics["reward"] == pytest.approx(theirs["reward"] / 2)
    moved = 0.0
    for mine, other, start in zip(
        everything.model.parameters(),
        expected.model.parameters(),
        micro_model().parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((mine.detach() - start.detach()).abs().max()))
    assert moved > 1e-3
    kept_in = run_on(PROBLEMS, drawn, **changes)
    assert kept_in.step()["tokens"] > metrics["tokens"]


def test_minibatches_share_what_stays_and_fillers_stand_in() -> None:
    drawn = given(PROBLEMS)
    settings = config(dynamic_sampling="filter", minibatches=3)
    rewards = torch.tensor([*[0.0] * 4, *[1.0, 0, 0, 0], *[2.0] * 4, *[0.0] * 4])
    assert in_varied_group(rewards, G).tolist() == [False] * 4 + [True] * 4 + [False] * 8
    advantage = group_advantages(rewards, settings)
    assert (advantage != 0).tolist() == [False] * 4 + [True] * 4 + [False] * 8
    packed = pack(drawn, advantage)
    order = torch.randperm(16)
    parts = split_minibatches(packed, rewards, order, settings)
    assert [len(part.rows.ids) for part in parts] == [2, 1, 1]
    learnt = torch.cat([part.advantage for part in parts]).unique()
    assert torch.equal(learnt, advantage[4:8].unique())

    wide = config(dynamic_sampling="filter", minibatches=6)
    parts = split_minibatches(packed, rewards, order, wide)
    assert [part.is_filler for part in parts] == [False] * 4 + [True] * 2
    assert not len(parts[-1].rows.sequence) and len(parts[-1].rows.ids) == 1
    off = split_minibatches(packed, rewards, order, config(minibatches=3))
    assert [len(part.rows.ids) for part in off] == [6, 6, 4]
    # those without a reward leave theirs, and the number of minibatches stays
    rewards[order[[0, 2, 7]]] = torch.nan
    rewards[order[12:]] = torch.nan
    off = split_minibatches(packed, rewards, order, config(minibatches=3))
    assert [len(part.rows.ids) for part in off] == [4, 5, 1] and off[-1].is_filler


@pytest.mark.parametrize("sampling", ["filter", "resample"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_where_nothing_varies_nothing_is_learnt(sampling: str, minibatches: int) -> None:
    def hopeless(problems: Any, completions: Any) -> Scores:
        return Scores(torch.ones(len(completions)), {})

    changes = {"minibatches": minibatches, "dynamic_sampling": sampling, "max_resamples": 1}
    run = Trainer(micro_model(), draw_problems, hopeless, config(**changes))
    if sampling == "resample":
        with pytest.warns(UserWarning, match="4 groups are missing after 1 more rounds"):
            metrics = run.step()
        assert (metrics["resamples"], metrics["groups_drawn"]) == (1, 8)
    else:
        metrics = run.step()
    assert (metrics["groups_kept"], metrics["tokens"], metrics["loss"]) == (0, 0, 0)
    for after, before in zip(run.model.parameters(), micro_model().parameters(), strict=True):
        assert torch.equal(after, before)


UNSCORED = torch.tensor([1, 6, 8, 15])  # one of each group


def lacking(where: Sequence[int]) -> Any:
    """`only_even`, but for these completions, to which it does not apply."""

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        total = only_even(problems, completions).total
        total[torch.tensor(where)] = torch.nan
        return Scores(total, {"hopeful": total})

    return reward


@pytest.mark.parametrize("sampling", ["off", "filter"])
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("dapo", 40), ("grpo", 0), ("dr_grpo", 40), ("reinforce_plus_plus", 0), ("rloo", 0)],
)
def test_what_no_reward_applies_to_is_as_if_it_had_not_been_drawn(
    name: str, tokens: int, sampling: str
) -> None:
    """Groups of four with one of them unscored are groups of three: KL, means and divisors too."""
    objective = RECIPES[name].replace(beta=0.1, kl="k3")
    changes = {"objective": objective, "tokens_per_microbatch": tokens}
    changes["dynamic_sampling"] = sampling
    drawn = given(PROBLEMS)
    run = run_on(PROBLEMS, drawn, **changes)
    run.reward = lacking(UNSCORED.tolist())
    with pytest.warns(UserWarning, match="no reward applies to 4 completions of step 1; they are"):
        metrics = run.step()
    scored = torch.ones(16, dtype=torch.bool)
    scored[UNSCORED] = False
    expected = run_on(PROBLEMS, drawn.select(scored), **changes | {"group_size": 3})
    theirs = expected.step()

    assert metrics["unscored"] == 4 and "unscored" not in theirs
    for figure in ("tokens", "reward", "hopeful", "zero_std"):
        assert metrics[figure] == pytest.approx(theirs[figure], rel=1e-5), figure
    assert metrics["length"] != theirs["length"]  # of all that were drawn
    moved = 0.0
    for mine, other, start in zip(
        run.model.parameters(), expected.model.parameters(), micro_model().parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((mine.detach() - start.detach()).abs().max()))
    assert moved > 1e-3


def test_advantages_without_what_is_unscored() -> None:
    """Groups of 3, 0, 1, 2 and 4 that count, by hand."""
    nan = torch.nan
    rewards = torch.tensor(
        [1, nan, 3, 2, nan, nan, nan, nan, 5, nan, nan, nan, nan, 4, nan, 4, 0, 0, 0, 4]
    )
    group = in_varied_group(rewards, G).view(-1, G)[:, 0].tolist()
    assert group == [True, False, False, False, True]
    std = (12 / 3) ** 0.5
    for name, first, last in [
        ("dr_grpo", [-1, 0, 1, 0], [-1, -1, -1, 3]),
        ("grpo", [-1, 0, 1, 0], [-1 / std, -1 / std, -1 / std, 3 / std]),
    ]:
        expected = torch.tensor([*first, *[0.0] * 12, *last])
        for sampling in ("off", "filter", "resample"):
            settings = config(objective=RECIPES[name], dynamic_sampling=sampling)
            got = group_advantages(rewards, settings)
            # 1e-4 is added to a standard deviation
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=0)
    assert not group_advantages(torch.full((8,), nan), config()).any()


@pytest.mark.parametrize("minibatches", [1, 2])
def test_where_nothing_is_scored_nothing_is_learnt(minibatches: int) -> None:
    run = Trainer(micro_model(), draw_problems, lacking(range(16)), config(minibatches=minibatches))
    with pytest.warns(UserWarning, match="no reward applies to 16 completions of step 1"):
        first = run.step()
    second = run.step()
    for metrics in (first, second):
        assert (metrics["unscored"], metrics["tokens"], metrics["loss"]) == (16, 0, 0)
        assert metrics["zero_std"] == 1 and metrics["skipped_updates"] == 0
        assert "hopeful" not in metrics
    # once per run
    told = [line for each in (first, second) for line in each.get("warnings", [])]
    assert sum("no reward applies" in line for line in told) == 1
    for after, before in zip(run.model.parameters(), micro_model().parameters(), strict=True):
        assert torch.equal(after, before)


def test_ppo_leaves_out_what_no_reward_applies_to() -> None:
    """Its tokens are in no loss, of policy or critic, and nothing becomes NaN."""
    settings = config(objective=RECIPES["ppo"], minibatches=2, epochs=1)
    for where in (UNSCORED.tolist(), range(16)):
        run = PPOTrainer(
            micro_model(), lambda count, rng: PROBLEMS, lacking(where), settings,
            engine=GivenEngine(given(PROBLEMS)),
        )  # fmt: skip
        with pytest.warns(UserWarning, match=f"no reward applies to {len(where)} completions"):
            metrics = run.step()
        mask = given(PROBLEMS).completion_mask.sum(1)
        mask[torch.tensor(where)] = 0
        assert metrics["tokens"] == mask.sum()
        assert metrics["skipped_updates"] == 0
        weights = [*run.model.parameters(), *run.critic.parameters()]
        assert all(weight.isfinite().all() for weight in weights)


def test_a_step_that_a_reward_spoils_is_named() -> None:
    def late(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        calls.append(1)
        return only_even(problems, completions)._replace(parts={"a": torch.ones(len(calls) * 16)})

    calls: list[int] = []
    run = Trainer(micro_model(), draw_problems, late, config())
    run.step()
    with pytest.raises(RewardError, match=r"^step 2: a: expected shape \[S\] = \[16\], got \[32\]"):
        run.step()


def resampling(checkpoints: Path | None = None, **changes: Any) -> tuple[Trainer, list[int]]:
    """A run over problems in epochs, and how many completions each call of its reward saw."""
    problems = draw_problems(30, random.Random(5))
    seen: list[int] = []

    def noted(asked: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        seen.append(len(completions))
        return only_even(asked, completions)

    settings = config(**{"dynamic_sampling": "resample", "max_resamples": 8} | changes)
    run = Trainer(micro_model(), Epochs(problems), noted, settings, checkpoints=checkpoints)
    return run, seen


def test_prompts_are_drawn_until_there_are_enough() -> None:
    run, seen = resampling()
    batches: list[Batch] = []
    minibatches = run.minibatches

    def noted(drawn: Rollout, rewards: torch.Tensor, order: torch.Tensor) -> Any:
        assert in_varied_group(rewards, G).all() and len(rewards) == 16
        # the prompts of a group are one, and hopeful
        first = [row[mask][0] for row, mask in zip(drawn.prompt, drawn.prompt_mask, strict=True)]
        assert not any(int(token) % 2 for token in first)
        found = minibatches(drawn, rewards, order)
        batches.extend(part for parts in found for part in parts)
        return found

    run.minibatches = noted  # type: ignore[method-assign]
    history = run.train()[1:]
    assert len(seen) > 3 and set(seen) == {16}
    assert sum(m["resamples"] + 1 for m in history) == len(seen)
    for metrics in history:
        assert (metrics["groups_kept"], metrics["groups_missing"]) == (4, 0)
        assert metrics["groups_drawn"] == 4 * (metrics["resamples"] + 1)
        # the tokens of the batch, twice; the length is of all that were drawn
        assert 0 < metrics["zero_std"] < 1
    assert run.draw_problems.position == 4 * len(seen)  # type: ignore[attr-defined]
    assert [len(batch.rows.ids) for batch in batches] == [16] * 3


def test_rounds_have_an_end_and_the_first_stays_what_it_was() -> None:
    """The figures of a run that never draws again are those of its first rounds."""
    run, seen = resampling(max_resamples=0)
    plain, _ = resampling(dynamic_sampling="filter")
    with pytest.warns(UserWarning, match="groups are missing after 0 more rounds"):
        mine = run.step()
    theirs = plain.step()
    assert len(seen) == 1 and mine["groups_missing"] > 0
    for name in ("resamples", "groups_missing"):
        del mine[name]
    # that groups were missing is a warning of one of them
    del mine["warnings"], theirs["warnings"]
    assert without_times([mine]) == without_times([theirs])


def test_rounds_draw_different_completions_from_the_same_weights() -> None:
    asked: list[list[list[int]]] = []

    def noted(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        asked.append([list(ids) for ids in completions])
        return Scores(torch.zeros(len(completions)), {})

    def same(count: int, rng: random.Random) -> list[Problem]:
        return [Problem((3, 4))] * count

    settings = config(dynamic_sampling="resample", max_resamples=2, steps=2)
    with pytest.warns(UserWarning, match="are missing"):
        Trainer(micro_model(), same, noted, settings).train()
    assert len(asked) == 6 and len({str(each) for each in asked}) == 6


def test_a_run_that_goes_on_draws_the_same(tmp_path: Path) -> None:
    straight, _ = resampling()
    expected = straight.train()
    first, _ = resampling()
    for _ in range(2):
        first.step()
    save_trainer(first, tmp_path)
    torch.rand(5)
    second, _ = resampling(tmp_path)
    assert second.resume() == 2
    assert without_times(second.train()) == without_times(expected[3:])
    for mine, theirs in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dynamic_sampling: .* got 'often'"):
        config(dynamic_sampling="often")
    with pytest.raises(ValueError, match="max_resamples: expected 0 or more, got -1"):
        config(max_resamples=-1)
    with pytest.raises(ValueError, match=r"max_log_ratio: expected 0 or more, got -2\.0"):
        config(max_log_ratio=-2.0)
    settings = replace(config(objective=RECIPES["ppo"]), dynamic_sampling="filter")
    with pytest.raises(ValueError, match="dynamic_sampling: expected 'off', PPO has no groups"):
        PPOTrainer(micro_model(), draw_problems, only_even, settings)
