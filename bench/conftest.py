"""The run of the benchmarks: options, order, time, what is measured just now, the final table."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contenders import missing_peers
from bench.machine import DEVICE, describe, device_name
from bench.table import LEGEND, table

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
        self.case_started = clock()
        self.end = self.case_started + seconds
        self.least: dict[str, float] = {}

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


BUDGET = pytest.StashKey[Budget]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Time, and sizes by hand."""
    group = parser.getgroup("bench", "bench/")
    group.addoption("--long", action="store_true", help="all sizes and rounds, however long")
    group.addoption("--rows", type=int, help="rows of logits instead of what fits")
    group.addoption("--vocabulary", type=int, action="append", help="may be given repeatedly")
    group.addoption("--hidden", type=int, help="size of the hidden states")


def pytest_configure(config: pytest.Config) -> None:
    """Collects bench_*.py, and leaves the table to `pytest_terminal_summary`."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True
    # says what is measured
    config.option.verbose = 1
    # gpu.sh stops a part by SIGINT, which a background job inherits as ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By importance, so that what time does not allow is what matters least."""
    items.sort(key=lambda item: job.rank if (job := _job(item)) else ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """The time begins."""
    session.config.stash[BUDGET] = Budget(SECONDS, sum(map(bool, map(_job, session.items))))


def _job(item: pytest.Item) -> Any:
    """Of a benchmark; None of any other test."""
    return item.callspec.params.get("job") if hasattr(item, "callspec") else None


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> Budget | None:
    """The time that is left; None with --long."""
    return None if request.config.option.long else request.config.stash[BUDGET]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What --benchmark-json says of the machine."""
    machine_info.update(describe(), missing_peers=missing_peers())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the table of all that was timed."""
    session = getattr(config, "_benchmarksession", None)
    timed = [] if session is None else [bench for bench in session.benchmarks if bench]
    if not timed:
        return
    runs = [
        {"group": run.group, "median": run["median"], "rounds": run["rounds"], **run.extra_info}
        for run in timed
    ]
    terminalreporter.section(f"{device_name()}, torch {torch.__version__}")
    lines = [*table(runs), *LEGEND]
    skipped = terminalreporter.stats.get("skipped", [])
    if late := sum("out of time" in str(report.longrepr) for report in skipped):
        lines += ["", f"Out of time: {late} cases were not measured; --long measures all."]
    if missing := missing_peers():
        lines += ["", f"Absent: {', '.join(missing)}."]
    if DEVICE == "cpu":
        lines.append("Triton kernels need a GPU; their bytes: bench/results/counted.md.")
    for line in lines:
        terminalreporter.write_line(line)
