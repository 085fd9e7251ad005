"""Seconds of each phase of a step, and the memory it took at its highest."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_core.trainer.distributed import gathered

# What a record says of the machine it was made on, and not of the run: no two runs agree on it.
MACHINE = ("seconds", "peak_cuda_mib", "peak_resident_mib")
MIB = 2**20


class Clock:
    """Wall-clock seconds and peak memory per phase of a step.

    On a GPU the seconds are those between two marks in its queue, so that nobody waits for it, and
    the memory is what torch has allocated on it; torch's own peak is set back at every phase.

    On a CPU the memory is the process's resident set. The system keeps its highest value since
    the process began, which is not set back here: a phase has what was the highest by its end, and
    the one to look at is the one that raises it.

    Args:
        device: of the model; None is the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda = device if device is not None and device.type == "cuda" else None
        self.spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self.peaks: defaultdict[str, float] = defaultdict(float)
        self.start = self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time spent inside, and the memory, for `name`."""
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
        start = self._mark()
        try:
            yield
        finally:
            self.spans.append((name, start, self._mark()))
            self.peaks[name] = max(self.peaks[name], self._peak_mib())

    @property
    def seconds(self) -> dict[str, float]:
        """Of every phase so far, and under "rest" what lay between them."""
        found: defaultdict[str, float] = defaultdict(float)
        whole = _seconds(self.start, self._mark())
        for name, start, end in self.spans:
            found[name] += _seconds(start, end)
        return {**found, "rest": max(0.0, whole - sum(found.values()))}

    def memory(self) -> dict[str, dict[str, float]]:
        """MiB of every phase, named by what was measured, of the process that took the most.

        Nothing where the system does not tell (Windows, without a GPU).
        """
        largest: defaultdict[str, float] = defaultdict(float)
        for peaks in gathered(dict(self.peaks)):
            for name, peak in peaks.items():
                largest[name] = max(largest[name], round(peak, 1))
        if not any(largest.values()):
            return {}
        return {"peak_cuda_mib" if self.cuda else "peak_resident_mib": dict(largest)}

    def _mark(self) -> float | torch.cuda.Event:
        if self.cuda is None:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.cuda))
        return mark

    def _peak_mib(self) -> float:
        if self.cuda is not None:
            return torch.cuda.max_memory_allocated(self.cuda) / MIB
        return resident_peak_mib()


def resident_peak_mib() -> float:
    """The most memory this process has held since it began, MiB; 0 where there is no telling."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Between two marks."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
