"""What a run shows: the right figures in the right columns, within the terminal, and once."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core import RECIPES
from grpo_core.runs import console, figures
from grpo_core.runs.console import Console, Lines, open_console
from grpo_core.runs.figures import NEAR_ZERO, choose_cells, line, memory_text, short
from grpo_core.trainer import samples
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.samples import Sample, Samples, shortened
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

pytestmark = pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens")

WITH_KL = RECIPES["grpo"].replace(beta=0.04, kl="k3")


class Numbers:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def config(**changes: Any) -> TrainerConfig:
    """Four steps of one update each; a look at the second and the last."""
    settings: dict[str, Any] = {
        "objective": WITH_KL,
        "steps": 4,
        "prompts_per_step": 4,
        "group_size": 4,
        "minibatches": 1,
        "epochs": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "evaluate_every": 2,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    return TrainerConfig(**settings | changes)


def run(folder: Path, shown: Console | None, **changes: Any) -> tuple[Trainer, list[dict]]:
    """The micro model, trained with samples and a console; its history."""
    held_out = [Problem((2, 3, 4)), Problem((5, 6))]
    kept = Samples(Numbers(), folder / "samples.jsonl", count=1)  # type: ignore[arg-type]
    trainer = Trainer(
        micro_model(),
        draw_problems,
        share_of_sevens,
        config(**changes),
        samples=kept,
        console=shown,
    )

    def look() -> dict[str, float]:
        found = evaluate(trainer.model, held_out, share_of_sevens, Sampling(8), samples=3)
        kept.look(trainer.steps_done, held_out, found)
        return found.metrics

    return trainer, trainer.train(look)


def test_lines_hold_the_figures_of_their_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are notes here
        _, history = run(tmp_path, Lines())
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    (head,) = (line.split() for line in lines if line.startswith(" step "))
    assert {"reward", "sevens", "length", "cut", "KL", "entropy", "clip", "grad", "s"} <= {*head}
    rows = [line.split() for line in lines if re.match(r" +\d+ +\d\.\d{3} ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for row, record in zip(rows, history[1:], strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["reward"] == cells["sevens"] == f"{record['reward']:.3f}"
        assert cells["KL"] == short(record["kl"])
        assert cells["cut"] == f"{record['truncated']:.0%}"
        assert cells["grad"] == short(record["grad_norm"])
    text = " ".join(" ".join(lines).split())
    assert text.count("nothing is wrong") == text.count("ran into max_new_tokens") == 1
    assert text.count("held out: reward") == 3
    best = max(history[-1]["held_out"]["sevens/pass@3"], 0)
    assert f"sevens/pass@3 {short(best)}" in text
    assert text.count("best, earned") == 2 and text.count("held out, earned") == 3
    assert re.search(r"memory: .*\d MiB resident", text)


def test_a_loss_that_is_not_near_zero_is_not_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A constant length to divide by, and answers of all lengths."""
    _, history = run(tmp_path, Lines(), objective=RECIPES["dapo"], steps=2)
    assert abs(history[1]["loss"]) > NEAR_ZERO
    shown = capsys.readouterr().out
    assert "nothing is wrong" not in shown
    assert " KL " not in shown


def test_without_lines_trouble_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="ran into max_new_tokens"):
        run(tmp_path, Console(), steps=2)
    assert capsys.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="ran into max_new_tokens"):
        run(tmp_path, None, steps=2)
    assert "2/2" in capsys.readouterr().err


def test_samples_are_kept_where_they_were_looked_at(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, Console())
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    looks = [sample for sample in kept if sample["kind"] == "held out"]
    assert [(look["step"], look["prompt"]) for look in looks] == [
        (0, "2 3 4"),
        (2, "2 3 4"),
        (4, "2 3 4"),
    ]
    asked, completions, scores = trainer.drawn
    by_kind = {sample["kind"]: sample for sample in kept if sample["step"] == 4}
    for kind, reward in (("best", scores.total.max()), ("worst", scores.total.min())):
        sample = by_kind[kind]
        place = [" ".join(map(str, ids)) for ids in completions].index(sample["completion"])
        assert sample["reward"] == reward == sample["completion"].split().count("7") / 8
        assert sample["prompt"] == " ".join(map(str, asked[place].prompt))
    assert trainer.samples is not None
    trainer.samples.step(9, asked[:1], completions[:1], one_of(scores), keep=False)
    assert [sample.kind for sample in trainer.samples.rollout] == ["best"]
    # what has no reward is neither, and of nothing else there is no sample
    total = scores.total.clone()
    order = total.argsort()
    total[order[[0, -1]]] = math.nan
    trainer.samples.step(9, asked, completions, scores._replace(total=total), keep=False)
    known = scores.total[order[1:-1]]
    assert [s.reward for s in trainer.samples.rollout] == [known.max(), known.min()]
    total[:] = math.nan
    trainer.samples.step(9, asked, completions, scores._replace(total=total), keep=False)
    assert trainer.samples.rollout == []


