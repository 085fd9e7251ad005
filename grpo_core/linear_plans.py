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

import torch
from torch import Tensor

from grpo_core.arguments import Tokens
from grpo_core.autograd import loss_of_statistics
from grpo_core.kernels.records import RowLoss, Rows, RowStats, Slopes
from grpo_core.linear_call import HiddenRows, LinearCall, Swept, dlogits_dtype, joined, lift
from grpo_core.linear_head import LinearHead
from grpo_core.linear_memory import ChunkBuffer
from grpo_core.linear_products import HeadGradients, HeadProducts


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
                self.sums = HeadGradients.of(head, call.wanted[1:], call.into)
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
        heat = self.call.heat_of(chunk)
        self.products.logits(self.hidden[chunk], self.buffer.logits, heat=heat)
        if self.call.reference is not None:
            self.ref_products.logits(self.ref_hidden[chunk], self.ref_buffer.logits, heat=heat)

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
        self.products.through(dlogits, self.buffer.logits[:n], self.call.heat_of(chunk))
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        self.products.gradients(self.hidden[chunk], dlogits, dhidden, self.sums)
