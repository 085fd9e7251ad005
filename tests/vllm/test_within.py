"""vLLM within the trainer's machine, by the command: its weights come as files on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm.real import Command, RealServer, options, records, save_files

pytestmark = pytest.mark.timeout(3000)


def test_it_learns(process: RealServer, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """With tied embeddings, of which vLLM keeps a packed copy on a CPU."""
    # memory for one engine
    process.stop()
    files = save_files(tmp_path, tie_word_embeddings=True)
    words = ["--rollout", "vllm", "--rollout_weights", "folder"]
    words += ["--rollout_folder", str(tmp_path / "weights"), "--rollout_memory", "0.1"]
    run = Command(options(files, tmp_path / "run", *words))
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 16))
    rewards = [record["reward"] for record in found]
    mean = max(record["sampler_mismatch"] for record in found)
    figure(
        f"command with vLLM within, tied: reward {rewards[0]:.2f} to {rewards[-1]:.2f} "
        f"in 15 steps, mean mismatch of a step at most {mean:.1e} nats"
    )
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    # a head that stays behind is off by nats
    assert mean <= 1e-5
