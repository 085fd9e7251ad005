"""Several turns: what an environment answers is in the context, and is never trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core import RECIPES
from grpo_core.reinforce import main
from grpo_core.trainer.batch import pack
from grpo_core.trainer.checkpoint import save_trainer
from grpo_core.trainer.environment import EnvironmentFault, Episodes, complete
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.forward import packed_logp
from grpo_core.trainer.rewards import RewardError, Scores, no_reward
from grpo_core.trainer.rollout import (
    Observed,
    Problem,
    Rollout,
    Sampling,
    concat_rollouts,
    make_rollout,
    rollout,
)
from grpo_core.trainer.samples import Samples
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.engines import CopyEngine
from tests.micro import EOS, PAD, SEVEN, VOCABULARY, draw_problems, micro_model, share_of_sevens
from tests.test_console import Numbers
from tests.test_reinforce import files, options, records  # noqa: F401
from tests.test_replay import sets_of
from tests.test_trainer import without_times
from tests.test_vllm import engine, path, vllm  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*are missing after"),
]
LONG = Sampling(20)


class Answering:
    """Observations of nothing to four tokens, sometimes an end token; done after some turns."""

    def reset(self, problem: Problem) -> None:
        self.left = sum(problem.prompt) % 4

    def step(self, turn: list[int]) -> tuple[list[int], float, bool]:
        assert turn[-1] == EOS and EOS not in turn[:-1]
        self.left -= 1
        observation = [3, EOS, 5, 6][: sum(turn) % 5]
        return observation, turn.count(SEVEN) / 8, self.left < 0


def settings(**changes: Any) -> TrainerConfig:
    """Three steps of two prompts, two updates twice."""
    given: dict[str, Any] = {
        "objective": RECIPES["dapo"],
        "steps": 3,
        "prompts_per_step": 2,
        "group_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "sampling": LONG,
        "checkpoint_every": 1,
    }
    return TrainerConfig(**given | changes)


def run(make: Any = Answering, reward: Any = no_reward, max_turns: int = 4, **more: Any) -> Trainer:
    """With an environment, or with `make=None` without; options of the trainer and its settings."""
    known = ("engine", "checkpoints", "samples")
    of_trainer = {name: more.pop(name) for name in known if name in more}
    episodes = make and Episodes(make, max_turns=max_turns)
    return Trainer(
        micro_model(), draw_problems, reward, settings(**more), environment=episodes, **of_trainer
    )


def write_on(context: Sequence[int]) -> int:
    """A policy without chance: the next token."""
    code = sum((place + 3) * token for place, token in enumerate(context))
    return EOS if code % 4 == 0 else 2 + code % 13


def scripted(
    calls: list[tuple[int, int]], keeps: bool = False
) -> Callable[[Sequence[Sequence[int]], Sampling], Rollout]:
    """Draws by `write_on`; log-probabilities and kept ids tell the place in the whole sequence."""

    def draw(contexts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        calls.append((max(map(len, contexts)), sampling.max_new_tokens))
        rows = []
        for context in contexts:
            ids = list(context)
            while len(ids) < len(context) + sampling.max_new_tokens:
                ids.append(write_on(ids))
                if ids[-1] == EOS:
                    break
            rows.append(ids[len(context) :])
        places = [range(len(c), len(c) + len(row)) for c, row in zip(contexts, rows, strict=True)]
        return make_rollout(
            contexts,
            rows,
            [[-place / 8 for place in of_row] for of_row in places],
            pad=PAD,
            ends=[EOS],
            device=torch.device("cpu"),
            kept=[[[0, 1 + place % 15] for place in of_row] for of_row in places]
            if keeps
            else None,
        )

    return draw


def one_by_one(problem: Problem, limit: int, max_turns: int) -> dict[str, Any]:
    """The same completion, token by token."""
    world = Answering()
    world.reset(problem)
    ids: list[int] = []
    sampled: list[bool] = []
    start, turns, earned = 0, 1, 0.0
    while True:
        if len(ids) == limit:
            cut = True
            break
        ids.append(write_on([*problem.prompt, *ids]))
        sampled.append(True)
        if ids[-1] != EOS:
            continue
        observation, reward, done = world.step(ids[start:])
        earned += reward
        cut = not done
        if done or turns == max_turns or len(ids) + len(observation) >= limit:
            break
        ids += observation
        sampled += [False] * len(observation)
        start, turns = len(ids), turns + 1
    return {"ids": ids, "sampled": sampled, "turns": turns, "earned": earned, "cut": cut}


@pytest.mark.parametrize(("limit", "max_turns"), [(1, 4), (6, 4), (20, 1), (20, 3), (40, 100)])
def test_completions_are_those_of_one_token_at_a_time(limit: int, max_turns: int) -> None:
    """Of prompts of different lengths, in whatever parts the turns are drawn."""
    rng = random.Random(limit)
    problems = [
        Problem(tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 12))))
        for _ in range(40)
    ]
    calls: list[tuple[int, int]] = []
    got = Episodes(Answering, max_turns=max_turns).play(
        micro_model(), scripted(calls, keeps=True), problems, Sampling(limit, top_k=2), "here"
    )
    assert got.turns is not None and got.earned is not None and got.sampled is not None
    expected = [one_by_one(problem, limit, max_turns) for problem in problems]
    assert got.completions() == [each["ids"] for each in expected]
    assert got.turns.tolist() == [each["turns"] for each in expected]
    assert got.earned.tolist() == [each["earned"] for each in expected]
    assert got.truncated.tolist() == [each["cut"] for each in expected]
    kept = iter(sets_of(got.kept))
    for row, (problem, each) in enumerate(zip(problems, expected, strict=True)):
        length, before = len(each["ids"]), len(problem.prompt)
        assert got.prompt[row][got.prompt_mask[row]].tolist() == list(problem.prompt)
        assert got.completion_mask[row].sum() == length
        assert got.sampled[row, :length].tolist() == each["sampled"]
        assert not got.sampled[row, length:].any()
        places = [before + place for place in range(length)]
        logp = [-p / 8 * was for p, was in zip(places, each["sampled"], strict=True)]
        assert got.sampler_logp[row, :length].tolist() == logp
        told = [next(kept) for was in each["sampled"] if was]
        drawn = [p for p, was in zip(places, each["sampled"], strict=True) if was]
        assert told == [[0, 1 + place % 15] for place in drawn]
    assert next(kept, None) is None
    # no context gets longer than the longest prompt and the limit
    assert max(sum(call) for call in calls) == max(len(p.prompt) for p in problems) + limit
    if limit == 20 and max_turns == 3:
        kinds = {(each["turns"], each["cut"]) for each in expected}
        assert {(1, False), (2, False), (3, False), (3, True)} <= kinds
        assert any(EOS in ids and kind == Observed for ids, kind in observed(got))


def observed(drawn: Rollout) -> list[tuple[list[int], type]]:
    """The tokens of each completion by their kind."""
    lists = drawn.completions()
    return [
        ([id for id in ids if type(id) is kind], kind) for ids in lists for kind in (int, Observed)
    ]


def test_one_turn_is_a_rollout_without_an_environment() -> None:
    """Bit for bit: metrics, and weights after three steps."""

    class Once:
        def reset(self, problem: Problem) -> None:
            pass

        def step(self, turn: list[int]) -> tuple[None, float, bool]:
            return None, turn.count(SEVEN) / 8, True

    def sevens(problems: Any, completions: Any) -> Scores:
        """Of those that an environment gets to see."""
        counts = [ids.count(SEVEN) / 8 * (ids[-1] == EOS) for ids in map(list, completions)]
        return Scores(torch.tensor(counts), {"sevens": torch.tensor(counts)})

    alone, single = (
        run(None, sevens, dynamic_sampling="resample"),
        run(Once, dynamic_sampling="resample"),
    )
    for mine, theirs in zip(single.train(), alone.train(), strict=True):
        if mine["step"]:
            assert (mine.pop("turns"), mine.pop("observed")) == (1, 0)
            mine["sevens"] = mine.pop("environment")
        assert without_times([mine]) == without_times([theirs])
    pairs = zip(single.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(single.model.parameters(), micro_model().parameters(), strict=True)
    )


def drawn_by_model(sampling: Sampling = LONG) -> Rollout:
    torch.manual_seed(0)
    problems = draw_problems(24, random.Random(3))
    model = micro_model()
    return complete(model, partial(rollout, model), problems, sampling, Episodes(Answering), "here")


@pytest.mark.parametrize("sampling", [LONG, Sampling(20, 0.7), Sampling(20, 0.7, top_k=5)])
def test_only_sampled_tokens_are_rows_with_the_samplers_log_probabilities(
    sampling: Sampling,
) -> None:
    """Those of the whole context, observations included."""
    drawn = drawn_by_model(sampling)
    advantage = torch.arange(24.0)
    batch = pack(drawn, advantage)
    written = [[id for id in ids if type(id) is int] for ids in drawn.completions()]
    assert batch.rows.target.tolist() == [id for ids in written for id in ids]
    assert batch.advantage.tolist() == [float(n) for n, ids in enumerate(written) for _ in ids]
    assert batch.rows.attention.sum() == drawn.prompt_mask.sum() + drawn.completion_mask.sum()
    assert sum(map(len, written)) < drawn.completion_mask.sum() - 20
    logp = packed_logp(micro_model(), batch.rows, settings(sampling=sampling))
    torch.testing.assert_close(logp, batch.sampler_logp, rtol=0, atol=2e-5)
    masked = pack(drawn, advantage, mask_truncated=True)
    assert 0 < len(masked.advantage.unique()) == int((~drawn.truncated).sum()) < 24
    counts = {name: value.tolist() for name, value in drawn.counts().items()}
    assert counts["length"] == [len(ids) for ids in written]
    whole = drawn.completions()
    assert counts["observed"] == [len(a) - len(b) for a, b in zip(whole, written, strict=True)]


def test_the_gradient_is_that_of_the_sampled_tokens() -> None:
    """REINFORCE with the mean over them, by a forward of one sequence at a time."""
    trainer = run(minibatches=1, epochs=1)
    drawn = drawn_by_model()
    advantage = torch.randn(24, generator=torch.Generator().manual_seed(1))
    batch = trainer.with_logp(pack(drawn, advantage))
    out = trainer.loss(batch, None)
    assert out.loss is not None
    out.loss.backward()
    assert float(out.metrics["tokens"]) == float(drawn.is_sampled.sum())

    model, total = micro_model(), torch.zeros(())
    for row, ids in enumerate(drawn.completions()):
        prompt = drawn.prompt[row][drawn.prompt_mask[row]].tolist()
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[range(len(ids)), ids]
        own = torch.tensor([type(id) is int for id in ids])
        total = total - advantage[row] * logp[own].sum()
    (total / drawn.is_sampled.sum()).backward()
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_engine_plays_the_episodes_of_the_model_itself() -> None:
    """Bit for bit, with its weights updated once a step."""
    copy = CopyEngine(micro_model(seed=9))
    followed, alone = run(engine=copy), run()
    history = followed.train()
    assert without_times(history) == without_times(alone.train())
    assert copy.updates == [0, 1, 2] and len(copy.asked) > 6
    for metrics in history[1:]:
        assert metrics["sampler_mismatch_max"] < 1e-4
        assert metrics["turns"] > 1 and metrics["observed"] > 0


def test_vllm_plays_episodes(engine: Any) -> None:  # noqa: F811
    """Several calls a step, each with seeds of its own; tokens and log-probabilities agree."""
    trainer = run(engine=engine, sampling=Sampling(20, 0.7))
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["sampler_mismatch_max"] < 1e-4 and metrics["turns"] > 1
    seeds = [params.seed for params in engine.worker.asked]
    # one of two servers gets half of them
    assert len(seeds) == len(set(seeds)) > 8


def test_rewards_of_all_turns_are_summed_and_added_to_the_others() -> None:
    trainer = run(reward=share_of_sevens)
    metrics = trainer.step()
    _, completions, scores = trainer.drawn
    assert scores.parts.keys() == {"environment", "sevens"}
    assert torch.equal(scores.total, scores.parts["environment"] + scores.parts["sevens"])
    assert metrics["environment"] > 0 and metrics["reward"] == pytest.approx(
        metrics["environment"] + metrics["sevens"]
    )
    for ids, earned in zip(completions, scores.parts["environment"].tolist(), strict=True):
        own = [id for id in ids if type(id) is int]
        # a turn that was cut off is not answered
        whole = len(own) - own[::-1].index(EOS) if EOS in own else 0
        assert earned == own[:whole].count(SEVEN) / 8

    def taken(problems: Any, completions: Any) -> Scores:
        return Scores(torch.zeros(8), {"environment": torch.zeros(8)})

    with pytest.raises(RewardError, match="expected another name than 'environment'"):
        run(reward=taken).step()


def never(problems: Any, completions: Any) -> Scores:
    nan = torch.full((len(completions),), torch.nan)
    return Scores(nan, {"never": nan})


def test_where_no_reward_applies_the_environments_counts() -> None:
    trainer = run(reward=never)
    assert "unscored" not in trainer.step()
    scores = trainer.drawn[2]
    assert torch.equal(scores.total, scores.parts["environment"])


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Also one that draws further rounds; nothing of an environment outlives its completion."""
    more: dict[str, Any] = {"dynamic_sampling": "resample", "max_resamples": 2}
    straight = run(**more)
    expected = without_times(straight.train())
    assert any(metrics.get("resamples") for metrics in expected)
    first = run(**more)
    for _ in range(2):
        first.step()
    save_trainer(first, tmp_path)
    second = run(checkpoints=tmp_path, **more)
    assert second.resume() == 2
    assert without_times(second.train()) == expected[3:]


