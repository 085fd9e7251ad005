"""What a loss from hidden states holds in memory: how much of it, and the buffer that is reused.

| plan | beside inputs and returned gradients                                                     |
|------|------------------------------------------------------------------------------------------|
| fast | a chunk's logits; float32 sums where a parameter is narrower, 4 bytes · V · D for lm_head |
| lean | a chunk's logits, or a slice of all rows' logits; float32 dhidden                        |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.kernels.records import Rows
from grpo_core.linear.head import LinearHead
from grpo_core.linear.matmuls import LEAST_ROWS, HeadProducts
from grpo_core.objective.validation import is_int

Plan = Literal["fast", "lean"]

# on a CPU larger buffers are no faster; on a GPU every chunk reads and writes dweight once
CPU_BYTES, GPU_BYTES = 2**26, 2**30
# the lean plan's, for either of its phases
LEAN_BYTES = 3 * 2**26
# with fewer rows to a chunk the traffic of dweight outweighs its product
FEW_ROWS = 256
# a tile of the matrix units' output, and 16 bytes of any dtype
ROW_STEP = 64


@dataclass(frozen=True)
class Layout:
    """How a call is cut up.

    Attributes:
        plan: "lean" cuts the vocabulary where dweight is summed.
        rows: of a chunk, at most.
        width: words of a slice, lean plan.
        slice_rows: rows of a chunk within a slice, lean plan.
    """

    plan: Plan
    rows: int
    width: int = 0
    slice_rows: int = 0


@dataclass(frozen=True)
class Sizes:
    """What decides about a layout."""

    n: int  # rows whose logits are made
    V: int
    D: int
    row_bytes: int  # of a row of the buffers
    sums: int  # bytes of float32 sums beyond the returned gradients, fast plan
    trains_matrix: bool

    @classmethod
    def of(
        cls,
        n: int,
        head: LinearHead,
        hidden: Tensor,
        wanted: tuple[bool, ...],
        row_bytes: int,
    ) -> Sizes:
        """Those of a call that wants gradients of hidden and the head's tensors."""
        narrow = [
            x for x, want in zip(head.tensors, wanted[1:], strict=True) if x is not None and want
        ]
        sums = sum(4 * x.numel() for x in narrow if x.dtype != torch.float32)
        return cls(n, head.V, head.D, row_bytes, sums, wanted[1])


