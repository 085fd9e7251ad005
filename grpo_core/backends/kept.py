"""Rows restricted to the vocabulary ids that a sampler kept: top-p, top-k, min-p.

The kept logits of a few rows are gathered into a narrow matrix, on which the backend inside works
as on any logits. A row of K kept entries becomes one of W, padded with −inf: W is the first power
of two from K on, at least 16 and at most V. So the bits of a row's results do not depend on other
rows, and one large set does not widen the others. Rows of one W are worked on a few at a time.

K logits and K ids of a row are read, not V logits; a gradient writes V zeros, then K numbers. A
logit of a group takes 40 bytes (places of 8 bytes, a copy, its gradient). On a GPU a call waits for
the device once, to read the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.backends.pytorch import put_rows
from grpo_core.backends.wrapper import Kernels, WrappedBackend, kernels_at
from grpo_core.kernels.records import (
    RowGradients,
    RowLoss,
    Rows,
    RowStats,
    Terms,
    TokenVectors,
    extent,
    place_of,
)

# gathered logits in a group, of 40 bytes each
CPU_LOGITS, GPU_LOGITS = 2**20, 2**23
LEAST_WIDTH = 16


@dataclass(frozen=True)
class Kept:
    """The vocabulary ids that the sampler kept for each of N tokens, as CSR.

    Those of token n are `ids[offsets[n] : offsets[n + 1]]`, ascending, none twice. Tokens are in
    the flattened order of target; the set of a masked token may be empty.

    Args:
        ids: [M] int32 or int64, in [0, V).
        offsets: [N + 1] int64, from 0 to M.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Kept:
        """From a bool mask [..., V], true for what was kept."""
        mask = mask.reshape(-1, mask.shape[-1])
        return cls(mask.nonzero()[:, 1].int(), _offsets(mask.sum(1)))

    @classmethod
    def from_sets(cls, sets: Iterable[Iterable[int]], device: torch.device | str = "cpu") -> Kept:
        """From the ids of each token in any order, as sampling engines return them."""
        rows = [sorted(row) for row in sets]
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32, device=device)
        return cls(ids, _offsets(torch.tensor([len(row) for row in rows], device=device)))

    @classmethod
    def cat(cls, parts: Sequence[Kept]) -> Kept:
        """The sets of all tokens of the parts, one after the other."""
        sizes = torch.cat([part.offsets.diff() for part in parts])
        return cls(torch.cat([part.ids for part in parts]), _offsets(sizes))

    def select(self, rows: Tensor) -> Kept:
        """The sets of some tokens: their numbers [R], in this order, or a bool mask [N]."""
        first, sizes = self.offsets[:-1][rows], self.offsets.diff()[rows]
        offsets = _offsets(sizes)
        place = torch.arange(int(offsets[-1]), device=self.ids.device)
        return Kept(self.ids[place + (first - offsets[:-1]).repeat_interleave(sizes)], offsets)

    def rows(self, entries: Tensor) -> Tensor:
        """The token of some places in `ids`, int64."""
        rows = torch.searchsorted(self.offsets, entries, right=True) - 1
        return rows.clamp_(0, len(self.offsets) - 2)

    def places(self, target: Tensor) -> Tensor:
        """[N] int64: where each target is in its set; -1 where it was not kept."""
        M, first, end = len(self.ids), self.offsets[:-1], self.offsets[1:]
        if not M:
            return torch.full_like(target, -1)
        low, high = first, end
        # binary search, inside the ids also where offsets were not checked
        for _ in range(M.bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (self.ids[middle.clamp(0, M - 1)] < target)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        found = (low < end) & (self.ids[low.clamp(0, M - 1)] == target)
        return torch.where(found, low - first, -1)


def _offsets(sizes: Tensor) -> Tensor:
    """[N + 1] int64: where each set begins, and the end."""
    return torch.nn.functional.pad(sizes.long().cumsum(0), (1, 0))


def keep_rows(kernels: Kernels, kept: Kept | None, target: Tensor) -> Kernels:
    """The row functions restricted to `kept`; `target` is [N] int64, negative where masked."""
    if kept is None:
        return kernels
    # values that were not checked may lie outside
    offsets = kept.offsets.clamp(0, len(kept.ids))
    sizes = torch.where(target >= 0, offsets.diff().clamp_(min=0), 0)
    spans = torch.stack([offsets[:-1], sizes, kept.places(target)])
    return KeptRows(kernels, kept.ids, spans, sizes.cpu())


class KeptRows(WrappedBackend):
    """The row functions over the kept entries of each row.

    Args:
        ids: [M], of all tokens.
        spans: [3, n] int64: where the set of each row begins, its size, the target's place in it.
        sizes: [n] int64 in host memory, the sizes again; 0 for rows that are not read.
    """

    def __init__(self, kernels: Kernels, ids: Tensor, spans: Tensor, sizes: Tensor) -> None:
        super().__init__(kernels)
        self.ids, self.spans, self.sizes = ids, spans, sizes

    def at(self, place: slice | Tensor) -> KeptRows:
        sizes = self.sizes[place.cpu() if isinstance(place, Tensor) else place]
        return KeptRows(kernels_at(self.kernels, place), self.ids, self.spans[:, place], sizes)

    def row_stats(self, rows: Rows, target: Tensor) -> RowStats:
        """As of the backend inside; logp is −inf where the target was not kept."""
        out: Any = None
        places = self._places(target, rows.V)
        for group, some, _ in self._gathered(rows, None):
            # the entropy is that of the set, whatever the target
            stats = group.kernels.row_stats(some, places[group.at].clamp(min=0))
            out = group.fill(out, stats, rows.N)
        unkept = (places < 0) & (target >= 0) & (target < rows.V)
        return out._replace(logp=out.logp.masked_fill(unkept, -torch.inf))

    def row_dlogits(
        self,
        rows: Rows,
        target: Tensor,
        row_gradients: RowGradients,
        stats: RowStats | RowLoss,
        dlogits: Tensor,
    ) -> Tensor:
        places = self._places(target, rows.V)
        known = RowStats(stats.logp, stats.entropy, stats.kl, stats.state)
        for group, some, gradient in self._gathered(rows.for_gradient(row_gradients), dlogits):
            at = group.at
            group.kernels.row_dlogits(
                some, places[at], row_gradients.at(at), known.at(at), gradient
            )
        return dlogits

    def row_loss(
        self, rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: Tensor | None
    ) -> RowLoss:
        out: Any = None
        places = self._places(tokens.target, rows.V)
        for group, some, gradient in self._gathered(rows, dlogits):
            vectors = replace(tokens.at(group.at), target=places[group.at])
            result = group.kernels.row_loss(some, vectors, terms, gradient)
            out = group.fill(out, result, rows.N)
        return out

    def zero_others(self, dlogits: Tensor, columns: slice) -> None:
        """Zeroes a gradient [n, columns] of some vocabulary ids where they were not kept."""
        start, sizes, _ = self.spans
        rows = torch.arange(len(sizes), device=sizes.device)
        rows = rows.repeat_interleave(sizes, output_size=int(self.sizes.sum()))
        first = (sizes.cumsum(0) - sizes - start)[rows]
        columns_of = self.ids[torch.arange(len(rows), device=rows.device) - first].long()
        here = (columns_of >= columns.start) & (columns_of < columns.stop)
        others = torch.ones_like(dlogits, dtype=torch.bool)
        others[rows[here], columns_of[here] - columns.start] = False
        dlogits.masked_fill_(others, 0.0)

    def _places(self, target: Tensor, V: int) -> Tensor:
        """[n] int64: the place of each target in its set; -1 where there is none."""
        return torch.where((target >= 0) & (target < V), self.spans[2], -1)

    def _gathered(
        self, rows: Rows, dlogits: Tensor | None
    ) -> Iterator[tuple[_Group, Rows, Tensor | None]]:
        """Every group, its kept logits, and their gradient, which then goes to `dlogits`."""
        for group in self._groups(rows):
            some, gradient = group.gather(rows), None
            if dlogits is not None:
                # in place, unless dtypes differ
                gradient = some.logits.to(dlogits.dtype)
            yield group, some, gradient
            if dlogits is not None:
                group.scatter(gradient, dlogits)
        if dlogits is not None:
            unread = (self.sizes == 0).nonzero().squeeze(1)
            put_rows(dlogits, unread.to(dlogits.device), 0.0)

    def _groups(self, rows: Rows) -> Iterator[_Group]:
        """Rows of one width, a few at a time; at least one group, which may be empty."""
        # the number of binary digits
        digits = torch.frexp((self.sizes - 1).clamp(min=LEAST_WIDTH - 1).double()).exponent
        widths = (2 ** digits.long()).clamp(max=rows.V)
        read = self.sizes.nonzero().squeeze(1)
        order = read[widths[read].argsort(stable=True)]
        found, counts = widths[order].unique_consecutive(return_counts=True)
        parts = list(zip(found.tolist(), counts.tolist(), strict=True))
        most = GPU_LOGITS if rows.logits.is_cuda else CPU_LOGITS
        places, start = order.to(rows.logits.device), 0
        for width, count in parts or [(1, 0)]:
            for piece in places[start : start + count].split(max(1, most // width)):
                yield self._group(piece, width)
            start += count

    def _group(self, at: Tensor, width: int) -> _Group:
        start, size = self.spans[:2, at, None]
        entries = torch.arange(width, device=at.device)
        padding = entries >= size
        entries = torch.minimum(entries, size - 1)
        columns = self.ids[start + entries].long()
        return _Group(kernels_at(self.kernels, at), at, entries, columns, padding)


class _Group(NamedTuple):
    """A few rows, and the places of their kept logits."""

    kernels: Any  # for these rows
    at: Tensor  # [g] int64, the rows
    entries: Tensor  # [g, W] int64, places in the sets; padding repeats the last one
    columns: Tensor  # [g, W] int64, their vocabulary ids
    padding: Tensor  # [g, W] bool

    def gather(self, rows: Rows) -> Rows:
        """The kept logits as rows."""
        return replace(rows, logits=self._kept(rows.logits), ref_logits=self._kept(rows.ref_logits))

    def _kept(self, logits: Any) -> Any:
        if logits is None:
            return None
        flat, places = self._flat(logits)
        return flat[places].masked_fill_(self.padding, -torch.inf)

    def scatter(self, gradient: Any, dlogits: Tensor) -> None:
        """Writes the rows of the gradient: 0, and `gradient` at the kept entries."""
        put_rows(dlogits, self.at, 0.0)
        flat, places = self._flat(dlogits)
        # padding writes the last entry's number again
        flat[places] = gradient.gather(1, self.entries)

    def _flat(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of all rows as a vector, and the places of the kept entries in it."""
        T, batch_stride, row_stride = place_of(logits)
        starts = self.at // T * batch_stride + self.at % T * row_stride
        # values that were not checked may lie outside
        places = starts[:, None] + self.columns.clamp(0, logits.shape[-1] - 1)
        return logits.as_strided((extent(logits),), (1,)), places

    def fill(self, out: Any, part: Any, N: int) -> Any:
        """Writes the vectors of these rows into those of all N rows, 0 elsewhere."""
        if out is None:
            out = part._make(None if x is None else x.new_zeros(*x.shape[:-1], N) for x in part)
        for vector, some in zip(out, part, strict=True):
            if some is not None:
                vector[..., self.at] = some
        return out
