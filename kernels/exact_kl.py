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
    load_others,
    load_tiles,
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
    TILES: tl.constexpr,
):
    """(M, S, Σ 2^c·c) of a row without its target, (M, S) of π_ref, Σ 2^c·(c − c_ref)."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    columns = tile_columns(THREADS, WIDTH, VECTOR)
    peak = tl.full([THREADS], LOWEST, tl.float32)
    zeros = tl.zeros([THREADS], tl.float32)
    # (M, S, Σ 2^c·c) of π, (M, S, Σ 2^c·c) of π_ref, and Σ 2^c·(c − c_ref)
    pair = peak, zeros, zeros, peak, zeros, zeros, zeros
    for first in range(0, V, step):
        if (first + step <= V) & ((target < first) | (target >= first + step)):
            tiles = load_tiles(row_ptr + first, columns, THREADS, WIDTH, VECTOR, TILES)
            ref_tiles = load_tiles(ref_ptr + first, columns, THREADS, WIDTH, VECTOR, TILES)
            pair = absorb_pair(pair, tiles, ref_tiles, scale)
        else:
            for start in range(first, tl.minimum(first + step, V), tile):
                at = start + columns
                logits = load_others(row_ptr, at, V, target, WIDTH, VECTOR)
                ref_logits = load_others(ref_ptr, at, V, target, WIDTH, VECTOR)
                pair = absorb_pair(pair, (logits,), (ref_logits,), scale)

    peak, rest, moment, ref_peak, ref_rest, _, cross = pair
    row_peak, row_ref_peak = tl.max(peak, 0), tl.max(ref_peak, 0)
    shift = peak - row_peak
    ref_shift = ref_peak - row_ref_peak
    decay = tl.exp2(shift)
    cross = tl.sum(decay * (cross + (shift - ref_shift) * rest), 0)
    moment = tl.sum(decay * (moment + shift * rest), 0)
    rest = tl.sum(decay * rest, 0)
    return row_peak, rest, moment, row_ref_peak, tl.sum(tl.exp2(ref_shift) * ref_rest, 0), cross


@triton.jit
def absorb_pair(pair, tiles, ref_tiles, scale):
    """Takes the same tiles of both rows into the running sums of `row_softmax_pair`."""
    old_peak, old_rest, moment, old_ref_peak, ref_rest, ref_moment, cross = pair
    peak, rest, moment = absorb(old_peak, old_rest, moment, tiles, scale)
    ref_peak, ref_rest, ref_moment = absorb(old_ref_peak, ref_rest, ref_moment, ref_tiles, scale)
    shift = old_peak - peak
    moved = shift - (old_ref_peak - ref_peak)
    cross = tl.exp2(shift) * (cross + moved * old_rest)
    gaps = tl.zeros_like(tiles[0])
    for k in tl.static_range(len(tiles)):
        centred = tl.fma(tiles[k], scale, -peak[:, None])
        ref_centred = tl.fma(ref_tiles[k], scale, -ref_peak[:, None])
        gaps += weighted_gap(tl.exp2(centred), centred, ref_centred)
    return peak, rest, moment, ref_peak, ref_rest, ref_moment, cross + tl.sum(gaps, 1)


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
