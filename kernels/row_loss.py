"""The one pass: from a row of logits to the loss of its token and the gradient of the whole row.

One program reads a row, finishes its softmax, evaluates surrogate and KL on scalars, and writes
dlogits, over the logits themselves when both pointers are the same. The second reading of the row
comes from the caches as far as they reach. Memory traffic in the ideal: one read and one write, 4
bytes per bfloat16 logit for forward and backward together; without `dlogits`, one read.

    L = Σ_n weight_n · (factor_n · ℓ(logp_n, logp_n − old_logp_n, A_n) + beta · kl_n)
        − entropy_weight_n · H_n
    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

The last term is that of the exact KL, for which the row of the reference's logits is read beside.

Rows of weight 0 are not read; rows without a gradient are not read twice. A row with a term that
is not finite (NaN or +inf among its logits, an overflowing ratio) is dropped: no loss, no gradient.
"""

import torch

from .exact_kl import exact_kl, row_softmax_pair
from .language import tl, triton
from .launch import launch, row_layout
from .online_softmax import LOG2E, row_softmax, sure_entropy, target_gap, token_statistics
from .records import RowLoss, Rows, Terms, TokenVectors
from .row_gradient import write_row_gradient, write_row_zeros
from .row_tiles import hold_tiles, row_start
from .scalar_math import is_finite
from .token_loss import token_terms


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
        "weight_ptr",
        "advantage_ptr",
        "old_logp_ptr",
        "ref_logp_ptr",
        "factor_ptr",
        "entropy_weight_ptr",
        "logp_ptr",
        "entropy_ptr",
        "ratio_ptr",
        "kl_ptr",
        "loss_ptr",
        "dlogp_ptr",
        "dropped_ptr",
        "state_ptr",
    ],
)
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
    logp_ptr,
    entropy_ptr,
    ratio_ptr,
    kl_ptr,
    loss_ptr,
    dlogp_ptr,
    dropped_ptr,
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
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    KEPT: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, rows_per_batch, batch_stride, row_stride)
    target = tl.load(target_ptr + row)
    readable = (target >= 0) & (target < V)
    word = target.to(tl.int32)
    weight = tl.load(weight_ptr + row)
    logp = 0.0
    entropy = 0.0
    ratio = 0.0
    kl = 0.0
    loss = 0.0
    dlogp = 0.0
    dentropy = 0.0
    dkl = 0.0
    peak = 0.0
    rest = 1.0
    z = 0.0
    ref = None
    if ref_logits_ptr is not None:
        ref_ptr = ref_logits_ptr + row_start(
            row, ref_rows_per_batch, ref_batch_stride, ref_row_stride
        )
        ref_peak = 0.0
        ref_rest = 1.0
        ref_z = 0.0
    dropped = False
    counts = (weight != 0) & readable
    held = None
    if HELD > 0:
        held = hold_tiles(logits_ptr + start, counts, THREADS, WIDTH, HELD)
    if counts:
        row_ptr = logits_ptr + start
        if ref_logits_ptr is None:
            peak, rest, moment = row_softmax(
                row_ptr, V, word, scale, THREADS, WIDTH, TILES, held, KEPT
            )
        else:
            peak, rest, moment, ref_peak, ref_rest, cross = row_softmax_pair(
                row_ptr, ref_ptr, V, word, scale, THREADS, WIDTH, TILES
            )
            ref_z, _ = target_gap(ref_ptr, word, scale, ref_peak, ref_rest)
        z, lost = target_gap(row_ptr, word, scale, peak, rest)
        logp, entropy = token_statistics(z, lost, rest, moment)
        entropy = sure_entropy(entropy, z, row_ptr, V, word, scale, THREADS, WIDTH)
        # without an old policy the ratio is exactly 1, yet NaN where logp is not finite
        old_logp = logp
        if old_logp_ptr is not None:
            old_logp = tl.load(old_logp_ptr + row)
        log_ratio = logp - old_logp
        ratio = tl.exp(log_ratio)
        advantage = tl.load(advantage_ptr + row)
        loss, dlogp, dlog_ratio, kl = token_terms(
            logp,
            log_ratio,
            advantage,
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
        if ref_logits_ptr is not None:
            kl = exact_kl(z, rest, ref_z, ref_rest, cross)
            if beta != 0:
                loss += beta * kl
                dkl = beta * weight
        dlogp = weight * (dlogp + dlog_ratio)
        loss = weight * loss
        if entropy_weight_ptr is not None:
            dentropy = -tl.load(entropy_weight_ptr + row)
            loss += dentropy * entropy
        usable = is_finite(logp) & is_finite(log_ratio) & is_finite(ratio)
        dropped = (usable & is_finite(loss) & is_finite(dlogp)) == 0
        loss = tl.where(dropped, 0.0, loss)
        dlogp = tl.where(dropped, 0.0, dlogp)
        dentropy = tl.where(dropped, 0.0, dentropy)
        dkl = tl.where(dropped, 0.0, dkl)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(ratio_ptr + row, ratio)
    tl.store(kl_ptr + row, kl)
    tl.store(loss_ptr + row, loss)
    tl.store(dlogp_ptr + row, dlogp)
    tl.store(dropped_ptr + row, dropped)
    tl.store(state_ptr + row, peak)
    tl.store(state_ptr + N + row, rest)
    if ref_logits_ptr is not None:
        tl.store(state_ptr + 2 * N + row, ref_peak)
        tl.store(state_ptr + 3 * N + row, ref_rest)
        ref = (ref_ptr, ref_peak, ref_rest, ref_z, kl)
    if dlogits_ptr is not None:
        out = row_start(row, out_rows_per_batch, out_batch_stride, out_row_stride)
        if (dlogp != 0) | (dentropy != 0) | (dkl != 0):
            write_row_gradient(
                logits_ptr + start,
                dlogits_ptr + out,
                V,
                word,
                scale,
                (dlogp, dentropy, dkl),
                (peak, rest, z, entropy),
                ref,
                entropy_weight_ptr is not None,
                THREADS,
                WIDTH,
                TILES,
                held,
                KEPT,
                BACKWARDS,
            )
        else:
            write_row_zeros(dlogits_ptr + out, V, THREADS, WIDTH)


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
        rows: logits of N tokens over V words, float32, bfloat16 or float16.
        tokens: targets, weights, advantages and what else is given of each.
        temperature: T, the logits are divided by it.
        terms: the objective's formulas.
        dlogits: written if given, of the logits' shape; may be the logits.
        ref_rows: the reference policy's logits of the same tokens, for the exact KL, or None.
    """
    out = rows if dlogits is None else Rows.of(dlogits)
    ref = ref_rows or rows
    states = 2 if ref_rows is None else 4
    state = torch.empty(states, rows.N, dtype=torch.float32, device=rows.logits.device)
    result = RowLoss.empty(rows.N, rows.logits.device, state)
    layout = row_layout(rows)
    launch(
        _row_loss_kernel,
        rows.N,
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
        logp_ptr=result.logp,
        entropy_ptr=result.entropy,
        ratio_ptr=result.ratio,
        kl_ptr=result.kl,
        loss_ptr=result.loss,
        dlogp_ptr=result.dlogp,
        dropped_ptr=result.dropped,
        state_ptr=result.state,
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
        beta=terms.beta,
        surrogate_args=terms.surrogate_args,
        SURROGATE=terms.surrogate,
        KL=terms.kl,
        KL_TIMES_RATIO=terms.kl_times_ratio,
        **layout.of_two_readings(rows.V, dlogits is not None, ref_rows is not None),
    )
    return result
