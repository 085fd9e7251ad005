"""The figures of a step as columns of a table, and what is said of its memory and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.rewards import shown_name

NEAR_ZERO = 0.01  # more than rounding leaves of a loss that is 0
LOSS_IS_ZERO = (
    "the loss is {loss}, and nothing is wrong: the advantages of a group sum to 0, so on "
    "policy the loss is near 0 whatever is learnt, while its gradient is not. Watch the reward."
)


@dataclass(frozen=True)
class Column:
    """A figure of a step; where room is short, columns of the lowest rank stay."""

    head: str
    rank: int
    width: int
    text: Callable[[Metrics], str]


def choose_columns(parts: Sequence[str], config: TrainerConfig, width: int) -> list[Column]:
    """The columns that fit.

    Args:
        parts: names of rewards.
        config: of the run; there is a column of the KL if it is in the objective.
        width: of the terminal, in characters.
    """

    def figure(
        head: str, rank: int, name: str = "", form: Callable[[float], str] = short, width: int = 0
    ) -> Column:
        def text(record: Metrics) -> str:
            value = record.get(name or head)
            return "–" if value is None else form(value)

        return Column(head, rank, width or max(5, len(head)), text)

    rewards = [
        figure(shown_name(name)[:12], 3 if place else 1, name) for place, name in enumerate(parts)
    ]
    columns = [
        Column("step", 0, 4, lambda record: str(record["step"])),
        figure("reward", 0),
        *rewards,
        figure("length", 2, form="{:.1f}".format),
        figure("cut", 2, "truncated", percent, 4),
        figure("same", 4, "zero_std", percent, 4),
        *([figure("KL", 1, "kl")] if config.objective.beta > 0 else []),
        figure("entropy", 2),
        figure("clip", 2, "clip_fraction", percent, 4),
        figure("ratio≤", 6, "ratio_max"),
        figure("grad", 2, "grad_norm"),
        figure("rate", 7, "learning_rate"),
        Column("s", 2, 5, lambda record: seconds(sum(record.get("seconds", {}).values()))),
        Column("MiB", 5, 6, lambda record: f"{max(memory(record).values(), default=0.0):.0f}"),
    ]
    chosen, room = [], width + 2
    for column in sorted(columns, key=lambda column: column.rank):
        if column.width + 2 <= room:
            chosen.append(column)
            room -= column.width + 2
    return [column for column in columns if column in chosen]


def row(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """A line of the table."""
    pairs = zip(columns, cells, strict=True)
    return "  ".join(f"{cell:>{column.width}}" for column, cell in pairs)


def percent(share: float) -> str:
    """0 to 1 in at most four characters: 0%, 0.3%, 12%, 100%."""
    if not math.isfinite(share):
        return str(share)
    return f"{share:.1%}" if 0.0005 <= share < 0.0995 else f"{share:.0%}"


def short(value: float) -> str:
    """About three digits, in at most six characters."""
    size = abs(value)
    if size and (size < 0.001 or 1e5 <= size < math.inf):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def seconds(value: float) -> str:
    """Seconds in at most five characters."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def memory(record: Metrics) -> dict[str, float]:
    """MiB at the highest of each phase, on the GPU or of the process."""
    return next((record[name] for name in MACHINE[1:] if name in record), {})


def memory_text(record: Metrics) -> str:
    """The memory of each phase with its unit; one value if all phases have the same."""
    peaks = memory(record)
    if not peaks:
        return ""
    large = max(peaks.values()) >= 10240
    sizes = {name: f"{mib / 1024:.1f}" if large else f"{mib:.0f}" for name, mib in peaks.items()}
    kind = "allocated" if "peak_cuda_mib" in record else "resident"
    unit = f"{'GiB' if large else 'MiB'} {kind}"
    if kind == "resident" and len(set(sizes.values())) == 1:
        return f"{sizes.popitem()[1]} {unit}, the most so far"
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) + f" {unit}"


def explanation(record: Metrics) -> str:
    """A note on a loss near 0; "" for other losses."""
    loss = record["loss"]
    return LOSS_IS_ZERO.format(loss=short(loss)) if abs(loss) < NEAR_ZERO else ""
