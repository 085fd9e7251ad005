"""Checkpoints are whole or not there, and what goes on from one is the run that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core import RECIPES, trainer_state
from grpo_core.checkpoint import Interrupted, checkpoints, save_checkpoint, step_of
from grpo_core.clock import MACHINE
from grpo_core.rewards import Scores
from grpo_core.rollout import Problem, Sampling
from grpo_core.trainer import Trainer, TrainerConfig
from grpo_core.training_loop import record
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, reward=at_step(2, twice)).train()
    assert [step_of(path) for path in checkpoints(tmp_path / "checkpoints")] == [1]


def test_records_after_the_checkpoint_are_taken_back(
    straight: tuple[Trainer, Path], tmp_path: Path
) -> None:
    """The run went on for two steps and half a line after its last checkpoint, and then died."""
    run = trainer(tmp_path, checkpoint_every=2)
    record(run, {"step": 0}, None)
    for _ in range(4):
        record(run, run.step(), None)
        if run.steps_done == 2:
            trainer_state.save(run, tmp_path / "checkpoints")
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
from grpo_core import checkpoint
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
@pytest.mark.parametrize("place", ["inside", "before the rename", "after the rename"])
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


def test_without_a_checkpoint_it_begins_at_the_beginning(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() == 0
    assert trainer().resume() == 0


def test_poisoned_weights_are_not_saved(tmp_path: Path) -> None:
    model = micro_model()
    folder = save_checkpoint(tmp_path, 1, model, {}, keep=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"finite weights at step 2, lm_head\.weight"):
        save_checkpoint(tmp_path, 2, model, {}, keep=1)
    assert checkpoints(tmp_path) == [folder]


def test_the_same_step_twice(tmp_path: Path) -> None:
    model = micro_model()
    for state in ({"a": 1}, {"a": 2}):
        folder = save_checkpoint(tmp_path, 7, model, state, keep=1)
    assert torch.load(folder / "trainer.pt")["a"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_updates_that_are_never_finite_stop_the_run(tmp_path: Path) -> None:
    """The message names the step and the file of the inputs; the weights stay as they were."""
    run = trainer(tmp_path, max_skipped_updates=5)
    before = [weight.clone() for weight in run.model.parameters()]
    run.model.get_output_embeddings().weight.register_hook(lambda g: g * torch.inf)
    expected = r"step 2: 6 updates in a row .* inputs, they lie in .*not-finite-000002\.pt"
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
