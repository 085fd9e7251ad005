"""The loss from hidden states beside the bare matrix products, every contender side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.batch import dtype_name
from bench.conftest import DEVICE, clock
from bench.hidden import CASES, PRODUCTS, Case, Floor, HiddenBatch, HiddenContender, contenders
from bench.hidden_truth import HiddenTruth, errors, refuse_wrong
from bench.machine import device_name
from bench.meter import ProductMeter, one_thread, peak_extra_bytes

ROUNDS = {"cuda": 20, "cpu": 3}
TIMED = [
    pytest.param(contender, case, id=f"{case.replace(' ', '-')}-{contender.name}")
    for case in CASES
    for contender in contenders(case)
]


@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize(("contender", "case"), TIMED)
def test_hidden(
    contender: HiddenContender,
    case: Case,
    hidden_batch: HiddenBatch,
    hidden_truth: Callable[[], HiddenTruth],
    benchmark: BenchmarkFixture,
) -> None:
    """Refuses what is wrong, counts products and bytes, then times."""
    batch = hidden_batch
    if batch.hidden.dtype not in contender.dtypes:
        pytest.skip(f"{contender.name} is right in {contender.dtypes} only")
    (N, D), V = batch.hidden.shape, len(batch.lm_head)
    dtype = dtype_name(batch.hidden.dtype)
    call = contender.call(batch, case)
    with ProductMeter() as counter, one_thread():
        outcome = call()
    found = errors(batch, outcome, hidden_truth())
    refuse_wrong(contender.name, found, batch.hidden.dtype)
    del outcome
    peak = peak_extra_bytes(call, DEVICE)
    floor = Floor(batch, case)
    floor_seconds: list[float] = []

    def measure_floor() -> None:
        start = clock()
        floor()
        floor_seconds.append(clock() - start)

    def timed() -> None:
        # the result is freed within the round
        call()

    benchmark.group = f"from hidden states, {case}, {dtype}, {N:,} x {V:,} x {D:,}"
    benchmark.pedantic(timed, setup=measure_floor, rounds=ROUNDS[DEVICE], warmup_rounds=1)
    products = statistics.median(floor_seconds)
    benchmark.extra_info.update(
        contender=contender.name,
        hidden_case=case,
        device=device_name(),
        threads=torch.get_num_threads(),
        N=N,
        V=V,
        D=D,
        dtype=dtype,
        products=counter.operations / (2 * len(floor.hidden) * V * D),
        necessary_products=PRODUCTS[case],
        products_seconds=products,
        peak_extra_bytes=peak,
        returned_bytes=_returned_bytes(batch, case),
        **{f"{name}_error": error for name, error in found.items()},
    )
    if benchmark.stats is not None:
        times = benchmark.stats.stats.data
        # each round beside its own floor: neighbours on the machine come and go
        pairs = zip(times, floor_seconds[-len(times) :], strict=True)
        benchmark.extra_info.update(
            ratio_to_products=statistics.median(time / floor for time, floor in pairs),
            ratio_of_best=min(times) / min(floor_seconds),
        )


def _returned_bytes(batch: HiddenBatch, case: Case) -> int:
    """Bytes of the gradients, which are part of every peak."""
    head = batch.lm_head.nbytes if case == "trained head" else 0
    return 0 if case == "logp" else batch.hidden.nbytes + head
