"""Pictures of runs: which figures are drawn, of how many runs, and what is missing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_core.plot import main
from grpo_core.runs.plots import BARS, draw_methods, points, read_histories, reward_panels


def write_run(directory: Path, steps: int, **more: Any) -> Path:
    """A run that gets better."""
    directory.mkdir()
    lines = [{"stage": "grpo", "step": 0, "held_out": {"reward": 0.1, "accuracy": 0.1}}]
    for step in range(1, steps + 1):
        share = 1 - math.exp(-step / 10)
        record = {"stage": "grpo", "step": step, "reward": share, "length": 10 + step, **more}
        record["seconds"] = {"rollout": 2.0, "reference": 0.5, "loss": 1.0, "optimizer": 0.1}
        if step % 5 == 0:
            record["held_out"] = {"reward": share, "accuracy": share / 2}
        lines.append(record)
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


def test_several_runs_in_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "first", 30, kl=0.1), write_run(tmp_path / "second", 12)]
    assert main(list(map(str, runs))) == 0
    picture = runs[0] / "curves.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(read_histories(runs)) == ["first", "second"]
    assert main([str(runs[1]), "--output", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").stat().st_size < picture.stat().st_size


def test_runs_without_steps_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty")])
    assert "metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(write_run(tmp_path / "none", 0))])
    assert "runs: expected at least one step" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([str(write_run(tmp_path / "run", 3))])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_held_out_figures_of_any_reward_and_of_several_answers(tmp_path: Path) -> None:
    """The command's own rewards are "math" and "format"; few runs have an "accuracy"."""
    run = write_run(tmp_path / "first", 10)
    figures = ("math", "math/avg@8", "math/pass@2", "math/pass@8", "greedy_math", "math/trap")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (11, 12):
            held_out = {name: step / 20 for name in (*figures, "reward", "a.py:digits")}
            file.write("\n" + json.dumps({"stage": "grpo", "step": step, "held_out": held_out}))
    histories = read_histories([run])
    panels = {panel.title: panel for panel in reward_panels(histories)}
    assert list(panels) == ["Accuracy, held out", "Math, held out", "Digits, held out"]
    math_panel = panels["Math, held out"]
    assert math_panel.note == "line: avg@8, dashed: pass@8, dotted: greedy"
    assert list(math_panel.curves.values()) == ["-", "--", ":"]
    (history,) = histories.values()
    for figure in math_panel.curves:
        assert points(history, figure) == [(11, 0.55), (12, 0.6)]
    (figure,) = panels["Accuracy, held out"].curves
    assert [step for step, _ in points(history, figure)] == [0, 5, 10]
    assert main([str(run)]) == 0


def test_the_bars_of_a_method_lie_on_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the first and the last method have no bar in some panels."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    limits = []
    save = Figure.savefig

    def savefig(self: Any, *args: Any, **options: Any) -> None:
        limits.extend(ax.get_ylim() for ax in self.axes)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    figures = {"accuracy": 0.5, "traps": 0.4, "held": 0, "peak_mib": 0, "seconds": 0}
    trained = figures | {"held": 1e6, "peak_mib": 80, "seconds": 3}
    outcomes = [
        {"method": name, **values}
        for name, values in (("base", figures), ("SFT", trained), ("small base", figures))
    ]
    draw_methods(outcomes, tmp_path / "compare.png")
    assert len(limits) == len(BARS) and len(set(limits)) == 1
