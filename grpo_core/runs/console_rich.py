"""The console as a live table: figures of the last steps, curves, times, memory, samples, notes.

A frame is one renderable, which `rich` draws over the last; its blocks stand in `console_blocks`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich import live
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.text import Text

from grpo_core.runs import console_blocks as blocks
from grpo_core.runs.columns import choose, explanation
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.console import Console
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.samples import Sample

ROWS = 8  # steps in the table, where the terminal is high enough
FEWEST_ROWS = 3
NOTES = 3  # the last ones
HELD_OUT = 2  # answers to the same prompts
SHOWN_FOR = 4.0  # seconds that a sample stays at least, so that it can be read

# gives a block back if there is room for it
Fits = Callable[[RenderableType], list[RenderableType]]


class Live(Console):
    """A table that is drawn anew after every step.

    Args:
        terminal: to draw on; None is standard output.
    """

    def __init__(self, terminal: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal(highlight=False)

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.prepare(label, done, config)
        self.live = live.Live(self.frame(), console=self.terminal, auto_refresh=False)
        self.live.start()

    def prepare(self, label: str, done: int, config: TrainerConfig) -> None:
        """Takes note of the run; nothing is drawn yet."""
        self.label, self.config = label, config
        self.first = self.done = done
        self.start = time.monotonic()
        self.records: list[Metrics] = []
        self.looks: list[Metrics] = []
        self.parts: list[str] = []
        self.samples: list[Sample] = []
        self.shown_since = -math.inf
        self.notes: list[str] = []

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        self.take(record, parts, samples)
        self.live.update(self.frame(), refresh=True)

    def take(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        """Takes note of a step."""
        if "held_out" in record:
            self.looks.append(record)
        if record["step"]:
            self.records.append(record)
            self.done, self.parts = record["step"], list(parts)
            if len(self.records) == 1 and (explained := explanation(record)):
                self.notes.append(explained)
        now = time.monotonic()
        if now - self.shown_since > SHOWN_FOR or self.done == self.config.steps:
            self.samples, self.shown_since = list(samples), now

    def note(self, message: str) -> None:
        self.notes.append(message)

    def end(self) -> None:
        self.live.update(self.frame(whole=True), refresh=True)
        self.live.stop()

    def frame(self, whole: bool = False) -> RenderableType:
        """Everything there is to show, as far as the terminal is high enough.

        Curves, held-out figures and samples give way first, then rows of the table.

        Args:
            whole: however high it is.
        """
        width, records = self.terminal.width, self.records
        left = 10**6 if whole else self.terminal.height - 1
        taken, each = time.monotonic() - self.start, 0.0
        if self.done > self.first:
            each = taken / (self.done - self.first)
        head = [blocks.progress(self.label, self.done, self.config.steps, taken, each)]
        tail = [blocks.notes(self.notes[-NOTES:])] if self.notes else []
        if records:
            tail.insert(0, blocks.times(records[-1], width))
            left -= FEWEST_ROWS + 2
        left -= self.height(*head, *tail)

        def fits(block: RenderableType) -> list[RenderableType]:
            nonlocal left
            lines = self.height(block)
            if lines > left:
                return []
            left -= lines
            return [block]

        looks = fits(blocks.looks(self.looks, width)) if self.looks else []
        samples = self.written(fits)
        curves = fits(blocks.curves(records, self.parts)) if len(records) > 1 else []
        steps: list[RenderableType] = []
        if records:
            rows = min(ROWS, FEWEST_ROWS + max(0, left))
            steps = [blocks.table(records[-rows:], choose(self.parts, self.config, width))]
        return Group(*head, *curves, *steps, *looks, *samples, *tail)

    def written(self, fits: Fits) -> list[RenderableType]:
        """Samples, the rollout's best and worst first."""
        rewards = [sample.reward for sample in self.samples]
        held_out = [sample for sample in self.samples if sample.kind == "held out"]
        drawn = [sample for sample in self.samples if sample.kind != "held out"]
        shown: list[RenderableType] = []
        for sample in [*drawn, *held_out[:HELD_OUT]]:
            block = blocks.written(sample, min(rewards), max(rewards), self.terminal.width)
            shown += fits(block)
        return [*shown, *fits(Text())] if shown else []

    def height(self, *parts: RenderableType) -> int:
        """Lines that these take."""
        return sum(len(self.terminal.render_lines(part)) for part in parts)
