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
from .launch import (
    PAIR_REGISTERS,
    READING_REGISTERS,
    WRITING_REGISTERS,
    divergence_of,
    launch,
    place_of,
    row_keywords,
    unspecialized,
)
from .online_softmax import LOG2E
from .records import RowLoss, Rows, Terms, TokenVectors
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
    ref_rows_per_batch,
    ref_batch_stride: tl.int64,
    ref_row_stride: tl.int64,
    out_rows_per_batch,
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
    if dlogits_ptr is not None:
        out_ptr = dlogits_ptr + row_start(row, out_rows_per_batch, out_batch_stride, out_row_stride)
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row)
    if (weight == 0) | (target < 0) | (target >= V):
        store_vectors(vectors_ptr, N, row, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
        if ref_logits_ptr is not None:
            store_vectors(vectors_ptr + 8 * N, N, row, (0.0, 1.0))
            if DIVERGENCE == "mixture":
                tl.store(vectors_ptr + 10 * N + row, 0.0)
        tl.store(dropped_ptr + row, False)
        if dlogits_ptr is not None:
            write_row_zeros(out_ptr, V, THREADS, WIDTH)
        return

    target_col = target.to(tl.int32)
    ref_ptr = None
    if ref_logits_ptr is not None:
        ref_ptr = ref_logits_ptr + row_start(
            row, ref_rows_per_batch, ref_batch_stride, ref_row_stride
        )
    logp, entropy, row_kl, state, ref_state = read_row(
        row_ptr, ref_ptr, V, target_col, scale, interpolation, DIVERGENCE, THREADS, WIDTH, TILES
    )

    # without an old policy the ratio is exactly 1, yet NaN where logp is not finite
    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + row)
    log_ratio = logp - old_logp
    ratio = tl.exp(log_ratio)
    loss, dlogp, dlog_ratio, kl = token_terms(
        logp,
        log_ratio,
        tl.load(advantage_ptr + row),
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
    dkl = 0.0
    ref = None
    if ref_logits_ptr is not None:
        kl = row_kl
        ref = (ref_ptr, ref_state[0], ref_state[1], ref_state[2], ref_state[3])
        if beta != 0:
            loss += beta * kl
            dkl = beta * weight
    dlogp = weight * (dlogp + dlog_ratio)
    loss = weight * loss
    dentropy = 0.0
    if entropy_weight_ptr is not None:
        dentropy = -tl.load(entropy_weight_ptr + row)
        loss += dentropy * entropy

    usable = is_finite(logp) & is_finite(log_ratio) & is_finite(ratio)
    usable = usable & is_finite(loss) & is_finite(dlogp)
    loss = tl.where(usable, loss, 0.0)
    dlogp = tl.where(usable, dlogp, 0.0)
    dentropy = tl.where(usable, dentropy, 0.0)
    dkl = tl.where(usable, dkl, 0.0)
    vectors = (logp, entropy, ratio, kl, loss, dlogp, state[0], state[1])
    store_vectors(vectors_ptr, N, row, vectors)
    if ref_logits_ptr is not None:
        store_vectors(vectors_ptr + 8 * N, N, row, (ref_state[0], ref_state[1]))
        if DIVERGENCE == "mixture":
            tl.store(vectors_ptr + 10 * N + row, ref_state[3])
    tl.store(dropped_ptr + row, usable == 0)

    if dlogits_ptr is not None:
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
    rows: Rows,
    tokens: TokenVectors,
    temperature: float,
    terms: Terms,
    dlogits: torch.Tensor | None,
    ref_rows: Rows | None = None,
) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`.

    Args:
        rows: logits of N tokens, float32, bfloat16 or float16.
        tokens: targets, weights, advantages and what else is given of each.
        temperature: T, the logits are divided by it.
        terms: the objective's formulas.
        dlogits: written if given, of the logits' shape; may be the logits.
        ref_rows: the reference policy's logits of the same tokens, for the exact KL, or None.
    """
    N, device = rows.N, rows.logits.device
    count = 8 if ref_rows is None else 11 if ref_rows.divergence == "mixture" else 10
    vectors = torch.empty(count, N, dtype=torch.float32, device=device)
    dropped = torch.empty(N, dtype=torch.bool, device=device)
    registers = READING_REGISTERS
    if ref_rows is not None:
        ref_rows, registers = ref_rows.aligned_with(rows), PAIR_REGISTERS
    elif dlogits is not None and rows.logits.element_size() == 2:
        registers = WRITING_REGISTERS
    launch(
        _row_loss_kernel,
        N,
        on=rows.logits,
        logits_ptr=rows.logits,
        ref_logits_ptr=None if ref_rows is None else ref_rows.logits,
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
        N=N,
        V=rows.V,
        **place_of(rows),
        **place_of(ref_rows, "ref_"),
        **place_of(None if dlogits is None else Rows.of(dlogits), "out_"),
        scale=LOG2E.value / temperature,
        beta=terms.beta,
        surrogate_args=terms.surrogate_args,
        SURROGATE=terms.surrogate,
        KL=terms.kl,
        KL_TIMES_RATIO=terms.kl_times_ratio,
        **divergence_of(ref_rows),
        **row_keywords(rows, registers),
    )
    logp, entropy, ratio, kl, loss, dlogp = vectors[:6]
    return RowLoss(logp, entropy, ratio, kl, loss, dlogp, dropped, vectors[6:])
