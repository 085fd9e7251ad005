"""A few rows at a time: how the torch backend walks over the logits.

A block is as many rows as the cores' own caches hold beside scratch, one row a core of a vocabulary
above 131,072. A chunk is a few blocks, whose `[n]` vectors are worked on at once: such small
operations cost the same for one row as for many.

PyTorch shares every operation on a block among its threads; how many there are is never changed,
since that number is the whole process's. (Python threads with chunks of their own keep waking each
other for the interpreter's lock: a third slower, measured on two cores.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from grpo_core.kernels.records import Rows

# of a core's float32 logits: those, their centred copy and their powers are to lie in 2 MiB
BLOCK_BYTES = 2**19

Place = slice | Tensor  # of rows: neighbours, or int64 indices


@dataclass(frozen=True)
class Block:
    """Rows that are read one after the other: `[b, V]`, views where they are neighbours."""

    logits: Tensor
    ref_logits: Tensor | None  # the reference policy's
    dlogits: Tensor | None  # where the gradient goes, if that is a view
    put: Callable[[Tensor], None] | None  # takes the gradient there otherwise

    @property
    def has_gradient(self) -> bool:
        """Whether one is asked for."""
        return self.dlogits is not None or self.put is not None

    @property
    def home(self) -> Tensor | None:
        """The gradient's, where powers can wait for it."""
        at_home = self.dlogits is not None and self.dlogits.dtype == torch.float32
        return self.dlogits if at_home else None

    def bring_home(self, gradient: Tensor) -> None:
        """Rounds it, unless it is there."""
        if self.put is not None:
            self.put(gradient)
        elif self.dlogits is not None and gradient is not self.dlogits:
            self.dlogits.copy_(gradient)


@dataclass(frozen=True)
class Chunk:
    """Blocks whose `[n]` vectors are worked on together."""

    blocks: list[Block]
    sizes: list[int]  # rows of each
    at: Place  # of each row among all N
    target: Tensor  # [n] int64
    mine: Tensor  # [n] float64, the targets' logits; NaN for +inf
    ref_mine: Tensor | None  # the same by the reference policy

    def find(self, row: int) -> tuple[int, int]:
        """The block a row is in, and its place there."""
        for k, size in enumerate(self.sizes):
            if row < size:
                return k, row
            row -= size
        raise IndexError(row)


def for_each_chunk(
    work: Callable[[Chunk], None],
    rows: Rows,
    target: Tensor,
    wanted: Tensor,
    dlogits: Tensor | None = None,
    ref_rows: Rows | None = None,
    *,
    blocks: int,
) -> None:
    """Does `work(chunk)` on the wanted rows; unwanted rows of `dlogits` become 0.

    Args:
        target: [N] int64, within [0, V) where wanted.
        wanted: [N] bool.
        blocks: at most so many to a chunk.
    """
    logits = RowViews(rows)
    ref = None if ref_rows is None else RowViews(ref_rows)
    home = None if dlogits is None else RowViews(gradient_rows(rows, dlogits))
    ref_mine = None if ref is None else ref.at_targets(target)
    # found before any logits are overwritten
    views = _Views(logits, ref, home, target, logits.at_targets(target), ref_mine)
    if home is not None:
        home.zero(~wanted)
    with torch.inference_mode():
        for places in _chunks(logits, wanted, blocks):
            work(views.chunk(places))


def gradient_rows(rows: Rows, dlogits: Tensor) -> Rows:
    """The gradient lies as the logits do, being them, or is contiguous."""
    if dlogits.stride() == rows.logits.stride():
        return replace(rows, logits=dlogits)
    return Rows.of(dlogits.view(rows.N, rows.V))


