"""The softmax of a row of logits from one reading: sums of powers without the target.

All row kernels call these functions, so a row's log-probability is bit for bit the same in every
plan, in every batch, and wherever the row lies in memory.

A row is read once, tile by tile (`row_tiles`). Powers are taken relative to an `anchor` that is
known before the row is read: the largest of its first tile and its target. So there is no running
maximum, nothing to rescale, and one multiply-add less per logit than in an online softmax. Each
place of a tile has sums of its own, to which each column with the same remainder modulo the tile is
added in turn; then these sums are added up in the order of the columns. The order is the same
whatever the alignment, and no thread waits for another until the row is finished. Logits are scaled
by log₂(e)/T inside one multiply-add, and all powers are powers of two. The row of a reference is
read side by side, by the same steps; both must lie alike between multiples of 16 bytes.

An anchor far below the largest logit, or far above all, would cost digits or overflow. That shows
in the sum itself (`is_near`). Such a row, which hardly ever has a sampled target, is read twice
more: for the largest of the others, and for sums relative to that.

Logits beyond 2³⁰·T/log₂(e) are too large to be scaled: the rounding of the anchor would outweigh
what a float32 can express. A row whose largest is one, as of forbidden tokens with −1e32, has an
unscaled logit as its anchor, and a negative `sum_others` as the sign of that.
"""

