"""What a walk over rows of hidden states is asked for, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.backends.pytorch_rows import taken
from grpo_core.kernels.records import RowLoss, Rows, RowStats
from grpo_core.linear.head import LinearHead
from grpo_core.linear.memory import Layout
from grpo_core.loss.inputs import Tokens


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Everything of a walk but its differentiable tensors."""

    target: Tensor  # [n] int64, of the rows that are made, in that order
    rows: Tensor | None  # [n] int64, their place among all N; None for all of them in order
    layout: Layout
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias, lora_A, lora_B
    logits_dtype: torch.dtype
    autocast: torch.dtype | None
    temperature: float  # 1 with `heat`
    kernels: ModuleType
    heat: Tensor | None = None  # [n] float32, temperatures of the rows
    reference: tuple[Tensor, LinearHead] | None = None  # states and head, for the exact KL
    into: Tensor | None = None  # [rows, D] float32, what the matrix's gradient is added to

    @property
    def n(self) -> int:
        """Number of rows that are made."""
        return self.target.numel()

    @property
    def chunks(self) -> list[slice]:
        """All rows, as many at a time as fit."""
        step = self.layout.rows
        return [slice(i, min(i + step, self.n)) for i in range(0, self.n, step)]

    def heat_of(self, chunk: slice) -> Tensor | None:
        """Temperatures of some rows, if they have their own."""
        return None if self.heat is None else self.heat[chunk]


class Other(NamedTuple):
    """A policy whose log-probabilities are found where the policy's own logits are made."""

    name: str  # of their vector: old_logp or ref_logp
    hidden: Tensor  # [B, T, D] or [N, D], any D, detached
    head: LinearHead  # of no more words than the policy's, without a graph


@dataclass(frozen=True, kw_only=True)
class LinearCall(Pass):
    """The walk of a loss; `others` write into the vectors of `tokens`, which have room for it."""

    tokens: Tokens  # of the rows that are made
    lengths: tuple[int, ...] | None  # of sequences that are to stay whole; None: of no matter
    others: tuple[Other, ...] = ()

    @property
    def exact_beta(self) -> float | None:
        """Weight of the exact KL; None without one."""
        return None if self.reference is None else float(self.tokens.objective.beta)

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


def spread(dhidden: Tensor, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """Gradients [n, D] of the rows that were made -> shaped as all hidden states, 0 elsewhere."""
    if rows is None:
        return dhidden.view(hidden.shape)
    full = dhidden.new_zeros(hidden.shape)
    full.view(-1, hidden.shape[-1])[rows] = dhidden
    return full


def joined(parts: list[RowStats]) -> RowStats:
    """The statistics of neighbouring chunks as one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowStats._make(None if c[0] is None else torch.cat(c, -1) for c in columns)
