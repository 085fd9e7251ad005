"""The second process samples as this one would, and never outlives or blocks a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core import with_fused_head
from grpo_core.trainer import worker as module
from grpo_core.trainer.rewards import RewardError
from grpo_core.trainer.rollout import Sampling, rollout
from grpo_core.trainer.weights import ModelWeights
from grpo_core.trainer.worker import Worker, _shares
from tests.compiled import ROOT
from tests.engines import BegunEngine
from tests.micro import MAX_NEW_TOKENS, micro_model
from tests.test_asynchronous import Stopped, trainer
from tests.test_checkpoint import at_step, records
from tests.test_rollouts import same_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*tokens with an advantage were clipped"),
]

PROMPTS = [[3, 4, 5], [6, 7], [2, 9, 9, 9]] * 3
SAMPLINGS = (Sampling(MAX_NEW_TOKENS), Sampling(MAX_NEW_TOKENS, 0.7, top_p=0.8))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """Started once, since that takes seconds."""
    made = Worker(with_fused_head(micro_model(tie_word_embeddings=True)))
    yield made
    made.close()


def assert_samples_as_here(worker: Any, seed: int, sampling: Sampling) -> None:
    """All tensors of a rollout, bit for bit, and nothing drawn from this process's generator."""
    torch.manual_seed(seed)
    expected = rollout(worker.model, PROMPTS, sampling)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    worker.update_weights(ModelWeights(worker.model), seed)
    drawn = worker.generate(PROMPTS, sampling)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.weight_version == seed
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(drawn, name), value), name
    assert (drawn.kept is None) == (expected.kept is None)
    if expected.kept is not None:
        assert torch.equal(drawn.kept.ids, expected.kept.ids)
        assert torch.equal(drawn.kept.offsets, expected.kept.offsets)


def move(model: Any) -> None:
    """An update of the trained weights."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)


def test_it_samples_as_this_process_does(worker: Worker) -> None:
    """Before and after updates; the samples change with the seed and with the weights."""
    for seed in range(3):
        for sampling in SAMPLINGS:
            assert_samples_as_here(worker, seed, sampling)
        move(worker.model)


def test_weights_that_have_moved_since_are_not_read(worker: Worker) -> None:
    """Until they are sent: the trainer changes them while the process samples."""
    worker.update_weights(ModelWeights(worker.model), 7)
    torch.manual_seed(5)
    expected = rollout(worker.model, PROMPTS, SAMPLINGS[0])
    torch.manual_seed(5)
    receive = worker.begin(PROMPTS, SAMPLINGS[0])
    move(worker.model)
    drawn = receive()
    assert torch.equal(drawn.sampler_logp, expected.sampler_logp)


def test_signals_to_the_group_and_errors_leave_it_alive(worker: Worker) -> None:
    assert_samples_as_here(worker, 3, SAMPLINGS[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker._process.pid, number)
    with pytest.raises(ConnectionError, match=r"raised Traceback(.|\n)*prompts: expected at least"):
        worker.generate([[]], SAMPLINGS[0])
    assert_samples_as_here(worker, 4, SAMPLINGS[0])


def test_the_death_of_the_process_is_said_and_another_can_start(worker: Worker) -> None:
    """Each process gets its part of the threads."""
    worker.start()
    threads = torch.get_num_threads()
    worker.close()
    assert worker._process.exitcode == -signal.SIGKILL
    before = torch.get_num_threads()
    assert_samples_as_here(worker, 3, SAMPLINGS[1])
    assert torch.get_num_threads() == _shares(before)[0] == threads
    os.kill(worker._process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="has ended with exit code -9"):
            worker.generate(PROMPTS, SAMPLINGS[0])
    worker.close()
    assert torch.get_num_threads() == before


def test_shares_of_the_threads() -> None:
    expected = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (3, 2), 16: (8, 8)}
    assert {threads: _shares(threads) for threads in expected} == expected


def test_weights_that_shared_memory_cannot_hold_are_refused(monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module, "SHARED_MEMORY", Path("/"))
    with pytest.raises(ValueError, match=r"expected 0 MiB in / for the weights .* got 0 MiB"):
        Worker(micro_model()).update_weights(None, 0)


def test_a_model_that_pickle_cannot_read_is_refused() -> None:
    model = micro_model()
    model.own = lambda: None
    with pytest.raises(ValueError, match="asynchronous: expected a model for pickle, got"):
        Worker(model).update_weights(None, 0)


@pytest.mark.slow
def test_an_adapter_and_checkpointed_activations() -> None:
    peft = pytest.importorskip("peft")
    model = micro_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"])
    model = peft.get_peft_model(model, settings)
    worker = Worker(with_fused_head(model))
    for seed in range(2):
        assert_samples_as_here(worker, seed, SAMPLINGS[seed])
        move(model)
    shared = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert worker._shared.numel() == shared
    worker.close()


@pytest.mark.slow
def test_a_run_with_the_process_is_that_of_an_engine_in_this_one(tmp_path: Path) -> None:
    """Records and weights; at the end the process has ended."""
    runs = []
    for name, engine in (("worker", None), ("engine", BegunEngine(micro_model(seed=9)))):
        run = trainer(engine, tmp_path / name, dynamic_sampling="resample")
        run.train()
        runs.append(run)
    assert records(tmp_path / "worker") == records(tmp_path / "engine")
    assert same_weights(runs[0].model, runs[1].model)
    assert process_of(runs[0]).exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_every_end_of_a_run_ends_the_process() -> None:
    """An error, Ctrl-C, and the death of the process itself in the middle of a run."""

    for cause, error in ((Stopped, RewardError), (KeyboardInterrupt, KeyboardInterrupt)):

        def raising(cause: Any = cause) -> None:
            raise cause

        run = trainer(reward=at_step(3, raising))
        with pytest.raises(error):
            run.train()
        assert process_of(run).exitcode == -signal.SIGKILL
    run = trainer(steps=50)
    run.console.step = lambda record, *_: process_of(run).kill() if record["step"] == 2 else None
    with pytest.raises(ConnectionError, match="has ended with exit code -9"):
        run.train()


def process_of(run: Any) -> Any:
    """The second process of a trainer."""
    return run.sampler.worker._process


KILLED = """
import os, signal, time
from tests.micro import draw_problems, micro_model
from tests.test_asynchronous import trainer
from tests.test_checkpoint import at_step


def main():
    run = trainer(steps=50)
    run.step()
    print(run.sampler.worker._process.pid, flush=True)
    {end}


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "return"])
def test_the_process_does_not_outlive_the_trainers(end: str, tmp_path: Path) -> None:
    file = tmp_path / "killed.py"
    file.write_text(KILLED.format(end=end))
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == (0 if end == "return" else -signal.SIGKILL), done.stderr
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_a_sharded_model_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="asynchronous: expected 0, or an engine that all ranks"):
        trainer()
    monkeypatch.undo()
    monkeypatch.setattr(module, "world", lambda: 2)
    with pytest.raises(ValueError, match="got the model itself, on 2 ranks or sharded"):
        Worker(micro_model())
