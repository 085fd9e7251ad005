"""The matrix products of a head, and the memory that they may take.

There are three products, of 2·n·V·D operations each: logits = hidden @ lm_headᵀ, dhidden =
dlogits @ lm_head, dweight = dlogitsᵀ @ hidden. On a GPU operands of 16 bits are not converted and
the result is float32; on the CPU operands are converted to float32, a slice of the matrix at a
time. Sums of gradients are float32.

| plan | memory beside inputs and returned gradients                                              |
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

from grpo_core.linear.head import LinearHead
from grpo_core.objective.validation import is_int

Plan = Literal["fast", "lean"]

# of a converted slice of the matrix, or of logits that are converted
SLICE_BYTES = 2**25
# MKL sums a product over fewer rows in another order (measured: below 8 on two threads)
LEAST_ROWS = 16
# on a CPU larger buffers are no faster; on a GPU every chunk reads and writes dweight once
CPU_BYTES, GPU_BYTES = 2**26, 2**30
# of the lean plan, for either of its phases
LEAN_BYTES = 3 * 2**26
# with fewer rows in a chunk the traffic of dweight outweighs its product
FEW_ROWS = 256
# a tile of the matrix units' output, and 16 bytes of any dtype
ROW_STEP = 64


class HeadProducts:
    """The products of a head with some rows of hidden states, in one precision.

    Args:
        rows: [n] int64, places of the rows among all of `hidden`; None for all in order.
        autocast: dtype that torch.autocast wants, or None.

    Attributes:
        compute: dtype of the operands of a product.
    """

    def __init__(
        self, head: LinearHead, hidden: Tensor, rows: Tensor | None, autocast: torch.dtype | None
    ) -> None:
        self.head, self.V, self.D, self.rows = head, head.V, head.D, rows
        hidden = hidden.detach()
        self._hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self._operand = autocast or torch.promote_types(hidden.dtype, head.weight.dtype)
        self.compute = self._operand if hidden.is_cuda else torch.float32

    def operands(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the products."""
        return tensor.to(self._operand).to(self.compute)

    def _hidden_rows(self, chunk: slice) -> Tensor:
        """Hidden states `[n, D]` of a chunk, as operands."""
        return self.operands(
            take_rows(self._hidden, chunk if self.rows is None else self.rows[chunk])
        )

    def _slices(self, n: int, columns: slice, logits_dtype: torch.dtype) -> Iterator[slice]:
        """`columns` in one piece, or in slices where an operand has to be converted."""
        step = self.V
        if self.head.weight.dtype != self.compute or logits_dtype != self.compute:
            step = max(64, SLICE_BYTES // (4 * max(self.D, n)))
        for start in range(columns.start, columns.stop, step):
            yield slice(start, min(start + step, columns.stop))

    def logits(self, chunk: slice, out: Tensor, columns: slice | None = None) -> Tensor:
        """The logits of a chunk of rows and of some columns of the vocabulary.

        `out` has room for `LEAST_ROWS` rows; returns the part `[n, columns]` that was written.
        """
        head, hidden = self.head, self._hidden_rows(chunk)
        columns, n = columns or slice(0, self.V), hidden.shape[0]
        if not n:
            return out[:0]
        if n < LEAST_ROWS:
            hidden = torch.cat([hidden, hidden.new_zeros(LEAST_ROWS - n, self.D)])
        out = out[: len(hidden)]
        low_rank = None
        if head.lora_A is not None:
            low_rank = self.operands(hidden @ self.operands(head.lora_A).t())
        for part in self._slices(n, columns, out.dtype):
            logits = out[:, part.start - columns.start : part.stop - columns.start]
            if head.bias is not None:
                logits.copy_(head.bias[part].expand_as(logits))
            beta = 0.0 if head.bias is None else head.scale
            matmul(hidden, self.operands(head.weight[part]).t(), logits, head.scale, beta)
            if low_rank is not None and head.lora_B is not None:
                up = self.operands(head.lora_B[part])
                matmul(low_rank, up.t(), logits, head.scale * head.lora_scaling, 1.0)
        out = out[:n]
        return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)

    def through_softcap(self, dlogits: Tensor, logits: Tensor | None) -> None:
        """Multiplies `dlogits` by the derivative of the soft cap; overwrites `logits`."""
        if self.head.softcap is not None:
            assert logits is not None
            # the gradient of a row with NaN is 0 already
            logits.nan_to_num_(nan=0.0).div_(self.head.softcap).square_().neg_().add_(1)
            dlogits.mul_(logits)

    def add_gradients(
        self,
        chunk: slice,
        dlogits: Tensor,
        zero: Tensor,
        dhidden: Tensor | None,
        sums: list[Tensor | None],
        *,
        first: bool,
        columns: slice | None = None,
    ) -> None:
        """The gradient products of a chunk's `dlogits [n, columns]`.

        Rows of `dhidden` without a gradient may become NaN where the head holds a NaN.

        Args:
            zero: [n] bool, rows without a gradient.
            dhidden: [n, D] float32, overwritten; with `columns` added to.
            sums: gradients of weight, bias, lora_A and lora_B over `columns`, added to.
            first: whether those of weight and lora_B are overwritten instead.
        """
        head, scale = self.head, self.head.scale
        beta, beta_hidden = 0.0 if first else 1.0, 0.0 if columns is None else 1.0
        columns = columns or slice(0, self.V)
        # 0·NaN: hidden states that are not finite have no gradient, and must not reach the sums
        hidden = _finite(self._hidden_rows(chunk))
        dweight, dbias, dlora_A, dlora_B = sums
        dlow = low_rank = None
        if head.lora_A is not None:
            low_rank = _finite(self.operands(hidden @ self.operands(head.lora_A).t()))
            dlow = torch.zeros(low_rank.shape, device=hidden.device)
        low_scale = scale * head.lora_scaling
        for part in self._slices(dlogits.shape[0], columns, dlogits.dtype):
            local = slice(part.start - columns.start, part.stop - columns.start)
            d = dlogits[:, local].to(self.compute)
            if dhidden is not None:
                matmul(d, self.operands(head.weight[part]), dhidden, scale, beta_hidden)
                beta_hidden = 1.0
            if dweight is not None:
                matmul(d.t(), hidden, dweight[local], scale, beta)
            if dbias is not None:
                dbias[local].add_(d.sum(0, dtype=torch.float32), alpha=scale)
            if head.lora_B is not None and dlow is not None and low_rank is not None:
                matmul(d, self.operands(head.lora_B[part]), dlow, low_scale, 1.0)
                if dlora_B is not None:
                    matmul(d.t(), low_rank, dlora_B[local], low_scale, beta)
        if head.lora_A is not None and dlow is not None:
            dlow = dlow.masked_fill_(zero[:, None], 0.0).to(self.compute)
            if dhidden is not None:
                matmul(dlow, self.operands(head.lora_A), dhidden, 1.0, 1.0)
            if dlora_A is not None:
                matmul(dlow.t(), hidden, dlora_A, 1.0, 1.0)


