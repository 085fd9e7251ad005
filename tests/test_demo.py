"""The command line, on a run short enough to learn nothing, and (slow) two that learn."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from grpo_core.cli.options import help_text
from grpo_core.runs.demo.config import DemoConfig
from grpo_core.runs.demo.demo import SAMPLED, Demo
from grpo_core.train import main
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.trainer import Trainer
from tests.test_checkpoint import inherited

pytestmark = pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens")

SHORT = ["--base_steps", "3", "--sft_steps", "2", "--steps", "2", "--gate", "0"]
SHORT += ["--prompts", "2", "--held_out", "24"]


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_behind_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "--output", str(tmp_path), "--objective", "grpo", "--seed", "3"]) == 0

    options = json.loads((tmp_path / "config.json").read_text())["options"]
    assert (options["objective"], options["seed"], options["steps"]) == ("grpo", 3, 2)
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    stages = ["base", "R1-Zero", "SFT", "R1"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in results] == stages
    for name in ("base", "r1-zero", "sft", "r1"):
        assert (tmp_path / name / "model.safetensors").exists()

    logged = records(tmp_path)
    assert [r["stage"] for r in logged if "result" in r] == stages
    steps = [(r["stage"], r["step"]) for r in logged if "step" in r]
    assert steps == [(name, step) for name in ("R1-Zero", "R1") for step in (0, 1, 2)]
    # Untrained, so nothing is right, and the report says it with the same numbers.
    report = (tmp_path / "report.md").read_text()
    for result in results:
        row = next(line for line in report.splitlines() if line.startswith(f"| {result['name']} "))
        cells = [float(cell) for cell in row.strip("|").split("|")[1:]]
        assert cells[0] == round(result["greedy"]["accuracy"], 3)
        assert cells[5] == round(result["sampled"]["accuracy/trap"], 3)
        assert cells[7] == round(result["sampled"]["length"], 1)
    assert report.count("**3.11 and 3.8, which is larger?**") == 1
    shown = capsys.readouterr().out
    assert "R1-Zero" in shown
    assert re.search(r" s on (1 thread|(?!1 )\d+ threads); all results are in", shown)


@pytest.mark.slow
def test_fused_and_naive_runs_get_the_same_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One step: nothing is right yet, and rewards that are all 0 leave only rounding to learn from.
    arguments = [*SHORT, "--output", str(tmp_path), "--stages", "zero", "--steps", "1"]
    assert main([*arguments, "--no_plot"]) == 0
    fused, built = records(tmp_path), (tmp_path / "base/model.safetensors").stat().st_mtime_ns

    # By the way: without matplotlib the run goes on and says how to get it.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*arguments, "--loss", "naive", "--overwrite", "True"]) == 0
    naive = records(tmp_path)

    assert [r.get("reward") for r in fused] == [r.get("reward") for r in naive]
    assert [r.get("length") for r in fused] == [r.get("length") for r in naive]
    assert fused[0] == naive[0] and fused[1]["held_out"] == naive[1]["held_out"]
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == built


def test_a_base_is_read_again_unless_it_is_another(tmp_path: Path) -> None:
    def weights(**changes: int) -> torch.Tensor:
        config = DemoConfig(output=str(tmp_path), **{"base_steps": 3, **changes})
        return Demo(config).base_model().get_input_embeddings().weight

    first = weights()
    built = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    assert torch.equal(weights(), first)
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == built
    assert not torch.equal(weights(seed=1), first)
    assert not torch.equal(weights(base_steps=4), first)


def test_a_base_that_cannot_copy_digits_is_sent_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--base_steps", "3", "--held_out", "24", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "stopped: base model: expected a greedy accuracy of at least 0.9 on pairs" in message
    assert "train it longer with --base_steps (now 3)" in message


def test_the_objective_of_the_command_line() -> None:
    dapo = DemoConfig(objective="dapo", beta=0.25).trainer(SAMPLED).objective
    assert (dapo.beta, dapo.kl, dapo.surrogate.args[:2]) == (0.25, "k3", (0.2, 0.28))
    without = DemoConfig(objective="grpo", beta=0.0).trainer(SAMPLED).objective
    assert (without.beta, without.kl, without.aggregation) == (0.0, None, "sequence_mean")
    with pytest.raises(ValueError, match=r"objective: expected one of .*, got 'nonsense'"):
        DemoConfig(objective="nonsense")


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in DemoConfig.__dataclass_fields__:
        assert f"--{name}" in shown
        assert help_text(DemoConfig, name).split(":")[0] in shown


@pytest.mark.slow
def test_a_few_steps_of_reinforcement_learning_show(tmp_path: Path) -> None:
    """R1-Zero from a third of the base's training: ten steps, and most traps are seen through."""
    short = {"base_steps": 250, "steps": 10, "evaluate_every": 10, "held_out": 256, "gate": 0.0}
    base, zero = Demo(
        DemoConfig(output=str(tmp_path), stages="zero", learning_rate=3e-4, **short)
    ).run()
    assert base.greedy["accuracy/trap"] <= 0.10
    assert zero.greedy["accuracy/trap"] >= 0.40
    assert zero.sampled["accuracy/trap"] >= base.sampled["accuracy/trap"] + 0.20
    assert zero.sampled["format"] > base.sampled["format"]


