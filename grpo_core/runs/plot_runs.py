"""One run or several as a picture, from their metrics.jsonl: `python -m grpo_core.plot RUN...`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.cli.options import Parser, check_package, new_file, run_with_metrics
from grpo_core.runs.plot import INK, QUIET, STYLE, Run, held_out, smooth, training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[dict[str, Any]]
COLOURS = ("#d1495b", "#2e6f95", "#5b9279", "#b08d57", "#7a5195", "#4a4e69", "#c77d2e", "#3d8c95")
PHASES = {"rollout": "#2e6f95", "reference": "#8d99ae", "loss": "#d1495b", "critic": "#7a5195"}
PHASES |= {"rest": "#d9dce1"}
Curve = Callable[[History], list[tuple[int, float]]]


@dataclass(frozen=True)
class Panel:
    """A pair of axes: its texts, and what is drawn of every history, each in its line style."""

    title: str
    note: str
    curves: tuple[tuple[Curve, str], ...]


def _single(title: str, note: str, curve: Curve) -> Panel:
    return Panel(title, note, ((curve, "-"),))


PANELS = (
    _single("Reward", "training", training("reward")),
    _single("Reward, held out", "", held_out("reward")),
    _single("Length", "training, tokens", training("length")),
    _single("KL", "to the start, nats per token", training("kl")),
    _single("Entropy", "nats per token", training("entropy")),
    _single("Clip fraction", "share of tokens that are held back", training("clip_fraction")),
    _single("Gradient norm", "before clipping", training("grad_norm")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the picture; returns the exit status."""
    parser = Parser("grpo_core.plot", description="Draws the curves of one run or several.")
    parser.add_argument("runs", nargs="+", type=run_with_metrics, help="run directories")
    parser.add_argument(
        "--output", type=new_file, help="picture to write; default: curves.png in the first run"
    )
    options = parser.parse_args(arguments)
    try:
        check_package("plot", "matplotlib")
        path = plot_runs(options.runs, options.output or options.runs[0] / "curves.png")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(path)
    return 0


def plot_runs(runs: Sequence[Path], output: Path) -> Path:
    """Every figure that some run has, all runs in one pair of axes; and where the time went.

    Raises:
        FileNotFoundError, ValueError: a directory without metrics.jsonl, or without a step in it.
        ModuleNotFoundError: matplotlib is not installed.
    """
    histories = read_histories(runs)
    panels = [
        panel
        for panel in (*PANELS[:2], *accuracy_panels(histories), *PANELS[2:])
        if any(curve(history) for history in histories.values() for curve, _ in panel.curves)
    ]
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-(len(panels) + 1) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 3.3 * rows + 0.5))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, rect=(0, 0, 1, 0.95))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            titled(ax, panel.title, panel.note)
            for colour, (name, history) in zip(_colours(histories), histories.items(), strict=True):
                for curve, style in panel.curves:
                    label = name if style == "-" else None
                    _curve(ax, curve(history), colour, label, style)
        _time(axes[len(panels)], histories)
        for ax in axes[len(panels) + 1 :]:
            ax.set_axis_off()
        handles = {line.get_label(): line for ax in axes[:-1] for line in ax.get_lines()}
        figure.legend(
            handles=[handles[name] for name in histories if name in handles],
            loc="upper right",
            ncols=min(len(histories), 5),
            frameon=False,
            fontsize=10,
            handlelength=1.6,
        )
        figure.savefig(output, dpi=150)
    return output


def read_histories(runs: Sequence[Path]) -> dict[str, History]:
    """Every learning stage of every run, by a name that tells them apart."""
    found: dict[str, History] = {}
    for run in runs:
        stages = Run.read(run / "metrics.jsonl").histories
        for stage, history in stages.items():
            name = run.resolve().name if len(stages) == 1 else f"{run.resolve().name}: {stage}"
            found[name if name not in found else str(run)] = history
    if not any(len(history) > 1 for history in found.values()):
        raise ValueError(f"runs: expected at least one step, found none in {list(map(str, runs))}")
    return found


def _colours(histories: dict[str, History]) -> list[str]:
    """A colour for each, from the beginning again after the last."""
    return [COLOURS[k % len(COLOURS)] for k in range(len(histories))]


def titled(ax: Axes, title: str, note: str) -> None:
    """Gives a panel its title and, smaller, what it shows."""
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=19)
    ax.text(0, 1.03, note, transform=ax.transAxes, fontsize=8.5, color=QUIET)


def accuracy_panels(histories: dict[str, History]) -> list[Panel]:
    """A panel for every reward's held-out mean; pass@k and greedy answers where they were taken."""
    figures = dict.fromkeys(
        name
        for history in histories.values()
        for record in history
        for name in record.get("held_out", {})
    )
    panels = []
    for part in figures:
        if "/" in part or part.startswith("greedy_") or part in ("reward", "length", "truncated"):
            continue
        curves, notes = [(held_out(part), "-")], []
        passes = [name for name in figures if name.startswith(f"{part}/pass@")]
        if passes:
            # the largest k is the last
            best = max(passes, key=lambda name: int(name.rpartition("@")[2]))
            averages = [name for name in figures if name.startswith(f"{part}/avg@")]
            notes += [f"line: {name.rpartition('/')[2]}" for name in averages]
            notes.append(f"dashed: {best.rpartition('/')[2]}")
            curves.append((held_out(best), "--"))
        if f"greedy_{part}" in figures:
            notes.append("dotted: greedy")
            curves.append((held_out(f"greedy_{part}"), ":"))
        title = f"{part.rpartition(':')[2].capitalize()}, held out"
        panels.append(Panel(title, ", ".join(notes), tuple(curves)))
    return panels


def _curve(
    ax: Axes, points: Sequence[tuple[int, float]], colour: str, name: str | None, style: str
) -> None:
    """A line through the steps' figures; of many, smoothed with the single ones pale behind."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    settings: dict[str, Any] = {"color": colour, "linestyle": style, "label": name}
    if len(values) > 15:
        ax.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
        ax.plot(steps, smooth(values), linewidth=2.2, **settings)
    elif values:
        marker = "o" if style == "-" else None
        ax.plot(steps, values, linewidth=2.2, marker=marker, markersize=4, **settings)


def _time(ax: Axes, histories: dict[str, History]) -> None:
    """Seconds of a step, by phase, a bar for each run."""
    titled(ax, "Time of a step", "seconds, mean over the steps")
    for place, history in enumerate(reversed(list(histories.values()))):
        spent = [record["seconds"] for record in history if "seconds" in record]
        left = 0.0
        for phase in dict.fromkeys(phase for seconds in spent for phase in seconds):
            mean = sum(seconds.get(phase, 0.0) for seconds in spent) / len(spent)
            label = phase if place == 0 else None
            ax.barh(place, mean, left=left, height=0.5, color=PHASES.get(phase, INK), label=label)
            left += mean
    ax.set_yticks(range(len(histories)), list(histories)[::-1])
    ax.set_ylim(-0.8, len(histories) - 0.2)
    ax.grid(axis="y", visible=False)
    ax.legend(frameon=False, fontsize=8.5, ncols=4, loc="upper right", handlelength=0.8)
