"""Bytes that our Triton kernels move, counted in the interpreter's loads and stores.

Bytes per logit depend on neither the GPU nor, up to rounding, on N and V, so a small shape tells
them on any machine. `python -m bench.kernel_meter` prints them as JSON; a process of its own, as
Triton decides at the import of a kernel whether it is interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# a row of several tiles, unaligned, so that first and last tiles are masked
N, V = 4, 20_001


class Traffic(NamedTuple):
    """Bytes moved by kernels.

    `issued` counts every lane of every load and store that its mask lets through. `distinct`
    counts an address once per program for reading and once for writing: what memory moves when
    the second reading of a row comes from registers or a cache, as it is meant to.
    """

    issued: int
    distinct: int


class KernelMeter:
    """Records, while entered, every address that interpreted kernels load from and store to.

    Atomics are not recorded. Programs run one after another in the interpreter, so what lies
    between two changes of the grid index belongs to one program.
    """

    def __init__(self) -> None:
        self._program = 0
        self._accesses: list[tuple[int, bool, int, np.ndarray]] = []

    def __enter__(self) -> KernelMeter:
        from triton.runtime.interpreter import interpreter_builder

        self._builder = interpreter_builder
        load, store = (
            interpreter_builder.create_masked_load,
            interpreter_builder.create_masked_store,
        )
        set_grid_idx = interpreter_builder.set_grid_idx

        def counted_load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self._record(ptrs, mask, is_store=False)
            return load(ptrs, mask, *rest, **options)

        def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self._record(ptrs, mask, is_store=True)
            return store(ptrs, value, mask, *rest, **options)

        def next_program(*index: int) -> None:
            self._program += 1
            set_grid_idx(*index)

        interpreter_builder.create_masked_load = counted_load
        interpreter_builder.create_masked_store = counted_store
        interpreter_builder.set_grid_idx = next_program
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # the instance's attributes hid the methods of its class
        for name in ("create_masked_load", "create_masked_store", "set_grid_idx"):
            delattr(self._builder, name)

    def traffic(self, tensor: Tensor | None = None) -> Traffic:
        """Bytes moved so far, within the storage of `tensor` if one is given."""
        low, high = 0, 2**64 - 1
        if tensor is not None:
            low = tensor.untyped_storage().data_ptr()
            high = low + tensor.untyped_storage().nbytes()
        issued = 0
        seen: dict[tuple[int, bool, int], list[np.ndarray]] = {}
        for program, is_store, itemsize, addresses in self._accesses:
            inside = addresses[(addresses >= low) & (addresses < high)]
            issued += inside.size * itemsize
            seen.setdefault((program, is_store, itemsize), []).append(inside)
        distinct = sum(
            np.unique(np.concatenate(parts)).size * itemsize
            for (_, _, itemsize), parts in seen.items()
        )
        return Traffic(issued, distinct)

    def _record(self, ptrs: Any, mask: Any, *, is_store: bool) -> None:
        """Notes the addresses of one instruction."""
        itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        self._accesses.append((self._program, is_store, itemsize, addresses.ravel()))


def bytes_per_logit(call: Callable[[], object], logits: int) -> tuple[float, float]:
    """(issued, distinct) bytes of the kernels of one call, over its number of logits."""
    with KernelMeter() as meter:
        call()
    traffic = meter.traffic()
    return traffic.issued / logits, traffic.distinct / logits


@cache
def kernel_bytes_per_logit() -> dict[str, tuple[float, float]]:
    """(issued, distinct) for "float32, forward" and so on, from a process that interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(
        [sys.executable, "-m", "bench.kernel_meter"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return {case: (issued, distinct) for case, (issued, distinct) in json.loads(printed).items()}


def _main() -> None:
    """Prints the bytes per logit of every dtype and direction."""
    from bench.paths import Batch, Contender, Direction, dtype_name, ours

    kernels = Contender("ours-triton", partial(ours, backend="triton"))
    directions: tuple[Direction, ...] = ("forward", "forward + backward")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        batch = Batch.draw(N, V, dtype, "cpu")
        for direction in directions:
            case = f"{dtype_name(dtype)}, {direction}"
            found[case] = bytes_per_logit(kernels.call(batch, direction), N * V)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
