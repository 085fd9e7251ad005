"""Multiplies the gradient by grad_output, a scalar that stays on the device.

Backward of the one pass: nearly always grad_output is 1, and then every program returns after
reading that one number; neither the host waits nor memory moves.
"""

import torch

from .language import tl, triton
from .launch import launch, row_layout
from .online_softmax import row_end, row_start, tile_columns
from .records import Rows


@triton.jit(
    do_not_specialize=["V", "rows_per_batch", "batch_stride", "row_stride"],
    # scalars of a row: their alignment, which changes with N, must not recompile
    do_not_specialize_on_alignment=["factor_ptr"],
)
def _row_scale_kernel(
    dlogits_ptr,
    factor_ptr,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        start = row_start(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        tile: tl.constexpr = THREADS * WIDTH
        columns = tile_columns(THREADS, WIDTH, VECTOR)
        for first in range(0, V, tile):
            at = first + columns
            inside = at < row_end(V, WIDTH, VECTOR)
            dlogits = tl.load(dlogits_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            scaled = (factor * dlogits).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + start + at, scaled, mask=inside)


def row_scale(rows: Rows, factor: torch.Tensor) -> torch.Tensor:
    """Scales `rows` in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    launch(
        _row_scale_kernel,
        rows.N,
        on=rows.logits,
        dlogits_ptr=rows.logits,
        factor_ptr=factor,
        V=rows.V,
        rows_per_batch=rows.rows_per_batch,
        batch_stride=rows.batch_stride,
        row_stride=rows.row_stride,
        **row_layout(rows).keywords,
    )
    return rows.logits