def test_rollouts_are_selected_and_joined_with_their_turns() -> None:
    drawn = drawn_by_model(Sampling(20, top_k=5))
    order = torch.tensor([7, 0, 3])
    joined = concat_rollouts([drawn.select(order), drawn.select(slice(4, 6))], PAD)
    rows = [7, 0, 3, 4, 5]
    assert joined.turns is not None and drawn.turns is not None
    assert joined.earned is not None and drawn.earned is not None
    assert joined.turns.tolist() == [drawn.turns[row] for row in rows]
    assert joined.earned.tolist() == [drawn.earned[row] for row in rows]
    whole = drawn.completions()
    for mine, row in zip(joined.completions(), rows, strict=True):
        assert [(id, type(id)) for id in mine] == [(id, type(id)) for id in whole[row]]
    counts = drawn.is_sampled.sum(1).tolist()
    sets, starts = sets_of(drawn.kept), [sum(counts[:row]) for row in rows]
    expected = [
        kept
        for row, start in zip(rows, starts, strict=True)
        for kept in sets[start : start + counts[row]]
    ]
    assert sets_of(joined.kept) == expected


def test_evaluation_counts_turns_and_samples_show_them(tmp_path: Path) -> None:
    problems = draw_problems(12, random.Random(3))
    found = evaluate(
        micro_model(), problems, no_reward, LONG, samples=2, environment=Episodes(Answering)
    )
    assert found.metrics["turns"] > 1 and found.metrics["observed"] > 0
    assert found.metrics["environment"] == found.metrics["reward"] > 0
    assert "environment/pass@2" in found.metrics
    kept = Samples(Numbers(), tmp_path / "samples.jsonl", count=12)  # type: ignore[arg-type]
    kept.look(0, problems, found)
    texts = [sample.completion for sample in kept.held_out]
    assert any("⟦" in text for text in texts)
    for text, ids in zip(texts, found.completions, strict=True):
        pieces = text.replace("⟧", "⟦").split("⟦")
        assert [int(word) for piece in pieces for word in piece.split()] == ids
        inside = [int(word) for piece in pieces[1::2] for word in piece.split()]
        assert inside == [id for id in ids if type(id) is Observed]


