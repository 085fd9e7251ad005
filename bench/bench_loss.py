"""The loss from logits: forward, and forward + backward, every contender side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.batch import Batch, Outcome, dtype_name
from bench.conftest import DEVICE, clock
from bench.counted import CASES, case_name, find_count
from bench.machine import device_name
from bench.meter import CompiledMeter, OperandMeter, one_thread, peak_extra_bytes
from bench.paths import Contender, contenders
from bench.truth import Truth, refuse_wrong

# a call takes milliseconds on a GPU and up to seconds on a CPU
ROUNDS = {"cuda": 30, "cpu": 5}
# what has to move, in times the size of the logits: a reading, a writing, a second reading
NECESSARY = {CASES[0]: 1, CASES[1]: 2, CASES[2]: 3}
TIMED = [
    pytest.param(contender, case, id=f"{case[0]}-{case[1].replace(' ', '')}-{contender.name}")
    for case in CASES
    for contender in contenders(DEVICE, case[1])
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize(("contender", "case"), TIMED)
def test_loss(
    contender: Contender,
    case: Any,
    batch: Batch,
    truth: Callable[[Any], Truth],
    benchmark: BenchmarkFixture,
) -> None:
    """Refuses what is wrong, counts bytes, then times."""
    recipe, direction = case
    N, V = batch.logits.shape
    dtype = dtype_name(batch.logits.dtype)
    call = contender.call(batch, direction, recipe)
    operands = check_and_count(contender, call, batch, truth(recipe))
    counted = (
        find_count(contender.name, recipe, direction, dtype) if contender.kernels else operands
    )
    batch.logits.copy_(batch.pristine)
    peak = peak_extra_bytes(call, DEVICE)

    def timed() -> None:
        # the result is freed within the round, as the clone is within its own
        call()

    yardsticks = Yardsticks(batch)
    benchmark.group = f"{case_name(recipe, direction)}, {dtype}, {N:,} x {V:,}"
    benchmark.pedantic(timed, setup=yardsticks.measure, rounds=ROUNDS[DEVICE], warmup_rounds=1)
    clone, copy = yardsticks.medians()
    benchmark.extra_info.update(
        contender=contender.name,
        case=case_name(recipe, direction),
        device=device_name(),
        threads=torch.get_num_threads(),
        N=N,
        V=V,
        dtype=dtype,
        logits_bytes=batch.logits.nbytes,
        necessary_bytes=NECESSARY[case] * batch.logits.nbytes,
        clone_seconds=clone,
        copy_seconds=copy,
        peak_extra_bytes=peak,
        peak_extra_rows=peak / (V * batch.logits.itemsize),
        bytes_per_logit_issued=counted.get("issued"),
        bytes_per_logit=counted.get("distinct"),
    )
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(ratio_to_clone=median / clone, ratio_to_copy=median / copy)


def check_and_count(
    contender: Contender, call: Callable[[], Outcome], batch: Batch, truth: Truth
) -> dict[str, float | None]:
    """Bytes per logit of the operations of one call, once its outcome was found right."""
    operands = OperandMeter(threshold=batch.logits.nbytes // 2)
    compiled = CompiledMeter()
    batch.logits.copy_(batch.pristine)
    counting = compiled if contender.compiled else nullcontext() if contender.kernels else operands
    with one_thread(), counting:
        try:
            outcome = call()
        except RuntimeError as failure:
            if not contender.compiled:
                raise
            pytest.skip(f"torch.compile: {str(failure).splitlines()[0]}")
    refuse_wrong(contender.name, outcome, truth)
    logits = batch.logits.numel()
    if contender.compiled:
        return {"issued": compiled.accessed and compiled.accessed / logits}
    return {"issued": operands.issued / logits, "distinct": operands.large / logits}


class Yardsticks:
    """A clone and a copy of the logits before every round: what bandwidth is worth just then.

    A clone asks for fresh memory, which on a CPU costs more in page faults than in copying.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.clone: list[float] = []
        self.copy: list[float] = []

    def measure(self) -> None:
        """Times both; the copy restores the logits for the round to come."""
        start = clock()
        self.batch.logits.clone()
        cloned = clock()
        self.batch.logits.copy_(self.batch.pristine)
        copied = clock()
        self.clone.append(cloned - start)
        self.copy.append(copied - cloned)

    def medians(self) -> tuple[float, float]:
        """Seconds of a clone and of a copy."""
        return statistics.median(self.clone), statistics.median(self.copy)