def one_of(scores: Any) -> Any:
    """The first completion's scores."""
    parts = {name: part[:1] for name, part in scores.parts.items()}
    return scores._replace(total=scores.total[:1], parts=parts)


def test_other_processes_show_and_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_core.trainer import loop, monitor

    for module in (samples, monitor, loop):
        monkeypatch.setattr(module, "is_main", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, Lines(), steps=2)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "samples.jsonl").exists()


class Recorder(Console):
    """Keeps what a console is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.notes: list[str] = []

    def step(self, *given: Any) -> None:
        self.given.append(given)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """Nine steps."""
    recorder = Recorder()
    run(tmp_path_factory.mktemp("run"), recorder, steps=9)
    return recorder


@pytest.mark.parametrize("height", [24, 40, 100])
def test_a_frame_fits_the_terminal(height: int, recorded: Recorder) -> None:
    rich = pytest.importorskip("rich.console")
    from grpo_core.runs.console import Live

    screen = io.StringIO()
    terminal = rich.Console(file=screen, width=80, height=height, force_terminal=True)
    live = Live(terminal)
    live.begin("micro", 0, config(steps=9))
    live.note(recorded.notes[0])
    for given in recorded.given:
        live.step(*given)
        lines = terminal.render_lines(live.frame(), pad=False)
        assert len(lines) < height
        assert all(sum(part.cell_length for part in line) <= 80 for line in lines)
    low = plain(terminal, live.frame())
    assert ("▁" in low) == (height > 24)
    live.end()
    frame = plain(terminal, live.frame(whole=True))
    rows = [line.split() for line in frame.splitlines() if re.match(r" +\d+ +\d\.\d", line)]
    assert [row[0] for row in rows] == [str(step) for step in range(2, 10)]
    assert rows[-1][1] == f"{recorded.given[-1][0]['reward']:.3f}"
    assert "micro" in frame and "step 9 of 9" in frame and "ran into max_new_tokens" in frame
    assert "best, step 9" in frame and "held out, step 9" in frame
    assert re.search(r"rollout \S+%  reference \S+%  loss \S+%  optimizer \S+%", frame)
    # the cursor is hidden once, and there again at the end
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1


def plain(terminal: Any, frame: Any) -> str:
    """A frame as text."""
    lines = terminal.render_lines(frame)
    return "\n".join("".join(part.text for part in line) for line in lines)


def test_markup_in_a_completion_is_text_and_colours_tell(tmp_path: Path) -> None:
    rich = pytest.importorskip("rich.console")
    terminal = rich.Console(width=80, record=True, file=io.StringIO())
    live = console.Live(terminal, moving=False)
    live.begin("x", 0, config())
    texts = {"best": "[bold]1[/bold] [/b] :smile:", "worst": "long " * 100 + "end"}
    for kind, reward in (("best", 1.0), ("worst", 0.0)):
        sample = Sample(kind, 3, "?", texts[kind], None, reward, {})  # type: ignore[arg-type]
        terminal.print(live.sample(sample))
    html = terminal.export_html(clear=False)
    shown = terminal.export_text()
    assert texts["best"] in shown
    assert " … " in shown and shown.rstrip().endswith("end") and len(shown.splitlines()) == 5
    assert console.GOOD in html and console.BAD in html
    record = {"step": 1, "reward": 0.0, "truncated": 0.3, "zero_std": 0.0, "grad_norm": math.nan}
    live.records.append(record)
    terminal.print(live.steps(1))
    assert terminal.export_html().count(f"color: {console.BAD}") >= 1


def test_held_out_figures_stand_under_their_names() -> None:
    """A mean is not shown beside the avg@k that is the same; greedy completions are named."""
    rich = pytest.importorskip("rich.console")
    figures = {"greedy_r.py:math": 0.5, "reward": 1.0, "r.py:math": 0.25, "r.py:math/avg@8": 0.25}
    first = {"step": 0, "held_out": figures}
    last = {"step": 5, "held_out": {**figures, "reward": 2.0, "r.py:math/pass@8": 0.75}}
    heads = {80: ["math math math", "held out greedy reward avg@8 pass@8"]}
    heads |= {30: ["math", "held out greedy reward"]}
    for width, count in ((80, 4), (30, 2)):
        terminal = rich.Console(width=width, file=io.StringIO())
        live = console.Live(terminal, moving=False)
        live.begin("x", 0, config())
        live.evaluations = [first, last]
        lines = [text.split() for text in plain(terminal, live.held_out()).splitlines()]
        assert lines[:4] == [
            *map(str.split, heads[width]),
            ["step", "0", *["0.500", "1.000", "0.250", "nan"][:count]],
            ["step", "5", *["0.500", "2.000", "0.250", "0.750"][:count]],
        ]


def test_the_console_is_what_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_console("plain"), Lines)
    assert type(open_console("off")) is Console
    with pytest.raises(ValueError, match="console: expected rich, plain or off, got 'loud'"):
        open_console("loud")
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False))
    assert isinstance(open_console("rich"), Lines)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(console, "HAS_RICH", False)
        assert isinstance(open_console("rich"), Lines)
    pytest.importorskip("rich")
    assert type(open_console("rich")).__name__ == "Live"


def test_wider_terminals_show_more_and_narrow_ones_the_most_important() -> None:
    parts = ["rewards.py:digits", "format", "brevity"]

    def heads(width: int) -> list[str]:
        cells = choose_cells({"step": 1}, parts, config(), width)
        assert len(line(cells)) <= width
        return list(cells)

    assert heads(40) == ["step", "reward", "digits", "length", "KL"]
    assert {*heads(80)} < {*heads(200)}
    assert {"same", "brevity", "rate"} <= {*heads(200)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.000"),
        (0.81249, "0.812"),
        (-0.5, "-0.500"),
        (0.00012, "1e-4"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (2.5e7, "2e7"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_in_few_characters(value: float, expected: str) -> None:
    assert short(value) == expected


def test_texts_and_memory_in_few_characters() -> None:
    assert shortened("a\n b", 10) == "a b"
    assert shortened("0123456789" * 3, 13) == "01234 … 56789"
    peaks = {"rollout": 100.0, "loss": 200.4}
    assert memory_text({"peak_resident_mib": peaks}) == "rollout 100, loss 200 MiB resident"
    assert memory_text({"peak_cuda_mib": peaks}) == "rollout 100, loss 200 MiB allocated"
    assert memory_text({}) == ""


def test_a_curve_runs_from_its_lowest_to_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, values, expected in (
        (8, [0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        (2, [0, 0, 10, 10, math.nan], "▁█"),
        (4, [3.0, 3.0], "▁▁  "),
        (3, [], "   "),
    ):
        monkeypatch.setattr(figures, "WIDTH_OF_CURVE", width)
        assert figures.curve(values) == expected


def test_a_run_is_shown_from_its_files(
    tmp_path: Path, recorded: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    from grpo_core.show import main

    run_directory = tmp_path / "run"
    run_directory.mkdir()
    with pytest.raises(SystemExit):
        main([str(run_directory)])
    assert "metrics.jsonl" in capsys.readouterr().err
    lines = [json.dumps(record) for record, *_ in recorded.given]
    (run_directory / "metrics.jsonl").write_text("\n".join(lines))
    (run_directory / "config.json").write_text(json.dumps({"steps": 20}))
    with pytest.raises(SystemExit):
        main([str(run_directory), "--stage", "SFT"])
    assert "stage: expected one of ['grpo'], got 'SFT'" in capsys.readouterr().err
    kept = [
        json.dumps({"stage": "grpo", **asdict(sample)})
        for _, _, written in recorded.given[-1:]
        for sample in written
    ]
    (run_directory / "samples.jsonl").write_text("\n".join(kept))
    assert main([str(run_directory), "--svg", str(tmp_path / "run.svg")]) == 0
    shown = capsys.readouterr().out
    last = recorded.given[-1][0]
    for text in ("step 9 of 20", "sevens", f"{last['reward']:.3f}", "best", "held out", "KL"):
        assert text in shown
    assert "ran into max_new_tokens" in shown
    assert (tmp_path / "run.svg").read_text().startswith("<svg")
