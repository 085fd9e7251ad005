"""vLLM within the trainer's machine, by the command: its weights come as files on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm.real import Command, RealServer, options, records

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs make test-vllm"),
    pytest.mark.timeout(1800),
]


def test_it_learns_and_goes_on(
    process: RealServer, files: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    # memory for one engine
    process.stop()
    words = ["--rollout", "vllm", "--rollout_weights", "folder"]
    words += ["--rollout_folder", str(tmp_path / "weights"), "--rollout_memory", "0.1"]
    words = options(files, tmp_path / "run", *words)
    run = Command(words)
    run.wait_for(5)
    run.kill()
    run = Command([*words, "--resume", "True"])
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 16))
    rewards = [record["reward"] for record in found]
    worst = max(record["sampler_mismatch_max"] for record in found)
    figure(
        f"command with vLLM within: reward {rewards[0]:.2f} to {rewards[-1]:.2f} in 15 steps, "
        f"mismatch at most {worst:.1e} nats"
    )
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert worst <= 1e-5
