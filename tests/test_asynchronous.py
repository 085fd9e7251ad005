"""Rollouts one step ahead, against a loop written out by hand, and through every kind of stop."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import RECIPES, PolicyFactor, SamplerCorrection
from grpo_core.runs.config import RunConfig
from grpo_core.runs.demo.config import DemoConfig
from grpo_core.runs.figures import choose_cells
from grpo_core.trainer.baselines.ppo import PPOTrainer
from grpo_core.trainer.checkpoint import save_trainer
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.data import Epochs
from grpo_core.trainer.groups import randomness
from grpo_core.trainer.rewards import RewardError
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, rollout
from grpo_core.trainer.signals import Interrupted
from grpo_core.trainer.trainer import Trainer
from tests.engines import BegunEngine, CopyEngine
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens
from tests.test_checkpoint import assert_same, at_step, records
from tests.test_rollouts import same_weights
from tests.test_trainer import without_times
from tests.test_vllm import engine as stand_in  # noqa: F401
from tests.test_vllm import path, vllm  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*tokens with an advantage were clipped"),
]

STEPS = 5
SAMPLING = Sampling(MAX_NEW_TOKENS)


def begun(**settings: Any) -> BegunEngine:
    """An engine that starts with other weights."""
    return BegunEngine(micro_model(seed=9), **settings)


def trainer(
    engine: Any = None,
    directory: Path | None = None,
    reward: Any = share_of_sevens,
    model: Any = None,
    problems: Any = draw_problems,
    **changes: Any,
) -> Trainer:
    """Five asynchronous steps of 16 completions; dropout draws random numbers in updates."""
    settings: dict[str, Any] = {
        "objective": RECIPES["dapo"],
        "steps": STEPS,
        "prompts_per_step": 4,
        "group_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "checkpoint_every": 1,
        "asynchronous": 1,
        "sampling": SAMPLING,
    }
    model = model or micro_model(attention_dropout=0.1).train()
    return Trainer(
        model,
        problems,
        reward,
        TrainerConfig(**settings | changes),
        metrics_path=directory and directory / "metrics.jsonl",
        checkpoints=directory and directory / "checkpoints",
        engine=engine,
    )


def by_hand(steps: int, rates: Sequence[float]) -> tuple[Any, list[float]]:
    """DAPO by SGD in plain PyTorch: step k learns from completions by the weights after k - 2."""
    model, rewards = micro_model(), []
    versions = [deepcopy(model)]
    for k in range(1, steps + 1):
        with randomness(0, k - 1, torch.device("cpu")) as rng:
            problems = [each for each in draw_problems(4, rng) for _ in range(4)]
            order = torch.randperm(16)
            drawn = rollout(versions[max(k - 2, 0)], [each.prompt for each in problems], SAMPLING)
        reward = share_of_sevens(problems, drawn.completions()).total
        rewards.append(reward.mean().item())
        groups = reward.view(4, 4)
        advantage = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)
        for _ in range(2):
            for part in order.chunk(2):
                loss = clipped(model, drawn, part, advantage.flatten())
                model.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                with torch.no_grad():
                    for weight in model.parameters():
                        weight -= rates[k - 1] * weight.grad
        versions.append(deepcopy(model))
    return model, rewards


def clipped(model: Any, drawn: Rollout, part: Tensor, advantage: Tensor) -> Tensor:
    """-min(r A, clip(r, 0.8, 1.28) A), a mean over tokens, with r = π / π_sampler."""
    ids = torch.cat([drawn.prompt, drawn.completion], 1)[part]
    mask = torch.cat([drawn.prompt_mask, drawn.completion_mask], 1)[part]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
    T = drawn.completion.shape[1]
    logp = logits[:, -T - 1 : -1].log_softmax(-1).gather(2, ids[:, -T:, None]).squeeze(2)
    ratio = (logp - drawn.sampler_logp[part]).exp()
    A = advantage[part][:, None]
    tokens = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    mask = drawn.completion_mask[part]
    return (tokens * mask).sum() / mask.sum()


@pytest.mark.parametrize("waiting", [False, True])
def test_it_is_the_loop_written_out_by_hand(waiting: bool) -> None:
    """Also where completions come only after the step has been made."""
    updated = threading.Semaphore(1)
    engine = begun(hold=updated.acquire) if waiting else begun()
    run = trainer(engine, model=micro_model(), learning_rate=0.5)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    history = []
    for _ in range(STEPS):
        history.append(run.step())
        updated.release()
    model, rewards = by_hand(STEPS, [metrics["learning_rate"] for metrics in history])
    assert [metrics["reward"] for metrics in history] == pytest.approx(rewards, abs=1e-6)
    assert len(set(rewards)) > 2
    for mine, other in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    assert [metrics["staleness"] for metrics in history] == [0, 1, 1, 1, 1]
    # nothing is sampled for a step that is not made
    assert engine.updates == [0, 1, 2, 3]


def test_the_ratio_is_to_the_sampler() -> None:
    """Its log-probabilities are 0.4 nats too low; nothing else is computed for the ratio."""
    for k in range(2):
        run = trainer(begun(off=-0.4), minibatches=1, epochs=1, model=micro_model())
        assert run.config.old_logp == "sampler"
        metrics = [run.step() for _ in range(k + 1)][-1]
        assert "sampler_mismatch" not in metrics
        if k == 0:
            assert metrics["ratio_min"] == pytest.approx(math.exp(0.4), rel=1e-4)
            assert metrics["ratio_max"] == pytest.approx(math.exp(0.4), rel=1e-4)
        else:
            # weights that have moved since
            assert metrics["ratio_max"] - metrics["ratio_min"] > 0.1


def test_an_engine_without_a_part_of_the_weights_is_refused_at_the_start() -> None:
    """By one more forward, of the first completions alone, which draws no random numbers."""
    run = trainer(begun(skips="lm_head"))
    with pytest.raises(RuntimeError, match=r"sampler_mismatch: .* the head of tied embeddings"):
        run.step()
    assert run.steps_done == 0
    # also in turn with the training
    sync = trainer(begun(skips="lm_head"), asynchronous=0, old_logp="sampler")
    with pytest.raises(RuntimeError, match=r"sampler_mismatch: .* the head of tied embeddings"):
        sync.step()
    runs = [trainer(begun()) for _ in range(2)]
    runs[1].sampler.is_checked = True
    for _ in range(2):
        first, second = (without_times([run.step()]) for run in runs)
        assert first == second
    assert runs[0].sampler.is_checked and same_weights(runs[0].model, runs[1].model)
    # completions by other weights than the trainer's say nothing
    runs[0].sampler.is_checked, runs[0].sampler.engine.off = False, -0.6
    runs[0].step()
    runs[0].step()


def test_a_correction_without_a_ratio_compares_with_the_sampler() -> None:
    factor = PolicyFactor(SamplerCorrection(high=5.0), current=True)
    objective = RECIPES["gpg"].replace(factor=factor)
    metrics = trainer(begun(off=-0.4), objective=objective, model=micro_model(), epochs=1).step()
    assert metrics["factor_mean"] == pytest.approx(math.exp(0.4), rel=0.1)
    plain = RECIPES["dapo"].replace(factor=PolicyFactor(SamplerCorrection()))
    with pytest.raises(ValueError, match=r"objective\.factor: expected current=True with asynchr"):
        trainer(begun(), objective=plain)


@pytest.mark.parametrize("mode", ["filter", "resample"])
def test_dynamic_sampling_draws_again_by_the_newest_weights(mode: str) -> None:
    """The first round is a step old and the others are not; a mean over both is logged."""
    history = trainer(begun(), dynamic_sampling=mode, steps=8).train()[1:]
    again = [metrics.get("resamples", 0) for metrics in history]
    assert [metrics["staleness"] for metrics in history] == pytest.approx(
        [0, *(1 / (1 + more) for more in again[1:])]
    )
    assert any(again[1:]) == (mode == "resample")
    for metrics in history:
        assert metrics["groups_drawn"] == 4 * (1 + metrics.get("resamples", 0))


class Stopped(Exception):
    """Something that ends a run without saving."""


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize("how", ["signal", "failure"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"dynamic_sampling": "resample"}, id="resampled"),
        pytest.param({"sampling": Sampling(8, top_p=0.9)}, id="filtered", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_one_that_never_stopped(
    how: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, with problems in epochs; the pending rollout is not sampled again."""
    data = [Problem((3, n)) for n in range(2, 9)]
    if "dynamic_sampling" not in changes:
        changes = {"shuffle_rewards": True, **changes}

    def run(name: str, **named: Any) -> Trainer:
        return trainer(begun(), tmp_path / name, problems=Epochs(data), **named, **changes)

    whole = run("whole")
    whole.train()
    first = run("parts", checkpoint_every=2)
    if how == "signal":
        first.console.step = lambda record, *_: (
            signal.raise_signal(signal.SIGTERM) if record["step"] == 2 else None
        )
        with pytest.raises(Interrupted):
            first.train()
    else:
        first.console.step = lambda record, *_: stop() if record["step"] == 3 else None
        with pytest.raises(Stopped):
            first.train()
    second = run("parts")
    assert second.resume() == 2
    second.train()
    assert_same(second, whole)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert second.draw_problems.position == whole.draw_problems.position
    sampler: Any = second.sampler.engine
    assert sampler.updates[0] == 2