def test_an_environment_that_never_ends_is_cut_off() -> None:
    class Endless:
        def reset(self, problem: Problem) -> None:
            pass

        def step(self, turn: list[int]) -> tuple[list[int], float, bool]:
            return [], 0.5, False

    trainer = run(Endless, max_turns=3)
    metrics = trainer.step()
    assert metrics["truncated"] == 1 and 1 < metrics["turns"] <= 3 and metrics["observed"] == 0
    learnt = run(Endless, max_turns=3, mask_truncated=True, minibatches=1, epochs=1)
    assert learnt.step()["tokens"] == 0


def returning(answer: Any) -> type:
    """An environment that answers so."""

    class Wrong:
        def reset(self, problem: Problem) -> None:
            if answer == "reset":
                raise KeyError("board")

        def step(self, turn: list[int]) -> Any:
            if answer == "step":
                raise ZeroDivisionError("1/0")
            return answer

    return Wrong


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("reset", r"reset raised KeyError: 'board'"),
        ("step", r"step raised ZeroDivisionError: 1/0"),
        (([], 0.0), r"step: expected observation, reward, done, got tuple \(\[\], 0.0\)"),
        (([], float("nan"), False), r"reward: expected a finite number, got float nan"),
        (([], "1", False), r"reward: expected a finite number, got str '1'"),
        (([], 0.0, 1), r"done: expected True or False, got int 1"),
        (([16], 0.0, False), r"observation: expected token ids below 16, got list \[16\]"),
        (([-1], 0.0, False), r"observation: expected token ids below 16, got list \[-1\]"),
        (("text", 0.0, False), r"observation: expected token ids below 16, got str 'text'"),
    ],
)
def test_an_environment_that_fails_is_named_with_the_problem(answer: Any, message: str) -> None:
    problems = [Problem((3, 4), source="What is 3 + 4?")]
    episodes = Episodes(returning(answer))
    where = "step 2: environment 'Wrong', turn 1 of 'What is 3 \\+ 4\\?': "
    with pytest.raises(EnvironmentFault, match=where + message) as caught:
        episodes.play(micro_model(), scripted([]), problems, LONG, "step 2")
    assert (caught.value.__cause__ is not None) == (" raised " in message)


