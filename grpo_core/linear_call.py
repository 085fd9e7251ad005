"""What a loss from hidden states is asked for, and what a walk over its rows works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.arguments import Tokens
from grpo_core.kernels.records import RowLoss, Rows, RowStats
from grpo_core.linear_head import LinearHead
from grpo_core.linear_memory import ChunkBuffer, Layout
from grpo_core.linear_products import HeadProducts
from grpo_core.row_chunks import taken


@dataclass(frozen=True)
class LinearCall:
    """Everything of a call but its differentiable tensors."""

    tokens: Tokens  # of the rows that are made, in that order
    rows: Tensor | None  # [n] int64, their place among all N; None for all of them in order
    lengths: tuple[int, ...] | None  # of sequences that are to stay whole; None: of no matter
    layout: Layout
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias, lora_A, lora_B
    logits_dtype: torch.dtype
    autocast: torch.dtype | None
    temperature: float  # 1 with `heat`
    kernels: ModuleType
    reference: tuple[Tensor, LinearHead] | None  # hidden states and head, for the exact KL
    heat: Tensor | None = None  # [n] float32, temperatures of the rows
    into: Tensor | None = None  # [rows, D] float32, what the matrix's gradient is added to

    @property
    def n(self) -> int:
        """Number of rows that are made."""
        return self.tokens.target.numel()

    @property
    def exact_beta(self) -> float | None:
        """Weight of the exact KL; None without one."""
        return None if self.reference is None else float(self.tokens.objective.beta)

    @property
    def chunks(self) -> list[slice]:
        """All rows, as many at a time as fit."""
        step = self.layout.rows
        return [slice(i, min(i + step, self.n)) for i in range(0, self.n, step)]

    def heat_of(self, chunk: slice) -> Tensor | None:
        """Temperatures of some rows, if they have their own."""
        return None if self.heat is None else self.heat[chunk]

    def segments(self) -> Iterator[list[slice]]:
        """Chunks that are to be known together before any of them has a loss."""
        if not self.tokens.needs_statistics or not self.n:
            yield from ([chunk] for chunk in self.chunks)
        elif self.lengths is None:
            yield self.chunks
        else:
            yield from self._whole_sequences(self.lengths)

    def _whole_sequences(self, lengths: tuple[int, ...]) -> Iterator[list[slice]]:
        """Chunks of as many whole sequences as fit; a longer one is a segment of several."""
        most, start, stop = self.layout.rows, 0, 0
        for length in (*lengths, None):
            if length is None or stop + length - start > most:
                if stop > start:
                    steps = range(start, stop, most)
                    yield [slice(i, min(i + most, stop)) for i in steps]
                start = stop
            stop += length or 0


class Swept(NamedTuple):
    """What a sweep leaves behind; vectors `[n]`."""

    result: RowLoss
    factor: Tensor
    valid: Tensor
    gradients: list[Tensor | None]  # as `wanted`; hidden's `[n, D]`; float32


class HiddenRows:
    """Some rows of hidden states, in some order, where they lie."""

    def __init__(self, hidden: Tensor, rows: Tensor | None) -> None:
        hidden = hidden.detach()
        self.layout = Rows.of(hidden if hidden.stride(-1) == 1 else hidden.contiguous())
        self.rows = rows

    def __getitem__(self, place: slice) -> Tensor:
        return taken(self.layout, place if self.rows is None else self.rows[place])


def linear_stats(
    hidden: Tensor,
    head: LinearHead,
    target: Tensor,
    rows: Tensor | None,
    *,
    step: int,
    logits_dtype: torch.dtype,
    autocast: torch.dtype | None,
    temperature: float,
    heat: Tensor | None,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) `[n]` of some rows, `step` at a time; one product."""
    states, products = HiddenRows(hidden, rows), HeadProducts(head, hidden, autocast)
    n = target.numel()
    buffer = ChunkBuffer(min(step, max(n, 1)), head.V, logits_dtype, None, hidden.device)
    logp, entropy = torch.empty(2, n, dtype=torch.float32, device=hidden.device)
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        products.logits(states[chunk], buffer.logits, heat=None if heat is None else heat[chunk])
        here = buffer.rows(slice(0, chunk.stop - start))
        logp[chunk], entropy[chunk], *_ = kernels.row_stats(here, target[chunk], temperature)
    return logp, entropy


def dlogits_dtype(logits_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Of dlogits on their way into the products: the narrower of the two."""
    return compute if compute.itemsize < logits_dtype.itemsize else logits_dtype


def lift(tokens: Tokens) -> Tensor:
    """A power of two near the inverse of the weights: dlogits in float16 would underflow."""
    largest = torch.cat([tokens.weight, tokens.weight.new_tensor([1e-30])]).amax()
    return torch.exp2(torch.floor(-torch.log2(largest)))


def joined(parts: list[RowStats]) -> RowStats:
    """The statistics of neighbouring chunks as one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowStats._make(None if c[0] is None else torch.cat(c, -1) for c in columns)
