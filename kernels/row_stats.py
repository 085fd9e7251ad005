"""Log-probability and entropy of the targets: the plan for old, reference, evaluation passes.

Reads each row of logits once and writes four floats: logp and entropy, and as `state` the anchor M
and the sum S of `online_softmax`, from which `row_dlogits` finds the softmax again. Memory
traffic: 2 bytes per bfloat16 logit. With reference logits also the exact KL, and M and S of both
rows; those are read once, too. A row whose target lies outside [0, V) is not read; its outputs are
0.
"""

import torch

from .exact_kl import exact_kl, row_softmax_pair
from .language import tl, triton
from .launch import launch, row_layout
from .online_softmax import LOG2E, row_softmax, sure_entropy, target_gap, token_statistics
from .records import Rows, RowStats
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
    ],
    # no alignment, which changes with N and with a view, may recompile
    do_not_specialize_on_alignment=[
        "logits_ptr",
        "ref_logits_ptr",
        "target_ptr",
        "logp_ptr",
        "entropy_ptr",
        "kl_ptr",
        "state_ptr",
    ],
)
def _row_stats_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    kl_ptr,
    state_ptr,
    N,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ref_rows_per_batch,
    ref_batch_stride: tl.int64,
    ref_row_stride: tl.int64,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logp = 0.0
    entropy = 0.0
    kl = 0.0
    peak = 0.0
    rest = 1.0
    ref_peak = 0.0
    ref_rest = 1.0
    if (target >= 0) & (target < V):
        word = target.to(tl.int32)
        start = row_start(row, rows_per_batch, batch_stride, row_stride)
        row_ptr = logits_ptr + start
        if ref_logits_ptr is None:
            peak, rest, moment = row_softmax(row_ptr, V, word, scale, THREADS, WIDTH, TILES)
            z, lost = target_gap(row_ptr, word, scale, peak, rest)
        else:
            ref_ptr = ref_logits_ptr + row_start(
                row, ref_rows_per_batch, ref_batch_stride, ref_row_stride
            )
            peak, rest, moment, ref_peak, ref_rest, cross = row_softmax_pair(
                row_ptr, ref_ptr, V, word, scale, THREADS, WIDTH, TILES
            )
            z, lost = target_gap(row_ptr, word, scale, peak, rest)
            ref_z, _ = target_gap(ref_ptr, word, scale, ref_peak, ref_rest)
            kl = exact_kl(z, rest, ref_z, ref_rest, cross)
        logp, entropy = token_statistics(z, lost, rest, moment)
        entropy = sure_entropy(entropy, z, row_ptr, V, word, scale, THREADS, WIDTH)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(state_ptr + row, peak)
    tl.store(state_ptr + N + row, rest)
    if kl_ptr is not None:
        tl.store(kl_ptr + row, kl)
        tl.store(state_ptr + 2 * N + row, ref_peak)
        tl.store(state_ptr + 3 * N + row, ref_rest)


def row_stats(
    rows: Rows, target: torch.Tensor, temperature: float, ref_rows: Rows | None = None
) -> RowStats:
    """Softmax statistics of every row at its target.

    Args:
        rows: logits of N tokens over V words, float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means masked.
        temperature: T, the logits are divided by it.
        ref_rows: the reference policy's logits of the same tokens, for the exact KL, or None.
    """
    ref, device = ref_rows or rows, rows.logits.device
    logp, entropy, kl = torch.empty(3, rows.N, dtype=torch.float32, device=device)
    state = logp.new_empty(2 if ref_rows is None else 4, rows.N)
    stats = RowStats(logp, entropy, None if ref_rows is None else kl, state)
    layout = row_layout(rows)
    launch(
        _row_stats_kernel,
        rows.N,
        on=rows.logits,
        logits_ptr=rows.logits,
        ref_logits_ptr=None if ref_rows is None else ref_rows.logits,
        target_ptr=target,
        logp_ptr=stats.logp,
        entropy_ptr=stats.entropy,
        kl_ptr=stats.kl,
        state_ptr=stats.state,
        N=rows.N,
        V=rows.V,
        rows_per_batch=rows.rows_per_batch,
        batch_stride=rows.batch_stride,
        row_stride=rows.row_stride,
        ref_rows_per_batch=ref.rows_per_batch,
        ref_batch_stride=ref.batch_stride,
        ref_row_stride=ref.row_stride,
        scale=LOG2E.value / temperature,
        **(layout.keywords if ref_rows is None else layout.of_a_pair),
    )
    return stats
