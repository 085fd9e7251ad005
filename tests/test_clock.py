"""Where a step's time and memory go: sums, names, and what stands in for a GPU's clock."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_core.trainer import measure as module
from grpo_core.trainer.measure import Clock, resident_peak_mib


def test_phases_add_up_to_the_step() -> None:
    start = time.perf_counter()
    clock = Clock()
    for name, seconds in (("rollout", 0.02), ("loss", 0.01), ("rollout", 0.02)):
        with clock.phase(name):
            time.sleep(seconds)
        time.sleep(0.005)
    found = clock.seconds
    took = time.perf_counter() - start
    assert list(found) == ["rollout", "loss", "rest"]
    assert found["rollout"] >= 0.04 and found["loss"] >= 0.01 and found["rest"] >= 0.015
    assert found["rollout"] - 0.04 < took - 0.065 + 1e-3
    assert sum(found.values()) == pytest.approx(took, abs=2e-3)


def test_a_phase_that_raises_the_mark_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resident set's highest value never falls; a phase that comes twice has the higher."""
    peaks = iter([100.0, 300.0, 300.0])
    monkeypatch.setattr(module, "resident_peak_mib", lambda: next(peaks))
    clock = Clock(torch.device("cpu"))
    for name in ("loss", "optimizer", "loss"):
        with clock.phase(name):
            pass
    assert clock.memory() == {"peak_resident_mib": {"loss": 300.0, "optimizer": 300.0}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_mark_is_the_systems() -> None:
    before = resident_peak_mib()
    status = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    # the kernel sums its counters lazily, one per core
    assert before == pytest.approx(int(kib) / 1024, rel=0.01)


def test_on_a_gpu_its_queue_is_timed_and_its_allocator_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a device made of numbers: every mark is a second later, a phase's peak its own."""
    now, allocated, waited = [0.0], {"peak": 7 * 2**20}, []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            now[0] += 1000
            self.time = now[0]

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=0)
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    clock = Clock(torch.device("cuda", 0))
    with clock.phase("rollout"):
        allocated["peak"] = 3 * 2**20
    with clock.phase("loss"):
        allocated["peak"] = 5 * 2**20
    assert not waited
    assert clock.memory() == {"peak_cuda_mib": {"rollout": 3.0, "loss": 5.0}}
    assert clock.seconds == {"rollout": 1.0, "loss": 1.0, "rest": 3.0}
