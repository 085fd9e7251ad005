"""How a kernel is laid out on the device: the only home of block sizes and warps.

Keyed by vocabulary and element size alone. Nothing that depends on the number of rows may enter:
a row must give the same bits in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .language import triton
from .records import Rows

# the widest load of one thread, on every GPU at hand
LOAD_BYTES = 16
# one token per lane in the kernels over [N] vectors
VECTOR_BLOCK = 256


@dataclass(frozen=True)
class RowLayout:
    """How one program covers a row, see `online_softmax`; and what the compiler may assume."""

    THREADS: int
    WIDTH: int
    VECTOR: bool
    ALIGNMENT: int
    num_warps: int

    @property
    def keywords(self) -> dict[str, int]:
        """As a launch takes them."""
        return vars(self)


def row_layout(rows: Rows) -> RowLayout:
    """Layout of the row kernels; all but ALIGNMENT follows from vocabulary and dtype alone."""
    width = LOAD_BYTES // rows.logits.element_size()
    warps = 4 if rows.V <= 8192 else 16
    # AMD's wavefronts have 64 lanes; tiles, and so results, stay those of 32
    lanes = 64 if torch.version.hip else 32
    return RowLayout(
        THREADS=32 * warps,
        WIDTH=width,
        VECTOR=rows.V % width == 0,
        ALIGNMENT=math.gcd(width, rows.batch_stride, rows.row_stride),
        num_warps=max(1, 32 * warps // lanes),
    )


def vector_grid(N: int) -> tuple[int]:
    """Programs that cover an `[N]` vector."""
    return (triton.cdiv(N, VECTOR_BLOCK),)
