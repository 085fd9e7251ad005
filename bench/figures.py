"""The figures of a report: time, bandwidth and memory of every contender, by vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import Report, Run, bandwidth, copy_bandwidth, is_ours

# greys for plain PyTorch, warm for other people's kernels, blues for ours
COLOURS = {
    "naive": "#b8b8b8",
    "naive+entropy": "#8c8c8c",
    "compiled": "#5f5f5f",
    "liger": "#f2a65a",
    "liger-inplace": "#d9772b",
    "trl": "#c9b037",
    "ours-torch": "#8fd0c8",
    "ours-torch-inplace": "#2a9d8f",
    "ours-triton": "#7fb2e5",
    "ours-triton-inplace": "#1f5fa8",
}
BARS_OF_GROUP = 0.84
GRID = "#e3e3e3"
# bars of a panel up to which their numbers have room side by side
UPRIGHT = 24
# of the logits; less is vectors over tokens
SHOWN = 0.005
Value = Callable[[Run], tuple[float, str]]


def draw(report: Report, folder: Path) -> list[str]:
    """Writes the three figures, and returns their names."""
    figures = {
        "time.png": _figure(
            report, "Time, in times that of copying the logits; numbers: milliseconds", _time
        ),
        "bandwidth.png": _figure(
            report, "Bandwidth of what has to move, GB/s, and that of a copy", _speed, limit=True
        ),
        "memory.png": _figure(report, "Peak memory beyond the logits, in logits", _memory),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return list(figures)


def _time(run: Run) -> tuple[float, str]:
    """Height of a bar and what stands above it; so the next two."""
    return run["median"] / run["copy_seconds"], _short(run["median"] * 1e3)


def _speed(run: Run) -> tuple[float, str]:
    return bandwidth(run) / 1e9, _short(bandwidth(run) / 1e9)


def _memory(run: Run) -> tuple[float, str]:
    held = run["peak_extra_bytes"] / run["logits_bytes"]
    return held, _short(held) if held >= SHOWN else "0"


def _figure(
    report: Report,
    title: str,
    value: Value,
    *,
    limit: bool = False,
) -> Figure:
    """A panel per case and dtype, one below the other, and one legend for all."""
    cases = report.cases()
    widest = max(len({(run["N"], run["V"]) for run in report.of(*case)}) for case in cases)
    width = max(9.0, 1.9 * widest)
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(width, 1.6 + 2.4 * len(cases)), squeeze=False, layout="constrained"
    )
    labels: dict[str, object] = {}
    for axes, (case, dtype) in zip(panels[:, 0], cases, strict=True):
        _panel(axes, report.of(case, dtype), value, limit=limit)
        axes.set_title(f"{case}, {dtype}", loc="left", fontsize=10, fontweight="bold")
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.suptitle(f"{title}\n{report.taken_on}", x=0.01, ha="left", fontsize=11)
    order = [name for name in COLOURS if name in labels]
    order += [name for name in labels if name not in COLOURS]
    figure.legend(
        [labels[name] for name in order],
        order,
        loc="outside lower left",
        ncols=min(6, len(order)),
        frameon=False,
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, runs: list[Run], value: Value, *, limit: bool) -> None:
    """Contenders side by side, a group for every size."""
    sizes = sorted({(run["V"], run["N"]) for run in runs})
    names = [name for name in COLOURS if any(run["contender"] == name for run in runs)]
    names += sorted({run["contender"] for run in runs} - set(names))
    bar = BARS_OF_GROUP / max(1, len(names))
    crowded = len(names) * len(sizes) > UPRIGHT
    for nth, name in enumerate(names):
        offset = (nth - (len(names) - 1) / 2) * bar
        places, heights, numbers = [], [], []
        for group, size in enumerate(sizes):
            for run in runs:
                if (run["V"], run["N"]) == size and run["contender"] == name:
                    places.append(group + offset)
                    height, number = value(run)
                    heights.append(height)
                    numbers.append(number)
        bars = axes.bar(places, heights, 0.92 * bar, label=name, color=COLOURS.get(name, "#333333"))
        axes.bar_label(
            bars,
            numbers,
            fontsize=6.5,
            padding=2,
            rotation=90 if crowded else 0,
            fontweight="bold" if is_ours(name) else "normal",
        )
    if limit:
        for group, size in enumerate(sizes):
            copies = [copy_bandwidth(run) / 1e9 for run in runs if (run["V"], run["N"]) == size]
            half = BARS_OF_GROUP / 2 + 0.03
            label = "copy of the logits" if group == 0 else None
            axes.hlines(
                max(copies), group - half, group + half, color="#c0392b", lw=1.4, label=label
            )
    axes.margins(x=0.01, y=0.3 if crowded else 0.16)
    axes.set_xticks(range(len(sizes)), [f"{N:,} x {V:,}" for V, N in sizes], fontsize=9)
    axes.tick_params(axis="both", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(value: float) -> str:
    """Two or three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"
