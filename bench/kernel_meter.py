"""Bytes that Triton kernels move, ours or not, counted in the interpreter's loads and stores.

Bytes per logit depend on neither the GPU nor on N and V, so a few short rows tell them on any
machine. `python -m bench.kernel_meter` prints them by kernel and tensor, for every contender with
kernels; in a process of its own, as Triton decides at the import of a kernel whether it is
interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from grpo_core.cli.options import Parser

# every tensor that is not of vocabulary size
VECTORS = "[N] vectors"
# bytes per logit below which a line of the table says nothing
SHOWN = 0.005


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

    launch: int
    program: int
    is_store: bool
    itemsize: int
    addresses: np.ndarray


class Launch(NamedTuple):
    """One start of a kernel, and where its tensors lie: (first byte, one behind the last)."""

    kernel: str
    extents: dict[str, tuple[int, int]]


class KernelMeter:
    """Records, while entered, every address that interpreted kernels load from and store to.

    Programs run one after another in the interpreter, so what lies between two changes of the grid
    index belongs to one program.

    Attributes:
        launches: every start of a kernel, in order.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._program = 0
        self._accesses: list[Access] = []

    def __enter__(self) -> KernelMeter:
        from triton.runtime import interpreter

        self._builder = builder = interpreter.interpreter_builder
        self._executor = interpreter.GridExecutor
        self._run = run = self._executor.__call__
        load, store = builder.create_masked_load, builder.create_masked_store
        swap, update = builder.create_atomic_cas, builder.create_atomic_rmw
        set_grid_idx = builder.set_grid_idx

        def counted_load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self._record(ptrs, mask, False)
            return load(ptrs, mask, *rest, **options)

        def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            self._record(ptrs, mask, True)
            return store(ptrs, value, mask, *rest, **options)

        def counted_swap(ptr: Any, *rest: Any, **options: Any) -> Any:
            self._record(ptr, None, False, True)
            return swap(ptr, *rest, **options)

        def counted_update(
            kind: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **more: Any
        ) -> Any:
            self._record(ptr, mask, False, True)
            return update(kind, ptr, val, mask, *rest, **more)

        def next_program(*index: int) -> None:
            self._program += 1
            set_grid_idx(*index)

        def counted_run(grid: Any, *args: Any, **options: Any) -> Any:
            given = dict(zip(grid.arg_names, args, strict=False)) | options
            tensors = {name: _extent(x) for name, x in given.items() if torch.is_tensor(x)}
            self.launches.append(Launch(grid.fn.__name__, tensors))
            # what the interpreter itself asks of torch is no part of the call
            with _disable_current_modes():
                return run(grid, *args, **options)

        self._executor.__call__ = counted_run
        self._counted = {
            "create_masked_load": counted_load,
            "create_masked_store": counted_store,
            "create_atomic_cas": counted_swap,
            "create_atomic_rmw": counted_update,
            "set_grid_idx": next_program,
        }
        vars(builder).update(self._counted)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._executor.__call__ = self._run
        # the instance's attributes hid the methods of its class
        for name in self._counted:
            delattr(self._builder, name)

    def traffic(self, tensor: Tensor | None = None, stores: bool | None = None) -> Traffic:
        """Bytes moved so far, within `tensor` if one is given; only written, or only read."""
        low, high = (0, 2**64 - 1) if tensor is None else _extent(tensor)
        return _add_up(
            access._replace(addresses=_within(access.addresses, low, high))
            for access in self._accesses
            if stores is None or access.is_store == stores
        )

    def by_tensor(self, smallest: int) -> dict[tuple[str, str, bool], Traffic]:
        """(kernel, argument, written) -> bytes; tensors below `smallest` bytes are one."""
        parts: dict[tuple[str, str, bool], list[Access]] = {}
        for access in self._accesses:
            launch = self.launches[access.launch]
            left = access.addresses
            for name, (low, high) in launch.extents.items():
                inside = _within(left, low, high)
                left = left[(left < low) | (left >= high)]
                if inside.size:
                    label = name if high - low >= smallest else VECTORS
                    key = (launch.kernel, label, access.is_store)
                    parts.setdefault(key, []).append(access._replace(addresses=inside))
        return {key: _add_up(some) for key, some in parts.items()}

    def _record(self, ptrs: Any, mask: Any, *stores: bool) -> None:
        """Notes the addresses of one instruction."""
        itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses = ptrs.data
        if mask is not None:
            # one flag for a whole tile comes as a byte
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        for is_store in stores:
            self._accesses.append(
                Access(len(self.launches) - 1, self._program, is_store, itemsize, addresses.ravel())
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """(first byte, one behind the last) of a tensor, gaps between its rows included."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _within(addresses: np.ndarray, low: int, high: int) -> np.ndarray:
    """Those in [low, high)."""
    return addresses[(addresses >= low) & (addresses < high)]


def _add_up(accesses: Iterator[Access] | list[Access]) -> Traffic:
    """All of them, and each byte once per program and direction."""
    issued = distinct = 0
    seen: dict[tuple[int, bool], dict[int, list[np.ndarray]]] = {}
    for _, program, is_store, itemsize, addresses in accesses:
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


def bytes_per_logit(
    call_at: Callable[[int], Callable[[], object]], V: int, rows: tuple[int, int]
) -> dict[tuple[str, str, bool], tuple[float, float]]:
    """(issued, distinct) bytes that one more row of logits costs, by kernel, tensor and direction.

    Args:
        call_at: N -> the call over N rows of V logits.
        rows: two sizes; what does not grow with the rows cancels in their difference.
    """
    few, many = (_metered(call_at(N)).by_tensor(smallest=2 * V) for N in rows)
    logits = (rows[1] - rows[0]) * V
    return {
        key: ((traffic[0] - few[key][0]) / logits, (traffic[1] - few[key][1]) / logits)
        for key, traffic in many.items()
    }


def _metered(call: Callable[[], object]) -> KernelMeter:
    """The meter after one call."""
    with KernelMeter() as meter:
        call()
    return meter


def _main() -> None:
    """Prints every contender with kernels: launches, and bytes per logit by tensor."""
    Parser("bench.kernel_meter", description=__doc__.splitlines()[0]).parse_args()
    from bench.counted import CASES, ROWS, V, case_name
    from bench.counted import call_at as call_of
    from bench.paths import contenders

    for recipe, direction in CASES:
        print(f"\n{case_name(recipe, direction)}, bfloat16: bytes per logit, issued (distinct)")
        for contender in contenders("interpreter", direction):
            if not contender.kernels:
                continue
            call = call_of(contender, recipe, direction)
            meter = _metered(call(ROWS[0]))
            starts = [launch.kernel for launch in meter.launches]
            moved = bytes_per_logit(call, V, ROWS)
            total = [sum(part) for part in zip(*moved.values(), strict=True)]
            print(f"  {contender.name:<28}{total[0]:17.2f} ({total[1]:.2f})")
            for kernel in dict.fromkeys(starts):
                print(f"    {kernel}, {starts.count(kernel)} launched")
                for (of, tensor, written), (issued, distinct) in moved.items():
                    if of == kernel and issued >= SHOWN:
                        how = "written" if written else "read"
                        print(f"      {tensor:<26}{how:<8}{issued:7.2f} ({distinct:.2f})")


if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    _main()
