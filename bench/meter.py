"""What a call costs in bytes: memory it holds at its peak, and bytes its operations move.

Counts, not samples: the same call gives the same numbers on a busy machine and on an idle one.
Calls that launch our Triton kernels move bytes unseen from here: see `kernel_meter`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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


class OperandMeter(TorchDispatchMode):
    """Adds up the bytes that PyTorch operations read from and write to tensors.

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
    """

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.issued = 0
        self.large = 0
        self.operations = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = list(_traffic(func, args, kwargs or {}, result))
        self.operations += bool(moved)
        self.waits += _name(func) in WAITS
        for tensor, nbytes in moved:
            self.issued += nbytes
            if tensor.untyped_storage().nbytes() >= self.threshold:
                self.large += nbytes
        return result


class ProductMeter(TorchDispatchMode):
    """Adds up the operations of matrix products, also of those that FlopCounterMode passes over.

    Attributes:
        operations: multiplications and additions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = FACTORS.get(_name(func))
        if at is not None:
            self.operations += 2 * args[at].numel() * args[at + 1].shape[-1]
        return func(*args, **(kwargs or {}))


class CompiledMeter:
    """What inductor says that the code it compiles while this is entered reads and writes.

    Attributes:
        accessed: bytes of all operands of its kernels, each counted once per kernel; None when
            nothing was compiled or the code came from a cache without that number.
        kernels: how many it generated.
    """

    accessed: int | None = None
    kernels: int = 0

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
        self.accessed = self._metrics.num_bytes_accessed or None
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
