"""How the functions of this folder are compiled, and run on threads.

Each kernel is compiled once for a dtype, at its first call, and kept on disk where Numba finds a
folder to write to. Nothing else is specialised: sizes, temperatures, objectives and absent
arguments are all data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

# logits that are worth a thread of their own, and that a thread takes at a time
LEAST_WORK, GRAIN = 2**17, 2**16
# logits that a row is computed in at a time: 4 KiB of float32, small enough for the first-level
# cache and large enough to hide the call of a loop
BLOCK = 1024


# IEEE divisions; no counting of references to arrays, which costs a call for each of a row's
# functions. Left unset, `fastmath` would be that of whichever caller is compiled first.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "_nrt": False}
# without an entry for Python, half of the time to compile
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: Any = None, **options: Any) -> Any:
    """A function that only compiled functions call; a call from Python would crash."""
    decorate = numba.njit(**{**OPTIONS, **INNER, **options})
    return decorate if function is None else decorate(function)


@intrinsic
def claim(typing: Any, counter: Any, count: Any) -> Any:
    """Adds `count` to the counter and returns what it was, as one step for all threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, args[1], "monotonic")

    return types.int64(types.int64[::1], types.int64), generate


def compile_kernel(function: Callable) -> Callable:
    """A kernel that runs without the interpreter's lock, kept on disk where that can be written."""
    options = {"nogil": True, "no_cfunc_wrapper": True, **OPTIONS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # no folder that can be written
        return numba.njit(**options)(function)


@cache
def sources() -> str:
    """A digest of this folder, so that a kernel on disk is never older than what it calls."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run(kernel: Callable, N: int, V: int, *args: Any) -> None:
    """Runs `kernel(*args, blocks, counter, grain)` over N rows on as many threads as torch has.

    The calling thread works as well and waits for no thread that has not begun. Two calls at once
    share the helpers.
    """
    grain = max(1, GRAIN // max(V, 1))
    helpers = max(min(torch.get_num_threads(), N, N * V // LEAST_WORK), 1) - 1
    counter = np.zeros(1, np.int64)
    calls = [(*args, np.empty((2, BLOCK), np.float32), counter, grain) for _ in range(helpers + 1)]
    futures = _start(kernel, calls[1:]) if helpers > 0 else []
    kernel(*calls[0])
    for future in futures:
        if not future.cancel():
            future.result()


def _start(kernel: Callable, calls: list[tuple]) -> list[Future]:
    """Begins calls on helpers: those that there are threads for, none once the main one has ended.

    Python starts no thread then, but other threads and functions of `atexit` still compute.
    """
    pool, futures = _pool(torch.get_num_threads() - 1), []
    with suppress(RuntimeError):
        for call in calls:
            futures.append(pool.submit(kernel, *call))
    return futures


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "grpo_core")


# a forked process has none of its parent's threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
