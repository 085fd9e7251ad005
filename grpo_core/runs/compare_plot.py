"""The comparison as a picture: what was reached, beside what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from grpo_core.runs.plot import INK, STYLE
from grpo_core.runs.plot_runs import titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grpo_core.runs.comparison import Outcome

COLOURS = {
    "base": "#8d99ae",
    "SFT": "#5b9279",
    "DPO": "#b08d57",
    "PPO": "#7a5195",
    "GRPO": "#d1495b",
    "GRPO, KL in the reward": "#2e6f95",
}
PANELS: tuple[tuple[str, str, Callable[[Outcome], float], str], ...] = (
    ("Accuracy", "held-out, sampled", lambda o: 100 * o.accuracy, "{:.0f} %"),
    ("Accuracy on traps", "pairs like 3.11 and 3.8", lambda o: 100 * o.traps, "{:.0f} %"),
    ("Parameters held", "policy, critic, reference; millions", lambda o: o.held / 1e6, "{:.1f}"),
    ("Memory of a step", "beyond those, MiB", lambda o: o.peak_mib, "{:.0f}"),
    ("Training time", "seconds", lambda o: o.seconds, "{:.0f}"),
)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Bars of the means, a dot for every seed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))[::-1]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 3.6))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (title, note, value, form) in zip(axes.flat, PANELS, strict=True):
            _bars(ax, methods, outcomes, value, form)
            titled(ax, title, note)
        figure.savefig(path, dpi=160)


def _bars(
    ax: Axes,
    methods: Sequence[str],
    outcomes: Sequence[Outcome],
    value: Callable[[Outcome], float],
    form: str,
) -> None:
    """One panel."""
    largest = max(value(outcome) for outcome in outcomes)
    for place, method in enumerate(methods):
        values = [value(outcome) for outcome in outcomes if outcome.method == method]
        if not (middle := mean(values)):
            continue
        ax.barh(place, middle, height=0.62, color=COLOURS.get(method, INK), alpha=0.85)
        if len(values) > 1:
            ax.plot(values, [place] * len(values), "o", color=INK, markersize=3, alpha=0.55)
        reach = max(middle, *values) + 0.03 * largest
        ax.text(reach, place, form.format(middle), va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(methods)), methods)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xlim(0, 1.25 * largest or 1)
    ax.grid(axis="y", visible=False)
