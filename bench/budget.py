"""The time of a run, shared out over its cases."""

from __future__ import annotations

import time
from collections.abc import Callable

# of the cases; starting Python and the table take the rest of three minutes
SECONDS = 155.0


class Budget:
    """Decides whether a case may start and how many rounds it gets.

    A case starts if what it takes at least fits: its checks and one round, estimated by the longest
    case of its kind so far, of any kind where there was none.
    """

    def __init__(
        self, seconds: float, cases: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self.left = clock, cases
        self.started = self.case_started = clock()
        self.end = self.started + seconds
        self.least: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.started

    def start(self, kind: str) -> bool:
        """Begins a case, unless it cannot be ended in time."""
        self.case_started = now = self.clock()
        self.left -= 1
        return now + self.least.get(kind, max(self.least.values(), default=0.0)) <= self.end

    def rounds(self, kind: str, seconds: float, wanted: int) -> int:
        """How many rounds of so many seconds fit into the share of this case: at least one."""
        now = self.clock()
        self.least[kind] = max(self.least.get(kind, 0.0), now - self.case_started + seconds)
        share = (self.end - self.case_started) / (self.left + 1)
        fitting = (self.case_started + share - now) / max(seconds, 1e-9)
        return int(max(1, min(wanted, fitting)))
