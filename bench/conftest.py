"""Set-up of the benchmarks: which shapes, on which device, by which clock, and the final table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from bench.kernel_meter import kernel_bytes_per_logit
from bench.paths import Batch, dtype_name
from bench.report import kernel_lines, table
from bench.truth import Truth, find_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Qwen 2.5 and 3, Llama 3, Llama 2; on a CPU without Llama 3, which would repeat Qwen
VOCABULARIES = {"cuda": (151_936, 128_256, 32_000), "cpu": (151_936, 32_000)}
# the most demanding contender holds about six times the float32 logits, the batch itself twice
MEMORY_SHARE = 1 / 12
# enough to fill a GPU many times over; on a CPU, what a few minutes allow
MOST_ROWS = {"cuda": 16_384, "cpu": 512}
DTYPES = (torch.float32, torch.bfloat16)


def twelfth_of_memory(V: int) -> int:
    """The rule of sizes: rows, a power of two, whose float32 logits fill 1/12 of the memory."""
    if DEVICE == "cuda":
        memory, _ = torch.cuda.mem_get_info()
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = max(1, int(memory * MEMORY_SHARE) // (V * torch.float32.itemsize))
    return min(1 << (fitting.bit_length() - 1), MOST_ROWS[DEVICE])


def clock() -> float:
    """Seconds, once the device has finished all it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    """The GPU's name, or the number of threads."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Shapes of one's own."""
    group = parser.getgroup("bench", "shapes of bench/")
    group.addoption("--rows", type=int, help="rows of logits instead of a twelfth of memory")
    group.addoption("--vocabulary", type=int, action="append", help="may be given repeatedly")


def pytest_configure(config: pytest.Config) -> None:
    """Collects bench_*.py, and leaves the table to `pytest_terminal_summary`."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One batch for every vocabulary and dtype."""
    if "batch" not in metafunc.fixturenames:
        return
    given = metafunc.config.option
    shapes = [
        (given.rows or twelfth_of_memory(V), V, dtype)
        for V in given.vocabulary or VOCABULARIES[DEVICE]
        for dtype in DTYPES
    ]
    names = [f"{N}x{V}-{dtype_name(dtype)}" for N, V, dtype in shapes]
    metafunc.parametrize("batch", shapes, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def batch(request: pytest.FixtureRequest) -> Iterator[Batch]:
    """The input of a case; one at a time is in memory."""
    N, V, dtype = request.param
    yield Batch.draw(N, V, dtype, DEVICE)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def truth(batch: Batch) -> Truth:
    """What every contender has to find."""
    return find_truth(batch)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What --benchmark-json says of the machine."""
    machine_info.update(device=device_name(), torch=torch.__version__)
    if find_spec("triton"):
        machine_info["kernel_bytes_per_logit"] = kernel_bytes_per_logit()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the table of all that was timed."""
    session = getattr(config, "_benchmarksession", None)
    timed = [] if session is None else [bench for bench in session.benchmarks if bench]
    runs = [{"group": run.group, "median": run["median"], **run.extra_info} for run in timed]
    if runs:
        terminalreporter.section(f"{device_name()}, torch {torch.__version__}")
        lines = table(runs)
        if find_spec("triton") and DEVICE == "cpu":
            lines += kernel_lines(kernel_bytes_per_logit())
        for line in lines:
            terminalreporter.write_line(line)
