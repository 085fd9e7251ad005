"""How a run ends: tables of its figures, and one line for what has stopped it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from traceback import format_exception

from grpo_core.cli.options import UserCodeError, is_first_process
from grpo_core.trainer.rewards import RewardError
from grpo_core.trainer.signals import Interrupted, heeding_interrupts

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows) -> str:
    """A table, its head in the first row; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return "".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|\n", *lines[1:]])


def aligned(rows: Rows) -> list[str]:
    """The same table as lines for a terminal; a head such as "time, s" takes two of them."""
    names, _, units = zip(*(head.partition(", ") for head in rows[0]), strict=True)
    rows = [names, units, *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        numbers = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{first:{widths[0]}}{''.join(numbers)}".rstrip())
    return lines


def run_to_the_end(
    work: Callable[[], object],
    after_interrupt: str,
    errors: tuple[type[Exception], ...] = (FloatingPointError, OSError, ValueError),
) -> int:
    """Does the work of a command; returns the exit status.

    Args:
        work: to do.
        after_interrupt: what to do after Ctrl-C, for the user.
        errors: that are shown as one line.
    """
    try:
        with heeding_interrupts():
            work()
    except errors as error:
        print_error(f"\nstopped: {error}{user_traceback(error)}")
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        print_error(f"\ninterrupted; {after_interrupt}")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    return 0


def print_error(line: str) -> None:
    """A line on standard error, by the first process."""
    if is_first_process():
        print(line, file=sys.stderr)


def user_traceback(error: Exception) -> str:
    """The traceback of an error in the user's code, from that code on; "" for other errors."""
    cause = error.__cause__ if isinstance(error, RewardError | UserCodeError) else None
    if cause is None:
        return ""
    cause = cause.with_traceback(cause.__traceback__ and cause.__traceback__.tb_next)
    return "\n" + "".join(format_exception(cause))
