"""The exact KL(π ‖ π_ref) of a row, over the whole vocabulary, from both rows of logits.

Both rows are read once, side by side; the policy's is summed by the same steps as in
`online_softmax`, so its log-probability keeps its bits. Where the two lie differently between
multiples of 16 bytes, they are read by narrow loads, in the same order. With the target y apart
from the others,

    KL = p_y·(log p_y − log q_y) + (1 − p_y)·(log(1 − p_y) − log(1 − q_y) + KL_others)
    dKL/dx_j = p_j·(log p_j − log q_j − KL) / T

where KL_others is that of the softmax over the other words: Σ 2^c·(c − c_ref) / S − log₂ S +
log₂ S_ref in base 2. Exactly 0 where the two rows are equal, infinite where π_ref forbids a word
that π allows.
"""

from .language import tl, triton
from .online_softmax import (
    LN2,
    add_powers,
    as_state,
    finite_base,
    is_near,
    largest_other,
    load_others,
    log_sides,
    row_anchor,
    sigmoid2,
    weighted_gap,
)
from .row_tiles import (
    boundary,
    is_whole,
    load_part,
    load_tile,
    load_whole,
    row_lead,
    strided_columns,
    strided_order,
    sum_in_order,
    tile_places,
    wide_order,
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
    TILES: tl.constexpr,
):
    """(M, S, Σ 2^c·c) of a row without its target, (M, S) of π_ref, Σ 2^c·(c − c_ref)."""
    lead = row_lead(row_ptr, WIDTH)
    if lead == row_lead(ref_ptr, WIDTH):
        anchor, rest, moment, ref_anchor, ref_rest, cross = wide_pair(
            row_ptr, ref_ptr, V, lead, target, scale, THREADS, WIDTH, TILES
        )
    else:
        anchor, rest, moment, ref_anchor, ref_rest, cross = strided_pair(
            row_ptr, ref_ptr, V, target, scale, THREADS, WIDTH
        )
    near = is_near(anchor, rest)
    if not (near & is_near(ref_anchor, ref_rest)):
        largest, _ = largest_other(row_ptr, V, target, THREADS, WIDTH)
        ref_largest, _ = largest_other(ref_ptr, V, target, THREADS, WIDTH)
        others, moments, ref_rest, cross = pair_below(
            row_ptr, ref_ptr, V, target, largest, ref_largest, scale, THREADS, WIDTH
        )
        ref_anchor, ref_rest, _, ref_shift = as_state(ref_largest, ref_rest, 0.0, scale)
        peak, whole, moments, shift = as_state(largest, others, moments, scale)
        # where only π_ref has a bad anchor, π keeps what it has without one
        shift = tl.where(near, tl.fma(largest, scale, -anchor), shift)
        cross = tl.exp2(shift) * (cross + (shift - ref_shift) * others)
        anchor = tl.where(near, anchor, peak)
        rest = tl.where(near, rest, whole)
        moment = tl.where(near, moment, moments)
    return anchor, rest, moment, ref_anchor, ref_rest, cross


