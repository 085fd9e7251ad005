"""Set-up of the benchmarks: which shapes, on which device, by which clock, and the final table."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.batch import Batch, Recipe, dtype_name
from bench.counted import published
from bench.hidden import HiddenBatch
from bench.hidden_truth import HiddenTruth
from bench.hidden_truth import find_truth as find_hidden_truth
from bench.machine import describe, device_name, versions
from bench.peers import missing_peers
from bench.table import hidden_table, kernel_lines, table
from bench.truth import Truth, find_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (rows, V). On a GPU the vocabularies of Llama 2, GPT-2, Llama 3, Qwen 3 unpadded (odd) and padded,
# Gemma 3; on a CPU, as many rows as a few minutes allow
SHAPES = {
    "cuda": (
        (8192, 32_000),
        (8192, 50_257),
        (8192, 128_256),
        (8192, 151_669),
        (8192, 151_936),
        (16_384, 151_936),
        (8192, 262_144),
    ),
    "cpu": ((512, 151_936), (512, 32_000)),
}
# (rows, V, D) from hidden states: 8,192 rows of Llama 2, Llama 3, Qwen 3; on a CPU few of them
HIDDEN_SHAPES = {
    "cuda": (
        (8192, 151_936, 4096),
        (8192, 151_936, 2048),
        (8192, 128_256, 4096),
        (8192, 32_000, 4096),
    ),
    "cpu": ((1024, 32_000, 512), (128, 151_936, 512)),
}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}
# the most demanding contender holds three times the float32 logits from bfloat16 ones, and six
# times from float32 ones; the batch itself holds the logits twice
MEMORY_SHARE = {"cuda": 1 / 8, "cpu": 1 / 12}


def fitting_rows(V: int, wanted: int) -> int:
    """The rule of sizes: at most the power of two whose float32 logits fill a share of memory."""
    if DEVICE == "cuda":
        memory, _ = torch.cuda.mem_get_info()
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = max(1, int(memory * MEMORY_SHARE[DEVICE]) // (V * torch.float32.itemsize))
    return min(1 << (fitting.bit_length() - 1), wanted)


def clock() -> float:
    """Seconds, once the device has finished all it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Shapes of one's own."""
    group = parser.getgroup("bench", "shapes of bench/")
    group.addoption("--rows", type=int, help="rows of logits instead of what fits")
    group.addoption("--vocabulary", type=int, action="append", help="may be given repeatedly")
    group.addoption("--hidden", type=int, help="size of the hidden states")


def pytest_configure(config: pytest.Config) -> None:
    """Collects bench_*.py, and leaves the table to `pytest_terminal_summary`."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True
    # gpu.sh stops a part by SIGINT, which a background job inherits as ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One batch for every vocabulary and dtype."""
    if "hidden_batch" in metafunc.fixturenames:
        _generate_hidden(metafunc)
    if "batch" not in metafunc.fixturenames:
        return
    given = metafunc.config.option
    standard = SHAPES[DEVICE]
    vocabularies = given.vocabulary or list(dict.fromkeys(V for _, V in standard))
    wanted = [(given.rows or N, V) for V in vocabularies for N in _rows_of(V)]
    fitting = dict.fromkeys((given.rows or fitting_rows(V, N), V) for N, V in wanted)
    shapes = [(N, V, dtype) for N, V in fitting for dtype in DTYPES[DEVICE]]
    names = [f"{N}x{V}-{dtype_name(dtype)}" for N, V, dtype in shapes]
    metafunc.parametrize("batch", shapes, ids=names, indirect=True, scope="module")


def _generate_hidden(metafunc: pytest.Metafunc) -> None:
    """One batch of hidden states for every shape."""
    given = metafunc.config.option
    standard = HIDDEN_SHAPES[DEVICE]
    sizes = [(V, D) for _, V, D in standard]
    if given.vocabulary:
        sizes = [(V, standard[0][2]) for V in given.vocabulary]
    rows = dict((V, N) for N, V, _ in standard)
    shapes = [
        (given.rows or rows.get(V, standard[0][0]), V, given.hidden or D, DTYPES[DEVICE][0])
        for V, D in sizes
    ]
    shapes = list(dict.fromkeys(shapes))
    names = [f"{N}x{V}x{D}-{dtype_name(dtype)}" for N, V, D, dtype in shapes]
    metafunc.parametrize("hidden_batch", shapes, ids=names, indirect=True, scope="module")


def _rows_of(V: int) -> list[int]:
    """The rows that a vocabulary is timed with; of the first one where it is not among ours."""
    standard = SHAPES[DEVICE]
    return [N for N, known in standard if known == V] or [standard[0][0]]


@pytest.fixture(scope="module")
def batch(request: pytest.FixtureRequest) -> Iterator[Batch]:
    """The input of a case; one at a time is in memory."""
    N, V, dtype = request.param
    yield Batch.draw(N, V, dtype, DEVICE)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def hidden_batch(request: pytest.FixtureRequest) -> Iterator[HiddenBatch]:
    """The input of a case from hidden states."""
    yield HiddenBatch.draw(*request.param, DEVICE)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def hidden_truth(hidden_batch: HiddenBatch) -> Callable[[], HiddenTruth]:
    """What every contender has to find."""
    return cache(partial(find_hidden_truth, hidden_batch))


@pytest.fixture(scope="module")
def truth(batch: Batch) -> Callable[[Recipe], Truth]:
    """What every contender has to find, of the recipe asked for."""
    return cache(partial(find_truth, batch))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What --benchmark-json says of the machine."""
    machine_info.update(device=device_name(), **versions(), about=describe())
    machine_info["missing_peers"] = missing_peers()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the table of all that was timed."""
    session = getattr(config, "_benchmarksession", None)
    timed = [] if session is None else [bench for bench in session.benchmarks if bench]
    runs = [{"group": run.group, "median": run["median"], **run.extra_info} for run in timed]
    if runs:
        terminalreporter.section(f"{device_name()}, torch {torch.__version__}")
        lines = hidden_table(run for run in runs if "hidden_case" in run)
        if runs := [run for run in runs if "hidden_case" not in run]:
            lines += table(runs)
        if DEVICE == "cpu":
            lines += kernel_lines(published()) if runs else []
        elif missing := missing_peers():
            lines += ["", f"Absent: {', '.join(missing)}"]
        for line in lines:
            terminalreporter.write_line(line)
