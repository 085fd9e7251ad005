"""What the live console is put together from: each function makes one block, for `rich` to draw.

A block is made to be read at 80 columns, and ends in an empty line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_core.runs.columns import Column, memory_of, percent, short
from grpo_core.trainer.monitor import TRUNCATED_LIMIT, ZERO_STD_LIMIT, Metrics
from grpo_core.trainer.rewards import shown_name
from grpo_core.trainer.samples import Sample, shortened

EIGHTHS = "▁▂▃▄▅▆▇█"
MARGIN = 10  # of the names at the left
CURVE = 18  # characters
LOOKS = 6  # held-out figures side by side
COLOURS = ("#4f9bd1", "#d1698a", "#6fb08e", "#c9a227", "#9b7fc4", "#8d99ae")
QUIET, FAINT, GOOD, BAD, NOTE = "grey58", "grey30", "#6fb08e", "#e0607e", "#c9a227"


def progress(label: str, done: int, steps: int, seconds: float, each: float) -> RenderableType:
    """The run's name, a bar, and how long it has taken and will take.

    Args:
        label: of the run.
        done, steps: so many of so many.
        seconds: since it set out.
        each: seconds of a step, 0 if not yet known.
    """
    words = f"step {done} of {steps}   {clock(seconds)}"
    if each and done < steps:
        words += f"   {clock(each * (steps - done))} left"
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for ratio in (None, 1, None):
        grid.add_column(ratio=ratio, no_wrap=True)
    bar = ProgressBar(
        steps, done, style=FAINT, complete_style=COLOURS[0], finished_style=COLOURS[0]
    )
    grid.add_row(Text(label, style="bold"), bar, Text(words, style=QUIET))
    return _block(grid)


def curves(records: Sequence[Metrics], parts: Sequence[str]) -> RenderableType:
    """The whole run, a small curve for each figure with its last value."""
    names = ["reward", *parts[:1], "length", "entropy", "grad_norm", "clip_fraction"]
    heads = {"grad_norm": "gradient", "clip_fraction": "clipped"}
    grid = Table.grid(padding=(0, 4, 0, 0))
    cells = []
    for name, colour in zip(names, COLOURS, strict=False):
        values = [record[name] for record in records if name in record]
        if values:
            cell = Text(f"{heads.get(name, shown_name(name)):<{MARGIN}.{MARGIN - 1}}", style=QUIET)
            cell.append(spark(values, CURVE), style=colour).append(f"{short(values[-1]):>7}")
            cells.append(cell)
    for place in range(0, len(cells), 2):
        grid.add_row(*cells[place : place + 2])
    return _block(grid)


def table(records: Sequence[Metrics], columns: Sequence[Column]) -> RenderableType:
    """The figures of steps, the newest at the bottom; what is wrong stands out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(justify="right", width=column.width, no_wrap=True)
    grid.add_row(*(Text(column.head, style=QUIET) for column in columns))
    for record in records:
        newest = record is records[-1]
        skipped = any("was skipped" in message for message in record.get("warnings", ()))
        wrong = {
            "cut": record["truncated"] > TRUNCATED_LIMIT,
            "same": record["zero_std"] > ZERO_STD_LIMIT,
            "grad": not math.isfinite(record["grad_norm"]) or skipped,
        }
        styles = [
            f"bold {BAD}"
            if wrong.get(column.head)
            else "bold"
            if newest
            else QUIET * (column.head == "step")
            for column in columns
        ]
        cells = zip(columns, styles, strict=True)
        grid.add_row(*(Text(column.text(record), style=style) for column, style in cells))
    return _block(grid)


def times(record: Metrics, width: int) -> RenderableType:
    """Where a step's time went, as a bar with its legend, and the memory of each phase."""
    spent = record.get("seconds", {})
    whole = sum(spent.values()) or 1.0
    bar, legend = Text(f"{'time':{MARGIN}}", style=QUIET), Text(" " * MARGIN)
    drawn, so_far = 0, 0.0
    for place, (name, seconds) in enumerate(spent.items()):
        colour = COLOURS[place % len(COLOURS)]
        so_far += seconds
        upto = round((width - MARGIN) * so_far / whole)
        bar.append("━" * (upto - drawn), style=colour)
        drawn = upto
        legend.append(name, style=colour).append(f" {percent(seconds / whole)}  ", style=QUIET)
    lines = [bar, legend]
    if peaks := memory_of(record):
        lines.append(Text(f"{'memory':{MARGIN}}", style=QUIET).append(peaks))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return _block(Group(*lines))


def looks(found: Sequence[Metrics], width: int) -> RenderableType:
    """Held-out figures of the first look and the last, as many as fit."""
    first, last = found[0], found[-1]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=MARGIN - 2)
    named = last["held_out"]
    heads, room = {}, width - MARGIN
    for name in named:
        head = shown_name(name).split("/") + ["greedy"] * name.startswith("greedy_")
        head[0] = head[0].removeprefix("greedy_")
        room -= max(5, *map(len, head)) + 2
        if room < -2:
            break
        # the same as their avg@k
        if not any(other.startswith(f"{name}/avg@") for other in named):
            heads[name] = head
            grid.add_column(justify="right", no_wrap=True)
    deep = max(map(len, heads.values()))
    for line in range(deep):
        cells = [head[line] if line < len(head) else "" for head in heads.values()]
        first_cell = "" if line else "held out"
        grid.add_row(*(Text(cell, style=QUIET) for cell in (first_cell, *cells)))
    for look in (first, last) if last is not first else (first,):
        values = [short(look["held_out"].get(name, math.nan)) for name in heads]
        style = "bold" if look is last else ""
        when = Text(f"step {look['step']}", style=QUIET)
        grid.add_row(when, *(Text(value, style=style) for value in values))
    return _block(grid)


def written(sample: Sample, low: float, high: float, width: int) -> RenderableType:
    """A completion beneath its prompt, beside what it earned.

    Args:
        sample: to show.
        low, high: the least and the most that any of those beside it earned.
        width: of the terminal.
    """
    colour = GOOD if sample.reward == high > low else BAD if sample.reward == low < high else ""
    kind = f"  {sample.kind}, step {sample.step}"
    head = Text().append(f"{sample.reward:>{MARGIN - 2}.2f}  ", style=f"bold {colour}")
    head.append(shortened(sample.question, width - MARGIN - len(kind)), style="bold")
    head.append(kind, style=QUIET)
    body = Text(shortened(sample.completion, 2 * (width - MARGIN) - 8) or "(nothing)")
    return Group(head, Padding(body, (0, 0, 0, MARGIN)))


def notes(messages: Sequence[str]) -> RenderableType:
    """What there is to know of."""
    grid = Table.grid()
    grid.add_column(width=MARGIN)
    grid.add_column()
    for message in messages:
        grid.add_row(Text("note", style=f"bold {NOTE}"), Text(message))
    return grid


def spark(values: Sequence[float], width: int) -> str:
    """A curve in characters of eight heights, between its lowest and its highest value.

    More values than characters are averaged, a run of them for each; what is not finite is left
    out.
    """
    known = [value for value in values if math.isfinite(value)]
    count = min(width, len(known))
    edges = [len(known) * place // count for place in range(count + 1)] if count else []
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = 8 / (high - low) if high > low else 0.0
    drawn = "".join(EIGHTHS[min(7, int(scale * (mean - low)))] for mean in means)
    return f"{drawn:<{width}}"


def clock(seconds: float) -> str:
    """1:05, or 2:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _block(content: RenderableType) -> Padding:
    """With an empty line beneath."""
    return Padding(content, (0, 0, 1, 0))
