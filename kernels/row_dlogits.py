"""The gradient of every logit, from saved row statistics and derivatives per row.

The second phase where a row's derivatives were not known while the row was read: sequence-level
ratios, and a second backward. Reads a row once and writes it once, 4 bytes per bfloat16 logit, in
place when both pointers are the same. The formula: see `row_gradient`.
"""

import torch

from .language import tl
from .launch import WRITING_WARPS, launch, row_arguments, unspecialized
from .records import RowGradients, RowLoss, Rows, RowStats, place_of
from .row_gradient import write_row_gradient, write_row_zeros
from .row_tiles import row_start
from .token_statistics import target_gap


@unspecialized
def _row_dlogits_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ptr,
    dlogp_ptr,
    dentropy_ptr,
    dkl_ptr,
    entropy_ptr,
    state_ptr,
    dlogits_ptr,
    N,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ref_batch_stride: tl.int64,
    ref_row_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    scale,
    interpolation,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(row, rows_per_batch, batch_stride, row_stride)
    out_ptr = dlogits_ptr + row_start(row, rows_per_batch, out_batch_stride, out_row_stride)
    target = tl.load(target_ptr + row)
    dlogp = tl.load(dlogp_ptr + row)
    dentropy, entropy, dkl = 0.0, 0.0, 0.0
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    if dkl_ptr is not None:
        dkl = tl.load(dkl_ptr + row)
    moves = (dlogp != 0) | (dentropy != 0) | (dkl != 0)
    if moves & (target >= 0) & (target < V):
        target_col = target.to(tl.int32)
        anchor = tl.load(state_ptr + row)
        sum_others = tl.load(state_ptr + N + row)
        z, _ = target_gap(row_ptr, target_col, scale, anchor, sum_others)
        ref = None
        if dkl_ptr is not None:
            ref_start = row_start(row, rows_per_batch, ref_batch_stride, ref_row_stride)
            ref_ptr = ref_logits_ptr + ref_start
            ref_anchor = tl.load(state_ptr + 2 * N + row)
            ref_sum = tl.load(state_ptr + 3 * N + row)
            ref_z, _ = target_gap(ref_ptr, target_col, scale, ref_anchor, ref_sum)
            ref = (ref_ptr, ref_anchor, ref_sum, ref_z, tl.load(state_ptr + 4 * N + row))
        write_row_gradient(
            row_ptr,
            out_ptr,
            V,
            target_col,
            scale,
            (dlogp, dentropy, dkl),
            (anchor, sum_others, z, entropy),
            ref,
            interpolation,
            dentropy_ptr is not None,
            DIVERGENCE,
            THREADS,
            WIDTH,
            TILES,
        )
    else:
        write_row_zeros(out_ptr, V, THREADS, WIDTH)


def row_dlogits(
    rows: Rows,
    target: torch.Tensor,
    row_gradients: RowGradients,
    stats: RowStats | RowLoss,
    dlogits: torch.Tensor,
) -> torch.Tensor:
    """Writes dL/dlogits into `dlogits` (of the logits' shape; may be the logits).

    Args:
        rows: float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means a row of zeros.
        row_gradients: dL by the statistics of each row; a row without any becomes 0.
        stats: from `row_stats` or `row_loss`.
    """
    dlogp, dentropy, dkl = row_gradients
    _, *out_strides = place_of(dlogits)
    launch(
        _row_dlogits_kernel,
        rows.N,
        on=rows.logits,
        target_ptr=target,
        dlogp_ptr=dlogp,
        dentropy_ptr=dentropy,
        dkl_ptr=dkl,
        entropy_ptr=None if dentropy is None else stats.entropy,
        state_ptr=stats.state,
        dlogits_ptr=dlogits,
        out_batch_stride=out_strides[0],
        out_row_stride=out_strides[1],
        **row_arguments(rows.for_gradient(row_gradients), WRITING_WARPS),
    )
    return dlogits
