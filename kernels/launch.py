"""How a kernel is laid out on the device: the only home of block sizes and warps.

Keyed by vocabulary and element size alone. Nothing that depends on the number of rows may enter:
a row must give the same bits in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .language import triton
from .records import Rows

# the widest load of one thread, on every GPU at hand
LOAD_BYTES = 16
# one token per lane in the kernels over [N] vectors
VECTOR_BLOCK = 256


@dataclass(frozen=True)
class RowLayout:
    """How one program covers a row, see `online_softmax`; and what the compiler may assume.

    What it may assume decides the order in which it sums, so it must follow from V and dtype, too:
    rows of an odd vocabulary are never taken for aligned, and others must be (`lies_aligned`).
    """

    THREADS: int
    WIDTH: int
    VECTOR: bool
    TILES: int
    ALIGNMENT: int
    num_warps: int

    @property
    def keywords(self) -> dict[str, int]:
        """As a launch takes them."""
        return vars(self)


def lies_aligned(logits: torch.Tensor) -> bool:
    """Whether the kernels can read these rows where they lie, in the order that V prescribes."""
    width = LOAD_BYTES // logits.element_size()
    if logits.shape[-1] % width:
        return True
    *steps, _ = logits.stride()
    axes = zip(steps, logits.shape, strict=False)
    apart = all(step % width == 0 for step, size in axes if size > 1)
    return apart and logits.data_ptr() % LOAD_BYTES == 0


def row_layout(rows: Rows) -> RowLayout:
    """Layout of the row kernels, from vocabulary and dtype alone."""
    width = LOAD_BYTES // rows.logits.element_size()
    vector = rows.V % width == 0
    warps = 4 if rows.V <= 8192 else 8
    # AMD's wavefronts have 64 lanes; tiles, and so results, stay those of 32
    lanes = 64 if torch.version.hip else 32
    return RowLayout(
        THREADS=32 * warps,
        WIDTH=width,
        VECTOR=vector,
        # as many loads in flight as registers allow; narrow loads take more of them
        TILES=4 if vector else 2,
        ALIGNMENT=width if vector else 1,
        num_warps=max(1, 32 * warps // lanes),
    )


def launch(kernel: Any, programs: int, on: torch.Tensor, **arguments: Any) -> None:
    """Starts `programs` programs on the device of `on`, which need not be the current one."""
    if programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](**arguments)


def vector_programs(N: int) -> int:
    """Programs that cover an `[N]` vector."""
    return triton.cdiv(N, VECTOR_BLOCK)
