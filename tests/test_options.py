"""Every command: its help, its errors, what it refuses to overwrite, and what it loads for that."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from grpo_core import RECIPES, logp_loss
from grpo_core.cli.command import SPIN_COUNT
from grpo_core.cli.options import (
    RECIPE_NAMES,
    check_package,
    load_from_file,
    warmup,
)
from grpo_core.compare import main as compare
from grpo_core.inspect.__main__ import main as inspect
from grpo_core.plot import main as plot
from grpo_core.reinforce import main as reinforce
from grpo_core.runs.compare import table as comparison_table
from grpo_core.runs.config import RunConfig, find_objective
from grpo_core.runs.demo.decimals import SHOWCASE
from grpo_core.runs.demo.report import Stage, plain
from grpo_core.runs.directory import FILES, FOLDERS
from grpo_core.runs.report import aligned, markdown
from grpo_core.runs.run import results_table
from grpo_core.show import main as show
from grpo_core.train import main as train
from grpo_core.trainer.baselines.dpo import PreferenceConfig
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.rollout import Sampling
from grpo_core.verify import __main__ as verify_command
from grpo_core.verify.inputs import OBJECTIVES
from grpo_core.verify.report import DTYPES, dtype_name

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("grpo_core", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text("utf-8")
)
Main = Callable[[list[str]], int]


def refused(main: Main, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, behind the name of the command."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1, shown
    command, _, line = shown.err.strip().partition(": error: ")
    assert command.startswith("python -m grpo_core.")
    return line


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # some set these for themselves
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: python -m {command.removesuffix('_runs')} ")
    assert max(map(len, shown.splitlines())) <= 80


def test_options_are_read_before_torch_is_loaded() -> None:
    """The help and a wrong option of every command of the package, and the package itself."""
    code = """
import runpy, sys
import grpo_core
for command in sys.argv[1:]:
    for word in ("--help", "--nonsense"):
        sys.argv = [command, word]
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert stop.code == (0 if word == "--help" else 2), command
    heavy = {"torch", "transformers", "triton", "numpy", "matplotlib"} & sys.modules.keys()
    assert not heavy, (command, heavy)
"""
    commands = [command for command in COMMANDS if command.startswith("grpo_core")]
    assert len(commands) >= 8
    done = subprocess.run(
        [sys.executable, "-c", code, *commands], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("work", "given", "expected"),
    [
        ("command.prepare(0)", {}, str(SPIN_COUNT)),
        ("command.prepare(0)", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("command.prepare(0)", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import torch; command.prepare(0)", {}, "None"),
        ("import grpo_core, torch", {}, "None"),
    ],
    ids=["command", "count given", "policy given", "torch loaded before", "library"],
)
def test_threads_of_a_command_sleep_early(
    work: str, given: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """What the environment says when torch is loaded, and to the processes that follow."""
    look = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\n"
    (tmp_path / "torch.py").write_text(look, "utf-8")
    (tmp_path / "transformers").mkdir()
    logging = "class logging:\n    disable_progress_bar = staticmethod(lambda: None)\n"
    (tmp_path / "transformers/utils.py").write_text(logging, "utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += f"from grpo_core.cli import command; {work}\n{look}"
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_libgomp_reads_how_long_to_spin() -> None:
    code = "from grpo_core.cli import command; command.prepare(0)"
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    show = plain | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=show, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--sed", "3"], "--sed: no such option; did you mean --seed?"),
        (["--warmup-step=3"], "--warmup_step: no such option; did you mean --warmup_steps?"),
        (["--xyzzy"], "--xyzzy: no such option; see --help"),
        (["7"], "7: expected an option such as --help, got '7'"),
        (["--steps", "ten"], "--steps: expected a whole number, got 'ten'"),
        (["--steps", "2.5"], "--steps: expected a whole number, got '2.5'"),
        (["--group-size", "x"], "--group_size: expected a whole number, got 'x'"),
        (["--beta", "x"], "--beta: expected a number, got 'x'"),
        (["--steps"], "--steps: expected a value, got none"),
        (["--rewards"], "--rewards: expected at least one value, got none"),
        (["--autocast", "maybe"], "--autocast: expected True or False, got 'maybe'"),
        (
            ["--loss", "fusde"],
            "--loss: expected one of fused, logits, naive, got 'fusde'; did you mean fused?",
        ),
        (["--eval_k", "1", "x"], "--eval_k: expected a whole number, got 'x'"),
        (
            ["--log", "wand"],
            "--log: expected one of tensorboard, trackio, wandb, got 'wand'; did you mean wandb?",
        ),
        ([], "--model: expected a value, got nothing"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--group_size", "1"], "--group_size: expected at least 2, got 1"),
        (["--learning_rate", "inf"], "--learning_rate: expected 0 or more, got inf"),
        (["--learning_rate", "-1e-5"], "--learning_rate: expected 0 or more, got -1e-05"),
        (["--beta", "nan"], "--beta: expected a finite number >= 0, got nan"),
        (
            ["--rollout_weights", "folder"],
            "--rollout_folder: expected a folder with --rollout_weights folder, else none, "
            "got none",
        ),
        (
            ["--rollout_folder", "x"],
            "--rollout_folder: expected a folder with --rollout_weights folder, else none, got x",
        ),
        (["--steps", "2", "--warmup_steps", "2"], "--warmup_steps: expected 0 to 1, got 2"),
        (
            ["--sampler_low", "3"],
            "--sampler_high: expected at least sampler_low = 3.0, got 2.0",
        ),
        (["--rollout_memory", "2"], "--rollout_memory: expected at most 1, got 2.0"),
    ],
)
def test_a_wrong_option_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name, what was expected, what came, and the nearest of what there is."""
    given = ["--model", "m", "--data", "d.jsonl"] if words else []
    assert refused(reinforce, [*given, *words], capsys) == line