@triton.jit
def wide_pair(
    row_ptr,
    ref_ptr,
    V,
    lead,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """What `row_softmax_pair` gives, M the anchors: for rows that lie alike."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    end, hole = V + lead, target + lead
    row_ptr, ref_ptr = boundary(row_ptr, lead), boundary(ref_ptr, lead)
    logits = load_part(row_ptr, places, lead, end)
    ref_logits = load_part(ref_ptr, places, lead, end)
    anchors, sums = first_pair(
        row_ptr, ref_ptr, places - lead, logits, ref_logits, hole, lead, scale, THREADS, WIDTH
    )
    for first in range(tile, end, step):
        if is_whole(first, step, lead, end) & ((hole < first) | (hole >= first + step)):
            for k in tl.static_range(TILES):
                logits = load_whole(row_ptr + first + k * tile, THREADS, WIDTH)
                ref_logits = load_whole(ref_ptr + first + k * tile, THREADS, WIDTH)
                sums = add_pair(sums, logits, ref_logits, scale, anchors)
        else:
            for start in range(first, tl.minimum(first + step, end), tile):
                other = start + places != hole
                logits = load_tile(row_ptr, start, lead, end, THREADS, WIDTH)
                ref_logits = load_tile(ref_ptr, start, lead, end, THREADS, WIDTH)
                logits = tl.where(other, logits, float("-inf"))
                ref_logits = tl.where(other, ref_logits, float("-inf"))
                sums = add_pair(sums, logits, ref_logits, scale, anchors)
    return in_order(anchors, sums, wide_order(lead, THREADS, WIDTH))


@triton.jit
def strided_pair(
    row_ptr,
    ref_ptr,
    V,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What `wide_pair` gives, for rows that lie differently."""
    columns = strided_columns(THREADS, WIDTH)
    logits = load_part(row_ptr, columns, 0, V)
    ref_logits = load_part(ref_ptr, columns, 0, V)
    anchors, sums = first_pair(
        row_ptr, ref_ptr, columns, logits, ref_logits, target, 0, scale, THREADS, WIDTH
    )
    for first in range(THREADS * WIDTH, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target)
        ref_logits = load_others(ref_ptr, first + columns, V, target)
        sums = add_pair(sums, logits, ref_logits, scale, anchors)
    return in_order(anchors, sums, strided_order(THREADS, WIDTH))


@triton.jit
def first_pair(
    row_ptr,
    ref_ptr,
    columns,
    logits,
    ref_logits,
    hole,
    lead,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The anchors of both rows, and the sums of `add_pair` over their first tiles."""
    mine, ref_mine = tl.load(row_ptr + hole), tl.load(ref_ptr + hole)
    anchor = row_anchor(logits, columns, mine, scale, THREADS, WIDTH)
    ref_anchor = row_anchor(ref_logits, columns, ref_mine, scale, THREADS, WIDTH)
    anchors = anchor, ref_anchor
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    sums = zeros, zeros, zeros, zeros
    other = columns + lead != hole
    logits = tl.where(other, logits, float("-inf"))
    ref_logits = tl.where(other, ref_logits, float("-inf"))
    return anchors, add_pair(sums, logits, ref_logits, scale, anchors)


@triton.jit
def add_pair(sums, logits, ref_logits, scale, anchors):
    """Adds a tile of both rows to (Σ 2^c, Σ 2^c·c, Σ 2^c_ref, Σ 2^c·(c − c_ref))."""
    rest, moment, ref_rest, cross = sums
    rest, moment, power, centred = add_powers(rest, moment, logits, scale, anchors[0])
    ref_centred = tl.fma(ref_logits, scale, -anchors[1])
    cross += weighted_gap(power, centred, ref_centred)
    return rest, moment, ref_rest + tl.exp2(ref_centred), cross


@triton.jit
def in_order(anchors, sums, order):
    """Anchors and sums as `row_softmax_pair` has them, each of the four summed over its tile."""
    rest, moment, ref_rest, cross = sums
    return (
        anchors[0],
        sum_in_order(rest, order),
        sum_in_order(moment, order),
        anchors[1],
        sum_in_order(ref_rest, order),
        sum_in_order(cross, order),
    )


@triton.jit
def pair_below(
    row_ptr,
    ref_ptr,
    V,
    target,
    largest,
    ref_largest,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sums of `add_pair`, each row's c relative to the largest of its other words."""
    columns = strided_columns(THREADS, WIDTH)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    sums = zeros, zeros, zeros, zeros
    base, ref_base = finite_base(largest), finite_base(ref_largest)
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target) - base
        ref_logits = load_others(ref_ptr, first + columns, V, target) - ref_base
        sums = add_pair(sums, logits, ref_logits, scale, (0.0, 0.0))
    _, rest, moment, _, ref_rest, cross = in_order((0.0, 0.0), sums, strided_order(THREADS, WIDTH))
    return rest, moment, ref_rest, cross


@triton.jit
def exact_kl(z, rest, ref_z, ref_rest, cross):
    """KL(π ‖ π_ref) of a row, nats, from what `row_softmax_pair` found and both target gaps."""
    logp, log_others = log_sides(z)
    ref_logp, ref_log_others = log_sides(ref_z)
    others, mine = sigmoid2(z), sigmoid2(-z)
    rest, ref_rest = tl.abs(rest), tl.abs(ref_rest)
    kl_others = (cross / rest - tl.log2(rest) + tl.log2(ref_rest)) * LN2
    kl_others = tl.where(cross == float("inf"), cross, kl_others)
    kl = tl.where(others > 0, others * (log_others - ref_log_others + kl_others), 0.0)
    return kl + tl.where(mine > 0, mine * (logp - ref_logp), 0.0)
