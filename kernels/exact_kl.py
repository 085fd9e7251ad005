"""The exact KL(π ‖ π_ref) of a row, over the whole vocabulary, from both rows of logits.

Both rows are read once, side by side; the policy's is summed by the same steps as in
`online_softmax`, so its log-probability keeps its bits. With the target y apart from the others,

    KL = p_y·(log p_y − log q_y) + (1 − p_y)·(log(1 − p_y) − log(1 − q_y) + KL_others)
    dKL/dx_j = p_j·(log p_j − log q_j − KL) / T

where KL_others is that of the softmax over the other words: Σ 2^c·(c − c_ref) / S − log₂ S +
log₂ S_ref in base 2. Exactly 0 where the two rows are equal, infinite where π_ref forbids a word
that π allows.
"""

from .language import tl, triton
from .online_softmax import (
    LN2,
    LOWEST,
    absorb,
    log_sides,
    sigmoid2,
    tile_columns,
    weighted_gap,
)


@triton.jit
def row_softmax_pair(
    row_ptr,
    ref_ptr,
    V,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(M, S, Σ 2^c·c) of a row without its target, (M, S) of π_ref, and Σ 2^c·(c − c_ref)."""
    tile: tl.constexpr = THREADS * WIDTH
    columns = tile_columns(THREADS, WIDTH, VECTOR)
    peak = tl.full([THREADS], LOWEST, tl.float32)
    rest = tl.zeros([THREADS], tl.float32)
    moment = tl.zeros([THREADS], tl.float32)
    ref_peak = tl.full([THREADS], LOWEST, tl.float32)
    ref_rest = tl.zeros([THREADS], tl.float32)
    unused = tl.zeros([THREADS], tl.float32)
    cross = tl.zeros([THREADS], tl.float32)
    for first in range(0, V, tile):
        at = first + columns
        if (first + tile <= V) & ((target < first) | (target >= first + tile)):
            logits = tl.load(row_ptr + at).to(tl.float32)
            ref_logits = tl.load(ref_ptr + at).to(tl.float32)
        else:
            inside = (at < V) & (at != target)
            logits = tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
            ref_logits = tl.load(ref_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        old_peak, old_ref_peak, old_rest = peak, ref_peak, rest
        peak, rest, moment = absorb(peak, rest, moment, logits, scale)
        ref_peak, ref_rest, unused = absorb(ref_peak, ref_rest, unused, ref_logits, scale)
        shift = old_peak - peak
        moved = shift - (old_ref_peak - ref_peak)
        centred = tl.fma(logits, scale, -peak[:, None])
        ref_centred = tl.fma(ref_logits, scale, -ref_peak[:, None])
        cross = tl.exp2(shift) * (cross + moved * old_rest)
        cross += tl.sum(weighted_gap(tl.exp2(centred), centred, ref_centred), 1)

    row_peak, row_ref_peak = tl.max(peak, 0), tl.max(ref_peak, 0)
    shift = peak - row_peak
    ref_shift = ref_peak - row_ref_peak
    decay = tl.exp2(shift)
    cross = tl.sum(decay * (cross + (shift - ref_shift) * rest), 0)
    moment = tl.sum(decay * (moment + shift * rest), 0)
    rest = tl.sum(decay * rest, 0)
    return row_peak, rest, moment, row_ref_peak, tl.sum(tl.exp2(ref_shift) * ref_rest, 0), cross


@triton.jit
def exact_kl(z, rest, ref_z, ref_rest, cross):
    """KL(π ‖ π_ref) of a row, nats, from what `row_softmax_pair` found and both target gaps."""
    logp, log_others = log_sides(z)
    ref_logp, ref_log_others = log_sides(ref_z)
    others, mine = sigmoid2(z), sigmoid2(-z)
    kl_others = (cross / rest - tl.log2(rest) + tl.log2(ref_rest)) * LN2
    kl_others = tl.where(cross == float("inf"), cross, kl_others)
    kl = tl.where(others > 0, others * (log_others - ref_log_others + kl_others), 0.0)
    return kl + tl.where(mine > 0, mine * (logp - ref_logp), 0.0)