def test_other_commands_say_it_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    for main, words, line in (
        (train, ["--stage", "r1"], "--stage: no such option; did you mean --stages?"),
        (compare, ["--seed", "3"], "--seed: no such option; did you mean --seeds?"),
        (plot, [nowhere], f"runs: expected a run directory, found no {nowhere}/metrics.jsonl"),
        (plot, [], "runs: expected a value, got none"),
        (show, [nowhere], f"run: expected a run directory, found no {nowhere}/metrics.jsonl"),
        (
            verify_command.main,
            ["--recipe", "gmpoo"],
            f"--recipe: expected one of {', '.join(OBJECTIVES)}, got 'gmpoo'; did you mean gmpo?",
        ),
        (
            verify_command.main,
            ["--json", f"{nowhere}/a.json"],
            f"--json: expected a file in an existing folder, got {nowhere}/a.json",
        ),
        (
            inspect,
            ["--vocabulary", "1"],
            "--vocabulary: expected a whole number of at least 2, got '1'",
        ),
        (
            train,
            ["--objective", "gmpoo"],
            f"--objective: expected one of {', '.join(RECIPES)} or path.py:name, got 'gmpoo'; "
            "did you mean gmpo?",
        ),
    ):
        assert refused(main, words, capsys) == line


def test_names_that_are_listed_without_torch_are_those_there_are() -> None:
    assert tuple(RECIPES) == RECIPE_NAMES
    assert tuple(OBJECTIVES) == verify_command.OBJECTIVES
    assert tuple(map(dtype_name, DTYPES)) == verify_command.DTYPES


