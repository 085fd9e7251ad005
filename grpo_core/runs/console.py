"""What a run shows while it goes: a live table, plain lines, a progress bar, or nothing.

    rich    a live table with curves, times, memory and samples, see `console_rich`
    plain   a line for every step; in a file it stays readable
    off     nothing

A `Console` that shows nothing is the base of all; the trainer's own is the progress bar.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from typing import Literal

from grpo_core.runs.columns import Column, choose, explanation, memory_of, short
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.console import Console
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.samples import Sample, shortened

Kind = Literal["rich", "plain", "off"]
HEADER_EVERY = 20  # lines


class Lines(Console):
    """A line for every step, and what the model wrote wherever it is looked at; 80 columns."""

    width = 80

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.config, self.rows = config, 0
        say(f"{label}: step {done} of {config.steps}")

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        step = record["step"]
        if step:
            self._row(record, choose(parts, self.config, self.width))
        if held_out := record.get("held_out"):
            figures = (f"{name} {short(value)}" for name, value in held_out.items())
            self.tell("held out: " + ", ".join(figures))
        if step == self.config.steps or step % self.config.evaluate_every == 0:
            for sample in samples:
                asked = shortened(sample.question, 2 * self.width)
                self.tell(f"{sample.kind}, earned {sample.reward:.2f}: {asked}")
                self.tell(shortened(sample.completion, 4 * self.width) or "(nothing)", indent=4)

    def note(self, message: str) -> None:
        self.tell(f"note: {message}")

    def tell(self, text: str, indent: int = 2) -> None:
        """A text in as many lines as it takes."""
        first, more = " " * indent, " " * max(4, indent)
        say(textwrap.fill(text, self.width, initial_indent=first, subsequent_indent=more))

    def _row(self, record: Metrics, columns: Sequence[Column]) -> None:
        if self.rows % HEADER_EVERY == 0:
            say(_cells(columns, [column.head for column in columns]))
        say(_cells(columns, [column.text(record) for column in columns]))
        if self.rows == 0:
            if memory := memory_of(record):
                self.tell(f"memory: {memory}")
            if explained := explanation(record):
                self.note(explained)
        self.rows += 1


def say(line: str) -> None:
    """A line on the terminal, at once."""
    print(line, flush=True)


def _cells(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """The cells beneath their heads."""
    pairs = zip(columns, cells, strict=True)
    return "  ".join(f"{cell:>{column.width}}" for column, cell in pairs)


def open_console(kind: str) -> Console:
    """A console by its name.

    Args:
        kind: "rich" becomes "plain" where the package is missing, or where nobody could see it:
            standard output is no terminal.

    Raises:
        ValueError: another name.
    """
    if kind == "off":
        return Console()
    if kind == "plain":
        return Lines()
    if kind != "rich":
        raise ValueError(f"console: expected rich, plain or off, got {kind!r}")
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines()
    from grpo_core.runs.console_rich import Live

    return Live()