def test_what_makes_no_environment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"environment: expected a class or function .* got Ans"):
        Episodes(Answering())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_turns: expected at least 1, got 0"):
        Episodes(Answering, max_turns=0)
    with pytest.raises(EnvironmentFault, match=r"environment 'object', .*: reset raised Attribute"):
        run(object).step()


def test_random_numbers_depend_on_seed_and_step_alone() -> None:
    """Also those of an environment that takes them from torch."""

    class Dice(Answering):
        def step(self, turn: list[int]) -> tuple[list[int], float, bool]:
            return torch.randint(2, VOCABULARY, (2,)).tolist(), 0.0, bool(torch.rand(()) < 0.3)

    first, second = run(Dice), run(Dice)
    second.steps_done = 1
    torch.rand(5)
    second.step()
    first.step()
    assert first.drawn[1] != second.drawn[1]
    third = run(Dice)
    torch.rand(3)
    third.step()
    assert third.drawn[1] == first.drawn[1]


TEXT = """
class Counting:
    def reset(self, problem):
        self.question, self.turns = problem.source, 0

    def step(self, text):
        assert isinstance(text, str) and "<eos>" not in text
        self.turns += 1
        return f"{self.turns} and ", len(text) / 8, self.turns == 2


class Failing(Counting):
    def step(self, text):
        return self.nothing
"""


