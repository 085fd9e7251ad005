"""The loop over chunks of rows: the logits of all rows never exist at once.

Read `loss_over_chunks` first. Per row and vocabulary entry, D multiplications are one product:

| what is wanted                     | products of 2·n·V·D operations, n the rows that need them|
|------------------------------------|----------------------------------------------------------|
| log-probabilities, or no gradient  | 1                                                        |
| gradients, head frozen             | 2                                                        |
| gradients, head trained, fast plan | 3; 4 where a loss waits for more rows than a chunk holds |
| gradients, head trained, lean plan | 4, see `vocab_slices`                                    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.kernels.records import RowLoss, Rows, RowStats, Slopes
from grpo_core.linear.head import LinearHead
from grpo_core.linear.matmuls import LEAST_ROWS, HeadProducts, Plan, choose_layout
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.inputs import Tokens

# of hidden states [n, D], and of the head's weight, bias, lora_A and lora_B
Gradients = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """A call over n rows of hidden states: all but its differentiable tensors."""

    target: Tensor  # [n] int64
    rows: Tensor | None = None  # [n] int64, places among all N rows; None for all in order
    temperature: float
    plan: Plan | None
    memory_budget: int | None
    logits_dtype: torch.dtype
    autocast: torch.dtype | None
    kernels: ModuleType
    wanted: tuple[bool, ...] = (False,) * 5  # which `Gradients`
    reference: tuple[Tensor, LinearHead] | None = None  # states and head, for the exact KL
    tokens: Tokens | None = None  # of the n rows, for a loss
    lengths: tuple[int, ...] | None = None  # of sequences in order; None if they do not matter

    def at(self, some: Tensor) -> LinearCall:
        """The call over some of its rows, [k] int64."""
        tokens = None if self.tokens is None else self.tokens.select(some)
        rows = some if self.rows is None else self.rows[some]
        return replace(self, target=self.target[some], rows=rows, tokens=tokens)

    @property
    def exact_beta(self) -> float | None:
        """Weight of the exact KL; None without one."""
        if self.reference is None or self.tokens is None:
            return None
        return float(self.tokens.objective.beta)


class LossRows(NamedTuple):
    """What is known of n rows after a loss, `[n]` each; float32 unless said."""

    loss: Tensor  # times weight
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    dropped: Tensor  # bool
    factor: Tensor
    valid: Tensor  # bool

    @classmethod
    def empty(cls, n: int, device: torch.device) -> LossRows:
        """Room for n rows."""
        vectors = torch.empty(5, n, device=device).unbind()
        dropped, valid = torch.empty(2, n, dtype=torch.bool, device=device).unbind()
        return cls._make((*vectors, dropped, torch.ones(n, device=device), valid))

    def store(self, place: slice, result: RowLoss, tokens: Tokens) -> None:
        """Writes the rows of a chunk; `tokens` are theirs."""
        for name in ("loss", "logp", "entropy", "ratio", "kl", "dropped"):
            getattr(self, name)[place] = getattr(result, name)
        self.valid[place] = tokens.valid
        if tokens.factor is not None:
            self.factor[place] = tokens.factor


def loss_over_chunks(work: Workspace, tokens: Tokens) -> LossRows:
    """Loss and gradients of every row, fast plan; the gradients are summed in `work`.

    A chunk is some rows and the whole vocabulary. Its logits are made in a buffer that all chunks
    share, dlogits take their place, and the gradient products follow at once. A loss that waits for
    other rows (ratios of sequences, top entropy) waits for a segment: a chunk of whole sequences,
    or several chunks, whose logits are then made twice.
    """
    kernels, T, beta = work.call.kernels, work.call.temperature, work.call.exact_beta
    results = LossRows.empty(len(tokens.target), tokens.target.device)
    scale = work.choose_loss_scale(tokens.weight)
    scaled = tokens if scale is None else tokens.scale_weights(scale)
    for segment in _segments(work, tokens):
        start, stop = segment[0].start, segment[-1].stop
        place = slice(start, stop)
        if not tokens.needs_statistics:
            # one pass over the logits makes both the loss and dlogits
            logits, ref_logits = work.make_logits(place)
            some, dlogits = scaled.select(place), work.dlogits_of(place)
            result = kernels.row_loss(logits, some, T, some.terms, dlogits, ref_logits)
            work.add_gradients(place, some.slopes(result.dlogp, result.dropped, beta))
            loss = result.loss if scale is None else result.loss / scale
            results.store(place, result._replace(loss=loss), some)
            continue
        stats = concatenate([work.read_statistics(chunk) for chunk in segment])
        result, complete = loss_of_statistics(stats, tokens.select(place), kernels)
        results.store(place, result, complete)
        if not work.differentiates:
            continue
        slopes = work.scaled(complete.slopes(result.dlogp, result.dropped, beta))
        for chunk in segment:
            if len(segment) > 1:
                # the buffer holds the last chunk's
                work.make_logits(chunk)
            local = slice(chunk.start - start, chunk.stop - start)
            target = complete.target[local]
            work.differentiate(chunk, target, slopes.at(local), stats.at(local))
    return results


def _segments(work: Workspace, tokens: Tokens) -> Iterator[list[slice]]:
    """Chunks whose statistics are needed together before any of them has a loss."""
    if not tokens.needs_statistics:
        yield from ([chunk] for chunk in work.chunks)
    elif work.call.lengths is None or not work.differentiates:
        if work.chunks:
            yield work.chunks
    else:
        # as many whole sequences as fit; a longer one is a segment of several chunks
        most, start, stop = work.layout.rows, 0, 0
        for length in (*work.call.lengths, None):
            if length is None or stop + length - start > most:
                if stop > start:
                    yield [slice(i, min(i + most, stop)) for i in range(start, stop, most)]
                start = stop
            stop += length or 0


def loss_with_frozen_head(work: Workspace, tokens: Tokens) -> LossRows:
    """The same with two products, where a loss waits for other rows and only dhidden is wanted.

    dlogits of a row is dlogp·(δ − p)/T: dhidden is made as if dlogp were 1, and multiplied later.
    """
    stats, _ = read_chunks(work, ahead=True)
    result, complete = loss_of_statistics(stats, tokens, work.call.kernels)
    results = LossRows.empty(len(tokens.target), tokens.target.device)
    results.store(slice(None), result, complete)
    assert work.dhidden is not None
    zero = result.dlogp == 0
    work.dhidden.mul_(result.dlogp[:, None]).masked_fill_(zero[:, None], 0.0)
    return results


def read_chunks(
    work: Workspace,
    *,
    ahead: bool = False,
    also: Callable[[slice], list[Tensor]] = lambda chunk: [],
) -> tuple[RowStats, list[Tensor]]:
    """Statistics of every row.

    Args:
        ahead: also makes dhidden of Σ logp, of rows whose logp is finite.
        also: further vectors of a chunk whose logits are in the buffer.
    """
    stats, further = [], []
    # without a row one empty chunk, which has the right vectors
    for chunk in work.chunks or [slice(0, 0)]:
        stats.append(work.read_statistics(chunk))
        further.append(also(chunk))
        if ahead and chunk.stop > chunk.start:
            ones = only_finite(Slopes(torch.ones_like(stats[-1].logp), None, None), stats[-1])
            work.differentiate(chunk, work.call.target[chunk], ones, stats[-1])
    return concatenate(stats), [torch.cat(parts) for parts in zip(*further, strict=True)]


class Workspace:
    """What all chunks share: products, buffers, and the sums of gradients so far.

    Attributes:
        chunks: all rows, as many at a time as fit.
        logits: [rows, V], of the chunk at hand; `ref_logits` of its reference, for the exact KL.
        dlogits: their gradient: the same memory, unless its dtype is narrower or a soft cap needs
            the logits; None in the lean plan, which makes it by slices of the vocabulary.
        dhidden: [n, D] float32.
        sums: gradients of the head's tensors, float32.
        zero: [n] bool, rows without a gradient.
        scale: 0-dim, what dlogits and sums are multiplied by; None means 1.
    """

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall) -> None:
        self.call, self.head, self.differentiates = call, head, any(call.wanted)
        self.products = HeadProducts(head, hidden, call.rows, call.autocast)
        self.reference = None
        if call.reference is not None:
            states, ref_head = call.reference
            self.reference = HeadProducts(ref_head, states, call.rows, call.autocast)
        n, dtype, compute = len(call.target), call.logits_dtype, self.products.compute
        # products take the narrower of the two
        narrow = compute if compute.itemsize < dtype.itemsize else dtype
        apart = self.differentiates and (narrow != dtype or head.softcap is not None)
        row_bytes = head.V * dtype.itemsize * (1 if self.reference is None else 2)
        row_bytes += head.V * narrow.itemsize if apart else 0
        self.layout = choose_layout(
            n, head, call.wanted, row_bytes, call.plan, call.memory_budget, hidden.device
        )
        self.lean = self.differentiates and self.layout.plan == "lean"
        self.dlogits_dtype = compute if self.lean else narrow
        step = self.layout.rows
        self.chunks = [slice(i, min(i + step, n)) for i in range(0, n, step)]

        def buffer(dtype: torch.dtype) -> Tensor:
            rows = max(min(step, n), LEAST_ROWS)
            return torch.empty(rows, head.V, dtype=dtype, device=hidden.device)

        self.logits = buffer(dtype)
        self.ref_logits = None if self.reference is None else buffer(dtype)
        self.dlogits = None
        if self.differentiates and not self.lean:
            self.dlogits = buffer(narrow) if apart else self.logits
        self.dhidden, self.sums = self._empty_gradients(n, hidden.device)
        self.first = True
        self.scale: Tensor | None = None
        self.zero = torch.zeros(n, dtype=torch.bool, device=hidden.device)

    def _empty_gradients(self, n: int, device: torch.device) -> tuple[Tensor | None, Gradients]:
        """dhidden and sums; what the first chunk overwrites is left undefined."""
        head, dhidden = self.head, None
        if self.call.wanted[0]:
            # slices of the vocabulary add to it, chunks overwrite it
            make = torch.zeros if self.lean else torch.empty
            dhidden = make(n, head.D, dtype=torch.float32, device=device)
        sums: Gradients = []
        for tensor, want in zip(head.tensors, self.call.wanted[1:], strict=True):
            if tensor is None or not want or self.lean:
                sums.append(None)
                continue
            overwritten = n and (tensor is head.weight or tensor is head.lora_B)
            make = torch.empty if overwritten else torch.zeros
            sums.append(make(tensor.shape, dtype=torch.float32, device=device))
            if overwritten:
                # rows of a padded matrix
                sums[-1][head.V :] = 0  # type: ignore[index]
        return dhidden, sums

    def choose_loss_scale(self, weight: Tensor) -> Tensor | None:
        """Sets and returns `scale`: about 1 / weight in float16, where dlogits would underflow."""
        if self.differentiates and self.dlogits_dtype == torch.float16:
            largest = torch.cat([weight, weight.new_tensor([1e-30])]).amax()
            self.scale = torch.exp2(torch.floor(-torch.log2(largest)))
        return self.scale

    def scaled(self, slopes: Slopes) -> Slopes:
        """Times `scale`."""
        return slopes if self.scale is None else slopes.times(self.scale)

    def make_logits(self, chunk: slice) -> tuple[Rows, Rows | None]:
        """The logits of a chunk, and of its reference, in the buffers."""
        self.products.logits(chunk, self.logits)
        if self.reference is not None and self.ref_logits is not None:
            self.reference.logits(chunk, self.ref_logits)
        return self.rows_of(chunk)

    def rows_of(self, chunk: slice) -> tuple[Rows, Rows | None]:
        """The chunk in the buffers, as kernels take it."""
        n, ref = chunk.stop - chunk.start, self.ref_logits
        return Rows.of(self.logits[:n]), None if ref is None else Rows.of(ref[:n])

    def dlogits_of(self, chunk: slice) -> Tensor | None:
        """Where the gradient of the chunk in the buffers goes; None if there is none."""
        return None if self.dlogits is None else self.dlogits[: chunk.stop - chunk.start]

    def read_statistics(self, chunk: slice) -> RowStats:
        """Makes the logits of a chunk and reads their statistics."""
        logits, ref_logits = self.make_logits(chunk)
        target, T = self.call.target[chunk], self.call.temperature
        return self.call.kernels.row_stats(logits, target, T, ref_logits)

    def differentiate(self, chunk: slice, target: Tensor, slopes: Slopes, stats: RowStats) -> None:
        """dlogits of the chunk in the buffers, from vectors of its rows; the gradient products."""
        (logits, ref_logits), T = self.rows_of(chunk), self.call.temperature
        dlogits = self.dlogits_of(chunk)
        self.call.kernels.row_dlogits(logits, target, T, slopes, stats, dlogits, ref_logits)
        self.add_gradients(chunk, slopes)

    def add_gradients(self, chunk: slice, slopes: Slopes) -> None:
        """The gradient products of a chunk whose dlogits, made of `slopes`, are in the buffer."""
        dlogits = self.dlogits_of(chunk)
        if dlogits is None:
            return
        zero = self.zero[chunk] = ~slopes.any
        self.products.through_softcap(dlogits, self.logits[: len(dlogits)])
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        self.products.add_gradients(chunk, dlogits, zero, dhidden, self.sums, first=self.first)
        self.first = False

    def gradients(self) -> Gradients:
        """The sums over all chunks, without `scale`."""
        if self.dhidden is not None:
            # 0·NaN of a head that is not finite
            self.dhidden.masked_fill_(self.zero[:, None], 0.0)
        gradients = [self.dhidden, *self.sums]
        for gradient in gradients:
            if self.scale is not None and gradient is not None:
                gradient.div_(self.scale)
        return gradients


def concatenate(parts: list[RowStats]) -> RowStats:
    """The statistics of neighbouring chunks as one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return RowStats._make(None if c[0] is None else torch.cat(c, -1) for c in columns)


def only_finite(slopes: Slopes, stats: RowStats) -> Slopes:
    """The slopes with 0 where the log-probability is not finite."""
    bad = ~stats.logp.isfinite()
    return Slopes._make(None if slope is None else slope.masked_fill(bad, 0.0) for slope in slopes)


def scatter_rows(dhidden: Tensor, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """Gradients [n, D] of some rows, shaped as all hidden states, 0 elsewhere."""
    if rows is None:
        return dhidden.view(hidden.shape)
    full = dhidden.new_zeros(hidden.shape)
    full.view(-1, hidden.shape[-1])[rows] = dhidden
    return full
