"""A few rows at a time, each core its own: how the torch backend walks over the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grpo_core.kernels.records import Rows

# float32 scratch of one chunk, twice: larger leaves the caches, smaller pays per operation
CHUNK_BYTES = 2**22

Scratch = TypeVar("Scratch")


@dataclass(frozen=True)
class Chunk:
    """A few rows that are wanted: their logits `[n, V]`, places, and home of their gradient."""

    logits: Tensor
    ref_logits: Tensor | None  # [n, V], the reference policy's
    at: slice | Tensor  # place of each row among all N
    dlogits: Tensor | None  # [m, V], m >= n: every row of the stretch the chunk was taken from
    inside: slice | Tensor  # place of each row in `dlogits`


def for_each_chunk(
    work: Callable[[Chunk, Scratch], None],
    new_scratch: Callable[[], Scratch],
    rows: Rows,
    wanted: Tensor,
    dlogits: Tensor | None = None,
    ref_rows: Rows | None = None,
) -> None:
    """Does `work(chunk, scratch)` on the wanted rows; unwanted rows of `dlogits` become 0.

    Each core takes chunks of its own: sharing out every small operation instead would make the
    cores wait for each other some ten times a chunk, and for long where they are not alone.
    """
    pieces = list(_pieces(rows, dlogits, ref_rows))
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        scratch = new_scratch()
        for piece in pieces:
            if chunk := piece.chunk(wanted):
                work(chunk, scratch)
        return

    inference = torch.is_inference_mode_enabled()

    def worker(share: list[_Piece]) -> None:
        torch.set_num_threads(1)
        # the modes of the calling thread are not those of this one
        with torch.inference_mode(inference), torch.no_grad():
            scratch = new_scratch()
            for piece in share:
                if chunk := piece.chunk(wanted):
                    work(chunk, scratch)

    with _kept_thread_count(), ThreadPoolExecutor(threads) as pool:
        list(pool.map(worker, [pieces[k::threads] for k in range(threads)]))


@contextmanager
def _kept_thread_count() -> Iterator[None]:
    """What one thread sets for itself, torch would hand on to threads that begin later."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Piece:
    """Neighbouring rows before anyone has asked which of them are wanted."""

    logits: Tensor  # [m, V]
    ref: Rows | None
    dlogits: Tensor | None  # [m, V]
    place: slice  # among all N rows

    def chunk(self, wanted: Tensor) -> Chunk | None:
        """The wanted rows of it, if any; the gradient of the others becomes 0."""
        inside = wanted[self.place].nonzero().squeeze(1)
        if inside.numel() == self.logits.shape[0]:
            ref_logits = None if self.ref is None else taken(self.ref, self.place)
            return Chunk(self.logits, ref_logits, self.place, self.dlogits, slice(None))
        # a copy, so that zeroing the gradient leaves it readable when both are one
        some = self.logits[inside]
        if self.dlogits is not None:
            self.dlogits.zero_()
        if not inside.numel():
            return None
        at = self.place.start + inside
        ref_logits = None if self.ref is None else taken(self.ref, at)
        return Chunk(some, ref_logits, at, self.dlogits, inside)


def taken(rows: Rows, at: slice | Tensor) -> Tensor:
    """Some of the rows as `[n, V]`; a view where they are evenly spaced neighbours."""
    if rows.rows_per_batch >= rows.N:
        return rows.logits.as_strided((rows.N, rows.V), (rows.row_stride, 1))[at]
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=rows.logits.device)
    return rows.logits[at // rows.rows_per_batch, at % rows.rows_per_batch]


def _pieces(rows: Rows, dlogits: Tensor | None, ref: Rows | None) -> Iterator[_Piece]:
    """All rows, a few at a time."""
    step = max(1, CHUNK_BYTES // (4 * rows.V))
    # the gradient either lies as the logits do, being them, or is contiguous
    apart = dlogits is not None and dlogits.stride() != rows.logits.stride()
    flat = dlogits.view(rows.N, rows.V) if apart and dlogits is not None else None
    outputs = _stretches(dlogits, rows) if dlogits is not None and not apart else None
    first = 0
    for k, stretch in enumerate(_stretches(rows.logits, rows)):
        for start in range(0, stretch.shape[0], step):
            logits = stretch[start : start + step]
            place = slice(first + start, first + start + logits.shape[0])
            gradient = flat[place] if flat is not None else None
            if outputs is not None:
                gradient = outputs[k][start : start + step]
            yield _Piece(logits, ref, gradient, place)
        first += stretch.shape[0]


def _stretches(tensor: Tensor, rows: Rows) -> list[Tensor]:
    """`[B, T, V]` or `[N, V]` as views `[n, V]` of evenly spaced rows, as few as possible."""
    if rows.rows_per_batch >= rows.N:
        return [tensor.as_strided((rows.N, rows.V), (rows.row_stride, 1))]
    return list(tensor.unbind())
