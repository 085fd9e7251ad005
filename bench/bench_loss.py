"""Every contender on every case and size: held to float64, counted, then timed.

From logits the yardsticks are a clone and a copy of the logits, from hidden states the bare matrix
products; each is timed before every round: what the machine is worth just then.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.batch import CASES, HIDDEN_CASES, Batch, Case, Outcome
from bench.conftest import Budget
from bench.contenders import Contender, contenders
from bench.counted import published
from bench.machine import DEVICE, clock, device_name
from bench.meter import CompiledMeter, Meter, one_thread, peak_extra_bytes
from bench.truth import Truth, find_truth, refuse_wrong
from grpo_core.verify.report import dtype_name

# a call takes milliseconds on a GPU and up to seconds on a CPU
ROUNDS = {"cuda": 30, "cpu": 5}
# of Qwen 3 padded, Llama 2, Qwen 3 unpadded (odd), GPT-2, Llama 3, Gemma 3
VOCABULARIES = (151_936, 32_000, 151_669, 50_257, 128_256, 262_144)
# (rows, V, hidden size or 0); "short" is a CPU without --long
SHAPES = {
    "cuda": (*((8192, V, 0) for V in VOCABULARIES), (16_384, 151_936, 0)),
    "cpu": ((512, 151_936, 0), (512, 32_000, 0)),
    "short": ((128, 151_936, 0),),
}
HEADS = ((151_936, 4096), (151_936, 2048), (128_256, 4096), (32_000, 4096))
HIDDEN_SHAPES = {
    "cuda": tuple((8192, *head) for head in HEADS),
    "cpu": ((1024, 32_000, 512), (128, 151_936, 512)),
    "short": ((1024, 32_000, 512),),
}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}
# the most demanding contender holds three times the float32 logits from bfloat16 ones, and six
# times from float32 ones; the batch itself holds the logits twice
MEMORY_SHARE = {"cuda": 1 / 8, "cpu": 1 / 12}
# timed first in all cases and sizes
FIRST = ("ours", "naive")


class Shape(NamedTuple):
    """Of a batch; D is 0 from logits."""

    N: int
    V: int
    D: int
    dtype: torch.dtype


class Job(NamedTuple):
    """What one benchmark measures."""

    contender: Contender
    case: Case
    shape: Shape
    rank: tuple[int, ...]  # jobs of a lower one come first

    @property
    def group(self) -> str:
        """The block of the table."""
        *sizes, dtype = self.shape
        source = "from hidden states, " if self.case.from_hidden else ""
        size = " x ".join(f"{size:,}" for size in sizes if size)
        return f"{source}{self.case.name}, {dtype_name(dtype)}, {size}"


def fitting_rows(V: int, wanted: int) -> int:
    """At most the power of two whose float32 logits fill a share of the memory."""
    if DEVICE == "cuda":
        memory, _ = torch.cuda.mem_get_info()
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = max(1, int(memory * MEMORY_SHARE[DEVICE]) // (V * torch.float32.itemsize))
    return min(1 << (fitting.bit_length() - 1), wanted)


def shapes(from_hidden: bool, option: Any) -> list[Shape]:
    """The sizes of a run, by the options of the command line."""
    kind = DEVICE if DEVICE == "cuda" or option.long else "short"
    standard = (HIDDEN_SHAPES if from_hidden else SHAPES)[kind]
    usual_rows, _, usual_size = standard[0]
    found = []
    for V in option.vocabulary or dict.fromkeys(V for _, V, _ in standard):
        known = [shape for shape in standard if shape[1] == V]
        for N, _, D in known or [(usual_rows, V, usual_size)]:
            rows = option.rows or (N if from_hidden else fitting_rows(V, N))
            size = option.hidden or D if from_hidden else 0
            dtypes = DTYPES[DEVICE][: 1 if from_hidden else None]
            found += [Shape(rows, V, size, dtype) for dtype in dtypes]
    return list(dict.fromkeys(found))


def jobs(from_hidden: bool, option: Any) -> list[Job]:
    """Everything that can be measured here."""
    return [
        Job(contender, case, shape, (not contender.name.startswith(FIRST), at, from_hidden, nth))
        for at, shape in enumerate(shapes(from_hidden, option))
        for nth, case in enumerate(HIDDEN_CASES if from_hidden else CASES)
        for contender in contenders(DEVICE, case)
        if shape.dtype in contender.dtypes
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for every job; its name begins with from_logits or from_hidden."""
    found = {
        f"{source} {job.group}: {job.contender.name}".replace(" ", "-"): job
        for source in ("from_logits", "from_hidden")
        for job in jobs(source == "from_hidden", metafunc.config.option)
    }
    metafunc.parametrize("job", found.values(), ids=found)


