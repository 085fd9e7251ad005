"""Seconds and peak memory: of the phases of a step, and of a piece of code."""

from __future__ import annotations

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from grpo_core.trainer.distributed import all_gather_object

# fields of a record that describe the machine and differ between equal runs
MACHINE = ("seconds", "peak_cuda_mib", "peak_resident_mib")
MIB = 2**20


class Clock:
    """Wall-clock seconds and peak memory per phase of a step.

    On a GPU seconds are measured between two events in the stream, without synchronisation, and
    memory is what torch has allocated; torch's peak counter is reset at every phase.

    On a CPU memory is the peak of the process's resident set since the process started. It cannot
    be reset, so the phase that raises it is the one that needs the memory.

    Args:
        device: of the model; None for the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda = device if device is not None and device.type == "cuda" else None
        self.spans: list[tuple[str, Any, Any]] = []
        self.peaks: defaultdict[str, float] = defaultdict(float)
        self.start = self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside, and its peak memory, to `name`."""
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
        start = self._mark()
        yield
        self.spans.append((name, start, self._mark()))
        if self.cuda is not None:
            peak = torch.cuda.max_memory_allocated(self.cuda) / MIB
        else:
            peak = resident_peak_mib()
        self.peaks[name] = max(self.peaks[name], peak)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every phase so far; "rest" is the time between phases."""
        phases: defaultdict[str, float] = defaultdict(float)
        total = self._seconds(self.start, self._mark())
        for name, start, end in self.spans:
            phases[name] += self._seconds(start, end)
        return {**phases, "rest": max(0.0, total - sum(phases.values()))}

    def memory(self) -> dict[str, dict[str, float]]:
        """Peak MiB of every phase, the largest of all ranks, under the name of the measure.

        Empty where the system has no such figure (Windows without a GPU).
        """
        largest: defaultdict[str, float] = defaultdict(float)
        for peaks in all_gather_object(dict(self.peaks)):
            for name, peak in peaks.items():
                largest[name] = max(largest[name], round(peak, 1))
        if not any(largest.values()):
            return {}
        return {"peak_cuda_mib" if self.cuda else "peak_resident_mib": dict(largest)}

    def _mark(self) -> Any:
        """The time on a CPU, an event in the stream on a GPU."""
        if self.cuda is None:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.cuda))
        return mark

    def _seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        if self.cuda is None:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def resident_peak_mib() -> float:
    """Peak resident set of this process, MiB; 0 on Windows."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


class LiveBytes:
    """Context that counts every allocation of PyTorch, to find the peak of live bytes.

    On a CPU the profiler records all allocations, including scratch memory of operators and
    compiled code. On a GPU the allocator's own peak is read.

    Attributes:
        peak: largest number of bytes held at one time beyond those held before; set at the end.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device == "cuda"
        self.peak = 0

    def __enter__(self) -> LiveBytes:
        # garbage of earlier code must not be freed, and so subtracted, inside
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.recorded.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.before
            return
        self.recorded.__exit__(*error)
        profiler: Any = self.recorded.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.peak = max(accumulate((event.nbytes() for event in events), initial=0))
