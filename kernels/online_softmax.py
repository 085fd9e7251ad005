"""The softmax of a row of logits from one reading: sums of powers without the target.

All row kernels call these functions, so a row's log-probability is bit for bit the same in every
plan, in every batch, and wherever the row lies in memory.

A row is read once, tile by tile (`row_tiles`). Powers are taken relative to an `anchor` that is
known before the row is read: the largest of its first tile and its target. So there is no running
maximum, nothing to rescale, and one multiply-add less per logit than in an online softmax. Each
place of a tile has sums of its own, to which each column with the same remainder modulo the tile is
added in turn; then these sums are added up in the order of the columns. The order is the same
whatever the alignment, and no thread waits for another until the row is finished. Logits are scaled
by log₂(e)/T inside one multiply-add, and all powers are powers of two.

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
    V,
    target_col,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """(anchor, Σ 2^c, Σ 2^c·c) of a row without its target, c = scaled logit − anchor."""
    anchor, sum_others, moment_others = anchored_sums(
        row_ptr, V, target_col, scale, THREADS, WIDTH, TILES
    )
    if not is_near(anchor, sum_others):
        largest, _ = largest_other(row_ptr, V, target_col, THREADS, WIDTH)
        sum_others, moment_others = sums_below(
            row_ptr, V, target_col, V, largest, scale, THREADS, WIDTH
        )
        anchor, sum_others, moment_others, _ = from_largest(
            largest, sum_others, moment_others, scale
        )
    return anchor, sum_others, moment_others


@triton.jit
def anchored_sums(
    row_ptr,
    V,
    target_col,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """What `row_softmax` returns, the anchor being that of `row_anchor`."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    lead = row_lead(row_ptr, WIDTH)
    end, target_place = V + lead, target_col + lead
    row_ptr = boundary(row_ptr, lead)
    logits = load_part(row_ptr, places, lead, end)
    target_logit = tl.load(row_ptr + target_place)
    anchor = row_anchor(logits, places - lead, target_logit, scale, THREADS, WIDTH)
    logits = tl.where(places == target_place, float("-inf"), logits)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    sums, moments, _, _ = add_powers(zeros, zeros, logits, scale, anchor)
    for first in range(tile, end, step):
        others = (target_place < first) | (target_place >= first + step)
        if is_whole(first, step, lead, end) & others:
            for k in tl.static_range(TILES):
                logits = load_whole(row_ptr + first + k * tile, THREADS, WIDTH)
                sums, moments, _, _ = add_powers(sums, moments, logits, scale, anchor)
        else:
            for start in range(first, tl.minimum(first + step, end), tile):
                logits = load_tile(row_ptr, start, lead, end, THREADS, WIDTH)
                logits = tl.where(start + places == target_place, float("-inf"), logits)
                sums, moments, _, _ = add_powers(sums, moments, logits, scale, anchor)
    order = wide_order(lead, THREADS, WIDTH)
    return anchor, sum_in_order(sums, order), sum_in_order(moments, order)


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
def load_others(row_ptr, at, V, target_col):
    """Some columns as float32, −inf at the target and beyond the row."""
    return tl.where(at == target_col, float("-inf"), load_part(row_ptr, at, 0, V))


@triton.jit
def largest_other(row_ptr, V, target_col, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest logit beside the target's and its first column; −inf and V without others."""
    columns = strided_columns(THREADS, WIDTH)
    largest = tl.full([THREADS, WIDTH], float("-inf"), tl.float32)
    column = columns * 0 + V
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target_col)
        column = tl.where(logits > largest, first + columns, column)
        largest = tl.maximum(largest, logits)
    of_row = tl.max(largest)
    return of_row, tl.min(tl.where(largest == of_row, column, V))


@triton.jit
def sums_below(
    row_ptr,
    V,
    target_col,
    other_col,
    largest,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(Σ 2^c, Σ 2^c·c) of a row without two columns, c relative to `largest`."""
    columns = strided_columns(THREADS, WIDTH)
    sums = tl.zeros([THREADS, WIDTH], tl.float32)
    moments = tl.zeros([THREADS, WIDTH], tl.float32)
    base = finite_base(largest)
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target_col)
        logits = tl.where(first + columns == other_col, float("-inf"), logits)
        sums, moments, _, _ = add_powers(sums, moments, logits - base, scale, 0.0)
    order = strided_order(THREADS, WIDTH)
    return sum_in_order(sums, order), sum_in_order(moments, order)


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