@dataclass(frozen=True)
class RowViews:
    """The N rows of a tensor by their numbers."""

    rows: Rows

    @cached_property
    def flat(self) -> Tensor | None:
        """`[N, V]`, where rows are evenly spaced."""
        rows = self.rows
        if rows.rows_per_batch < rows.N:
            return None
        return rows.logits.as_strided((rows.N, rows.V), (rows.row_stride, 1))

    def take(self, at: Place) -> Tensor:
        """`[n, V]`: a view of neighbours in one batch, a copy of others."""
        if self.flat is not None:
            return self.flat[at]
        each, logits = self.rows.rows_per_batch, self.rows.logits
        if isinstance(at, slice):
            first = at.start // each
            if (at.stop - 1) // each == first:
                return logits[first, at.start - first * each : at.stop - first * each]
            at = torch.arange(at.start, at.stop, device=logits.device)
        return logits[at // each, at % each]

    def at_targets(self, target: Tensor) -> Tensor:
        """The logit of each row's target, `[N]` float64; NaN for +inf, which no softmax has."""
        rows = self.rows
        word = target.clamp(0, rows.V - 1)
        matrix = self.flat if self.flat is not None else rows.logits
        found = matrix.gather(-1, word.view(*matrix.shape[:-1], 1)).flatten().double()
        return found.masked_fill_(found == math.inf, math.nan)

    def put(self, at: Tensor, values: Tensor) -> None:
        """Writes rows at indices."""
        values = values.to(self.rows.logits.dtype)
        if self.flat is not None:
            self.flat.index_copy_(0, at, values)
            return
        each = self.rows.rows_per_batch
        self.rows.logits[at // each, at % each] = values

    def zero(self, which: Tensor) -> None:
        """Rows where `which` `[N]` is true become 0, whatever they hold."""
        at = which.nonzero().squeeze(1)
        if self.flat is not None:
            self.flat.index_fill_(0, at, 0.0)
            return
        each = self.rows.rows_per_batch
        self.rows.logits[at // each, at % each] = 0.0

    def runs(self, which: Tensor) -> list[slice]:
        """Neighbours of one batch where `which` is true, as long as possible."""
        if not which.numel():
            return []
        edge = torch.ones_like(which)
        edge[1:] = which[1:] != which[:-1]
        edge[:: self.rows.rows_per_batch] = True
        starts = edge.nonzero().squeeze(1).tolist()
        stops = [*starts[1:], which.numel()]
        kept = which[edge].tolist()
        return [slice(*ends) for *ends, keep in zip(starts, stops, kept, strict=True) if keep]


def taken(rows: Rows, at: Place) -> Tensor:
    """Some of the rows as `[n, V]`; a view where they are evenly spaced neighbours."""
    return RowViews(rows).take(at)


@dataclass(frozen=True)
class _Views:
    """What a chunk is taken from."""

    logits: RowViews
    ref: RowViews | None
    home: RowViews | None
    target: Tensor
    mine: Tensor
    ref_mine: Tensor | None

    def chunk(self, places: list[Place]) -> Chunk:
        """The blocks at these places."""
        at, ref_mine = _joined(places, self.target.device), self.ref_mine
        return Chunk(
            [self.block(place) for place in places],
            [_count(place) for place in places],
            at,
            self.target[at],
            self.mine[at],
            None if ref_mine is None else ref_mine[at],
        )

    def block(self, at: Place) -> Block:
        """The rows at this place."""
        dlogits = put = None
        if self.home is not None and isinstance(at, slice):
            dlogits = self.home.take(at)
        elif self.home is not None and isinstance(at, Tensor):
            put = partial(self.home.put, at)
        ref_logits = None if self.ref is None else self.ref.take(at)
        return Block(self.logits.take(at), ref_logits, dlogits, put)


def _chunks(logits: RowViews, wanted: Tensor, blocks: int) -> Iterator[list[Place]]:
    """Places of the blocks of each chunk of wanted rows."""
    V, runs = logits.rows.V, logits.runs(wanted)
    count = sum(map(_count, runs))
    block = torch.get_num_threads() * max(1, BLOCK_BYTES // (4 * V))
    places: list[Place] = [
        slice(start, min(start + block, run.stop))
        for run in runs
        for start in range(run.start, run.stop, block)
    ]
    if len(places) > 2 * -(-count // block):
        # so short that a copy of many is cheaper than operations on each
        places = list(wanted.nonzero().squeeze(1).split(block))

    chunk: list[Place] = []
    room = blocks * block
    for place in places:
        if _count(place) > room:
            yield chunk
            chunk, room = [], blocks * block
        chunk.append(place)
        room -= _count(place)
    if chunk:
        yield chunk


def _count(at: Place) -> int:
    return at.stop - at.start if isinstance(at, slice) else at.numel()


def _joined(places: list[Place], device: torch.device) -> Place:
    """All of them as one place."""
    slices = [place for place in places if isinstance(place, slice)]
    if len(slices) < len(places):
        return torch.cat([place for place in places if isinstance(place, Tensor)])
    if all(one.stop == other.start for one, other in pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    # torch's default device may be another than the rows'
    return torch.cat([torch.arange(at.start, at.stop, device=device) for at in slices])