def test_a_rollout_that_fails_stops_the_next_step_and_no_checkpoint(tmp_path: Path) -> None:
    """The reward of step 3 raises while step 2 trains; step 2 is saved, without a rollout."""
    data = Epochs([Problem((3, n)) for n in range(2, 9)])
    run = trainer(begun(), tmp_path, at_step(3, stop), problems=data)
    with pytest.raises(RewardError, match=r"step 3: .* raised Stopped"):
        run.train()
    again = trainer(begun(), tmp_path, problems=data)
    assert again.resume() == 2 and again.ahead.round is None
    assert again.draw_problems.position == 8
    assert [each["staleness"] for each in again.train()] == [0, 1, 1]


def test_a_resume_drops_what_was_pending(tmp_path: Path) -> None:
    run = trainer(begun(), tmp_path)
    run.step()
    save_trainer(run, tmp_path / "checkpoints")
    expected = run.step()
    assert run.resume() == 1
    assert without_times([run.step()]) == without_times([expected])


def test_an_evaluation_waits_and_has_the_newest_weights() -> None:
    engine = begun()
    run = trainer(engine, steps=4, evaluate_every=2)
    seen: list[bool] = []

    def evaluation() -> dict[str, float]:
        seen.append(run.ahead.round is None or run.ahead.round.done())
        run.draw([[3, 4]], SAMPLING)
        seen.append(same_weights(engine.model, run.model))
        return {}

    engine.hold = lambda: threading.Event().wait(0.05)
    run.train(evaluation)
    assert seen == [True] * 6
    assert engine.updates == [0, 1, 2, 4]
    # also outside of the loop
    engine.hold = lambda: threading.Event().wait(1)
    run = trainer(engine)
    run.ahead.begin(0)
    run.sampler.draw = lambda *_: run.ahead.round.done()
    assert run.draw([[3, 4]], SAMPLING)


