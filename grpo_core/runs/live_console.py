"""The console as a live table: curves, the last steps, held-out figures, samples, times, notes.

A frame is a list of lines, put together from blocks that end in an empty line.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

from rich import live
from rich.console import Console as Terminal
from rich.console import Group
from rich.text import Text

from grpo_core.runs.columns import (
    Column,
    choose_columns,
    explanation,
    memory_text,
    percent,
    row,
    short,
)
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.console import Console
from grpo_core.trainer.monitor import TRUNCATED_LIMIT, ZERO_STD_LIMIT, Metrics
from grpo_core.trainer.rewards import shown_name
from grpo_core.trainer.samples import Sample, shortened

ROWS, FEWEST_ROWS = 8, 3  # steps in the table
NOTES, HELD_OUT = 3, 2  # the last notes, the first held-out answers
SAMPLE_SECONDS = 4.0  # for which a sample stays at least
MARGIN, CURVE = 10, 18  # characters of names at the left, and of a curve
EIGHTHS = "▁▂▃▄▅▆▇█"
COLOURS = ("#4f9bd1", "#d1698a", "#6fb08e", "#c9a227", "#9b7fc4", "#8d99ae")
QUIET, FAINT, GOOD, BAD, NOTE = "grey58", "grey30", "#6fb08e", "#e0607e", "#c9a227"


class Live(Console):
    """A table that is redrawn after every step.

    Args:
        terminal: to draw on; None is standard output.
        moving: False only collects, for a single `frame` at the end.
    """

    def __init__(self, terminal: Terminal | None = None, moving: bool = True) -> None:
        self.terminal = terminal or Terminal(highlight=False)
        self.moving = moving

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.label, self.config = label, config
        self.first = self.done = done
        self.start, self.sampled = time.monotonic(), -math.inf
        self.records: list[Metrics] = []
        self.evaluations: list[Metrics] = []
        self.parts: list[str] = []
        self.samples: list[Sample] = []
        self.notes: list[str] = []
        if self.moving:
            self.live = live.Live(self.frame(), console=self.terminal, auto_refresh=False)
            self.live.start()

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        if "held_out" in record:
            self.evaluations.append(record)
        if record["step"]:
            self.records.append(record)
            self.done, self.parts = record["step"], list(parts)
            if len(self.records) == 1 and (text := explanation(record)):
                self.notes.append(text)
        now = time.monotonic()
        if now - self.sampled > SAMPLE_SECONDS or self.done == self.config.steps:
            self.samples, self.sampled = list(samples), now
        if self.moving:
            self.live.update(self.frame(), refresh=True)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def end(self) -> None:
        self.live.update(self.frame(whole=True), refresh=True)
        self.live.stop()

    def frame(self, whole: bool = False) -> Group:
        """All blocks that the terminal is high enough for, or all with `whole`.

        On a low terminal curves go first, then samples, held-out figures, rows of the table.
        """
        width, records = self.terminal.width, self.records
        head = self.progress()
        tail = times_block(records[-1], width) if records else []
        for message in self.notes[-NOTES:]:
            tail += self.wrap(Text.assemble(("note".ljust(MARGIN), f"bold {NOTE}")), message)
        room = sys.maxsize if whole else self.terminal.height - 1
        room -= len(head) + len(tail) + (FEWEST_ROWS + 2 if records else 0)

        def fitting(block: list[Text]) -> list[Text]:
            nonlocal room
            kept = block if len(block) <= room else []
            room -= len(kept)
            return kept

        held_out = fitting(held_out_block(self.evaluations, width) if self.evaluations else [])
        samples = [line for block in self.sample_blocks() for line in fitting(block)]
        samples += fitting([Text()]) if samples else []
        curves = fitting(curves_block(records, self.parts) if len(records) > 1 else [])
        steps = []
        if records:
            rows = min(ROWS, FEWEST_ROWS + max(0, room))
            steps = steps_block(records[-rows:], choose_columns(self.parts, self.config, width))
        lines = [*head, *curves, *steps, *held_out, *samples, *tail]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)

    def progress(self) -> list[Text]:
        """The run's name, a bar, the time that it has taken and will take."""
        done, steps = self.done, self.config.steps
        seconds = time.monotonic() - self.start
        times = f"step {done} of {steps}   {clock(seconds)}"
        if self.first < done < steps:
            times += f"   {clock(seconds / (done - self.first) * (steps - done))} left"
        length = max(0, self.terminal.width - len(self.label) - len(times) - 4)
        bar = "━" * (length * done // steps)
        rest = "━" * (length - len(bar))
        parts = (self.label, "bold"), "  ", (bar, COLOURS[0]), (rest, FAINT), "  ", (times, QUIET)
        return [Text.assemble(*parts), Text()]

    def sample_blocks(self) -> list[list[Text]]:
        """A block for each sample: the best and worst of the rollout, then held-out answers."""
        rewards = [sample.reward for sample in self.samples]
        held_out = [sample for sample in self.samples if sample.kind == "held out"]
        drawn = [sample for sample in self.samples if sample.kind != "held out"]
        blocks, room = [], self.terminal.width - MARGIN
        for sample in [*drawn, *held_out[:HELD_OUT]]:
            low, high = min(rewards), max(rewards)
            best, worst = sample.reward == high > low, sample.reward == low < high
            reward = f"{sample.reward:>{MARGIN - 2}.2f}  "
            kind = f"  {sample.kind}, step {sample.step}"
            question = shortened(sample.question, room - len(kind))
            style = f"bold {GOOD if best else BAD if worst else ''}"
            head = Text.assemble((reward, style), (question, "bold"), (kind, QUIET))
            body = shortened(sample.completion, 2 * room - 8) or "(nothing)"
            blocks.append([head, *self.wrap(Text(" " * MARGIN), body)])
        return blocks

    def wrap(self, margin: Text, text: str) -> list[Text]:
        """A text in lines beside a margin, which the first line shows."""
        lines = Text(text).wrap(self.terminal, self.terminal.width - MARGIN)
        return [
            (Text(" " * MARGIN) if place else margin) + line for place, line in enumerate(lines)
        ]


def curves_block(records: Sequence[Metrics], parts: Sequence[str]) -> list[Text]:
    """The whole run: a small curve of each figure, and its last value."""
    names = ["reward", *parts[:1], "length", "entropy", "grad_norm", "clip_fraction"]
    heads = {"grad_norm": "gradient", "clip_fraction": "clipped"}
    cells = []
    for name, colour in zip(names, COLOURS, strict=False):
        if values := [record[name] for record in records if name in record]:
            head = f"{heads.get(name, shown_name(name)):<{MARGIN}.{MARGIN - 1}}"
            last = f"{short(values[-1]):>7}    ", QUIET
            cells.append(Text.assemble((head, QUIET), (curve(values, CURVE), colour), last))
    return [*(Text.assemble(*cells[k : k + 2]) for k in range(0, len(cells), 2)), Text()]


def curve(values: Sequence[float], width: int) -> str:
    """Values in characters of eight heights; means of several if there are too many."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [len(finite) * place // count for place in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = 8 / (high - low) if high > low else 0.0
    return "".join(EIGHTHS[min(7, int(scale * (mean - low)))] for mean in means).ljust(width)


def steps_block(records: Sequence[Metrics], columns: Sequence[Column]) -> list[Text]:
    """The figures of steps, the newest at the bottom; troubles in red."""
    lines = [Text(row(columns, [column.head for column in columns]), QUIET)]
    for record in records:
        skipped = any("was skipped" in message for message in record.get("warnings", ()))
        troubles = {
            "cut": record["truncated"] > TRUNCATED_LIMIT,
            "same": record["zero_std"] > ZERO_STD_LIMIT,
            "grad": not math.isfinite(record["grad_norm"]) or skipped,
        }
        newest = record is records[-1]
        cells = []
        for column in columns:
            style = f"bold {BAD}" if troubles.get(column.head) else "bold" if newest else "none"
            if column.head == "step" and not newest:
                style = QUIET
            cells.append(Text(f"{column.text(record):>{column.width}}", style))
        lines.append(Text("  ").join(cells))
    return [*lines, Text()]


def times_block(record: Metrics, width: int) -> list[Text]:
    """Where a step's time went, as a bar with a legend, and the memory of each phase."""
    seconds = record.get("seconds", {})
    total = sum(seconds.values()) or 1.0
    bar, legend = Text("time".ljust(MARGIN), QUIET), Text(" " * MARGIN)
    end = 0.0
    for place, (name, spent) in enumerate(seconds.items()):
        colour = COLOURS[place % len(COLOURS)]
        end += spent / total
        bar.append("━" * (round((width - MARGIN) * end) + MARGIN - len(bar)), colour)
        legend.append(name, colour).append(f" {percent(spent / total)}  ", QUIET)
    text = memory_text(record)
    memory = [Text.assemble(("memory".ljust(MARGIN), QUIET), text)] if text else []
    return [bar, legend, *memory, Text()]


def held_out_block(evaluations: Sequence[Metrics], width: int) -> list[Text]:
    """Held-out figures of the first evaluation and the last, as many as fit."""
    shown = [evaluations[0], *evaluations[1:][-1:]]
    names = evaluations[-1]["held_out"]
    columns: list[tuple[list[str], list[str]]] = []
    room = width - MARGIN + 2
    for name in names:
        # a mean is the same as its avg@k
        if any(other.startswith(f"{name}/avg@") for other in names):
            continue
        heads = shown_name(name).removeprefix("greedy_").split("/")
        heads += ["greedy"] * name.startswith("greedy_")
        values = [short(each["held_out"].get(name, math.nan)) for each in shown]
        if (room := room - max(5, *map(len, heads + values)) - 2) < 0:
            break
        columns.append((heads, values))
    deepest = max((len(heads) for heads, _ in columns), default=1)
    margin = ["held out", *[""] * (deepest - 1), *(f"step {each['step']}" for each in shown)]
    lines = [Text.assemble((text.ljust(MARGIN), QUIET)) for text in margin]
    for heads, values in columns:
        size = max(5, *map(len, heads + values))
        cells = [*heads, *[""] * (deepest - len(heads)), *values]
        for place, (line, cell) in enumerate(zip(lines, cells, strict=True)):
            style = QUIET if place < deepest else "bold" if line is lines[-1] else "none"
            line.append(f"{cell:>{size}}  ", style)
    return [*lines, Text()]


def clock(seconds: float) -> str:
    """1:05, or 2:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