from .language import tl, triton
from .row_tiles import (
    boundary,
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

# below every real logit, finite so that a row of −inf gives no NaN
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# scaled logits from which on an anchor would be rounded by a power of 2⁶⁴
FAR = tl.constexpr(2.0**30)
# A sum of powers that tells of a good anchor. Below, a few powers underflow that count (2⁻⁴⁶ of the
# sum); above, the entropy's terms outgrow those of an even softmax over a vocabulary, log₂ V = 18.
LEAST_SUM, LARGEST_SUM = tl.constexpr(2.0**-80), tl.constexpr(2.0**18)


@triton.jit
def row_softmax(
    row_ptr,
    ref_ptr,
    V,
    target_col,
    scale,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """(anchor, Σ 2^c, Σ 2^c·c) without the target, (anchor, Σ 2^c) of π_ref, Σ 2^c·(c − c_ref).

    c = scaled logit − anchor. The last is Σ 2^c_ref·(c_ref − c) for the forward KL, and not used
    for a mixture. Without a reference, `ref_ptr` None, its sums are 0.
    """
    anchor, sum_others, moment_others, ref_anchor, ref_sum, cross = anchored_sums(
        row_ptr, ref_ptr, V, target_col, scale, DIVERGENCE, THREADS, WIDTH, TILES
    )
    near = is_near(anchor, sum_others)
    both_near = near
    if ref_ptr is not None:
        both_near = near & is_near(ref_anchor, ref_sum)
    if not both_near:
        largest, _ = largest_other(row_ptr, V, target_col, THREADS, WIDTH)
        ref_largest = largest
        if ref_ptr is not None:
            ref_largest, _ = largest_other(ref_ptr, V, target_col, THREADS, WIDTH)
        below, moment_below, ref_below, cross_below = sums_below(
            (row_ptr, ref_ptr), V, target_col, None, (largest, ref_largest), scale, DIVERGENCE,
            THREADS, WIDTH,
        )  # fmt: skip
        peak, total, moment, shift = from_largest(largest, below, moment_below, scale)
        if ref_ptr is not None:
            ref_anchor, ref_sum, _, ref_shift = from_largest(ref_largest, ref_below, 0.0, scale)
            # where only π_ref has a bad anchor, π keeps what it has without one
            shift = tl.where(near, tl.fma(largest, scale, -anchor), shift)
            peak = tl.where(near, anchor, peak)
            total = tl.where(near, sum_others, total)
            moment = tl.where(near, moment_others, moment)
            if DIVERGENCE == "forward":
                cross = tl.exp2(ref_shift) * (cross_below + (ref_shift - shift) * ref_below)
            else:
                cross = tl.exp2(shift) * (cross_below + (shift - ref_shift) * below)
        anchor, sum_others, moment_others = peak, total, moment
    return anchor, sum_others, moment_others, ref_anchor, ref_sum, cross


@triton.jit
def anchored_sums(
    row_ptr,
    ref_ptr,
    V,
    target_col,
    scale,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """What `row_softmax` returns, the anchors being those of `row_anchor`."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    lead = row_lead(row_ptr, WIDTH)
    end, target_place = V + lead, target_col + lead
    row_ptr = boundary(row_ptr, lead)
    logits = load_others(row_ptr, places, lead, end, target_place)
    target_logit = tl.load(row_ptr + target_place)
    anchor = row_anchor(logits, places - lead, target_logit, scale, THREADS, WIDTH)
    ref_logits, ref_anchor = None, 0.0
    if ref_ptr is not None:
        ref_ptr = boundary(ref_ptr, lead)
        ref_logits = load_others(ref_ptr, places, lead, end, target_place)
        ref_target = tl.load(ref_ptr + target_place)
        ref_anchor = row_anchor(ref_logits, places - lead, ref_target, scale, THREADS, WIDTH)
    pointers, anchors = (row_ptr, ref_ptr), (anchor, ref_anchor)
    ends = (lead, end, target_place)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    sums = add_tile((zeros, zeros, zeros, zeros), logits, ref_logits, scale, anchors, DIVERGENCE)
    # Whole tiles up to the target's, that one masked, whole tiles again, the last masked, which may
    # lie behind the row. A branch in a loop would move all sums to where its two ways meet.
    first, stop = tile, tl.maximum(target_place // tile, 1) * tile
    for _ in range(2):
        whole = first + (stop - first) // step * step
        for start in range(first, whole, step):
            for k in tl.static_range(TILES):
                sums = add_both(
                    sums, pointers, start, k * tile, None, scale, anchors, DIVERGENCE,
                    THREADS, WIDTH,
                )  # fmt: skip
        for start in range(whole, stop, tile):
            sums = add_both(
                sums, pointers, start, 0, None, scale, anchors, DIVERGENCE, THREADS, WIDTH
            )
        sums = add_both(sums, pointers, stop, 0, ends, scale, anchors, DIVERGENCE, THREADS, WIDTH)
        first = stop + tile
        stop = tl.maximum(first, end // tile * tile)
    order = wide_order(lead, THREADS, WIDTH)
    total, moment, ref_total, cross = each_in_order(sums, order, ref_ptr is not None)
    return anchor, total, moment, ref_anchor, ref_total, cross


@triton.jit
def add_both(
    sums,
    pointers,
    first,
    shift,
    ends,
    scale,
    anchors,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the tile from place `first + shift` on of both rows, the second None without π_ref.

    `ends` = (lead, end, target's place), or None for a whole tile without the target.
    """
    row_ptr, ref_ptr = pointers
    ref_logits = None
    if ends is None:
        logits = load_whole(row_ptr + first + shift, THREADS, WIDTH)
        if ref_ptr is not None:
            ref_logits = load_whole(ref_ptr + first + shift, THREADS, WIDTH)
    else:
        lead, end, target_place = ends
        other = tile_places(THREADS, WIDTH, first) != target_place
        logits = load_tile(row_ptr, first, lead, end, THREADS, WIDTH)
        if ref_ptr is not None:
            ref_logits = load_tile(ref_ptr, first, lead, end, THREADS, WIDTH)
            ref_logits = tl.where(other, ref_logits, float("-inf"))
        logits = tl.where(other, logits, float("-inf"))
    return add_tile(sums, logits, ref_logits, scale, anchors, DIVERGENCE)


@triton.jit
def row_anchor(logits, columns, target_logit, scale, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest scaled logit among the target's and those of the first tile.

    Only columns that the first tile holds wherever the row lies.
    """
    first = tl.where(columns < (THREADS - 1) * WIDTH, logits, float("-inf"))
    return tl.maximum(tl.maximum(tl.max(first), target_logit.to(tl.float32)) * scale, LOWEST)


@triton.jit
def is_near(anchor, sum_others):
    """Whether the anchor of such a sum was good; neither of NaN nor of infinity."""
    return (sum_others >= LEAST_SUM) & (sum_others <= LARGEST_SUM) & (tl.abs(anchor) < FAR)


@triton.jit
def add_powers(sums, moments, logits, scale, anchor):
    """Adds 2^c and 2^c·c of a tile to the sums; returns also 2^c and c."""
    centred = tl.fma(logits, scale, -anchor)
    power = tl.exp2(centred)
    return sums + power, tl.fma(power, tl.maximum(centred, LOWEST), moments), power, centred


@triton.jit
def add_tile(sums, logits, ref_logits, scale, anchors, DIVERGENCE: tl.constexpr):
    """Adds a tile of both rows to (Σ 2^c, Σ 2^c·c, Σ 2^c_ref, Σ 2^c·(c − c_ref))."""
    total, moment, ref_total, cross = sums
    total, moment, power, centred = add_powers(total, moment, logits, scale, anchors[0])
    if ref_logits is not None:
        ref_centred = tl.fma(ref_logits, scale, -anchors[1])
        if DIVERGENCE == "reverse":
            cross += weighted_gap(power, centred, ref_centred)
        ref_power = tl.exp2(ref_centred)
        if DIVERGENCE == "forward":
            cross += weighted_gap(ref_power, ref_centred, centred)
        ref_total += ref_power
    return total, moment, ref_total, cross


@triton.jit
def weighted_gap(weight, centred, ref_centred):
    """weight·(c − c_ref), and 0 for a token of weight 0, whatever π_ref says of it."""
    return tl.where(weight != 0, weight * (centred - ref_centred), 0.0)


@triton.jit
def each_in_order(sums, order, PAIR: tl.constexpr):
    """Each of the sums of `add_tile` over its tile."""
    ref_total, cross = 0.0, 0.0
    total, moment = sum_in_order(sums[0], order), sum_in_order(sums[1], order)
    if PAIR:
        ref_total, cross = sum_in_order(sums[2], order), sum_in_order(sums[3], order)
    return total, moment, ref_total, cross


@triton.jit
def load_others(row_ptr, at, lead, end, target_place):
    """Some logits as float32, −inf at the target and outside of the row."""
    return tl.where(at == target_place, float("-inf"), load_part(row_ptr, at, lead, end))


@triton.jit
def largest_other(row_ptr, V, target_col, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest logit beside the target's and its first column; −inf and V without others."""
    columns = strided_columns(THREADS, WIDTH)
    largest = tl.full([THREADS, WIDTH], float("-inf"), tl.float32)
    column = columns * 0 + V
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, 0, V, target_col)
        column = tl.where(logits > largest, first + columns, column)
        largest = tl.maximum(largest, logits)
    of_row = tl.max(largest)
    return of_row, tl.min(tl.where(largest == of_row, column, V))


@triton.jit
def sums_below(
    pointers,
    V,
    target_col,
    other_col,
    largest,
    scale,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sums of `add_tile`, each row's c relative to its `largest`; without a second column."""
    row_ptr, ref_ptr = pointers
    columns = strided_columns(THREADS, WIDTH)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    sums = zeros, zeros, zeros, zeros
    base, ref_base = finite_base(largest[0]), finite_base(largest[1])
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, 0, V, target_col) - base
        if other_col is not None:
            logits = tl.where(first + columns == other_col, float("-inf"), logits)
        ref_logits = None
        if ref_ptr is not None:
            ref_logits = load_others(ref_ptr, first + columns, 0, V, target_col) - ref_base
        sums = add_tile(sums, logits, ref_logits, scale, (0.0, 0.0), DIVERGENCE)
    return each_in_order(sums, strided_order(THREADS, WIDTH), ref_ptr is not None)


@triton.jit
def finite_base(largest):
    """What is subtracted from a row's logits: nothing where all are −inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def from_largest(largest, sum_others, moment_others, scale):
    """(anchor, Σ 2^c, Σ 2^c·c, by how much their c are larger) from sums relative to `largest`."""
    scaled = largest * scale
    real = tl.abs(largest) < float("inf")
    far = real & (tl.abs(scaled) >= FAR)
    anchor = tl.where(far, largest, tl.maximum(scaled, LOWEST))
    # what the rounding of the anchor has added
    shift = tl.where(real & (far == 0), tl.fma(largest, scale, -anchor), 0.0)
    unit = tl.exp2(shift)
    moment_others = unit * tl.fma(shift, sum_others, moment_others)
    sum_others = unit * sum_others
    return anchor, tl.where(far, -sum_others, sum_others), moment_others, shift


@triton.jit
def split_anchor(anchor, sum_others):
    """(what is subtracted from logits before they are scaled, and after) of a row."""
    far = sum_others < 0
    return tl.where(far, anchor, 0.0), tl.where(far, 0.0, anchor)
