"""From hidden states to loss and gradients, chunk by chunk: the logits of all tokens never exist.

| what is wanted                     | products of 2·n·V·D operations, n the rows that need them|
|------------------------------------|---------------------------------------------------------|
| log-probabilities, or no gradient  | 1                                                        |
| gradients, head frozen             | 2                                                        |
| gradients, head trained, fast plan | 3; 4 where a loss waits for more rows than a chunk holds |
| gradients, head trained, lean plan | 4                                                        |
| another policy's log-probabilities | 1 more, into the same buffer, just before the policy's   |

For every chunk: products, the row kernel in place on the logits, gradient products.
Where a loss waits for rows (ratios of sequences, top entropy), it waits for a *segment*: a chunk of
whole sequences, or several chunks, whose logits are then made a second time. With a frozen head
even those are made once: dlogits of a row is dlogp·(δ − p)/T, so the product is taken before dlogp
is known, and its rows are multiplied afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.kernels.records import RowLoss, Rows, RowStats, Slopes
from grpo_core.linear.call import LinearCall, Swept, joined
from grpo_core.linear.head import LinearHead
from grpo_core.linear.walk import Policy, Walk
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.inputs import Tokens


class Sweep(Walk):
    """The walk of a loss; all the policies of a chunk before the next chunk."""

    call: LinearCall

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall) -> None:
        super().__init__(hidden, head, call)
        self.tokens = call.tokens
        self.others = [(x.name, Policy(x.hidden, x.head, call)) for x in call.others]
        if any(call.wanted):
            self.lift_by(self.tokens.weight)
        # nothing is to be left to chance where a chunk never comes
        device = hidden.device
        self.result = RowLoss.empty(call.n, device, state=torch.empty(0, call.n, device=device))
        self.factor = self.result.logp.new_ones(call.n)
        self.valid = torch.ones(call.n, dtype=torch.bool, device=device)

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
        return Swept(self.result, self.factor, self.valid, self.gradients())

    def _segment(self, chunks: list[slice]) -> None:
        """Loss and gradients of chunks that are known together."""
        if not self.tokens.needs_statistics:
            self._one_pass(chunks[0])
            return
        stats = self._stats(chunks)
        first = chunks[0].start
        tokens, slopes = self._finish(slice(first, chunks[-1].stop), stats)
        slopes = self.lifted(slopes)
        for chunk in chunks:
            if len(chunks) > 1:
                self.make_logits(chunk)
            here = slice(chunk.start - first, chunk.stop - first)
            self.differentiate(chunk, tokens.target[here], slopes.at(here), stats.at(here))

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
            stats = self._stats([chunk])
            ones = torch.ones_like(stats.logp)
            self.differentiate(chunk, self.call.target[chunk], Slopes(ones, None, None), stats)
            parts.append(stats)
        stats = joined(parts or [self.read(slice(0, 0))])
        _, slopes = self._finish(slice(0, self.call.n), stats)
        assert self.dhidden is not None
        still = slopes.dlogp == 0
        self.dhidden.mul_(slopes.dlogp[:, None]).masked_fill_(still[:, None], 0.0)

    def _one_pass(self, chunk: slice) -> None:
        """Products, loss and dlogits of a chunk whose rows wait for nothing; gradient products."""
        call, tokens = self.call, self.tokens
        if self.lift is not None:
            tokens = tokens.times(self.lift)
        self._make_all_logits(chunk)
        dlogp = []
        for place, dlogits in self.buffer.launches(chunk.stop - chunk.start):
            at = slice(chunk.start + place.start, chunk.start + place.stop)
            found = call.kernels.row_loss(
                self.buffer.rows(place),
                tokens.at(at),
                call.temperature,
                tokens.terms,
                dlogits,
                self.ref_rows(place),
            )
            dlogp.append(found.dlogp)
            if self.lift is not None:
                found = found._replace(loss=found.loss / self.lift, dlogp=found.dlogp / self.lift)
            self._keep(at, found)
        if self.tokens.factor is not None:
            self.factor[chunk] = self.tokens.factor[chunk]
        if any(call.wanted):
            dropped = self.result.dropped[chunk]
            self.push(chunk, tokens.at(chunk).slopes(torch.cat(dlogp), dropped, call.exact_beta))

    def _make_all_logits(self, chunk: slice) -> None:
        """Log-probabilities under the other policies, then the policy's logits: one buffer."""
        call = self.call
        for name, policy in self.others:
            logits = self.buffer.of_words(policy.products.V)
            policy.logits(chunk, logits)
            rows = Rows.of(logits[: chunk.stop - chunk.start])
            found = call.kernels.row_stats(rows, call.target[chunk], call.temperature)
            getattr(self.tokens, name)[chunk] = found.logp
        self.make_logits(chunk)

    def _stats(self, chunks: list[slice]) -> RowStats:
        """Statistics of chunks; the last one's logits stay in the buffer."""
        parts = []
        for chunk in chunks:
            self._make_all_logits(chunk)
            parts.append(self.read(chunk))
        return joined(parts or [self.read(slice(0, 0))])

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
        # but the state, which no one reads again
        for vector, value in zip(self.result[:-1], found[:-1], strict=True):
            vector[place] = value
