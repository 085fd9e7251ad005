"""What a run shows while it goes: a live table, plain lines, a progress bar, or nothing.

    rich    a live table with curves, times, memory and samples, see `console_rich`
    plain   a line for every step; in a file it stays readable
    off     nothing

A `Console` that shows nothing is the base of all; the trainer's own is the progress bar.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Literal

from tqdm import tqdm

from grpo_core.columns import Column, choose, memory_of, short
from grpo_core.monitor import Metrics, warn
from grpo_core.samples import Sample
from grpo_core.trainer_config import TrainerConfig

Kind = Literal["rich", "plain", "off"]
HEADER_EVERY = 20  # lines
LOSS_IS_ZERO = (
    "the loss is {loss:.4f}, and that is as it should be: the advantages of a group sum to 0, so "
    "on policy the loss is about 0 whatever is learnt, while its gradient is not. Watch the reward."
)
# more than rounding leaves, less than a loss that says something
NEAR_ZERO = 0.01


class Console:
    """Shows nothing; what goes wrong becomes a warning of Python's."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        """A run sets out, or goes on after `done` steps."""

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        """A step was taken, or the model looked at before the first.

        Args:
            record: the step's, as in the metrics file.
            parts: the rewards' names in it.
            samples: what the model wrote lately.
        """

    def note(self, message: str) -> None:
        """Something to know of."""
        warn(message)

    def end(self) -> None:
        """The run is over, or interrupted."""


class Bar(Console):
    """A progress bar with a few figures."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.bar = tqdm(total=config.steps, initial=done, desc=label, unit="step")

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        if not record["step"]:
            return
        shown = {name: record[name] for name in ("reward", "length", "kl")}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def end(self) -> None:
        self.bar.close()


class Lines(Console):
    """A line for every step, of at most 80 columns, and samples wherever there are new ones."""

    width = 80

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.config, self.lines, self.shown = config, 0, -1
        self.explained = False
        say(f"{label}: step {done} of {config.steps}")

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        if record["step"]:
            columns = choose(parts, self.config, self.width)
            if self.lines % HEADER_EVERY == 0:
                say(_row(columns, [column.head for column in columns]))
                peaks = memory_of(record)
                if self.lines == 0 and peaks:
                    say(f"  memory: {peaks}")
            say(_row(columns, [column.text(record) for column in columns]))
            self.lines += 1
            if not self.explained and abs(record["loss"]) < NEAR_ZERO:
                self.note(LOSS_IS_ZERO.format(loss=record["loss"]))
            self.explained = True
        if held_out := record.get("held_out"):
            figures = [f"{name} {short(value)}" for name, value in held_out.items()]
            say("  held out: " + ", ".join(figures))
            for sample in samples:
                say(f"  {sample.kind}, {sample.reward:.2f}: {sample.question!r}")
                say(f"    {sample.completion!r}")

    def note(self, message: str) -> None:
        say(f"  note: {message}")


def say(line: str) -> None:
    """A line on the terminal, at once."""
    print(line, flush=True)


def _row(columns: Sequence[Column], cells: Sequence[str]) -> str:
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
    from grpo_core.console_rich import Live

    return Live()
