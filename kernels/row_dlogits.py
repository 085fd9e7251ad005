"""The gradient of every logit, from saved row statistics and derivatives per row.

The second phase where a row's derivatives were not known while the row was read: sequence-level
ratios, and a second backward. Reads a row once and writes it once, 4 bytes per bfloat16 logit, in
place when both pointers are the same. The formula: see `row_gradient`.
"""

import torch

from .language import tl
from .launch import (
    PAIR_REGISTERS,
    WRITING_REGISTERS,
    divergence_of,
    launch,
    place_of,
    row_keywords,
    unspecialized,
)
from .online_softmax import LOG2E
from .records import RowGradients, RowLoss, Rows, RowStats
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
    kl_ptr,
    state_ptr,
    dlogits_ptr,
    N,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ref_rows_per_batch,
    ref_batch_stride: tl.int64,
    ref_row_stride: tl.int64,
    out_rows_per_batch,
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
    out_ptr = dlogits_ptr + row_start(row, out_rows_per_batch, out_batch_stride, out_row_stride)
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
            ref_ptr = ref_logits_ptr + row_start(
                row, ref_rows_per_batch, ref_batch_stride, ref_row_stride
            )
            ref_anchor = tl.load(state_ptr + 2 * N + row)
            ref_sum = tl.load(state_ptr + 3 * N + row)
            ref_z, _ = target_gap(ref_ptr, target_col, scale, ref_anchor, ref_sum)
            if DIVERGENCE == "mixture":
                of_kl = tl.load(state_ptr + 4 * N + row)
            else:
                of_kl = tl.load(kl_ptr + row)
            ref = (ref_ptr, ref_anchor, ref_sum, ref_z, of_kl)
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
    temperature: float,
    row_gradients: RowGradients,
    stats: RowStats | RowLoss,
    dlogits: torch.Tensor,
    ref_rows: Rows | None = None,
) -> torch.Tensor:
    """Writes dL/dlogits into `dlogits` (of the logits' shape; may be the logits).

    Args:
        rows: logits of N tokens, float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means a row of zeros.
        temperature: T, the logits are divided by it.
        row_gradients: dL by the statistics of each row; a row without any becomes 0.
        stats: from `row_stats` or `row_loss`.
        ref_rows: the reference policy's logits, where `row_gradients.dkl` is given.
    """
    dlogp, dentropy, dkl = row_gradients
    ref, registers = None, None if dentropy is None else WRITING_REGISTERS
    if dkl is not None and ref_rows is not None:
        ref, registers = ref_rows.aligned_with(rows), PAIR_REGISTERS
    launch(
        _row_dlogits_kernel,
        rows.N,
        on=rows.logits,
        logits_ptr=rows.logits,
        ref_logits_ptr=None if ref is None else ref.logits,
        target_ptr=target,
        dlogp_ptr=dlogp,
        dentropy_ptr=dentropy,
        dkl_ptr=dkl,
        entropy_ptr=None if dentropy is None else stats.entropy,
        kl_ptr=None if dkl is None else stats.kl,
        state_ptr=stats.state,
        dlogits_ptr=dlogits,
        N=rows.N,
        V=rows.V,
        **place_of(rows),
        **place_of(ref, "ref_"),
        **place_of(Rows.of(dlogits), "out_"),
        scale=LOG2E.value / temperature,
        **divergence_of(ref),
        **row_keywords(rows, registers),
    )
    return dlogits