def choose_layout(
    sizes: Sizes, plan: Plan | None, memory_budget: int | None, device: torch.device
) -> Layout:
    """The layout that plan and budget ask for; without a plan, lean where fast is too large.

    Raises:
        ValueError: an unknown plan, a budget below 1.
    """
    if plan is not None and plan not in get_args(Plan):
        raise ValueError(f"plan: expected one of {get_args(Plan)} or None, got {plan!r}")
    if memory_budget is not None and not (is_int(memory_budget) and memory_budget >= 1):
        raise ValueError(f"memory_budget: expected an int >= 1, bytes, got {memory_budget!r}")
    few = -(-min(FEW_ROWS, max(sizes.n, 1)) // LEAST_ROWS) * LEAST_ROWS * sizes.row_bytes
    if memory_budget is None:
        chunk = GPU_BYTES if device.type == "cuda" else CPU_BYTES
        fits = sizes.sums + few <= _free_bytes(device)
        chunk = max(chunk, few)
    else:
        chunk = memory_budget - sizes.sums
        fits = chunk >= few
    if not sizes.trains_matrix:
        plan, fits, lean_chunk = "fast", True, plan == "lean"
        chunk = min(chunk, LEAN_BYTES) if lean_chunk else chunk
    if plan == "fast" or (plan is None and fits):
        return Layout("fast", _rows_within(chunk, sizes))
    room = LEAN_BYTES if memory_budget is None else memory_budget - 4 * sizes.n * sizes.D
    room = min(room, LEAN_BYTES)
    rows = max(min(sizes.n, 8192), 1)
    # logits in float32, their gradient in the product's dtype, and the sum of a slice of dweight
    width = room // (8 * rows + 4 * sizes.D)
    if width < ROW_STEP:
        # at least 64 words, and as many rows as then fit
        most = room // (8 * ROW_STEP) - sizes.D // 2
        rows = max(min(rows, most) // LEAST_ROWS, 1) * LEAST_ROWS
        width = ROW_STEP
    width = min(width // ROW_STEP * ROW_STEP, sizes.V)
    return Layout("lean", _rows_within(room, sizes), width, rows)


def layout_of(
    n: int,
    head: LinearHead,
    hidden: Tensor,
    wanted: tuple[bool, ...],
    *,
    logits_dtype: torch.dtype,
    autocast: torch.dtype | None,
    plan: Plan | None,
    memory_budget: int | None,
    has_reference: bool = False,
    into: Tensor | None = None,
) -> Layout:
    """The layout of a walk over n rows; arguments as in `linear_call.Pass`."""
    narrow = None
    if any(wanted):
        narrow = dlogits_dtype(logits_dtype, HeadProducts(head, hidden, autocast).compute)
    row_bytes = buffer_bytes(
        head.V, logits_dtype, narrow, apart=head.softcap is not None, ref=has_reference
    )
    sums = wanted if into is None else (wanted[0], False, *wanted[2:])
    sizes = Sizes.of(n, head, hidden, sums, row_bytes)
    return choose_layout(sizes, plan, memory_budget, hidden.device)


def dlogits_dtype(logits_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Of dlogits on their way into the products: the narrower of the two."""
    return compute if compute.itemsize < logits_dtype.itemsize else logits_dtype


def _rows_within(bytes_: int, sizes: Sizes) -> int:
    """Rows of a chunk: as many as fit, chunks of nearly one size, a multiple of the step."""
    most = max(bytes_ // sizes.row_bytes // LEAST_ROWS, 1) * LEAST_ROWS
    if most >= sizes.n:
        return -(-max(sizes.n, 1) // LEAST_ROWS) * LEAST_ROWS
    step = ROW_STEP if most >= ROW_STEP else LEAST_ROWS
    most = most // step * step
    chunks = max(1, -(-sizes.n // most))
    even = -(-max(sizes.n, 1) // chunks)
    return min(most, -(-even // step) * step)


def _free_bytes(device: torch.device) -> float:
    """Memory that a call may take; on the CPU nobody counts."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class ChunkBuffer:
    """The logits of a chunk, and their gradient in place of them.

    Where the gradient is narrower than the logits (products of 16 bits on a GPU), it is written
    over logits of rows that are already done: with `lead` spare rows in front, the first `lead`
    rows go there, the next 2·lead over their logits, the next 4·lead over those, and so on. No
    launch reads what it writes over, and all rows of the gradient end up side by side.

    Args:
        rows: of a chunk.
        V: words.
        dtype: of the logits.
        dlogits_dtype: None without a gradient.
        apart: the logits are needed beside their gradient.
    """

    # a chunk is done in four launches
    LAUNCHES = 4

    def __init__(
        self,
        rows: int,
        V: int,
        dtype: torch.dtype,
        dlogits_dtype: torch.dtype | None,
        device: torch.device,
        *,
        apart: bool = False,
    ) -> None:
        rows = max(rows, LEAST_ROWS)
        self.lead = 0
        self.dlogits: Tensor | None = None
        if dlogits_dtype is None or apart or dlogits_dtype == dtype:
            self.logits = torch.empty(rows, V, dtype=dtype, device=device)
            if dlogits_dtype is not None:
                self.dlogits = self.logits
            if apart:
                self.dlogits = torch.empty(rows, V, dtype=dlogits_dtype, device=device)
            return
        assert dlogits_dtype.itemsize * 2 == dtype.itemsize
        self.lead = -(-rows // (2**self.LAUNCHES - 1) // 8) * 8
        memory = torch.empty((self.lead + 2 * rows) * V, dtype=dlogits_dtype, device=device)
        self.logits = memory[self.lead * V :].view(dtype).view(rows, V)
        self.dlogits = memory[: rows * V].view(rows, V)

    def launches(self, n: int) -> Iterator[tuple[slice, Tensor | None]]:
        """(rows, home of their gradient) to be done one after the other, for a chunk of n rows."""
        start = 0
        while start < n:
            stop = n if not self.lead else min(n, self.lead + 2 * start)
            place = slice(start, stop)
            yield place, None if self.dlogits is None else self.dlogits[place]
            start = stop

    def rows(self, place: slice) -> Rows:
        """Some rows of the logits, for the kernels."""
        return Rows.of(self.logits[place])

    def of_words(self, V: int) -> Tensor:
        """Room for as many rows of no more words than the buffer's own, in its memory."""
        rows = self.logits.shape[0]
        return self.logits.view(-1)[: rows * V].view(rows, V)


def buffer_bytes(
    V: int,
    dtype: torch.dtype,
    dlogits_dtype: torch.dtype | None,
    *,
    apart: bool,
    ref: bool,
) -> int:
    """Bytes that a row of `ChunkBuffer` takes, with its reference's logits where there are any."""
    size = dtype.itemsize * (2 if ref else 1)
    if apart and dlogits_dtype is not None:
        size += dlogits_dtype.itemsize
    elif dlogits_dtype is not None and dlogits_dtype != dtype:
        return size * V + dlogits_dtype.itemsize * V // 7
    return size * V
