"""What a call costs in bytes: memory it holds at its peak, and bytes its operations move.

Counts, not samples: the same call gives the same numbers on a busy machine and on an idle one.
`Meter` counts PyTorch's operations, `CompiledMeter` what inductor makes of them, `KernelMeter` the
loads and stores of Triton kernels in the interpreter: bytes per logit depend on neither the GPU nor
on N and V, so a few short rows tell them on any machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from grpo_core.trainer.measure import LiveBytes

# reserve memory and leave it untouched
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# the host needs a value, or a size that follows from values
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique"}
# overwrite their first argument without reading it
OVERWRITES = {"copy_", "fill_", "zero_"}

# matrix products, and where their left factor stands among the arguments
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


@contextmanager
def one_thread() -> Iterator[None]:
    """A single thread of computation: modes and profiler do not see what other threads do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes held at one time that were not held before; the result is held by the caller."""
    with LiveBytes(device) as live, one_thread():
        call()
    return live.peak


class Meter(TorchDispatchMode):
    """Adds up the bytes that PyTorch operations read from and write to tensors, and their products.

    A view is free and so is reserving memory; an in-place operation reads and writes; an indexed
    one touches as many elements as its index names (also `scatter_add`, which autograd uses under a
    dispatch mode). An operator that reads its input several times inside, as log_softmax does,
    counts once: this is what the operation *must* move.

    Attributes:
        issued: bytes of all operands.
        large: bytes of operands in storages of at least `threshold` bytes; what is smaller
            may stay in a cache between one operation and the next.
        operations: those that read or write at all; on a GPU each starts a kernel or more.
        waits: those for which the host would wait for a GPU.
        products: multiplications and additions of matrix products, also of those that
            FlopCounterMode passes over.
        kernels: 0, as `CompiledMeter` has it.
    """

    def __init__(self, threshold: int = 0) -> None:
        super().__init__()
        self.threshold = threshold
        self.issued = self.large = self.operations = self.waits = self.products = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = list(_traffic(func, args, kwargs or {}, result))
        self.operations += bool(moved)
        self.waits += _name(func) in WAITS
        for tensor, nbytes in moved:
            self.issued += nbytes
            self.large += nbytes * (tensor.untyped_storage().nbytes() >= self.threshold)
        at = FACTORS.get(_name(func))
        if at is not None:
            self.products += 2 * args[at].numel() * args[at + 1].shape[-1]
        return result


class CompiledMeter:
    """What inductor says that the code it compiles while this is entered reads and writes.

    Attributes:
        issued, large: bytes of all operands of its kernels, each counted once per kernel; 0 when
            nothing was compiled or the code came from a cache without that number.
        kernels: how many it generated.
    """

    issued = large = kernels = operations = waits = 0

    def __enter__(self) -> CompiledMeter:
        # an import of seconds, for compiled contenders only
        from torch._inductor import metrics

        self._metrics = metrics
        # inductor counts only for this log
        self._log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
        self._level = self._log.level
        self._log.setLevel(logging.INFO)
        metrics.reset()
        return self

    def __exit__(self, *failure: object) -> None:
        self._log.setLevel(self._level)
        self.issued = self.large = self._metrics.num_bytes_accessed
        self.kernels = self._metrics.generated_kernel_count


def _name(func: Any) -> str:
    """Of an operation."""
    return func._schema.name.removeprefix("aten::")


def _traffic(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[tuple[Tensor, int]]:
    """(tensor, bytes) for every reading and every writing of one operation."""
    name, schema = _name(func), func._schema
    is_view = any(out.alias_info and not out.alias_info.is_write for out in schema.returns)
    if is_view or name in ALLOCATES:
        return
    touched = _touched(name, args, result)
    for position, argument in enumerate(schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only_written = written and (argument.kwarg_only or name in OVERWRITES)
        only_shape = position == 0 and (name.startswith("new_") or name.endswith("_like"))
        for tensor in filter(torch.is_tensor, tree_leaves(given)):
            nbytes = tensor_bytes(tensor)
            if position == 0 and touched is not None:
                nbytes = touched * tensor.itemsize
            if not only_written and not only_shape:
                yield tensor, nbytes
            if written:
                yield tensor, nbytes
    fresh = [out.alias_info is None for out in schema.returns]
    outputs = result if len(fresh) > 1 else (result,)
    for tensor in tree_leaves([out for out, new in zip(outputs, fresh, strict=False) if new]):
        if torch.is_tensor(tensor):
            partly = touched if name == "scatter_add" else None
            yield tensor, tensor_bytes(tensor) if partly is None else partly * tensor.itemsize


def _touched(name: str, args: tuple[Any, ...], result: Any) -> int | None:
    """Elements of its first argument that an indexed operation reads or writes; None means all."""
    if name in {"gather", "scatter_", "scatter_add_", "scatter_add"}:
        return args[2].numel()
    if name in {"index_select", "index_fill_", "index_copy_", "index_add_"}:
        return args[2].numel() * (args[0].numel() // max(1, args[0].shape[args[1]]))
    return result.numel() if name in {"index", "embedding"} else None


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements behind a tensor: an expanded axis counts once."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in axes if stride or not size)


class Traffic(NamedTuple):
    """Bytes moved by kernels.

    `issued` counts every lane of every load and store that its mask lets through. `distinct`
    counts a byte once per program for reading and once for writing: what memory moves when
    the second reading of a row comes from registers or a cache, as it is meant to.
    """

    issued: int
    distinct: int


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
        # program, whether it is a store, bytes and addresses of every load and store
        self._accesses: list[tuple[int, bool, int, np.ndarray]] = []
        self._patches = ExitStack()

    def __enter__(self) -> KernelMeter:
        from triton.runtime import interpreter

        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        set_grid_idx, run = builder.set_grid_idx, executor.__call__

        def record_access(name: str, ptrs: int, mask: int | None, *stores: bool) -> None:
            """Notes an instruction; `ptrs`, `mask`: places among its arguments."""
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
            self._accesses.append((self._program, is_store, itemsize, addresses.ravel()))


def _within(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Those of a tensor, gaps between its rows included."""
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    first = tensor.data_ptr()
    behind = first + extent * tensor.itemsize if tensor.numel() else first
    return addresses[(addresses >= first) & (addresses < behind)]
