"""Checkpoints are whole or not there, and what goes on from one is the run that never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core import RECIPES
from grpo_core.trainer.checkpoint import checkpoints, new_folder, save_trainer, step_of
from grpo_core.trainer.console import Console
from grpo_core.trainer.data import Epochs
from grpo_core.trainer.loop import record
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.monitor import append_json, writing
from grpo_core.trainer.rewards import Scores
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.signals import Interrupted, heeding_interrupts, stop_request
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.combinations import slow
from tests.compiled import ROOT
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

STEPS = 5


def trainer(
    directory: Path | None = None,
    model: PreTrainedModel | None = None,
    reward: Any = share_of_sevens,
    **changes: Any,
) -> Trainer:
    """Five short steps with a reference, dropout (which draws numbers) and a checkpoint of each."""
    settings: dict[str, Any] = {
        "objective": RECIPES["grpo"],
        "steps": STEPS,
        "prompts_per_step": 2,
        "group_size": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "sampling": Sampling(MAX_NEW_TOKENS),
        "checkpoint_every": 1,
    }
    model = model or micro_model(attention_dropout=0.1)
    model.train()
    torch.manual_seed(7)
    return Trainer(
        model,
        draw_problems,
        reward,
        TrainerConfig(**settings | changes),
        metrics_path=None if directory is None else directory / "metrics.jsonl",
        checkpoints=None if directory is None else directory / "checkpoints",
    )


def at_step(step: int, act: Callable[[], object]) -> Any:
    """A reward that does something when the given step is scored, once."""
    calls = iter(range(1, 1000))

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        if next(calls) == step:
            act()
        return share_of_sevens(problems, completions)

    return reward


def records(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINE} for line in lines]


def assert_same(run: Trainer, other: Trainer) -> None:
    """Weights, optimizer state and counters, bit for bit."""
    for mine, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    states = run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name])
    assert run.steps_done == other.steps_done


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """The run that never stopped."""
    directory = tmp_path_factory.mktemp("straight")
    run = trainer(directory)
    run.train()
    return run, directory


@pytest.mark.parametrize("number", [signal.SIGINT, *slow(signal.SIGTERM)])
def test_a_signal_ends_the_run_after_its_step(
    number: signal.Signals, straight: tuple[Trainer, Path], tmp_path: Path
) -> None:
    handler = signal.getsignal(number)
    reward = at_step(3, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted, match=f"{number.name}: stopped after saving .*step-000003"):
        trainer(tmp_path, reward=reward, checkpoint_every=100).train()
    assert signal.getsignal(number) is handler
    run = trainer(tmp_path)
    assert run.resume() == 3
    run.train()
    assert_same(run, straight[0])
    assert records(tmp_path) == records(straight[1])


@contextmanager
def inherited(number: signal.Signals, handler: Any) -> Iterator[None]:
    """As in a process that has begun with this handler."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_second_signal_does_not_wait(handler: Any, tmp_path: Path) -> None:
    """Nor where SIGINT is ignored from the start, as in a background job of a script."""

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with inherited(signal.SIGINT, handler):
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, reward=at_step(2, twice)).train()
        assert signal.getsignal(signal.SIGINT) == handler
    assert [step_of(path) for path in checkpoints(tmp_path / "checkpoints")] == [1]


def own_handler(number: int, frame: object) -> None:
    """Somebody else's."""


@pytest.mark.parametrize(
    ("number", "handler", "second"),
    [
        (signal.SIGINT, signal.SIG_IGN, signal.default_int_handler),
        (signal.SIGINT, signal.SIG_DFL, signal.SIG_DFL),
        (signal.SIGINT, own_handler, own_handler),
        (signal.SIGTERM, signal.SIG_IGN, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL, signal.SIG_DFL),
        (signal.SIGTERM, own_handler, own_handler),
    ],
)
def test_what_a_second_signal_does(number: signal.Signals, handler: Any, second: Any) -> None:
    with inherited(number, handler):
        with stop_request() as request:
            assert request.number == 0
            signal.raise_signal(number)
            assert request.number == number
            assert signal.getsignal(number) == second
        assert signal.getsignal(number) == handler