@lru_cache(maxsize=1)
def draw(shape: Shape) -> Batch:
    """The input of a job; one at a time is in memory."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return Batch.draw(shape.N, shape.V, shape.dtype, DEVICE, shape.D)


@lru_cache
def truth_of(shape: Shape, recipe: Any) -> Truth:
    """What every contender has to find."""
    return find_truth(draw(shape), recipe)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.benchmark(timer=clock, disable_gc=True)
def test_loss(job: Job, benchmark: BenchmarkFixture, budget: Budget | None) -> None:
    """Refuses what is wrong, counts products and bytes, then times."""
    contender, case, shape, _ = job
    if budget and not budget.start(contender.name):
        pytest.skip("out of time")
    batch = draw(shape)
    call = contender.call(batch, case)
    truth = truth_of(shape, case.recipe)
    batch.restore()
    outcome, counts = count(contender, call, batch, case)
    errors = refuse_wrong(contender.name, outcome, truth)
    del outcome
    batch.restore()
    peak = peak_extra_bytes(call, DEVICE)
    steps = yardsticks(batch, case)
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def measure() -> None:
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)

    def timed() -> None:
        # the result is freed within the round, as the clone is within its own
        call()

    start = clock()
    measure()
    timed()
    rounds = ROUNDS[DEVICE]
    if budget:
        rounds = budget.rounds(contender.name, clock() - start, rounds)
    benchmark.group = job.group
    benchmark.pedantic(timed, setup=measure, rounds=rounds)
    benchmark.extra_info.update(
        contender=contender.name,
        case=case.name,
        from_hidden=case.from_hidden,
        device=device_name(),
        threads=torch.get_num_threads(),
        **shape._replace(dtype=dtype_name(shape.dtype))._asdict(),
        **{f"{name}_seconds": statistics.median(s[-rounds:]) for name, s in seconds.items()},
        # of the gradients, which are part of every peak
        returned_bytes=sum(tensor.nbytes for tensor in batch.inputs[: case.gradients]),
        logits_bytes=shape.N * shape.V * shape.dtype.itemsize,
        peak_extra_bytes=peak,
        **counts,
        **{f"{name}_error": error for name, error in errors.items()},
    )
    if benchmark.stats is not None:
        times = benchmark.stats.stats.data
        # each round beside its own floor: neighbours on the machine come and go
        floors = [*seconds.values()][-1][-len(times) :]
        ratios = [time / floor for time, floor in zip(times, floors, strict=True)]
        # a copy of the logits reads and writes
        least = 1 if case.from_hidden else case.floor / 2
        benchmark.extra_info["ratio_to_floor"] = statistics.median(ratios) / least


def count(
    contender: Contender, call: Callable[[], Outcome], batch: Batch, case: Case
) -> tuple[Outcome, dict[str, float | None]]:
    """The outcome of one call, and bytes per logit or products of its operations."""
    meter: Any = CompiledMeter() if contender.compiled else Meter(batch.pristine.nbytes // 2)
    with one_thread(), nullcontext() if contender.kernels else meter:
        try:
            outcome = call()
        except RuntimeError as failure:
            if not contender.compiled:
                raise
            pytest.skip(f"torch.compile: {str(failure).splitlines()[0]}")
    if case.from_hidden:
        product = 2 * batch.scored * batch.inputs[1].numel()
        return outcome, {"products": meter.products / product}
    if contender.kernels:
        key = contender.name, case.name, dtype_name(batch.pristine.dtype)
        found = published().get(key, {})
        issued, large = found.get("issued"), found.get("distinct")
    else:
        issued, large = (n / batch.pristine.numel() or None for n in (meter.issued, meter.large))
    return outcome, {"bytes_per_logit_issued": issued, "bytes_per_logit": large}


def yardsticks(batch: Batch, case: Case) -> dict[str, Callable[[], object]]:
    """The least work of a case; the last is the floor, and a copy restores the logits.

    A clone asks for fresh memory, which on a CPU costs more in page faults than in copying.
    """
    if case.from_hidden:
        return {"products": products(batch, case)}
    return {"clone": batch.pristine.clone, "copy": batch.restore}


def products(batch: Batch, case: Case) -> Callable[[], list[Tensor]]:
    """The bare products of a case, on every row that counts, into memory already in use."""
    hidden, lm_head = batch.inputs
    hidden = hidden[batch.valid]
    logits = hidden.new_empty(len(hidden), len(lm_head))
    # the logits stand for their gradient
    factors = [(hidden, lm_head.t()), (logits, lm_head), (logits.t(), hidden)][: case.floor]
    sinks = [logits, *map(torch.empty_like, (hidden, lm_head)[: case.floor - 1])]
    return lambda: [torch.mm(a, b, out=sink) for (a, b), sink in zip(factors, sinks, strict=True)]
