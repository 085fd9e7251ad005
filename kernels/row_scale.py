"""Multiplies the gradient by grad_output, a scalar that stays on the device.

Backward of the one pass: nearly always grad_output is 1, and then every program returns after
reading that one number; neither the host waits nor memory moves.
"""

import torch

from .language import tl
from .launch import launch, row_layout, unspecialized
from .records import place_of
from .row_tiles import boundary, is_whole, load_part, load_whole, row_lead, row_start, tile_places


@unspecialized
def _row_scale_kernel(
    dlogits_ptr,
    factor_ptr,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        row_ptr = dlogits_ptr + row_start(row, rows_per_batch, batch_stride, row_stride)
        tile: tl.constexpr = THREADS * WIDTH
        places = tile_places(THREADS, WIDTH)
        lead = row_lead(row_ptr, WIDTH)
        end = V + lead
        row_ptr = boundary(row_ptr, lead)
        for first in range(0, end, tile):
            at = first + places
            if is_whole(first, tile, lead, end):
                scaled = factor * load_whole(row_ptr + first, THREADS, WIDTH)
                tl.store(row_ptr + at, scaled.to(dlogits_ptr.dtype.element_ty))
            else:
                scaled = factor * load_part(row_ptr, at, lead, end)
                inside = (at >= lead) & (at < end)
                tl.store(row_ptr + at, scaled.to(dlogits_ptr.dtype.element_ty), mask=inside)


def row_scale(dlogits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scales the rows in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    rows_per_batch, batch_stride, row_stride = place_of(dlogits)
    launch(
        _row_scale_kernel,
        dlogits.shape[:-1].numel(),
        on=dlogits,
        dlogits_ptr=dlogits,
        factor_ptr=factor,
        V=dlogits.shape[-1],
        rows_per_batch=rows_per_batch,
        batch_stride=batch_stride,
        row_stride=row_stride,
        **row_layout(dlogits),
    )
    return dlogits