def test_an_ignored_interrupt_is_heeded() -> None:
    """Another handler than that is left alone, as is what a thread cannot set."""
    with inherited(signal.SIGINT, signal.SIG_IGN):
        with pytest.raises(KeyboardInterrupt), heeding_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with ThreadPoolExecutor(1) as threads:
            threads.submit(lambda: heeding_interrupts().__enter__()).result()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    with inherited(signal.SIGINT, own_handler), heeding_interrupts():
        assert signal.getsignal(signal.SIGINT) == own_handler


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within it no file can be longer than `room` bytes: the system refuses the rest of it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [20_000, 60_000], ids=["in the weights", "in trainer.pt"])
def test_a_full_disk_is_named_and_costs_no_checkpoint(room: int, tmp_path: Path) -> None:
    """safetensors writes 45 kB of weights, torch's zip writer the rest; neither names a path."""
    run = trainer(tmp_path)
    run.step()
    folder = tmp_path / "checkpoints"
    first = save_trainer(run, folder)
    run.step()
    second = re.escape(str(folder / "step-000002"))
    expected = rf"{second}: could not be written; is the disk full \(\d+ MiB are free\)"
    with full_disk(room), pytest.raises(OSError, match=expected):
        save_trainer(run, folder)
    assert list(folder.iterdir()) == [first]
    assert trainer(tmp_path).resume() == 1


def test_a_full_disk_in_the_middle_of_shards(tmp_path: Path) -> None:
    shards = {"model": dict(micro_model().state_dict())}
    folder = tmp_path / "step-000001"
    with (
        full_disk(20_000),
        pytest.raises(OSError, match="step-000001: could not be written; is"),
        new_folder(folder) as unfinished,
    ):
        dcp.save(shards, checkpoint_id=unfinished / "shards")
    assert not list(tmp_path.iterdir())


def test_other_errors_of_writing_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "nowhere" / "file").write_text("")
    for kind in (RuntimeError, torch.OutOfMemoryError):
        with pytest.raises(kind, match="of another cause"), writing(tmp_path):
            raise kind("of another cause")
    file = tmp_path / "metrics.jsonl"
    with full_disk(100), pytest.raises(OSError, match=r"metrics\.jsonl: could not be written; is"):
        append_json(file, {"text": 200 * "x"})


def test_records_after_the_checkpoint_are_taken_back(
    straight: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """The run went on for two steps and half a line after its last checkpoint, and then died."""
    run = trainer(tmp_path, checkpoint_every=2)
    record(run, {"step": 0}, None, Console())
    for _ in range(4):
        record(run, run.step(), None, Console())
        if run.steps_done == 2:
            save_trainer(run, tmp_path / "checkpoints")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')
    run = trainer(tmp_path, checkpoint_every=2)
    assert run.resume() == 2
    run.train()
    assert_same(run, straight[0])
    assert records(tmp_path) == records(straight[1])


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from grpo_core.trainer import checkpoint
from tests.test_checkpoint import trainer

place, whole = sys.argv[2], torch.save


def half(state, path):
    whole(state, path)
    if path.parent.name.endswith("000003"):
        if place == "inside":
            path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)


def rename(self, to, renamed=Path.rename):
    renamed(self, to)
    if to.name.endswith("000003"):
        os.kill(os.getpid(), signal.SIGKILL)


if place == "after the rename":
    Path.rename = rename
else:
    checkpoint.torch.save = half
