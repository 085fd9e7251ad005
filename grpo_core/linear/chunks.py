"""The loop over chunks of rows, so that the full logits are never materialised.

Read `loss_over_chunks` first. Its cost is counted in matrix products:

| result                             | products of 2·n·V·D operations, n rows that need them    |
|------------------------------------|----------------------------------------------------------|
| log-probabilities, or no gradient  | 1                                                        |
| gradients, head frozen             | 2                                                        |
| gradients, head trained, fast plan | 3; 4 if a loss depends on more rows than a chunk has     |
| gradients, head trained, lean plan | 4, see `vocab_slices`                                    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_core.kernels.records import RowGradients, RowLoss, RowStats
from grpo_core.linear.workspace import Workspace
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.tokens import Tokens


class LossRows(NamedTuple):
    """The results of a loss for n rows, `[n]` each; float32 unless said otherwise."""

    loss: Tensor  # times weight
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    dropped: Tensor  # bool
    factor: Tensor | None  # None means 1
    valid: Tensor  # bool

    @classmethod
    def of(cls, result: RowLoss, tokens: Tokens) -> LossRows:
        """From the result of a backend; `tokens` are those of its rows."""
        logp, entropy, ratio, kl, loss, _, dropped, _ = result
        return cls(loss, logp, entropy, ratio, kl, dropped, tokens.factor, tokens.valid)


def loss_over_chunks(work: Workspace, tokens: Tokens) -> LossRows:
    """Loss and gradients of every row, fast plan; the gradients are summed in `work`.

    A chunk is some rows and the whole vocabulary. Its logits are computed in a buffer that all
    chunks share, dlogits overwrite them, and the gradient products follow. If the loss of a row
    depends on other rows (sequence-level ratios, top entropy), these rows are a segment: one chunk
    of whole sequences, or several chunks, whose logits are then computed twice.
    """
    results = []
    scale = work.choose_loss_scale(tokens.largest_weight)
    scaled = tokens if scale is None else tokens.scale_weights(scale)
    for segment in _segments(work, tokens):
        start, stop = segment[0].start, segment[-1].stop
        place = slice(start, stop)
        kernels = work.kernels_of(place)
        if not tokens.needs_statistics:
            # one pass over the logits computes both the loss and dlogits
            rows, some = work.make_logits(place), scaled.select(place)
            result = kernels.row_loss(rows, some, some.terms, work.dlogits_of(place))
            work.add_gradients(place, some.gradients(result))
            loss = result.loss if scale is None else result.loss / scale
            results.append(LossRows.of(result._replace(loss=loss), some))
            continue
        stats = concatenate([work.read_statistics(chunk) for chunk in segment])
        result, complete = loss_of_statistics(stats, tokens.select(place), kernels)
        results.append(LossRows.of(result, complete))
        if not work.differentiates:
            continue
        row_gradients = work.scaled(complete.gradients(result))
        for chunk in segment:
            if len(segment) > 1:
                # the buffer holds the logits of the last chunk
                work.make_logits(chunk)
            local = slice(chunk.start - start, chunk.stop - start)
            target = complete.target[local]
            work.differentiate(chunk, target, row_gradients.at(local), stats.at(local))
    return concatenate(results)


def _segments(work: Workspace, tokens: Tokens) -> Iterator[list[slice]]:
    """Chunks whose statistics are needed together before any of them has a loss."""
    lengths = work.call.lengths
    if not tokens.couples_rows:
        yield from ([chunk] for chunk in work.chunks)
        return
    if len(work.chunks) == 1 or lengths is None or not work.differentiates:
        yield work.chunks
        return
    # as many whole sequences as fit; a longer one is a segment of several chunks
    most, start, stop = work.layout.rows, 0, 0
    for length in (*lengths, None):
        if length is None or stop + length - start > most:
            if stop > start:
                yield [slice(i, min(i + most, stop)) for i in range(start, stop, most)]
            start = stop
        stop += length or 0


def loss_with_frozen_head(work: Workspace, tokens: Tokens) -> LossRows:
    """Loss and dhidden by two products, if the loss of a row depends on other rows.

    Only for a frozen head without entropy bonus or exact KL: dlogits of a row are dlogp·(δ − p)/T,
    so dhidden is computed with dlogp = 1 and multiplied by dlogp later.
    """
    stats, _ = read_chunks(work, gradients_in_forward=True)
    result, complete = loss_of_statistics(stats, tokens, work.call.kernels)
    assert work.dhidden is not None
    scale_rows(work.dhidden, result.dlogp)
    return LossRows.of(result, complete)


def scale_rows(dhidden: Tensor, dlogp: Tensor) -> Tensor:
    """Multiplies every row by its dlogp in place; rows where that is 0 become 0, also from NaN."""
    return dhidden.mul_(dlogp[:, None]).masked_fill_((dlogp == 0)[:, None], 0.0)


def read_chunks(
    work: Workspace,
    *,
    gradients_in_forward: bool = False,
    extra_vectors: Callable[[slice], list[Tensor]] = lambda chunk: [],
) -> tuple[RowStats, list[Tensor]]:
    """Statistics of every row.

    Args:
        gradients_in_forward: also computes dhidden of Σ logp over the rows with a finite logp.
        extra_vectors: returns further vectors of a chunk while its logits are in the buffer.
    """
    stats, further = [], []
    for chunk in work.chunks:
        stats.append(work.read_statistics(chunk))
        further.append(extra_vectors(chunk))
        if gradients_in_forward:
            ones = only_finite(RowGradients(torch.ones_like(stats[-1].logp), None, None), stats[-1])
            work.differentiate(chunk, work.call.target[chunk], ones, stats[-1])
    return concatenate(stats), [torch.cat(parts) for parts in zip(*further, strict=True)]


Record = TypeVar("Record", RowStats, LossRows)


def concatenate(parts: list[Record]) -> Record:
    """Concatenates the records of neighbouring chunks."""
    if len(parts) == 1:
        return parts[0]
    columns: Any = zip(*parts, strict=True)
    vectors: Any = (None if c[0] is None else torch.cat(c, -1) for c in columns)
    return type(parts[0])(*vectors)


def only_finite(row_gradients: RowGradients, stats: RowStats) -> RowGradients:
    """The row_gradients with 0 where the log-probability is not finite."""
    bad = ~stats.logp.isfinite()
    return RowGradients._make(
        None if vector is None else vector.masked_fill(bad, 0.0) for vector in row_gradients
    )
