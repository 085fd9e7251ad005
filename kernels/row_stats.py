"""Log-probability and entropy of the targets: the plan for old, reference, evaluation passes.

Reads each row of logits once and writes four floats: logp and entropy, and as `state` the largest
logit M and the sum S of `online_softmax`, from which `row_dlogits` finds the softmax again. Memory
traffic: 2 bytes per bfloat16 logit. A row whose target lies outside [0, V) is not read; its
outputs are 0.
"""

import torch

from .language import tl, triton
from .launch import launch, row_layout
from .online_softmax import LOG2E, row_softmax, row_start, target_gap, token_statistics
from .records import Rows, RowStats


@triton.jit(
    do_not_specialize=["N", "V", "rows_per_batch", "batch_stride", "row_stride"],
    # scalars of a row: their alignment, which changes with N, must not recompile
    do_not_specialize_on_alignment=["target_ptr", "logp_ptr", "entropy_ptr", "state_ptr"],
)
def _row_stats_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    state_ptr,
    N,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logp = 0.0
    entropy = 0.0
    peak = 0.0
    rest = 1.0
    if (target >= 0) & (target < V):
        word = target.to(tl.int32)
        start = row_start(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT)
        row_ptr = logits_ptr + start
        peak, rest, moment = row_softmax(row_ptr, V, word, scale, THREADS, WIDTH, VECTOR)
        z = target_gap(row_ptr, word, scale, peak, rest)
        logp, entropy = token_statistics(z, rest, moment)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(state_ptr + row, peak)
    tl.store(state_ptr + N + row, rest)


def row_stats(rows: Rows, target: torch.Tensor, temperature: float) -> RowStats:
    """Softmax statistics of every row at its target.

    Args:
        rows: logits of N tokens over V words, float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means masked.
        temperature: T, the logits are divided by it.
    """
    buffer = torch.empty(4, rows.N, dtype=torch.float32, device=rows.logits.device)
    stats = RowStats(buffer[0], buffer[1], buffer[2:])
    launch(
        _row_stats_kernel,
        rows.N,
        on=rows.logits,
        logits_ptr=rows.logits,
        target_ptr=target,
        logp_ptr=stats.logp,
        entropy_ptr=stats.entropy,
        state_ptr=stats.state,
        N=rows.N,
        V=rows.V,
        rows_per_batch=rows.rows_per_batch,
        batch_stride=rows.batch_stride,
        row_stride=rows.row_stride,
        scale=LOG2E.value / temperature,
        **row_layout(rows).keywords,
    )
    return stats
