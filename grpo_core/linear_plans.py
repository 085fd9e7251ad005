"""From hidden states to loss and gradients, chunk by chunk: the logits of all tokens never exist.

| what is wanted                     | products of 2·n·V·D operations, n the rows that need them|
|------------------------------------|---------------------------------------------------------|
| log-probabilities, or no gradient  | 1                                                        |
| gradients, head frozen             | 2                                                        |
| gradients, head trained, fast plan | 3; 4 where a loss waits for more rows than a chunk holds |
| gradients, head trained, lean plan | 4                                                        |

A chunk is some rows x all words: product, the row kernel in place on the logits, gradient
products.
Where a loss waits for rows (ratios of sequences, top entropy), it waits for a *segment*: a chunk of
whole sequences, or several chunks, whose logits are then made a second time. With a frozen head
even those are made once: dlogits of a row is dlogp·(δ − p)/T, so the product is taken before dlogp
is known, and its rows are multiplied afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.arguments import Tokens
from grpo_core.autograd import loss_of_statistics
from grpo_core.kernels.records import RowLoss, Rows, RowStats, Slopes
from grpo_core.linear_head import LinearHead
from grpo_core.linear_memory import ChunkBuffer, Layout
from grpo_core.linear_products import HeadGradients, HeadProducts
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
    temperature: float
    kernels: ModuleType
    reference: tuple[Tensor, LinearHead] | None  # hidden states and head, for the exact KL

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


class Sweep:
    """One walk over the rows, with the buffers it uses again for every chunk."""

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall) -> None:
        self.call, self.head, self.tokens = call, head, call.tokens
        self.hidden = HiddenRows(hidden, call.rows)
        self.products = HeadProducts(head, hidden, call.autocast)
        device, V, rows = hidden.device, head.V, min(call.layout.rows, max(call.n, 1))
        trains = any(call.wanted) and call.layout.plan == "fast"
        dtype = dlogits_dtype(call.logits_dtype, self.products.compute) if trains else None
        self.lift: Tensor | None = None
        if dtype == torch.float16:
            self.lift = lift(self.tokens)
        apart = trains and head.softcap is not None
        self.buffer = ChunkBuffer(rows, V, call.logits_dtype, dtype, device, apart=apart)
        if call.reference is not None:
            ref_hidden, ref_head = call.reference
            self.ref_hidden = HiddenRows(ref_hidden, call.rows)
            self.ref_products = HeadProducts(ref_head, ref_hidden, call.autocast)
            self.ref_buffer = ChunkBuffer(rows, V, call.logits_dtype, None, device)
        # nothing is to be left to chance where a chunk never comes
        self.result = RowLoss.empty(call.n, device, state=torch.empty(0, call.n, device=device))
        self.factor = self.result.logp.new_ones(call.n)
        self.valid = torch.ones(call.n, dtype=torch.bool, device=device)
        self.sums = HeadGradients(None, None, None, None)
        self.dhidden: Tensor | None = None
        if any(call.wanted):
            if call.layout.plan == "fast":
                self.sums = HeadGradients.of(head, call.wanted[1:])
            if call.wanted[0]:
                room = torch.zeros if call.layout.plan == "lean" else torch.empty
                self.dhidden = room(call.n, head.D, dtype=torch.float32, device=device)

    def __call__(self) -> Swept:
        """Loss, statistics and gradients of every row."""
        call = self.call
        only_hidden = call.wanted == (True, False, False, False, False)
        plain = self.tokens.entropy_weight is None and not call.exact_beta
        if not any(call.wanted):
            self._without_gradient()
        elif only_hidden and plain and self.tokens.needs_statistics:
            self._scaled_afterwards()
        else:
            for segment in call.segments():
                self._segment(segment)
        sums = self.sums.finished()
        if self.lift is not None:
            for tensor in (self.dhidden, *sums):
                if tensor is not None:
                    tensor.div_(self.lift)
        return Swept(self.result, self.factor, self.valid, [self.dhidden, *sums])

    def _segment(self, chunks: list[slice]) -> None:
        """Loss and gradients of chunks that are known together."""
        if not self.tokens.needs_statistics:
            self._one_pass(chunks[0])
            return
        stats = self._stats(chunks)
        first = chunks[0].start
        tokens, slopes = self._finish(slice(first, chunks[-1].stop), stats)
        slopes = slopes if self.lift is None else slopes.times(self.lift)
        for chunk in chunks:
            if len(chunks) > 1:
                self._make_logits(chunk)
            here = slice(chunk.start - first, chunk.stop - first)
            self._write_dlogits(tokens.target[here], slopes.at(here), stats.at(here))
            self._push(chunk)

    def _without_gradient(self) -> None:
        """Statistics and loss alone."""
        chunks = self.call.chunks
        if self.tokens.needs_statistics:
            self._finish(slice(0, self.call.n), self._stats(chunks))
            return
        for chunk in chunks:
            self._one_pass(chunk)

    def _scaled_afterwards(self) -> None:
        """dhidden as if every dlogp were 1, then times dlogp."""
        parts, self.lift = [], None
        for chunk in self.call.chunks:
            self._make_logits(chunk)
            stats = self._read(chunk)
            ones = torch.ones_like(stats.logp)
            self._write_dlogits(self.tokens.target[chunk], Slopes(ones, None, None), stats)
            self._push(chunk)
            parts.append(stats)
        stats = joined(parts or [self._read(slice(0, 0))])
        _, slopes = self._finish(slice(0, self.call.n), stats)
        assert self.dhidden is not None
        still = slopes.dlogp == 0
        self.dhidden.mul_(slopes.dlogp[:, None]).masked_fill_(still[:, None], 0.0)

    def _one_pass(self, chunk: slice) -> None:
        """Product, loss and dlogits of a chunk whose rows wait for nothing; gradient products."""
        call, tokens = self.call, self.tokens
        if self.lift is not None:
            tokens = tokens.times(self.lift)
        self._make_logits(chunk)
        for place, dlogits in self.buffer.launches(chunk.stop - chunk.start):
            at = slice(chunk.start + place.start, chunk.start + place.stop)
            found = call.kernels.row_loss(
                self.buffer.rows(place),
                tokens.at(at),
                call.temperature,
                tokens.terms,
                dlogits,
                self._ref_rows(place),
            )
            if self.lift is not None:
                found = found._replace(loss=found.loss / self.lift, dlogp=found.dlogp / self.lift)
            self._keep(at, found)
        if self.tokens.factor is not None:
            self.factor[chunk] = self.tokens.factor[chunk]
        if any(call.wanted):
            self._push(chunk)

    def _make_logits(self, chunk: slice) -> None:
        """The logits of a chunk, into the buffer."""
        self.products.logits(self.hidden[chunk], self.buffer.logits)
        if self.call.reference is not None:
            self.ref_products.logits(self.ref_hidden[chunk], self.ref_buffer.logits)

    def _ref_rows(self, place: slice) -> Rows | None:
        """The reference's logits of some rows of the chunk."""
        return None if self.call.reference is None else self.ref_buffer.rows(place)

    def _read(self, chunk: slice) -> RowStats:
        """Statistics of the chunk in the buffer."""
        here = slice(0, chunk.stop - chunk.start)
        target, T = self.tokens.target[chunk], self.call.temperature
        return self.call.kernels.row_stats(self.buffer.rows(here), target, T, self._ref_rows(here))

    def _stats(self, chunks: list[slice]) -> RowStats:
        """Statistics of chunks; the last one's logits stay in the buffer."""
        parts = []
        for chunk in chunks:
            self._make_logits(chunk)
            parts.append(self._read(chunk))
        return joined(parts or [self._read(slice(0, 0))])

    def _finish(self, place: slice, stats: RowStats) -> tuple[Tokens, Slopes]:
        """The loss of rows whose statistics are known, and what their gradient is made of."""
        tokens = self.tokens.of_rows(place)
        found, tokens = loss_of_statistics(stats, tokens, self.call.kernels)
        self._keep(place, found)
        self.valid[place] = tokens.valid
        if tokens.factor is not None:
            self.factor[place] = tokens.factor
        return tokens, tokens.slopes(found.dlogp, found.dropped, self.call.exact_beta)

    def _keep(self, place: slice, found: RowLoss) -> None:
        """Files what is known of some rows."""
        # neither the state, which no one reads again, nor a total of part of the rows
        for vector, value in zip(self.result[:-2], found[:-2], strict=True):
            vector[place] = value

    def _write_dlogits(self, target: Tensor, slopes: Slopes, stats: RowStats) -> None:
        """The gradient of the chunk in the buffer."""
        for place, dlogits in self.buffer.launches(target.numel()):
            self.call.kernels.row_dlogits(
                self.buffer.rows(place),
                target[place],
                self.call.temperature,
                slopes.at(place),
                stats.at(place),
                dlogits,
                self._ref_rows(place),
            )

    def _push(self, chunk: slice) -> None:
        """The gradient products of the chunk in the buffer."""
        n = chunk.stop - chunk.start
        assert self.buffer.dlogits is not None
        dlogits = self.buffer.dlogits[:n]
        self.products.through_cap(dlogits, self.buffer.logits[:n])
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        self.products.gradients(self.hidden[chunk], dlogits, dhidden, self.sums)


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
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) `[n]` of some rows, `step` at a time; one product."""
    states, products = HiddenRows(hidden, rows), HeadProducts(head, hidden, autocast)
    n = target.numel()
    buffer = ChunkBuffer(min(step, max(n, 1)), head.V, logits_dtype, None, hidden.device)
    logp, entropy = torch.empty(2, n, dtype=torch.float32, device=hidden.device)
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        products.logits(states[chunk], buffer.logits)
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
