"""The one pass: from a row of logits to the loss of its token and the gradient of the whole row.

One program reads a row, finishes its softmax, evaluates surrogate and KL on scalars, and writes
dlogits, over the logits themselves when both pointers are the same. The second reading of the row
comes from the caches as far as they reach. Memory traffic in the ideal: one read and one write, 4
bytes per bfloat16 logit for forward and backward together; without `dlogits`, one read.

    L = Σ_n weight_n · (factor_n · ℓ(logp_n, logp_n − old_logp_n, A_n) + beta · kl_n)
        − entropy_weight_n · H_n
    dL/dx_j: see `row_gradient`

For the exact KL the row of the reference's logits is read beside. Rows of weight 0 are not read;
rows without a gradient are not read twice. A row with a term that is not finite (NaN or +inf among
its logits, an overflowing ratio) is dropped: no loss, no gradient.
"""

import torch

from .language import tl
from .launch import READING_WARPS, WRITING_WARPS, launch, row_arguments, unspecialized
from .records import RowLoss, Rows, Terms, TokenVectors, place_of
from .row_gradient import write_row_gradient, write_row_zeros
from .row_reading import read_row
from .row_tiles import row_start, store_vectors
from .scalar_math import is_finite
from .token_loss import token_terms


@unspecialized
def _row_loss_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ptr,
    weight_ptr,
    advantage_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    factor_ptr,
    entropy_weight_ptr,
    vectors_ptr,
    dropped_ptr,
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
    beta,
    interpolation,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(row, rows_per_batch, batch_stride, row_stride)
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row)
    if (weight == 0) | (target < 0) | (target >= V):
        store_vectors(vectors_ptr, N, row, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
        if ref_logits_ptr is not None:
            store_vectors(vectors_ptr + 8 * N, N, row, (0.0, 1.0, 0.0))
        tl.store(dropped_ptr + row, False)
        if dlogits_ptr is not None:
            out_ptr = dlogits_ptr + row_start(row, rows_per_batch, out_batch_stride, out_row_stride)
            write_row_zeros(out_ptr, V, THREADS, WIDTH)
        return

    target_col = target.to(tl.int32)
    ref_ptr = None
    if ref_logits_ptr is not None:
        ref_ptr = ref_logits_ptr + row_start(row, rows_per_batch, ref_batch_stride, ref_row_stride)
    logp, entropy, row_kl, state, ref_state = read_row(
        row_ptr, ref_ptr, V, target_col, scale, interpolation, DIVERGENCE, THREADS, WIDTH, TILES
    )

    # without an old policy the ratio is exactly 1, yet NaN where logp is not finite
    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + row)
    log_ratio = logp - old_logp
    ratio = tl.exp(log_ratio)
    ref, exact_kl, dkl = None, None, 0.0
    if ref_logits_ptr is not None:
        ref = (ref_ptr, ref_state[0], ref_state[1], ref_state[2], ref_state[3])
        exact_kl = row_kl
        if beta != 0:
            dkl = beta * weight
    bonus, dentropy = None, 0.0
    if entropy_weight_ptr is not None:
        entropy_weight = tl.load(entropy_weight_ptr + row)
        bonus, dentropy = entropy_weight * entropy, -entropy_weight
    loss, dlogp, dlog_ratio, kl = token_terms(
        logp,
        log_ratio,
        tl.load(advantage_ptr + row),
        weight,
        exact_kl,
        bonus,
        factor_ptr,
        ref_logp_ptr,
        row,
        None,
        beta,
        surrogate_args,
        SURROGATE,
        KL,
        KL_TIMES_RATIO,
    )
    dlogp = weight * (dlogp + dlog_ratio)
    usable = is_finite(logp) & is_finite(log_ratio) & is_finite(ratio)
    usable = usable & is_finite(loss) & is_finite(dlogp)
    loss = tl.where(usable, loss, 0.0)
    dlogp = tl.where(usable, dlogp, 0.0)
    dentropy = tl.where(usable, dentropy, 0.0)
    dkl = tl.where(usable, dkl, 0.0)
    vectors = (logp, entropy, ratio, kl, loss, dlogp, state[0], state[1])
    store_vectors(vectors_ptr, N, row, vectors)
    if ref_logits_ptr is not None:
        values = (ref_state[0], ref_state[1], ref_state[3])
        store_vectors(vectors_ptr + 8 * N, N, row, values)
    tl.store(dropped_ptr + row, usable == 0)

    if dlogits_ptr is not None:
        out_ptr = dlogits_ptr + row_start(row, rows_per_batch, out_batch_stride, out_row_stride)
        if (dlogp != 0) | (dentropy != 0) | (dkl != 0):
            write_row_gradient(
                row_ptr,
                out_ptr,
                V,
                target_col,
                scale,
                (dlogp, dentropy, dkl),
                (state[0], state[1], state[2], entropy),
                ref,
                interpolation,
                entropy_weight_ptr is not None,
                DIVERGENCE,
                THREADS,
                WIDTH,
                TILES,
            )
        else:
            # in place, no thread may overwrite the target's logit before all have read it
            tl.debug_barrier()
            write_row_zeros(out_ptr, V, THREADS, WIDTH)


def row_loss(
    rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: torch.Tensor | None
) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`.

    Args:
        rows: float32, bfloat16 or float16.
        tokens: targets, weights, advantages and what else is given of each.
        terms: the objective's formulas.
        dlogits: written if given, of the logits' shape; may be the logits.
    """
    count = 8 if rows.ref_logits is None else 11
    vectors = tokens.weight.new_empty(count, rows.N)
    dropped = vectors.new_empty(rows.N, dtype=torch.bool)
    writes_half = dlogits is not None and rows.logits.element_size() == 2
    _, *out_strides = place_of(rows.logits if dlogits is None else dlogits)
    launch(
        _row_loss_kernel,
        rows.N,
        on=rows.logits,
        target_ptr=tokens.target,
        weight_ptr=tokens.weight,
        advantage_ptr=tokens.advantage,
        old_logp_ptr=tokens.old_logp,
        ref_logp_ptr=tokens.ref_logp,
        factor_ptr=tokens.factor,
        entropy_weight_ptr=tokens.entropy_weight,
        vectors_ptr=vectors,
        dropped_ptr=dropped,
        dlogits_ptr=dlogits,
        out_batch_stride=out_strides[0],
        out_row_stride=out_strides[1],
        beta=terms.beta,
        surrogate_args=terms.surrogate_args,
        SURROGATE=terms.surrogate,
        KL=terms.kl,
        KL_TIMES_RATIO=terms.kl_times_ratio,
        **row_arguments(rows, WRITING_WARPS if writes_half else READING_WARPS),
    )
    logp, entropy, ratio, kl, loss, dlogp = vectors[:6]
    return RowLoss(logp, entropy, ratio, kl, loss, dlogp, dropped, vectors[6:])
