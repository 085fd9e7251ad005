"""Pictures: of any runs (`python -m grpo_core.plot`), of the demo run, of the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_core.cli.command import interruptible
from grpo_core.cli.options import Parser, check_package, new_file
from grpo_core.runs.directory import Record, read_metrics, run_with_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Histories = Mapping[str, Sequence[Record]]
INK, QUIET, FAINT = "#22252a", "#6b7078", "#d9dce1"
COLOURS = ("#d1495b", "#2e6f95", "#5b9279", "#b08d57", "#7a5195", "#4a4e69", "#c77d2e", "#3d8c95")
# stages of the demo run, and methods of the comparison
NAMED = {"base": "#8d99ae", "SFT": "#5b9279", "R1-Zero": "#d1495b", "R1": "#2e6f95"}
NAMED |= {"DPO": "#b08d57", "PPO": "#7a5195", "GRPO": "#d1495b"}
NAMED |= {"GRPO, KL in the reward": "#2e6f95", "small base": "#8d99ae"}
NAMED |= {"R1 distilled by SFT": "#5b9279", "R1 distilled by opd": "#c77d2e"}
# A line of more values than MANY is the mean of SMOOTHING, without the highest and the lowest of
# them: now and then a single token multiplies the estimate of the KL by ten.
MANY, SMOOTHING = 15, 7

STYLE: dict[Any, Any] = {
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
}


class Panel(NamedTuple):
    """A pair of axes.

    Attributes:
        title, note: above it.
        curves: figures of a step's record and their line styles; held_out/NAME is a held-out one.
        scale: of the vertical axis.
    """

    title: str
    note: str
    curves: Mapping[str, str]
    scale: str = "linear"


PANELS = (
    Panel("Reward", "training", {"reward": "-"}),
    Panel("Reward, held out", "", {"held_out/reward": "-"}),
    Panel("Length", "training, tokens", {"length": "-"}),
    Panel("KL", "to the initial model or the teacher, nats per token", {"kl": "-"}),
    Panel("Entropy", "nats per token", {"entropy": "-"}),
    Panel("Clip fraction", "share of tokens that are clipped", {"clip_fraction": "-"}),
    Panel("Gradient norm", "before clipping", {"grad_norm": "-"}),
)
DEMO_TITLE = "“3.11 and 3.8, which is larger?”"
TRAPS = "held-out pairs like 3.11 and 3.8, sampled"
DEMO = (
    Panel("Accuracy", "held-out, sampled", {"held_out/accuracy": "-"}),
    Panel("Accuracy on traps", TRAPS, {"held_out/accuracy/trap": "-"}),
    Panel("Length of a response", "held-out, sampled, tokens", {"held_out/length": "-"}),
    Panel("Reward", "training: accuracy + 0.2 format", {"reward": "-"}),
    Panel("Entropy", "training, nats per token", {"entropy": "-"}),
    Panel("Distance from the start", "training, KL in nats per token", {"kl": "-"}, "log"),
)
# of the comparison: title, note, field of an outcome, its unit, and how a value is written
BARS = (
    ("Accuracy", "held-out, sampled", "accuracy", 0.01, "{:.0f} %"),
    ("Accuracy on traps", "pairs like 3.11 and 3.8", "traps", 0.01, "{:.0f} %"),
    ("Parameters held", "policy, critic, reference; millions", "held", 1e6, "{:.1f}"),
    ("Memory of a step", "beyond those, MiB", "peak_mib", 1, "{:.0f}"),
    ("Training time", "seconds", "seconds", 1, "{:.0f}"),
)


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Draws one run or several; returns the exit status."""
    parser = Parser("grpo_core.plot", description="Plots the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", type=run_with_metrics, help="run directories")
    parser.add_argument(
        "--output", type=new_file, help="picture to write; default: curves.png in the first run"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.runs[0] / "curves.png"
    try:
        check_package("plot", "matplotlib")
        draw_runs(options.runs, output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(output)
    return 0


def draw_runs(runs: Sequence[Path], output: Path) -> None:
    """Every figure that some run has, with all runs in each panel, and the time of a step.

    Raises:
        ValueError: no run has a step.
    """
    histories = read_histories(runs)
    panels = [
        panel
        for panel in (*PANELS[:2], *reward_panels(histories), *PANELS[2:])
        if any(points(history, name) for history in histories.values() for name in panel.curves)
    ]
    with _axes(output, len(panels) + 1) as axes:
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel, histories)
        _legend(axes[: len(panels)])
        _draw_times(axes[len(panels)], histories)


def draw_demo(run: Path, output: Path) -> None:
    """The six panels of the demo run, with dashed lines for the models before learning."""
    histories, results = read_metrics(run)
    with _axes(output, len(DEMO), DEMO_TITLE) as axes:
        for ax, panel in zip(axes, DEMO, strict=True):
            _draw_panel(ax, panel, histories)
        for ax, figure in zip(axes, ("accuracy", "accuracy/trap", "length"), strict=False):
            for name in (name for name in results if name not in histories):
                level, colour = results[name]["sampled"][figure], NAMED[name]
                ax.axhline(level, color=colour, linewidth=1.5, linestyle="--", label=name)
        _legend(axes)


def draw_methods(outcomes: Sequence[Record], output: Path) -> None:
    """The comparison: a bar for the mean of every method, a dot for every seed."""
    methods = list(dict.fromkeys(outcome["method"] for outcome in outcomes))[::-1]
    with _axes(output, len(BARS), columns=len(BARS)) as axes:
        for ax, (title, note, name, unit, form) in zip(axes, BARS, strict=True):
            _set_title(ax, title, note)
            largest = max(outcome[name] for outcome in outcomes) / unit
            for place, method in enumerate(methods):
                values = [each[name] / unit for each in outcomes if each["method"] == method]
                if not (middle := mean(values)):
                    continue
                ax.barh(place, middle, height=0.62, color=NAMED.get(method, INK), alpha=0.85)
                if len(values) > 1:
                    ax.plot(values, [place] * len(values), "o", color=INK, markersize=3, alpha=0.55)
                end = max(values) + 0.03 * largest
                ax.text(end, place, form.format(middle), va="center", fontsize=9)
            ax.set_yticks(range(len(methods)), methods if ax is axes[0] else [])
            ax.set_xlim(0, 1.25 * largest or 1)
            # also where methods without a bar lie at the ends
            ax.set_ylim(-0.6, len(methods) - 0.4)
            ax.grid(axis="y", visible=False)


def unless_missing(draw: Callable[..., None], source: Any, output: Path) -> None:
    """Draws a picture; without matplotlib it prints how to install it."""
    try:
        draw(source, output)
    except ModuleNotFoundError as error:
        print(f"no {output.name}, since {error.name} is missing: pip install {error.name}")


def read_histories(runs: Sequence[Path]) -> dict[str, list[Record]]:
    """The records of every stage of every run, by a name that tells them apart."""
    histories: dict[str, list[Record]] = {}
    for run in runs:
        stages, _ = read_metrics(run)
        for stage, history in stages.items():
            name = run.resolve().name if len(stages) == 1 else f"{run.resolve().name}: {stage}"
            histories[name if name not in histories else str(run)] = history
    if not any(len(history) > 1 for history in histories.values()):
        raise ValueError(f"runs: expected at least one step, found none in {list(map(str, runs))}")
    return histories


def reward_panels(histories: Histories) -> list[Panel]:
    """A panel for every reward's held-out mean, with pass@k and greedy answers if there are any."""
    records = [record for history in histories.values() for record in history]
    figures = dict.fromkeys(name for record in records for name in record.get("held_out", {}))
    panels = []
    for reward in figures:
        other = reward in ("reward", "length", "truncated")
        if other or "/" in reward or reward.startswith("greedy_"):
            continue
        curves, notes = {f"held_out/{reward}": "-"}, []
        if passes := [name for name in figures if name.startswith(f"{reward}/pass@")]:
            best = max(passes, key=lambda name: int(name.rpartition("@")[2]))
            averages = [name for name in figures if name.startswith(f"{reward}/avg@")]
            notes += [f"line: {name.rpartition('/')[2]}" for name in averages]
            notes.append(f"dashed: {best.rpartition('/')[2]}")
            curves[f"held_out/{best}"] = "--"
        if f"greedy_{reward}" in figures:
            notes.append("dotted: greedy")
            curves[f"held_out/greedy_{reward}"] = ":"
        title = f"{reward.rpartition(':')[2].capitalize()}, held out"
        panels.append(Panel(title, ", ".join(notes), curves))
    return panels


def points(history: Sequence[Record], figure: str) -> list[tuple[int, float]]:
    """(step, value) of every record with this figure; held_out/NAME is a held-out one."""
    kind, _, name = figure.partition("/")
    if kind == "held_out":
        history = [{"step": each["step"]} | each.get("held_out", {}) for each in history]
        figure = name
    return [(record["step"], record[figure]) for record in history if figure in record]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the `SMOOTHING` values around each without the two extremes; fewer at the ends."""
    half = SMOOTHING // 2
    windows = [sorted(values[max(0, k - half) : k + half + 1]) for k in range(len(values))]
    return [mean(window[1:-1] or window) for window in windows]


def _draw_panel(ax: Axes, panel: Panel, histories: Histories) -> None:
    """Title, and each curve of each history."""
    _set_title(ax, panel.title, panel.note)
    for place, (name, history) in enumerate(histories.items()):
        colour = NAMED.get(name, COLOURS[place % len(COLOURS)])
        for figure, style in panel.curves.items():
            drawn = [p for p in points(history, figure) if panel.scale == "linear" or p[1] > 0]
            steps, values = [step for step, _ in drawn], [value for _, value in drawn]
            marker = "o" if style == "-" and len(values) <= MANY else None
            if len(values) > MANY:
                ax.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
                values = smooth(values)
            label = name if style == "-" else None
            settings: dict[str, Any] = {"color": colour, "linestyle": style, "label": label}
            ax.plot(steps, values, linewidth=2.3, marker=marker, markersize=4.2, **settings)
    ax.set_yscale(panel.scale)
    ax.set_xlabel("step", color=QUIET, fontsize=9)


def _draw_times(ax: Axes, histories: Histories) -> None:
    """Seconds of a step by phase, a bar for each run."""
    _set_title(ax, "Time of a step", "seconds, mean over the steps")
    phases: dict[str, str] = {}
    for place, history in enumerate(reversed(list(histories.values()))):
        spent = [record["seconds"] for record in history if "seconds" in record]
        left = 0.0
        for phase in dict.fromkeys(phase for seconds in spent for phase in seconds):
            label = None if phase in phases else phase
            colour = phases.setdefault(phase, COLOURS[len(phases) % len(COLOURS)])
            width = mean(seconds.get(phase, 0.0) for seconds in spent)
            ax.barh(place, width, left=left, height=0.5, color=colour, label=label)
            left += width
    ax.set_yticks(range(len(histories)), list(histories)[::-1])
    ax.set_ylim(-0.8, len(histories) - 0.2)
    ax.grid(axis="y", visible=False)
    ax.legend(frameon=False, fontsize=8.5, ncols=4, loc="upper right", handlelength=0.8)


@contextmanager
def _axes(output: Path, count: int, title: str = "", columns: int = 3) -> Iterator[list[Axes]]:
    """Axes of a figure in the style of all, which is written to a file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 3.3 * rows + 0.5))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        if title:
            figure.suptitle(title, x=0.0125, ha="left", fontsize=19, fontweight="bold")
        for ax in axes[count:]:
            ax.set_axis_off()
        yield axes
        figure.savefig(output, dpi=160)


def _set_title(ax: Axes, title: str, note: str) -> None:
    """Gives a panel its title and, smaller, what it shows."""
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=19)
    ax.text(0, 1.03, note, transform=ax.transAxes, fontsize=8.5, color=QUIET)


def _legend(axes: Sequence[Axes]) -> None:
    """The names of all lines, once each, above the panels."""
    lines = {str(line.get_label()): line for ax in axes for line in ax.get_lines()}
    shown = [line for name, line in lines.items() if not name.startswith("_")]
    axes[0].figure.legend(
        handles=shown, loc="outside upper right", ncols=5, frameon=False, fontsize=10
    )
