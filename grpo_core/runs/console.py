"""What a run shows: `rich` a live table, `plain` a line per step, `off` nothing.

The table, in `live_console`, and the lines have the same columns: as many as there is room for.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Sequence

from grpo_core.runs.columns import Column, choose_columns, explanation, memory_text, row, short
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.console import Console
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.samples import Sample, shortened

HEADER_EVERY = 20  # lines


class Lines(Console):
    """A line for every step, and samples of every evaluation, in 80 columns."""

    width = 80

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.config, self.rows = config, 0
        print(f"{label}: step {done} of {config.steps}", flush=True)

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        step = record["step"]
        if step:
            self._print_row(record, choose_columns(parts, self.config, self.width))
        if held_out := record.get("held_out"):
            figures = (f"{name} {short(value)}" for name, value in held_out.items())
            self._print("held out: " + ", ".join(figures))
        if step == self.config.steps or step % self.config.evaluate_every == 0:
            for sample in samples:
                question = shortened(sample.question, 2 * self.width)
                self._print(f"{sample.kind}, earned {sample.reward:.2f}: {question}")
                self._print(shortened(sample.completion, 4 * self.width) or "(nothing)", indent=4)

    def note(self, message: str) -> None:
        self._print(f"note: {message}")

    def _print(self, text: str, indent: int = 2) -> None:
        first, more = " " * indent, " " * max(4, indent)
        print(textwrap.fill(text, self.width, initial_indent=first, subsequent_indent=more))
        sys.stdout.flush()

    def _print_row(self, record: Metrics, columns: Sequence[Column]) -> None:
        if self.rows % HEADER_EVERY == 0:
            print(row(columns, [column.head for column in columns]))
        print(row(columns, [column.text(record) for column in columns]), flush=True)
        if self.rows == 0:
            if text := memory_text(record):
                self._print(f"memory: {text}")
            if text := explanation(record):
                self.note(text)
        self.rows += 1


def open_console(kind: str) -> Console:
    """A console by its name; "rich" is "plain" without the package or without a terminal.

    Raises:
        ValueError: another name.
    """
    if kind == "off":
        return Console()
    if kind not in ("rich", "plain"):
        raise ValueError(f"console: expected rich, plain or off, got {kind!r}")
    if kind == "plain" or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines()
    from grpo_core.runs.live_console import Live

    return Live()
