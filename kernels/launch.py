"""How a kernel is laid out on the device: the only home of block sizes and warps.

Keyed by vocabulary and element size alone. Nothing that depends on the number of rows may enter:
a row must give the same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .language import triton

# the widest load of one thread, on every GPU at hand
LOAD_BYTES = 16
# one token per lane in the kernels over [N] vectors
VECTOR_BLOCK = 256


@dataclass(frozen=True)
class RowLayout:
    """A row is read in tiles of `THREADS` threads times `WIDTH` neighbouring logits."""

    THREADS: int
    WIDTH: int
    num_warps: int


def row_layout(V: int, dtype: torch.dtype) -> RowLayout:
    """Layout of the row kernels for a vocabulary of `V` logits of `dtype`."""
    width = LOAD_BYTES // dtype.itemsize
    warps = 4 if V <= 8192 else 16
    # AMD's wavefronts have 64 lanes; tiles and results stay those of 32 per warp
    lanes = 64 if torch.version.hip else 32
    return RowLayout(THREADS=32 * warps, WIDTH=width, num_warps=max(1, 32 * warps // lanes))


def vector_grid(N: int) -> tuple[int]:
    """Programs that cover an `[N]` vector."""
    return (triton.cdiv(N, VECTOR_BLOCK),)
