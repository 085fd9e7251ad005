"""Log-probability and entropy of the targets: the plan for old, reference, evaluation passes.

Reads each row of logits once and writes four floats: logp and entropy, and as `state` the anchor
and the sum of `online_softmax`, from which `row_dlogits` computes the softmax again. Memory
traffic: 2 bytes per bfloat16 logit. With reference logits also the exact KL, and the state of both
rows; those are also read once. A row whose target lies outside [0, V) is not read; its outputs are
0.
"""

import torch

from .language import tl
from .launch import launch, row_arguments, unspecialized
from .records import Rows, RowStats
from .row_reading import read_row
from .row_tiles import row_start, store_vectors


@unspecialized
def _row_stats_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ptr,
    vectors_ptr,
    N,
    V,
    rows_per_batch,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    ref_batch_stride: tl.int64,
    ref_row_stride: tl.int64,
    scale,
    interpolation,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(row, rows_per_batch, batch_stride, row_stride)
    target = tl.load(target_ptr + row)
    if (target < 0) | (target >= V):
        store_vectors(vectors_ptr, N, row, (0.0, 0.0, 0.0, 1.0))
        if ref_logits_ptr is not None:
            store_vectors(vectors_ptr + 4 * N, N, row, (0.0, 1.0, 0.0, 0.0))
        return

    ref_ptr = None
    if ref_logits_ptr is not None:
        ref_ptr = ref_logits_ptr + row_start(row, rows_per_batch, ref_batch_stride, ref_row_stride)
    logp, entropy, kl, state, ref_state = read_row(
        row_ptr,
        ref_ptr,
        V,
        target.to(tl.int32),
        scale,
        interpolation,
        DIVERGENCE,
        THREADS,
        WIDTH,
        TILES,
    )
    store_vectors(vectors_ptr, N, row, (logp, entropy, state[0], state[1]))
    if ref_logits_ptr is not None:
        values = (ref_state[0], ref_state[1], ref_state[3], kl)
        store_vectors(vectors_ptr + 4 * N, N, row, values)


def row_stats(rows: Rows, target: torch.Tensor) -> RowStats:
    """Softmax statistics of every row at its target.

    Args:
        rows: float32, bfloat16 or float16.
        target: [N] int64; outside [0, V) means masked.
    """
    alone = rows.ref_logits is None
    vectors = target.new_empty(4 if alone else 8, rows.N, dtype=torch.float32)
    launch(
        _row_stats_kernel,
        rows.N,
        on=rows.logits,
        target_ptr=target,
        vectors_ptr=vectors,
        **row_arguments(rows),
    )
    if alone:
        return RowStats(vectors[0], vectors[1], None, vectors[2:])
    return RowStats(vectors[0], vectors[1], vectors[7], vectors[2:7])