def test_no_weights_are_sent_before_the_rollouts_of_all_ranks_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 would send while another one still samples."""
    run = trainer(engine := begun())
    run.step()
    waited: list[tuple[bool, list[int]]] = []

    def barrier() -> None:
        waited.append((run.ahead.round.done(), list(engine.updates)))

    monkeypatch.setattr("grpo_core.trainer.ahead.barrier", barrier)
    run.draw([[3, 4]], SAMPLING)
    assert waited == [(True, [0])] and engine.updates == [0, 1]


def test_an_end_drops_the_round_that_it_breaks_off() -> None:
    """The end of the second process is not the error of a later step."""
    gate = threading.Event()
    run = trainer(begun(hold=gate.wait))
    run.ahead.begin(0)
    pending = run.ahead.round

    class Ended:
        def close(self) -> None:
            gate.set()
            pending.result()

    run.sampler.worker = Ended()
    run.ahead.close()
    assert run.ahead.round is None


def test_a_resume_starts_the_second_process_which_takes_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before a last step, for which nothing is sampled."""
    first = trainer(begun(), tmp_path, steps=3)
    first.console.step = lambda record, *_: stop() if record["step"] == 3 else None
    with pytest.raises(Stopped):
        first.train()
    started = []
    monkeypatch.setattr("grpo_core.trainer.worker.Worker.start", lambda self: started.append(self))
    second = trainer(None, tmp_path, steps=3)
    assert second.resume() == 2 and started == [second.sampler.worker]


