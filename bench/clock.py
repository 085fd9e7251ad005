"""Time of a call on the device, by its own events, from a cold cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# more than the level-2 cache of any card: writing it leaves nothing of the last round there
FLUSHED_BYTES = 256 * 2**20
WARM_UP = 3
ROUNDS = 20


def median_seconds(call: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """Median over `rounds` calls; on a CPU by the wall clock, once."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    for _ in range(WARM_UP):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)
