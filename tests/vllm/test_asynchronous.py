"""Rollouts one step ahead over the real server: what is learnt from, and every kind of stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core import RECIPES
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from grpo_core.trainer.vllm.server import VllmServer
from tests.micro import draw_problems, share_of_sevens
from tests.vllm.real import Command, RealServer, differences, model_like, over, records

pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*tokens with an advantage were clipped"),
]
LIMIT = 1e-5  # nats
# rewards of equal runs: a sum of logits that is rounded otherwise may change a token
REWARDS = 0.02
AHEAD = ("--asynchronous", "1", "--held_out", "4", "--evaluate_every", "15")
# of rollouts that take longer than the rest of a step
LONG = ("--max_new_tokens", "24", "--group_size", "32", "--steps", "100")
# seconds until a command waits for its server, and until one has ended that waits for nothing
PAUSE, SOON = 10, 60


def check_steps(run: Path, steps: int) -> list[dict[str, Any]]:
    """Every step once, all but the first by weights one step old."""
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    assert [record["staleness"] for record in found] == [0, *[1] * (steps - 1)]
    return found


def rewards(found: list[dict[str, Any]]) -> list[float]:
    """Of each step."""
    return [record["reward"] for record in found]


@pytest.fixture(scope="module")
def whole(
    process: RealServer, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The records of a run that nothing has stopped."""
    if not process.is_up():
        process.stop()
        process.start()
    folder = tmp_path_factory.mktemp("whole")
    run = Command(over(process.url, files, folder, *AHEAD))
    assert run.wait() == 0, run.output()
    return check_steps(folder / "run", 15)


def test_it_learns(whole: list[dict[str, Any]], figure: Callable[[str], None]) -> None:
    found = rewards(whole)
    figure(f"command one step ahead: reward {found[0]:.2f} to {found[-1]:.2f} in 15 steps")
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.2
    # completions by the same weights, and the ratio to them
    assert whole[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(record["ratio_max"] > 1.01 for record in whole[1:])


def test_the_old_policy_is_the_one_that_sampled(
    server: RealServer, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Its log-probabilities are those of the weights one step ago, not of the newest."""
    model, steps = model_like(), 4
    config = TrainerConfig(
        objective=RECIPES["dapo"],
        steps=steps,
        prompts_per_step=4,
        group_size=8,
        minibatches=1,
        epochs=1,
        learning_rate=1e-2,
        warmup_steps=0,
        asynchronous=1,
        sampling=Sampling(12),
    )
    engine = VllmServer(server.url, model, folder=str(tmp_path))
    run = Trainer(model, draw_problems, share_of_sevens, config, engine=engine)
    versions, worst, stale = [deepcopy(model)], 0.0, []
    for step in range(steps):
        if run.ahead.round is None:
            run.ahead.begin(step)
        assert run.ahead.round is not None
        round_ = run.ahead.round.result()
        prompts, drawn = [problem.prompt for problem in round_.problems], round_.rollout
        assert drawn.weight_version == max(step - 1, 0)
        own = torch.cat(differences(versions[max(step - 1, 0)], prompts, drawn))
        worst = max(worst, own.abs().max().item())
        varied = round_.rewards.view(4, 8).std(1).repeat_interleave(8) > 0
        newest = differences(versions[step], prompts, drawn)
        # groups of equal rewards have no advantage, and are left out
        newest = torch.cat([each for each, has in zip(newest, varied, strict=True) if has])
        metrics = run.step()
        # of the only update
        assert metrics["ratio_max"] == pytest.approx(newest.max().exp().item(), abs=1e-4)
        assert metrics["ratio_min"] == pytest.approx(newest.min().exp().item(), abs=1e-4)
        assert metrics["staleness"] == min(step, 1)
        assert "sampler_mismatch" not in metrics
        if step:
            stale.append(newest.abs().max().item())
        versions.append(deepcopy(model))
    figure(
        f"one step ahead: mismatch at most {worst:.1e} nats with the weights that sampled, "
        f"at least {min(stale):.2f} with the newest"
    )
    assert worst <= LIMIT < 1e-2 < min(stale)
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_is_killed_loses_nothing(
    server: RealServer, files: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    words = over(server.url, files, tmp_path, *AHEAD)
    run = Command(words)
    run.wait_for(3)
    run.kill()
    done = records(tmp_path / "run")
    assert len(done) < 15
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    found = check_steps(tmp_path / "run", 15)
    assert rewards(found) == pytest.approx(rewards(whole), abs=REWARDS)


def test_a_server_that_dies_during_a_rollout_ahead(
    server: RealServer, files: Path, tmp_path: Path
) -> None:
    """The step before is complete and saved; with a new server the run goes on."""
    words = over(server.url, files, tmp_path, *AHEAD, *LONG, "--steps", "8")
    run = Command(words)
    run.wait_for(3)
    server.freeze()
    time.sleep(PAUSE)
    before = len(records(tmp_path / "run"))
    assert run.process.poll() is None and before < 8
    server.stop()
    assert run.wait() == 1
    assert run.output().count("is the server up?") == 1 and "Traceback" not in run.output()
    assert len(records(tmp_path / "run")) == before
    server.start()
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 9))
    # the rollout that was lost is sampled anew, by the newest weights
    stale = [0, *[1] * 7]
    stale[before] = 0
    assert [record["staleness"] for record in found] == stale


def test_ctrl_c_saves_the_rollout_ahead(
    server: RealServer, files: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Also for a server that was started anew."""
    words = over(server.url, files, tmp_path, *AHEAD, "--checkpoint_every", "100")
    run = Command(words)
    run.wait_for(3)
    run.interrupt()
    assert run.wait() == 128 + signal.SIGINT
    assert len(records(tmp_path / "run")) < 15 and "Traceback" not in run.output()
    # the completions come from the checkpoint, all weights from the trainer
    server.stop()
    server.start()
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    found = check_steps(tmp_path / "run", 15)
    assert rewards(found) == pytest.approx(rewards(whole), abs=REWARDS)


@pytest.mark.parametrize("ahead", ["1", "0"])
def test_ctrl_c_twice_ends_a_run_whose_server_is_silent(
    server: RealServer, files: Path, tmp_path: Path, ahead: str
) -> None:
    """It waits for no completion."""
    run = Command(over(server.url, files, tmp_path, *LONG, "--asynchronous", ahead))
    run.wait_for(2)
    server.freeze()
    try:
        time.sleep(PAUSE)
        run.interrupt()
        time.sleep(PAUSE)
        # it waits for the step to end
        assert run.process.poll() is None
        run.interrupt()
        assert run.process.wait(SOON) == 128 + signal.SIGINT
        assert "Traceback" not in run.output()
    finally:
        run.kill()
        server.thaw()
