"""How much memory a piece of code holds at its peak, counted and not sampled."""

from __future__ import annotations

import gc
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class LiveBytes:
    """Within it every allocation is counted.

    On the CPU all of them pass PyTorch's allocator, the scratch inside an operator and that of
    compiled code included, and the profiler writes each down; on a GPU the allocator keeps account.

    Attributes:
        peak: most bytes held at one time that were not held before; known once it has ended.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device == "cuda"
        self.peak = 0

    def __enter__(self) -> LiveBytes:
        # what earlier code left in cycles must not be freed, and so be taken off, within this one
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.recorded.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.before
            return
        self.recorded.__exit__(kind, error, trace)
        profiler: Any = self.recorded.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.peak = max(accumulate((event.nbytes() for event in events), initial=0))