def test_the_command_with_an_environment_from_a_file(
    files: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "worlds.py"
    file.write_text(TEXT)
    given = options(files, tmp_path / "run", "--rewards", "none", "--max_new_tokens", "40")
    world = ["--environment", f"{file}:Counting", "--max_turns", "3"]
    assert main([*given, *world]) == 0
    logged = records(tmp_path / "run")
    assert all(r["environment"] == r["reward"] for r in logged[1:])
    assert max(r["turns"] for r in logged[1:]) > 1
    samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    shown = [json.loads(line)["completion"] for line in samples]
    assert any(" ⟦1 and ⟧ " in text for text in shown)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["after"]["greedy"]["turns"] >= 1
    with pytest.raises(SystemExit):
        main([*given, *world[:-1], "4", "--resume", "True"])
    assert "--max_turns: expected 3 as in" in capsys.readouterr().err
    given[given.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert main([*given, "--environment", f"{file}:Failing"]) == 1
    shown_error = capsys.readouterr().err
    assert "stopped: held-out problems: environment 'Failing', turn 1 of '" in shown_error
    assert "return self.nothing" in shown_error and "environment.py" not in shown_error
    for name, message in (("worlds:A", "path.py:name"), (f"{file}:None", "a name in")):
        with pytest.raises(SystemExit):
            main([*given, "--overwrite", "True", "--environment", name])
        assert f"--environment: expected {message}" in capsys.readouterr().err
