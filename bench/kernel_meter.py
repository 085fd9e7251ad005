"""Bytes that Triton kernels move, ours or not, counted in the interpreter's loads and stores.

Bytes per logit depend on neither the GPU nor on N and V, so a few short rows tell them on any
machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Traffic(NamedTuple):
    """Bytes moved by kernels.

    `issued` counts every lane of every load and store that its mask lets through. `distinct`
    counts a byte once per program for reading and once for writing: what memory moves when
    the second reading of a row comes from registers or a cache, as it is meant to.
    """

    issued: int
    distinct: int


class Access(NamedTuple):
    """One load, store or atomic operation of one program; an atomic one is both."""

    program: int
    is_store: bool
    itemsize: int
    addresses: np.ndarray


class KernelMeter:
    """Records, while entered, every address that interpreted kernels load from and store to.

    Programs run one after another in the interpreter, so what lies between two changes of the grid
    index belongs to one program.

    Attributes:
        launches: the kernel of every launch, in order.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self._program = 0
        self._accesses: list[Access] = []
        self._patches = ExitStack()

    def __enter__(self) -> KernelMeter:
        from triton.runtime import interpreter

        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        set_grid_idx, run = builder.set_grid_idx, executor.__call__

        def record_access(name: str, ptrs: int, mask: int | None, *stores: bool) -> None:
            """Notes the addresses of an instruction; `ptrs`, `mask`: places among its arguments."""
            method = getattr(builder, name)

            def call(*args: Any, **options: Any) -> Any:
                self._record(args[ptrs], None if mask is None else args[mask], stores)
                return method(*args, **options)

            self._patches.enter_context(patch.object(builder, name, call))

        def next_program(*index: int) -> None:
            self._program += 1
            set_grid_idx(*index)

        def counted_run(grid: Any, *args: Any, **options: Any) -> Any:
            self.launches.append(grid.fn.__name__)
            # what the interpreter itself asks of torch is no part of the call
            with _disable_current_modes():
                return run(grid, *args, **options)

        self._patches.enter_context(patch.object(executor, "__call__", counted_run))
        self._patches.enter_context(patch.object(builder, "set_grid_idx", next_program))
        record_access("create_masked_load", 0, 1, False)
        record_access("create_masked_store", 0, 2, True)
        record_access("create_atomic_cas", 0, None, False, True)
        record_access("create_atomic_rmw", 1, 3, False, True)
        return self

    def __exit__(self, *failure: object) -> None:
        self._patches.close()

    def traffic(self, tensor: Tensor | None = None, stores: bool | None = None) -> Traffic:
        """Bytes moved so far, within `tensor` if one is given; only written, or only read."""
        issued = distinct = 0
        seen: dict[tuple[int, bool], dict[int, list[np.ndarray]]] = {}
        for program, is_store, itemsize, addresses in self._accesses:
            if stores is not None and is_store != stores:
                continue
            if tensor is not None:
                addresses = _within(addresses, tensor)
            issued += addresses.size * itemsize
            seen.setdefault((program, is_store), {}).setdefault(itemsize, []).append(addresses)
        for by_size in seen.values():
            # two logits may be read as one word here, and one by one there
            unit = min(by_size)
            pieces = [
                np.add.outer(np.concatenate(parts), np.arange(0, size, unit, np.uint64)).ravel()
                for size, parts in by_size.items()
            ]
            distinct += np.unique(np.concatenate(pieces)).size * unit
        return Traffic(issued, distinct)

    def _record(self, ptrs: Any, mask: Any, stores: tuple[bool, ...]) -> None:
        """Notes the addresses of one instruction."""
        itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses = ptrs.data
        if mask is not None:
            # one flag for a whole tile comes as a byte
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        for is_store in stores:
            self._accesses.append(Access(self._program, is_store, itemsize, addresses.ravel()))


def _within(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Those of a tensor, gaps between its rows included."""
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    first = tensor.data_ptr()
    behind = first + extent * tensor.itemsize if tensor.numel() else first
    return addresses[(addresses >= first) & (addresses < behind)]
