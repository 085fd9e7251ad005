"""Signals: the first SIGINT or SIGTERM asks a run to stop, the second one ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# how a signal ends a process
DEFAULT: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Interrupted(Exception):
    """The signal `number` stopped the run, after a checkpoint was saved."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after saving {checkpoint}")
        self.number = number


class StopRequest:
    """The number of the signal that asked the run to stop, or 0."""

    number = 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Context in which the first SIGINT or SIGTERM is recorded and the second one acts.

    The second acts as it did outside, or by default if it was ignored outside.
    """
    request = StopRequest()
    with heeding_interrupts():
        outside = {number: signal.getsignal(number) for number in DEFAULT}

        def record(number: int, frame: FrameType | None) -> None:
            request.number = number
            _set_handlers(outside)

        with _handlers(dict.fromkeys(DEFAULT, record)):
            yield request


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Context in which signals that are ignored act by default.

    Background jobs of a script ignore SIGINT.
    """
    unheeded = (signal.SIG_IGN, None)
    with _handlers({n: act for n, act in DEFAULT.items() if signal.getsignal(n) in unheeded}):
        yield


@contextmanager
def _handlers(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Context with other signal handlers; only the main thread may set them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    _set_handlers(handlers)
    try:
        yield
    finally:
        _set_handlers(before)


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        # None stands for a handler that was not installed from Python
        signal.signal(number, DEFAULT[number] if handler is None else handler)
