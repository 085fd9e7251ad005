"""The run as a picture: six panels read from metrics.jsonl, drawn to curves.png."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"R1-Zero": "#d1495b", "R1": "#2e6f95"}
LEVEL_COLOURS = {"base": "#8d99ae", "SFT": "#5b9279"}
INK, QUIET, FAINT = "#22252a", "#6b7078", "#d9dce1"
# Steps that a training figure's line averages. The highest and the lowest stay out: a single token
# now and then multiplies the estimate of the KL by ten.
SMOOTHING = 7

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Run:
    """A metrics file, sorted: a history per learning stage, figures per finished stage."""

    histories: dict[str, list[dict[str, Any]]]
    results: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def read(cls, path: Path) -> Run:
        histories: dict[str, list[dict[str, Any]]] = {}
        results = {}
        for line in path.read_text("utf-8").splitlines():
            record = json.loads(line)
            if "result" in record:
                results[record["stage"]] = record["result"]
            else:
                histories.setdefault(record["stage"], []).append(record)
        return cls(histories, results)


def plot(directory: Path) -> Path:
    """Draws `directory`/metrics.jsonl.

    Returns:
        The path of curves.png.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    run = Run.read(directory / "metrics.jsonl")
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 7.4))
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.14, rect=(0, 0, 1, 0.89))
        axes = figure.subplots(2, 3)
        for ax, panel in zip(axes.flat, PANELS, strict=True):
            draw(ax, panel, run)
        figure.text(0.0125, 0.945, TITLE, fontsize=19, fontweight="bold")
        figure.text(0.0125, 0.907, subtitle(run), fontsize=10.5, color=QUIET)
        handles = {line.get_label(): line for line in axes[0, 0].get_lines()}
        figure.legend(
            handles=list(handles.values()),
            loc="upper right",
            bbox_to_anchor=(0.99, 0.985),
            ncols=len(handles),
            frameon=False,
            fontsize=10.5,
            handlelength=1.6,
        )
        path = directory / "curves.png"
        figure.savefig(path, dpi=160)
    return path


def subtitle(run: Run) -> str:
    """What became of the traps, in one line."""
    traps = (
        f"{name} {figures['sampled']['accuracy/trap']:.0%}" for name, figures in run.results.items()
    )
    return "Traps answered right, sampled:   " + "   ·   ".join(traps)


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its texts, what is drawn of each history, and how."""

    title: str
    note: str
    curve: Callable[[Sequence[dict[str, Any]]], list[tuple[int, float]]]
    level: str | None = None  # the sampled figure of base and SFT drawn as a line across
    smoothed: bool = False  # with the single steps behind the line, pale
    bottom: float | None = None  # of an axis of shares, whose top is 1
    logarithmic: bool = False


def draw(ax: Axes, panel: Panel, run: Run) -> None:
    """The panel's curves, levels and texts."""
    ax.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=21)
    ax.text(0, 1.035, panel.note, transform=ax.transAxes, fontsize=9, color=QUIET)
    if panel.level is not None:
        draw_levels(ax, run, panel.level)
    for name, history in run.histories.items():
        points = panel.curve(history)
        steps, values = [step for step, _ in points], [value for _, value in points]
        colour = COLOURS.get(name, INK)
        if panel.smoothed:
            ax.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
            values = smooth(values)
        marker = None if panel.smoothed else "o"
        ax.plot(
            steps, values, color=colour, linewidth=2.4, marker=marker, markersize=4.5, label=name
        )
    if panel.bottom is not None:
        # room for a line that runs along the top
        ax.set_ylim(panel.bottom, 1 + 0.02 * (1 - panel.bottom))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if panel.logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    last = max(record["step"] for history in run.histories.values() for record in history)
    ax.set_xlim(-0.02 * last, 1.02 * last)
    ax.set_xlabel("step", color=QUIET, fontsize=9)


def draw_levels(ax: Axes, run: Run, figure: str) -> None:
    """Where base and SFT stand, dashed."""
    for name, colour in LEVEL_COLOURS.items():
        if name in run.results:
            value = run.results[name]["sampled"][figure]
            ax.axhline(value, color=colour, linewidth=1.5, linestyle=(0, (4, 3)), label=name)


def held_out(name: str) -> Callable[[Sequence[dict[str, Any]]], list[tuple[int, float]]]:
    """(step, figure) wherever this held-out figure was taken."""
    return lambda history: [
        (record["step"], record["held_out"][name])
        for record in history
        if name in record.get("held_out", {})
    ]


def training(name: str) -> Callable[[Sequence[dict[str, Any]]], list[tuple[int, float]]]:
    """(step, figure) of every training step."""
    return lambda history: [(record["step"], record[name]) for record in history if name in record]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the `SMOOTHING` values around each without the two extremes; fewer at the ends."""
    half = SMOOTHING // 2
    windows = [
        sorted(values[max(0, place - half) : place + half + 1]) for place in range(len(values))
    ]
    return [mean(window[1:-1] or window) for window in windows]


TITLE = "“3.11 and 3.8, which is larger?”"
PANELS = (
    Panel("Accuracy", "held-out, sampled", held_out("accuracy"), level="accuracy", bottom=0.5),
    Panel(
        "Accuracy on traps",
        "held-out pairs like 3.11 and 3.8, sampled",
        held_out("accuracy/trap"),
        level="accuracy/trap",
        bottom=0.0,
    ),
    Panel("Length of a response", "held-out, sampled, tokens", held_out("length"), level="length"),
    Panel("Reward", "training: accuracy + 0.2 format", training("reward"), smoothed=True),
    Panel("Entropy", "training, nats per token", training("entropy"), smoothed=True),
    Panel(
        "Distance from the start",
        "training, KL in nats per token, logarithmic",
        lambda history: [point for point in training("kl")(history) if point[1] > 1e-4],
        smoothed=True,
        logarithmic=True,
    ),
)
