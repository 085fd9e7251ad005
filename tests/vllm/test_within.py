"""vLLM within the trainer's machine, by the command: its weights come as files on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.real import Command, RealServer, options, records, save_files

pytestmark = pytest.mark.timeout(3000)


def learn(process: RealServer, folder: Path, *more: str, **changes: bool) -> list[dict[str, Any]]:
    """Records of a run of 15 steps that has learnt."""
    # memory for one engine
    process.stop()
    files = save_files(folder, **changes)
    words = ["--rollout", "vllm", "--rollout_weights", "folder"]
    words += ["--rollout_folder", str(folder / "weights"), "--rollout_memory", "0.1"]
    run = Command(options(files, folder / "run", *words, *more))
    assert run.wait() == 0, run.output()
    found = records(folder / "run")
    assert [record["step"] for record in found] == list(range(1, 16))
    rewards = [record["reward"] for record in found]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    return found


def test_it_learns(process: RealServer, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """With tied embeddings, of which vLLM keeps a packed copy on a CPU."""
    found = learn(process, tmp_path, tie_word_embeddings=True)
    mean = max(record["sampler_mismatch"] for record in found)
    figure(
        f"command with vLLM within, tied: reward {found[0]['reward']:.2f} to "
        f"{found[-1]['reward']:.2f} in 15 steps, mean mismatch of a step at most {mean:.1e} nats"
    )
    # a head that stays behind is off by nats
    assert mean <= 1e-5


def test_it_learns_one_step_ahead(
    process: RealServer, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """vLLM samples in another thread than it gets its weights in."""
    found = learn(process, tmp_path, "--asynchronous", "1")
    figure(
        f"command with vLLM within, one step ahead: reward {found[0]['reward']:.2f} to "
        f"{found[-1]['reward']:.2f} in 15 steps"
    )
    assert [record["staleness"] for record in found] == [0, *[1] * 14]
    # by the same weights only in the first step
    assert found[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(record["ratio_max"] > 1.01 for record in found[1:])
