"""The gradient of every logit, from saved row statistics and a coefficient per row.

The second phase where a row's coefficient was not known while the row was read: sequence-level
ratios, and a second backward. Reads a row once and writes it once, 4 bytes per bfloat16 logit, in
place when both pointers are the same.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T
"""

import torch

from .language import tl, triton
from .launch import launch, row_layout
from .online_softmax import LOG2E, target_gap
from .records import RowLoss, Rows, RowStats, Slopes
from .row_gradient import write_row_gradient, write_row_zeros
from .row_tiles import row_start


@triton.jit(
    do_not_specialize=[
        "N",
        "V",
        "rows_per_batch",
        "batch_stride",
        "row_stride",
        "ref_rows_per_batch",
        "ref_batch_stride",
        "ref_row_stride",
        "out_rows_per_batch",
        "out_batch_stride",
        "out_row_stride",
    ],
    # no alignment, which changes with N and with a view, may recompile
    do_not_specialize_on_alignment=[
        "logits_ptr",
        "ref_logits_ptr",
        "dlogits_ptr",
        "target_ptr",
        "dlogp_ptr",
        "dentropy_ptr",
        "dkl_ptr",
        "entropy_ptr",
        "kl_ptr",
        "state_ptr",
    ],
)
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
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, rows_per_batch, batch_stride, row_stride)
    out = row_start(row, out_rows_per_batch, out_batch_stride, out_row_stride)
    row_ptr = logits_ptr + start
    target = tl.load(target_ptr + row)
    dlogp = tl.load(dlogp_ptr + row)
    dentropy = 0.0
    entropy = 0.0
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    dkl = 0.0
    if dkl_ptr is not None:
        dkl = tl.load(dkl_ptr + row)
    if ((dlogp != 0) | (dentropy != 0) | (dkl != 0)) & (target >= 0) & (target < V):
        word = target.to(tl.int32)
        peak = tl.load(state_ptr + row)
        rest = tl.load(state_ptr + N + row)
        z, _ = target_gap(row_ptr, word, scale, peak, rest)
        ref = None
        if dkl_ptr is not None:
            ref_ptr = ref_logits_ptr + row_start(
                row, ref_rows_per_batch, ref_batch_stride, ref_row_stride
            )
            ref_peak = tl.load(state_ptr + 2 * N + row)
            ref_rest = tl.load(state_ptr + 3 * N + row)
            ref_z, _ = target_gap(ref_ptr, word, scale, ref_peak, ref_rest)
            ref = (ref_ptr, ref_peak, ref_rest, ref_z, tl.load(kl_ptr + row))
        write_row_gradient(
            row_ptr,
            dlogits_ptr + out,
            V,
            word,
            scale,
            (dlogp, dentropy, dkl),
            (peak, rest, z, entropy),
            ref,
            dentropy_ptr is not None,
            THREADS,
            WIDTH,
            TILES,
        )
    else:
        write_row_zeros(dlogits_ptr + out, V, THREADS, WIDTH)


def row_dlogits(
    rows: Rows,
    target: torch.Tensor,
    temperature: float,
    slopes: Slopes,
    stats: RowStats | RowLoss,
    dlogits: torch.Tensor,
    ref_rows: Rows | None = None,
) -> torch.Tensor:
    """Writes dL/dlogits into `dlogits` (of the logits' shape; may be the logits).

    Args:
        rows: logits of N tokens over V words, float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means a row of zeros.
        temperature: T, the logits are divided by it.
        slopes: dL by the statistics of each row; a row without any becomes 0.
        stats: from `row_stats` or `row_loss`.
        ref_rows: the reference policy's logits, where `slopes.dkl` is given.
    """
    out, ref = Rows.of(dlogits), ref_rows or rows
    dlogp, dentropy, dkl = slopes
    layout = row_layout(rows)
    launch(
        _row_dlogits_kernel,
        rows.N,
        on=rows.logits,
        logits_ptr=rows.logits,
        ref_logits_ptr=None if dkl is None else ref.logits,
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
        rows_per_batch=rows.rows_per_batch,
        batch_stride=rows.batch_stride,
        row_stride=rows.row_stride,
        ref_rows_per_batch=ref.rows_per_batch,
        ref_batch_stride=ref.batch_stride,
        ref_row_stride=ref.row_stride,
        out_rows_per_batch=out.rows_per_batch,
        out_batch_stride=out.batch_stride,
        out_row_stride=out.row_stride,
        scale=LOG2E.value / temperature,
        **(layout.keywords if dkl is None else layout.of_a_pair),
    )
    return dlogits