trainer(Path(sys.argv[1]), keep_checkpoints=1).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "inside",
        pytest.param("before the rename", marks=pytest.mark.rare),
        "after the rename",
    ],
)
def test_killed_in_the_middle_of_a_save(
    place: str, straight: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """`kill -9`: what is half-written is never loaded, and what was whole before is still there."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), place],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = trainer(tmp_path)
    assert run.resume() == (3 if place == "after the rename" else 2)
    run.train()
    assert_same(run, straight[0])
    assert records(tmp_path) == records(straight[1])
    assert not list((tmp_path / "checkpoints").glob("unfinished*"))


def test_an_adapter_is_saved_and_read_as_one(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        torch.manual_seed(3)
        return peft.get_peft_model(micro_model(), settings)

    whole = trainer(tmp_path / "whole", adapted())
    whole.train()
    with pytest.raises(Interrupted):
        reward = at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
        trainer(tmp_path / "parts", adapted(), reward).train()
    run = trainer(tmp_path / "parts", adapted())
    assert run.resume() == 2
    run.train()
    assert_same(run, whole)
    (folder,) = checkpoints(tmp_path / "parts/checkpoints")[-1:]
    assert (folder / "adapter_model.safetensors").exists()


def test_a_checkpoint_is_a_model_of_transformers(straight: tuple[Trainer, Path]) -> None:
    run, directory = straight
    folders = checkpoints(directory / "checkpoints")
    assert [path.name for path in folders] == ["step-000004", "step-000005"]
    model = AutoModelForCausalLM.from_pretrained(folders[-1])
    for mine, theirs in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_another_run_is_not_gone_on_with(straight: tuple[Trainer, Path]) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: expected 0\.01 as in .*, got 0\.02"):
        trainer(straight[1], learning_rate=2e-2).resume()
    with pytest.raises(ValueError, match="objective: expected"):
        trainer(straight[1], objective=RECIPES["grpo"].replace(beta=0.1)).resume()


def test_a_new_run_does_not_delete_the_checkpoints_of_another(
    straight: tuple[Trainer, Path],
) -> None:
    """It keeps the last few of its folder, which would be those of the longer run before."""
    _, folder = straight
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=r"checkpoints: expected a folder without any, found .*-0"):
        trainer(folder).train()
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_knows_the_problems(tmp_path: Path) -> None:
    def run(*prompts: tuple[int, ...]) -> Trainer:
        made = trainer(tmp_path)
        made.draw_problems = Epochs([Problem(prompt) for prompt in prompts])
        return made

    first = run((3,), (4,))
    first.step()
    save_trainer(first, tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"data_fingerprint: expected 2 problems, .* got 2 prob"):
        run((3,), (5,)).resume()
    assert run((3,), (4,)).resume() == 1


def test_a_checkpoint_knows_the_weights_that_it_does_not_hold(tmp_path: Path) -> None:
    """Those of the reference, and those beneath an adapter; others come from the checkpoint."""
    peft = pytest.importorskip("peft")

    def run(kind: str, seed: int) -> Trainer:
        model = micro_model(seed)
        if kind == "adapter":
            torch.manual_seed(3)
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        beta = {"beta": 0.1, "kl": "k3"} if kind == "reference" else {"beta": 0.0, "kl": None}
        objective = RECIPES["dapo"].replace(**beta)
        return trainer(tmp_path / kind, model, objective=objective)

    for kind in ("reference", "adapter", "alone"):
        first = run(kind, 0)
        first.step()
        save_trainer(first, tmp_path / kind / "checkpoints")
        assert run(kind, 0).resume() == 1
        if kind == "alone":
            assert run(kind, 1).resume() == 1
        else:
            with pytest.raises(ValueError, match=r"start_weights: expected sha256 .*, got sha256"):
                run(kind, 1).resume()


def test_without_a_checkpoint_it_begins_at_the_beginning(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() == 0
    assert trainer().resume() == 0


def test_poisoned_weights_are_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.step()
    folder = save_trainer(run, tmp_path / "checkpoints")
    run.step()
    with torch.no_grad():
        run.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"values in lm_head\.weight at step 2"):
        save_trainer(run, tmp_path / "checkpoints")
    assert checkpoints(tmp_path / "checkpoints") == [folder]


def test_the_same_step_twice(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with new_folder(tmp_path / "step-000007") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "step-000007/file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_updates_that_are_never_finite_stop_the_run(tmp_path: Path) -> None:
    """The message names the step and the file of the inputs; the weights stay as they were."""
    run = trainer(tmp_path, max_skipped_updates=5)
    before = [weight.clone() for weight in run.model.parameters()]
    run.model.get_output_embeddings().weight.register_hook(lambda g: g * torch.inf)
    expected = r"step 2: 6 updates in a row .* inputs .* saved in .*not-finite-000002\.pt"
    with (
        pytest.warns(UserWarning, match="an update was skipped"),
        pytest.raises(FloatingPointError, match=expected),
    ):
        run.train()
    for mine, theirs in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(mine, theirs)
    (inputs,) = torch.load(tmp_path / "checkpoints/not-finite-000002.pt")
    assert inputs["rows"]["ids"].dtype == torch.int64
    assert inputs["advantage"].shape == inputs["old_logp"].shape