def test_only_the_first_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        reinforce(["--sed", "3"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_ctrl_c_during_the_imports_is_one_line(delay: float, tmp_path: Path) -> None:
    """After the first line torch and transformers are imported; status 130, no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_core.train", "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and "writes to" in process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors.strip()) == (130, "interrupted")


@pytest.mark.parametrize("main", [train, reinforce, compare])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_run_is_not_overwritten(
    main: Main, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is left of it, and whoever has made it; nothing is touched."""
    output = tmp_path / "run"
    left = output / name if name in FILES else output / name / "step-000040" / "trainer.pt"
    left.parent.mkdir(parents=True)
    left.write_text("precious")
    words = ["--output", str(output)]
    if main is reinforce:
        (tmp_path / "data.jsonl").write_text("{}")
        words += ["--model", "name", "--data", str(tmp_path / "data.jsonl")]
    line = refused(main, words, capsys)
    assert line.startswith(f"--output: expected a folder without a run, found {output / name}; ")
    assert "--output" in line and "--overwrite True" in line
    assert ("--resume True" in line) == (main is not compare)
    assert left.read_text() == "precious"
    assert [path for path in output.rglob("*") if path.is_file()] == [left]


def test_what_a_run_reads_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite would delete the model of the run before, or the data beside it."""
    output, data = tmp_path / "run", tmp_path / "data.jsonl"
    (output / "model").mkdir(parents=True)
    (output / "model/config.json").write_text("{}")
    (output / "config.json").write_text("{}")
    (output / "samples.jsonl").write_text("{}")
    data.write_text("{}")
    for model, given, option in (
        (output / "model", data, "model"),
        (output, data, "model"),
        ("name", output / "samples.jsonl", "data"),
    ):
        words = ["--output", str(output), "--overwrite", "True", "--rewards", "format"]
        words += ["--model", str(model), "--data", str(given)]
        line = refused(reinforce, words, capsys)
        lost = model if option == "model" else given
        assert f"--overwrite True would delete {lost} of --{option}, got {output}" in line
    assert (output / "model/config.json").exists() and (output / "samples.jsonl").exists()
    line = refused(reinforce, [*words, "--resume", "True"], capsys)
    assert line.startswith(("--output", "--overwrite"))


def test_an_output_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, why in ((tmp_path / "file", "File exists"), (tmp_path / "file/x", "Not a dir")):
        line = refused(train, ["--output", str(output)], capsys)
        assert line.startswith(f"--output: expected a folder that can be made, got {output} ({why}")


@pytest.mark.parametrize(
    ("words", "missing", "line"),
    [
        (["--log", "wandb"], "wandb", "--log: needs wandb, not installed: pip install wandb"),
        (["--lora_rank", "2"], "peft", "--lora_rank: needs peft, not installed: pip install peft"),
        (
            ["--rollout", "vllm"],
            "vllm",
            "--rollout: needs vllm, not installed: pip install 'vllm>=0.28'",
        ),
        (
            ["--rewards", "math"],
            "math_verify",
            "--rewards: math: needs math_verify, not installed: pip install math-verify",
        ),
        (
            ["--data", "reasoning_gym:chain_sum"],
            "reasoning_gym",
            "--data: needs reasoning_gym, not installed: pip install reasoning-gym",
        ),
        (
            ["--data", "openai/gsm8k"],
            "datasets",
            "--data: needs datasets, not installed: pip install datasets",
        ),
        (["--data", "no.parquet"], "", "--data: expected a file, found no no.parquet"),
        (["--rewards", "no.py:f"], "", "--rewards: expected a file, found no no.py"),
        (["--objective", "no.py:f"], "", "--objective: expected a file, found no no.py"),
        (["--model", "./no"], "", "--model: expected a folder or a name of the hub, found no no"),
        (
            ["--rewards", "formt"],
            "",
            "--rewards: expected math, accuracy, format, brevity or path.py:function, got 'formt'; "
            "did you mean format?",
        ),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(
    words: list[str],
    missing: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "data.jsonl").write_text("{}")
    given = ["--model", "name", "--data", str(tmp_path / "data.jsonl"), "--rewards", "format"]
    given += ["--output", str(tmp_path / "run")]
    assert refused(reinforce, [*given, *words], capsys) == line
    assert not (tmp_path / "run").exists()


def test_a_package_is_there_or_not() -> None:
    check_package("x", "torch")
    with pytest.raises(ModuleNotFoundError, match="x: needs no_such_package, not installed: pip"):
        check_package("x", "no_such_package")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: [", "expected YAML, got"),
        ("- 3", "expected options, a name and a value each, got [3]"),
        ("steps: {a: 1}", "steps: expected a value or a list, got {'a': 1}"),
        ("sed: 3", "--sed: no such option; did you mean --seed?"),
        ("steps: ten", "--steps: expected a whole number, got 'ten'"),
        ("rewards: []", "--rewards: expected at least one value, got none"),
        ("", "--model: expected a value, got nothing"),
    ],
)
def test_a_wrong_file_of_options_is_one_line(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert line in refused(reinforce, [str(file)], capsys)
    line = refused(reinforce, [str(tmp_path / "no.yaml")], capsys)
    assert line == f"{tmp_path}/no.yaml: expected a file of options, got No such file or directory"


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 40])
def test_a_warm_up_that_nobody_sets_fits_the_run(steps: int) -> None:
    """5 steps, or all but the last; a given one is checked."""
    expected = {1: 0, 2: 1, 5: 4, 6: 5, 40: 5}[steps]
    run = RunConfig(model="m", data="d", steps=steps)
    pairs = PreferenceConfig(steps=steps, batch_size=1, learning_rate=1e-3)
    for config in (TrainerConfig(steps=steps), run.trainer(Sampling(4)), pairs):
        assert warmup(config) == expected
    identity = TrainerConfig(steps=steps, warmup_steps=expected).identity()
    assert TrainerConfig(steps=steps).identity() == identity
    with pytest.raises(ValueError, match=f"warmup_steps: expected 0 to {steps - 1}, got {steps}"):
        TrainerConfig(steps=steps, warmup_steps=steps)


def test_no_default_makes_a_sensible_choice_invalid() -> None:
    """Every choice of every option alone, and the least of every number; a folder has a path."""
    least = {"steps": 1, "prompts": 1, "group_size": 2, "max_new_tokens": 1, "eval_samples": 1}
    sensible: list[dict[str, Any]] = [{name: value} for name, value in least.items()]
    hints = get_type_hints(RunConfig)
    for each in fields(RunConfig):
        if get_origin(hints[each.name]) is Literal:
            choices = [{each.name: choice} for choice in get_args(hints[each.name])]
            path = {"rollout_folder": "weights"}
            sensible += [each | path if "folder" in each.values() else each for each in choices]
        elif hints[each.name] is bool:
            sensible += [{each.name: True}]
    sensible += [{"rewards": ["format"]}, {"prompts": 1, "group_size": 2, "steps": 1}]
    for options in sensible:
        RunConfig(model="m", data="d", **options).trainer(Sampling(4))


@pytest.mark.parametrize(
    "options",
    [{"loss": "fussed"}, {"old_logp": "x"}, {"shard": "x"}, {"padding_free": "x"}],
)
def test_a_trainer_takes_no_unknown_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected "):
        TrainerConfig(**options)


def test_the_options_suit_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known from the launcher's environment; prompts that nobody sets are shared out evenly."""
    (tmp_path / "data.jsonl").write_text("{}")
    words = ["--model", "name", "--data", str(tmp_path / "data.jsonl"), "--rewards", "format"]
    line = refused(reinforce, [*words, "--shard", "fsdp"], capsys)
    assert line == "--shard: expected ddp, or a start by torchrun, got fsdp"
    assert RunConfig(model="m", data="d").prompts_per_step == 16
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert RunConfig(model="m", data="d").prompts_per_step == 18
    for more, line in (
        (["--prompts", "16"], "--prompts: expected a multiple of 3, the processes, got 16"),
        (["--loss", "naive"], "--loss: expected fused on 3 processes, got naive"),
        (
            ["--rollout", "vllm"],
            "--rollout: expected transformers or vllm-server on 3 processes, got vllm",
        ),
    ):
        assert refused(reinforce, [*words, *more], capsys) == line


def test_an_objective_from_a_file(tmp_path: Path) -> None:
    """Its own KL unless a weight is given; a recipe has the default of the command."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from grpo_core import RECIPES\nown = RECIPES['dapo'].replace(beta=0.5, kl='k2')\nx = 3\n"
    )
    own = find_objective(f"{file}:own", None)
    assert (own.beta, own.kl) == (0.5, "k2")
    assert find_objective(f"{file}:own", 0.25).beta == 0.25
    assert find_objective(f"{file}:own", 0.0).kl is None
    assert find_objective("dapo", None, default=0.01).beta == 0.01
    with pytest.raises(ValueError, match=r"objective: expected an Objective in .*:x, got int"):
        find_objective(f"{file}:x", None)
    with pytest.raises(ValueError, match=r"expected a name in .*, got 'owm'; did you mean own\?"):
        load_from_file("objective", f"{file}:owm")


def test_the_objective_that_the_document_shows(backend: Any, device: str, tmp_path: Path) -> None:
    """docs/training.md, as a file: −2·√r·A is what it says it is, and so is its derivative."""
    text = (ROOT / "docs/training.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(# losses\.py\n.*?)```", text, flags=re.DOTALL)
    (tmp_path / "losses.py").write_text(snippet)
    objective = find_objective(f"{tmp_path}/losses.py:damped_dapo", None)
    logp = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
    old_logp = torch.tensor([[-1.5, -1.0]], device=device)
    out = logp_loss(
        logp,
        old_logp=old_logp,
        advantage=torch.tensor([2.0], device=device),
        objective=objective,
        backend=backend,
    )
    out.loss.backward()
    root = (0.5 * (logp.detach() - old_logp)).exp()
    torch.testing.assert_close(out.loss.detach(), (-2 * root * 2.0).mean())
    torch.testing.assert_close(logp.grad, -root * 2.0 / 2)


def test_the_final_table_fits_a_terminal() -> None:
    figures = {"accuracy/pass@16": 0.5, "a_reward_function_of_a_very_long_name/avg@16": 1 / 3}
    stages = {when: {how: figures for how in ("greedy", "sampled")} for when in ("before", "after")}
    lines = aligned(results_table(stages))
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["accuracy/pass@16", *["0.500"] * 4]
    assert lines[0].split() == ["held", "out", "greedy", "greedy", "sampled", "sampled"]
    assert lines[1].split() == ["before", "after", "before", "after"]


def test_the_package_shows_its_public_names_alone() -> None:
    import grpo_core

    assert dir(grpo_core) == sorted([*grpo_core.__all__, "__version__"])
    for name in grpo_core.__all__:
        assert not isinstance(getattr(grpo_core, name), ModuleType)
    with pytest.raises(AttributeError, match="'grpo_core' has no attribute 'nonsense'"):
        grpo_core.nonsense  # noqa: B018


def test_a_report_fits_a_terminal() -> None:
    """That of the demo run without rich, and that of the comparison."""
    figures = {"accuracy": 0.125, "accuracy/trap": 0.5, "format": 1.0, "length": 31.25}
    stages = [Stage("R1-Zero", figures, figures, ["<answer>3.8</answer>"] * len(SHOWCASE))]
    lines = plain(stages)
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["R1-Zero", *["0.125", "0.500", "1.000", "31.2"] * 2]
    assert lines[5] == "  R1-Zero  <answer>3.8</answer> ✓"
    names = ("method", "seed", "accuracy", "traps", "samples", "trained", "held", "peak_mib")
    names += ("seconds",)
    values = ("GRPO, KL in the reward", 0, 0.875, 0.5, 10_240, 2**20, 2**21, 1234.0, 1234.0)
    base = ("base", 0, 0.25, 0.0, 0, 0, 0, 0.0, 0.0)
    rows = comparison_table([dict(zip(names, row, strict=True)) for row in (base, values)])
    lines = aligned(rows)
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["base", "0.250", "0.000"]
    assert lines[3].removeprefix(values[0]).split() == (
        ["0.875", "0.500", "10,240", "1.05", "2.10", "1234", "1234"]
    )
    assert markdown(rows).splitlines()[2] == "| base | 0.250 | 0.000 |  |  |  |  |  |"
