"""What a run shows: `rich` a live table, `plain` a line per step, `off` nothing."""

from __future__ import annotations

import importlib.util
import math
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import cycle

from grpo_core.cli.options import require
from grpo_core.runs import figures
from grpo_core.runs.figures import memory_text, short
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.console import Console
from grpo_core.trainer.monitor import TRUNCATED_LIMIT, ZERO_STD_LIMIT, Metrics
from grpo_core.trainer.rewards import shown_name
from grpo_core.trainer.samples import Sample, shortened

if HAS_RICH := importlib.util.find_spec("rich") is not None:
    from rich import live
    from rich.console import Console as Terminal
    from rich.console import Group, RenderableType
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

WIDTH, HEADER_EVERY = 80, 20  # characters of plain lines, and lines between their headers
ROWS, FEW_ROWS, LOW = 8, 3, 40  # steps in the table; fewer on a terminal of less than LOW lines
NOTES, SAMPLES = 3, 4
MARGIN = 10  # characters of names at the left
COLOURS = ("#4f9bd1", "#d1698a", "#6fb08e", "#c9a227", "#9b7fc4", "#8d99ae")
QUIET, GOOD, BAD, NOTE = "grey58", "#6fb08e", "#e0607e", "#c9a227"


class Lines(Console):
    """A line for every step, and samples of every evaluation, in 80 columns."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.config, self.rows = config, 0
        print(f"{label}: step {done} of {config.steps}", flush=True)

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        step = record["step"]
        if step:
            self._print_row(record, figures.choose_cells(record, parts, self.config, WIDTH))
        if held_out := record.get("held_out"):
            pairs = (f"{name} {short(value)}" for name, value in held_out.items())
            self._print("held out: " + ", ".join(pairs))
        if step == self.config.steps or step % self.config.evaluate_every == 0:
            for sample in samples:
                question = shortened(sample.question, 2 * WIDTH)
                self._print(f"{sample.kind}, earned {sample.reward:.2f}: {question}")
                self._print(shortened(sample.completion, 4 * WIDTH) or "(nothing)", indent=4)

    def note(self, message: str) -> None:
        self._print(f"note: {message}")

    def _print(self, text: str, indent: int = 2) -> None:
        first, more = " " * indent, " " * 4
        lines = textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=more)
        print(lines, flush=True)

    def _print_row(self, record: Metrics, cells: dict[str, str]) -> None:
        if self.rows % HEADER_EVERY == 0:
            print(figures.line({head: head for head in cells}))
        print(figures.line(cells), flush=True)
        if self.rows == 0:
            if text := memory_text(record):
                self._print(f"memory: {text}")
            if self.config.needs_rewards and (text := figures.explanation(record)):
                self.note(text)
        self.rows += 1


class Live(Console):
    """A table that is redrawn after every step.

    Args:
        terminal: to draw on; None is standard output.
        moving: False only collects, for a single `frame` at the end.
    """

    def __init__(self, terminal: Terminal | None = None, moving: bool = True) -> None:
        self.terminal = terminal or Terminal(highlight=False)
        self.live = live.Live(console=self.terminal, auto_refresh=False) if moving else None

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.label, self.config = label, config
        self.first = self.done = done
        self.start = time.monotonic()
        self.records: list[Metrics] = []
        self.evaluations: list[Metrics] = []
        self.parts: Sequence[str] = ()
        self.samples: Sequence[Sample] = ()
        self.notes: list[str] = []
        if self.live:
            self.live.start()

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        self.samples = samples
        if "held_out" in record:
            self.evaluations.append(record)
        if record["step"]:
            self.done, self.parts = record["step"], parts
            self.records.append(record)
            is_noted = len(self.records) == 1 and self.config.needs_rewards
            if is_noted and (text := figures.explanation(record)):
                self.note(text)
        if self.live:
            self.live.update(self.frame(), refresh=True)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def end(self) -> None:
        if self.live:
            self.live.update(self.frame(whole=True), refresh=True)
            self.live.stop()

    def frame(self, whole: bool = False) -> Group:
        """As many blocks as the terminal is high enough for, or all with `whole`.

        On a low terminal curves go first, then the last samples, then held-out figures.
        """
        height = sys.maxsize if whole else self.terminal.height
        blocks = {"progress": self.progress()}
        if self.records:
            blocks["curves"] = self.curves()
            blocks["steps"] = self.steps(ROWS if height >= LOW else FEW_ROWS)
        optional = {"held out": self.held_out()} if self.evaluations else {}
        # the best and the worst of the rollout, then the first held-out ones
        samples = sorted(self.samples, key=lambda sample: sample.kind == "held out")[:SAMPLES]
        optional |= {f"sample {n}": self.sample(one) for n, one in enumerate(samples)}
        blocks |= {**optional, "tail": self.tail()}
        for name in ("curves", *reversed(optional)):
            if len(self.terminal.render_lines(Group(*blocks.values()))) < height:
                break
            blocks.pop(name, None)
        return Group(*blocks.values())

    def progress(self) -> RenderableType:
        """The run's name, a bar, the time that it has taken and will take."""
        done, steps, seconds = self.done, self.config.steps, time.monotonic() - self.start
        times = f"step {done} of {steps}   {timedelta(seconds=round(seconds))}"
        if self.first < done < steps:
            left = seconds / (done - self.first) * (steps - done)
            times += f"   {timedelta(seconds=round(left))} left"
        grid = Table.grid("", Column(ratio=1), "", padding=(0, 2, 0, 0), expand=True)
        bar = ProgressBar(steps, done, complete_style=COLOURS[0], finished_style=COLOURS[0])
        grid.add_row(Text(self.label, "bold"), bar, Text(times, QUIET))
        return Group(grid, "")

    def curves(self) -> RenderableType:
        """The whole run: a small curve of each figure, and its last value."""
        names = ["reward", *self.parts[:1], "length", "entropy", "grad_norm", "clip_fraction"]
        cells = []
        for name, colour in zip(names, COLOURS, strict=False):
            values = [record[name] for record in self.records if record.get(name) is not None]
            if values:
                head = f"{shown_name(name):<{MARGIN}.{MARGIN - 1}}"
                last = f"{short(values[-1]):>7}    "
                cells.append(
                    Text.assemble((head, QUIET), (figures.curve(values), colour), (last, QUIET))
                )
        pairs = (Text.assemble(*cells[k : k + 2]) for k in range(0, len(cells), 2))
        return Group(*pairs, "")

    def steps(self, count: int) -> RenderableType:
        """The figures of the last steps; problems in red."""
        rows = []
        for record in self.records[-count:]:
            cells = figures.choose_cells(record, self.parts, self.config, self.terminal.width)
            skipped = any("was skipped" in message for message in record.get("warnings", ()))
            problems = {
                "cut": record["truncated"] > TRUNCATED_LIMIT,
                "same": record.get("zero_std", 0.0) > ZERO_STD_LIMIT,
                "grad": not math.isfinite(record["grad_norm"]) or skipped,
            }
            usual = "bold" if record is self.records[-1] else "none"
            styles = {head: f"bold {BAD}" for head, is_problem in problems.items() if is_problem}
            rows.append({head: Text(cells[head], styles.get(head, usual)) for head in cells})
        return table(rows)

    def held_out(self) -> RenderableType:
        """Held-out figures of the first evaluation and the last, as many as fit."""
        shown = [self.evaluations[0], *self.evaluations[1:][-1:]]
        names = list(shown[-1]["held_out"])
        # a mean is the same as its avg@k
        names = [n for n in names if not any(other.startswith(f"{n}/avg@") for other in names)]
        rows = [{"held out": Text(f"step {each['step']}", QUIET)} for each in shown]
        for name in names[: self.terminal.width // MARGIN - 1]:
            head = shown_name(name).removeprefix("greedy_").replace("/", "\n")
            head += "\ngreedy" * name.startswith("greedy_")
            for row, each in zip(rows, shown, strict=True):
                row[head] = Text(short(each["held_out"].get(name, math.nan)))
        return table(rows)

    def sample(self, sample: Sample) -> RenderableType:
        """The question and the beginning and end of the completion beside its reward."""
        room = self.terminal.width - MARGIN
        style = {"best": f"bold {GOOD}", "worst": f"bold {BAD}"}.get(sample.kind, "bold")
        kind = f"  {sample.kind}, step {sample.step}"
        question = shortened(sample.question, room - len(kind))
        return labelled(
            (Text(f"{sample.reward:.2f}", style), Text.assemble((question, "bold"), (kind, QUIET))),
            ("", Text(shortened(sample.completion, 2 * room - 8) or "(nothing)")),
        )

    def tail(self) -> RenderableType:
        """Where the last step's time went, the memory of each phase, the last notes."""
        record = self.records[-1] if self.records else {}
        spent = record.get("seconds", {})
        total, width = sum(spent.values()) or 1.0, self.terminal.width - MARGIN
        bar, legend, end = Text(), Text(), 0.0
        for (phase, seconds), colour in zip(spent.items(), cycle(COLOURS), strict=False):
            end += seconds / total
            bar.append("━" * (round(width * end) - len(bar)), colour)
            legend.append(phase, colour).append(f" {seconds / total:.0%}  ", QUIET)
        rows = [("time", bar), ("", legend)] if spent else []
        if text := memory_text(record):
            rows.append(("memory", Text(text)))
        notes = [(Text("note", f"bold {NOTE}"), Text(note)) for note in self.notes[-NOTES:]]
        return Group("", labelled(*rows, *notes))


def table(rows: Sequence[dict[str, Text]]) -> RenderableType:
    """Rows of cells below their heads, and an empty line."""
    drawn = Table(box=None, padding=(0, figures.GAP, 0, 0), pad_edge=False, header_style=QUIET)
    for head in rows[-1]:
        drawn.add_column(head, justify="right", min_width=figures.NARROWEST, no_wrap=True)
    for cells in rows:
        drawn.add_row(*cells.values())
    return Group(drawn, "")


def labelled(*rows: tuple[RenderableType, RenderableType]) -> Table:
    """Rows with a label in the margin."""
    grid = Table.grid(Column(width=MARGIN, style=QUIET), "")
    for row in rows:
        grid.add_row(*row)
    return grid


def open_console(kind: str) -> Console:
    """A console by its name; "rich" is "plain" without the package or without a terminal.

    Raises:
        ValueError: another name.
    """
    require(kind in ("rich", "plain", "off"), "console", "rich, plain or off", repr(kind))
    if kind == "off":
        return Console()
    return Live() if kind == "rich" and HAS_RICH and sys.stdout.isatty() else Lines()