def test_without_the_option_nothing_runs_ahead() -> None:
    for engine in (None, CopyEngine(micro_model(seed=9))):
        run = trainer(engine, asynchronous=0)
        assert run.sampler.worker is None
        metrics = run.step()
        assert run.ahead.round is None and "staleness" not in metrics


def test_an_engine_that_cannot_begin_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an engine with `begin`, got CopyEngine"):
        trainer(CopyEngine(micro_model()))
    with pytest.raises(ValueError, match="asynchronous: expected 0 or 1, got 2"):
        trainer(begun(), asynchronous=2)
    settings = TrainerConfig(objective=RECIPES["ppo"], asynchronous=1)
    with pytest.raises(ValueError, match="asynchronous: expected 0, since PPO's old policy is"):
        PPOTrainer(micro_model(), draw_problems, share_of_sevens, settings)


def test_options_of_the_commands() -> None:
    given: dict[str, Any] = {"model": "m", "data": "d.jsonl", "asynchronous": 1}
    assert RunConfig(**given).trainer(SAMPLING).old_logp == "sampler"
    assert DemoConfig(asynchronous=1).trainer(SAMPLING).old_logp == "sampler"
    with pytest.raises(ValueError, match="asynchronous: expected 0 with --environment, got 1"):
        RunConfig(**given, environment="calculator.py:Calculator")
    with pytest.raises(ValueError, match="rollout_sleep: expected False with --asynchronous 1"):
        RunConfig(**given, rollout_sleep=True)
    given["sampler_correction"] = "truncate"
    with pytest.raises(ValueError, match="sampler_correction: expected none with --asynchronous 1"):
        RunConfig(**given).trainer(SAMPLING)
    for asynchronous in (0, 1):
        found = RunConfig(**given | {"asynchronous": asynchronous, "objective": "rloo"})
        factor = found.trainer(SAMPLING).objective.factor
        assert factor == PolicyFactor(SamplerCorrection(), current=bool(asynchronous))


def test_several_processes_need_an_engine_that_they_share(monkeypatch: Any) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(model="m", data="d.jsonl", asynchronous=1, rewards=["accuracy"])
    with pytest.raises(ValueError, match="rollout: expected vllm-server with --asynchronous 1"):
        config.check_here()


def test_staleness_is_on_the_console() -> None:
    run = trainer(begun())
    record = [run.step() for _ in range(2)][-1]
    assert choose_cells(record, [], run.config, 80)["stale"] == "1.000"
    sync = trainer(asynchronous=0)
    assert "stale" not in choose_cells(sync.step(), [], sync.config, 200)


def test_a_stand_in_for_vllm_samples_in_the_background(stand_in: Any) -> None:  # noqa: F811
    """Weights are sent once a step, before the completions of the next one are asked for."""
    run = trainer(stand_in, model=micro_model(), minibatches=1, epochs=1)
    history = run.train()[1:]
    assert [metrics["staleness"] for metrics in history] == [0, 1, 1, 1, 1]
    finishes = [call for call in stand_in.worker.calls if call.startswith("finish")]
    assert finishes == [f"finish {k}" for k in range(STEPS - 1)]
    # on policy in the first step alone, if that had rewards to learn from
    assert history[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert max(metrics["ratio_max"] for metrics in history[1:]) > 1.01
