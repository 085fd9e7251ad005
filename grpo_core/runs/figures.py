"""The figures of a run as short texts, for the consoles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.rewards import shown_name

NARROWEST, GAP = 5, 2  # characters of a column, and between columns
WIDTH_OF_CURVE = 18  # characters
NEAR_ZERO = 0.01  # more than rounding leaves of a loss that is 0


def choose_cells(
    record: Metrics, parts: Sequence[str], config: TrainerConfig, width: int
) -> dict[str, str]:
    """The figures of a step by the heads of their columns, as many as fit.

    Args:
        record: of the step.
        parts: names of rewards.
        config: of the run; the KL is shown if it is in the objective or the advantages.
        width: of the terminal, in characters.
    """

    def cell(rank: int, name: str, form: str = "") -> tuple[int, str]:
        value = record.get(name)
        return rank, "–" if value is None else form.format(value) if form else short(value)

    rewards = {shown_name(name): cell(3 if k else 1, name) for k, name in enumerate(parts)}
    cells = {
        "step": cell(0, "step", "{}"),
        "reward": cell(0, "reward"),
        **rewards,
        "length": cell(2, "length", "{:.1f}"),
        "cut": cell(2, "truncated", "{:.0%}"),
        "same": cell(4, "zero_std", "{:.0%}"),
        **({"KL": cell(1, "kl")} if config.objective.beta or config.teacher_coef else {}),
        **({"stale": cell(3, "staleness")} if config.asynchronous else {}),
        "entropy": cell(2, "entropy"),
        "clip": cell(2, "clip_fraction", "{:.1%}"),
        "ratio≤": cell(6, "ratio_max"),
        "grad": cell(2, "grad_norm"),
        "rate": cell(7, "learning_rate"),
        "s": (2, short(sum(record.get("seconds", {}).values()))),
    }
    chosen, room = [], width + GAP
    # where room is short, columns of the lowest rank stay
    for head in sorted(cells, key=lambda head: cells[head][0]):
        if (size := max(NARROWEST, len(head)) + GAP) <= room:
            chosen.append(head)
            room -= size
    return {head: text for head, (_, text) in cells.items() if head in chosen}


def line(cells: dict[str, str]) -> str:
    """A line of the table, its cells below their heads."""
    gap = " " * GAP
    return gap.join(f"{text:>{max(NARROWEST, len(head))}}" for head, text in cells.items())


def short(value: float) -> str:
    """About three digits, in at most six characters."""
    size = abs(value)
    if size and (size < 0.001 or 1e5 <= size < math.inf):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def curve(values: Sequence[float]) -> str:
    """Values in characters of eight heights; means of several if there are too many."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(WIDTH_OF_CURVE, len(finite))
    edges = [len(finite) * place // count for place in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = 7.99 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[int(scale * (mean - low))] for mean in means).ljust(WIDTH_OF_CURVE)


def memory_text(record: Metrics) -> str:
    """The highest memory of each phase; "" if it is not known."""
    for name, kind in (("peak_cuda_mib", "allocated"), ("peak_resident_mib", "resident")):
        if name in record:
            peaks = (f"{phase} {mib:.0f}" for phase, mib in record[name].items())
            return ", ".join(peaks) + f" MiB {kind}"
    return ""


def explanation(record: Metrics) -> str:
    """A note on a loss near 0; "" for other losses."""
    loss = record["loss"]
    if abs(loss) >= NEAR_ZERO:
        return ""
    return (
        f"the loss is {short(loss)}, and nothing is wrong: the advantages of a group sum to 0, so "
        "on policy the loss is near 0 whatever is learnt, while its gradient is not. Watch the "
        "reward."
    )
