"""The figures of a step as columns of a table, as many as a terminal has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.rewards import shown_name

GAP = 2  # between columns
LONGEST_HEAD = 12

LOSS_IS_ZERO = (
    "the loss is {loss}, and nothing is wrong: the advantages of a group sum to 0, so on "
    "policy the loss is near 0 whatever is learnt, while its gradient is not. Watch the reward."
)
# more than rounding leaves, less than a loss that says something
NEAR_ZERO = 0.01


@dataclass(frozen=True)
class Column:
    """A figure, under its head.

    Attributes:
        head: at the top of the column.
        text: of a record.
        rank: the lower, the longer it stays where room is short.
        width: of its widest usual text, or of its head.
    """

    head: str
    text: Callable[[Metrics], str]
    rank: int
    width: int


def choose(parts: Sequence[str], config: TrainerConfig, width: int) -> list[Column]:
    """The columns that fit, in the order in which they are shown.

    Args:
        parts: names of rewards.
        config: of the run; without a KL in the objective there is no column of it.
        width: of the terminal.
    """
    rewards = [
        _figure(name, rank=1 if place == 0 else 3, head=shown_name(name)[:LONGEST_HEAD])
        for place, name in enumerate(parts)
    ]
    kl = [_figure("kl", rank=1, head="KL")] if config.objective.beta > 0 else []
    known = [
        Column("step", lambda record: str(record["step"]), 0, 4),
        _figure("reward", rank=0),
        *rewards,
        _figure("length", rank=2, text=lambda value: f"{value:.1f}"),
        _share("truncated", rank=2, head="cut"),
        _share("zero_std", rank=4, head="same"),
        *kl,
        _figure("entropy", rank=2),
        _share("clip_fraction", rank=2, head="clip"),
        _figure("ratio_max", rank=6, head="ratio≤"),
        _figure("grad_norm", rank=2, head="grad"),
        _figure("learning_rate", rank=7, head="rate"),
        Column("s", lambda record: _seconds(sum(record.get("seconds", {}).values())), 2, 5),
        Column("MiB", lambda record: f"{peak(record):.0f}", 5, 6),
    ]
    chosen: list[int] = []
    for place in sorted(range(len(known)), key=lambda place: (known[place].rank, place)):
        room = sum(known[other].width + GAP for other in [*chosen, place]) - GAP
        if room <= width:
            chosen.append(place)
    return [known[place] for place in sorted(chosen)]


def _figure(
    name: str, *, rank: int, head: str = "", text: Callable[[float], str] | None = None
) -> Column:
    """A number of the record; a dash where it has none."""
    form = text or short

    def cell(record: Metrics) -> str:
        return form(record[name]) if name in record else "–"

    return Column(head or name, cell, rank, max(5, len(head or name)))


def _share(name: str, *, rank: int, head: str) -> Column:
    """The same in percent."""
    column = _figure(name, rank=rank, head=head, text=percent)
    return Column(head, column.text, rank, 4)


def percent(share: float) -> str:
    """0 to 1 in at most four characters: 0%, 0.3%, 12%, 100%."""
    if not math.isfinite(share):
        return str(share)
    return f"{share:.1%}" if 0.0005 <= share < 0.0995 else f"{share:.0%}"


def short(value: float) -> str:
    """Three digits or so, in at most six characters."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size == 0 or 0.001 <= size < 10:
        return f"{value:.3f}"
    if size < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    if size < 1000:
        return f"{value:.1f}"
    return f"{value:.0f}" if size < 1e5 else f"{value:.0e}".replace("e+0", "e")


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def peaks_of(record: Metrics) -> dict[str, float]:
    """MiB by phase, whatever was measured."""
    found: dict[str, float] = next((record[name] for name in MACHINE[1:] if name in record), {})
    return found


def peak(record: Metrics) -> float:
    """MiB at a step's highest; 0 if it was not measured."""
    return max(peaks_of(record).values(), default=0.0)


def memory_of(record: Metrics) -> str:
    """The peak of each phase in words, with its unit; of the process, where none stands out."""
    peaks = peaks_of(record)
    if not peaks:
        return ""
    what = "allocated" if "peak_cuda_mib" in record else "resident"
    unit, divisor = ("MiB", 1) if peak(record) < 10240 else ("GiB", 1024)
    digits = 0 if divisor == 1 else 1
    sizes = {name: f"{mib / divisor:.{digits}f}" for name, mib in peaks.items()}
    if what == "resident" and len(set(sizes.values())) == 1:
        return f"{sizes.popitem()[1]} {unit} resident, the most so far"
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) + f" {unit} {what}"


def explanation(record: Metrics) -> str:
    """What there is to say to a loss that looks like nothing learnt; "" to another."""
    loss = record["loss"]
    return LOSS_IS_ZERO.format(loss=short(loss)) if abs(loss) < NEAR_ZERO else ""
