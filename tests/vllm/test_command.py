"""The command over the real server: it learns, and it goes on after a kill on either side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.protocol import Talk
from tests.vllm.real import Command, RealServer, model_like, over, records

pytestmark = pytest.mark.timeout(3000)
LIMIT = 1e-5  # nats, mean over a step's tokens


def check_steps(found: list[dict[str, Any]], steps: int) -> None:
    """Every step once, each sampled with the weights of its own."""
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    assert max(record["sampler_mismatch"] for record in found) <= LIMIT


def test_it_learns(
    server: RealServer, files: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    run = Command(over(server.url, files, tmp_path, "--held_out", "4", "--evaluate_every", "15"))
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    check_steps(found, 15)
    rewards = [record["reward"] for record in found]
    figure(
        f"command over the server: reward {rewards[0]:.2f} to {rewards[-1]:.2f} in 15 steps, "
        f"mean mismatch of a step at most {max(r['sampler_mismatch'] for r in found):.1e} nats"
    )
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_a_trainer_that_is_killed_goes_on(server: RealServer, files: Path, tmp_path: Path) -> None:
    """Also if that was within an update, which stands open and paused."""
    words = over(server.url, files, tmp_path, "--steps", "8")
    run = Command(words)
    run.wait_for(2)
    run.kill()
    done = len(records(tmp_path / "run"))
    assert done < 8
    talk = Talk(server.url, tmp_path, model_like(seed=3))
    talk.open()
    assert talk.post("/pause?mode=wait")[0] == 200
    assert talk.update(talk.save("left.safetensors"))[0] == 200
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    check_steps(records(tmp_path / "run"), 8)


def test_a_server_that_is_killed(server: RealServer, files: Path, tmp_path: Path) -> None:
    """The trainer says so in a line and ends; with a new server it goes on."""
    words = over(server.url, files, tmp_path, "--steps", "12")
    run = Command(words)
    run.wait_for(2)
    server.stop()
    assert run.wait() not in (0, None)
    assert "is the server up?" in run.output()
    assert len(records(tmp_path / "run")) < 12
    server.start()
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    check_steps(records(tmp_path / "run"), 12)


def test_what_does_not_fit_the_server_is_refused_before_the_run(
    server: RealServer, files: Path, tmp_path: Path
) -> None:
    run = Command(over(server.url, files, tmp_path, "--max_new_tokens", "30"))
    assert run.wait() == 2
    assert "--max_new_tokens: expected at most 40 tokens" in run.output()
    assert not records(tmp_path / "run")