def take_rows(hidden: Tensor, place: slice | Tensor) -> Tensor:
    """Some rows `[n, D]`: a view of neighbours if all rows are evenly spaced, otherwise a copy."""
    if hidden.ndim == 2:
        return hidden[place]
    B, T, _ = hidden.shape
    if 1 in (B, T) or hidden.stride(0) == T * hidden.stride(1):
        return hidden.flatten(0, 1)[place]
    if isinstance(place, slice):
        place = torch.arange(place.start, place.stop, device=hidden.device)
    return hidden[place // T, place % T]


def _finite(hidden: Tensor) -> Tensor:
    return torch.nan_to_num(hidden, nan=0.0, posinf=0.0, neginf=0.0)


def matmul(a: Tensor, b: Tensor, out: Tensor, alpha: float, beta: float) -> None:
    """out = beta·out + alpha·a @ b, summed in float32; with beta 0 the old `out` is ignored."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)
    else:
        result = torch.mm(a, b).mul_(alpha)
        out.copy_(result.add_(out, alpha=beta) if beta else result)


@dataclass(frozen=True)
class Layout:
    """How a call is cut into chunks.

    Attributes:
        plan: "lean" cuts the vocabulary where dweight is summed.
        rows: of a chunk, at most.
        width: columns of a slice of the vocabulary, lean plan.
        slice_rows: rows of a chunk within a slice, lean plan.
    """

    plan: Plan
    rows: int
    width: int = 0
    slice_rows: int = 0


def choose_layout(
    n: int,
    head: LinearHead,
    wanted: tuple[bool, ...],
    row_bytes: int,
    plan: Plan | None,
    memory_budget: int | None,
    device: torch.device,
) -> Layout:
    """The layout for a plan and a budget; without a plan, lean where fast is too large.

    Args:
        n: rows whose logits are made.
        wanted: gradients of hidden, weight, bias, lora_A and lora_B.
        row_bytes: of a row of the buffers.

    Raises:
        ValueError: an unknown plan, a budget below 1.
    """
    if plan is not None and plan not in get_args(Plan):
        raise ValueError(f"plan: expected one of {get_args(Plan)} or None, got {plan!r}")
    if memory_budget is not None and not (is_int(memory_budget) and memory_budget >= 1):
        raise ValueError(f"memory_budget: expected an int >= 1, bytes, got {memory_budget!r}")
    # float32 sums beyond the returned gradients, fast plan
    pairs = zip(head.tensors, wanted[1:], strict=True)
    sums = sum(
        4 * x.numel() for x, want in pairs if x is not None and want and x.dtype != torch.float32
    )
    few = -(-min(FEW_ROWS, max(n, 1)) // LEAST_ROWS) * LEAST_ROWS * row_bytes
    if memory_budget is None:
        chunk = max(GPU_BYTES if device.type == "cuda" else CPU_BYTES, few)
        fits = sums + few <= _free_bytes(device)
    else:
        chunk = memory_budget - sums
        fits = chunk >= few
    if not wanted[1]:
        # without a sum of the matrix the fast plan takes no more memory than the lean one
        chunk = min(chunk, LEAN_BYTES) if plan == "lean" else chunk
        plan = "fast"
    if plan == "fast" or (plan is None and fits):
        return Layout("fast", _rows_within(chunk, row_bytes, n))
    available = LEAN_BYTES if memory_budget is None else memory_budget - 4 * n * head.D
    available = min(available, LEAN_BYTES)
    rows = max(min(n, 8192), 1)
    # logits in float32, their gradient in the product's dtype, and the sum of a slice of dweight
    width = available // (8 * rows + 4 * head.D)
    if width < ROW_STEP:
        # at least 64 columns, and as many rows as then fit
        most = available // (8 * ROW_STEP) - head.D // 2
        rows = max(min(rows, most) // LEAST_ROWS, 1) * LEAST_ROWS
        width = ROW_STEP
    width = min(width // ROW_STEP * ROW_STEP, head.V)
    return Layout("lean", _rows_within(available, row_bytes, n), width, rows)


def _rows_within(bytes_: int, row_bytes: int, n: int) -> int:
    """Rows of a chunk: as many as fit, chunks of nearly one size, a multiple of the step."""
    most = max(bytes_ // row_bytes // LEAST_ROWS, 1) * LEAST_ROWS
    if most >= n:
        return -(-max(n, 1) // LEAST_ROWS) * LEAST_ROWS
    step = ROW_STEP if most >= ROW_STEP else LEAST_ROWS
    most = most // step * step
    even = -(-n // -(-n // most))
    return min(most, -(-even // step) * step)


def _free_bytes(device: torch.device) -> float:
    """Memory that a call may take; unlimited on the CPU."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