@pytest.mark.slow
@pytest.mark.rare
def test_the_embedded_run_learns(tmp_path: Path) -> None:
    """R1-Zero from a base that always falls for the trap; minutes on one core."""
    base, zero = Demo(DemoConfig(output=str(tmp_path), stages="zero")).run()
    assert base.greedy["accuracy/trap"] <= 0.10
    assert zero.greedy["accuracy/trap"] >= 0.90
    assert zero.sampled["accuracy"] >= 0.92 > base.sampled["accuracy"] + 0.1
    assert "<answer>3.11</answer>" in base.answers[0]
    assert "<answer>3.8</answer>" in zero.answers[0]


def test_an_interrupted_run_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, the shell's status for it, and no earlier results that look like this run's.

    Also where SIGINT is ignored from the start.
    """
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "r1").mkdir()

    def interrupt(self: Demo) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Demo, "base_model", interrupt)
    with inherited(signal.SIGINT, signal.SIG_IGN):
        assert main(["--output", str(tmp_path), "--no_plot", "--overwrite", "True"]) == 130
    assert "interrupted; finished stages are in" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "r1").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped once in R1-Zero's first step and once before R1: the same records and models."""
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert main([*SHORT, "--no_plot", "--output", str(straight)]) == 0
    again = [*SHORT, "--no_plot", "--output", str(parts)]

    step, reinforce = Trainer.step, Demo.reinforce

    def terminated(self: Trainer) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return step(self)

    def interrupted(self: Demo, model: PreTrainedModel, name: str) -> PreTrainedModel:
        if name == "R1":
            raise KeyboardInterrupt
        return reinforce(self, model, name)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", terminated)
        assert main(again) == 128 + signal.SIGTERM
    assert "with --resume True continues" in capsys.readouterr().err
    again += ["--resume", "True"]
    with monkeypatch.context() as patch:
        patch.setattr(Demo, "reinforce", interrupted)
        assert main(again) == 128 + signal.SIGINT
    with pytest.raises(SystemExit):
        main([*again, "--seed", "5"])
    assert "seed: expected 0 as in" in capsys.readouterr().err
    assert main(again) == 0

    without_times = [
        [{k: v for k, v in r.items() if k not in MACHINE} for r in records(directory)]
        for directory in (straight, parts)
    ]
    assert without_times[0] == without_times[1]
    for name in ("r1-zero", "sft", "r1"):
        weights = [(run / name / "model.safetensors").read_bytes() for run in (straight, parts)]
        assert weights[0] == weights[1]
    assert not any((parts / "checkpoints").iterdir())


def test_there_must_be_something_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--output", str(tmp_path / "new"), "--resume", "True"])
    assert "resume: expected an interrupted run, found no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--prompts", "0"], "prompts: expected at least 1, got 0"),
        (["--held_out", "0"], "held_out: expected at least 1, got 0"),
        (["--beta", "-1"], "--beta: expected a finite number >= 0, got -1.0"),
        (["--learning_rate", "nan"], "learning_rate: expected more than 0, got nan"),
        (["--learning_rate", "-1"], "learning_rate: expected more than 0, got -1.0"),
        (["--threads", "-3"], "threads: expected 0 or more, got -3"),
        (["--output", "/proc/nowhere"], "nowhere"),
    ],
)
def test_options_are_checked_before_anything_is_trained(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(option)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
