"""The softmax of a row of logits from one reading, and what its statistics are.

Both row kernels and the stats kernel call these functions, so a row's log-probability is bit for
bit the same in every plan, in every batch, and wherever the row lies in memory.

A row is read once, tile by tile (`row_tiles`). Powers are taken relative to an `anchor` that is
known before the row is: the largest of its first tile and its target. So there is no running
maximum to keep and nothing to rescale. Each place of a tile has sums of its own, to which each
column with the same remainder modulo the tile is added in turn; the order is that of the columns,
whatever the alignment, and these sums are added up in the order of the columns, too. No thread
waits for another until the row is finished. Logits are scaled by log₂(e)/T inside one multiply-add,
and all powers are powers of two.

An anchor far below the largest logit, or far above all, would cost digits or overflow. That shows
in the sum itself (`is_near`). Such a row, which hardly ever has a sampled target, is read twice
more: for the largest of the others, and for sums relative to that. So is a row in which another
word than the target is nearly certain, for its entropy alone (`sure_entropy`).

Logits beyond 2³⁰·T/log₂(e) are too large to be scaled: the rounding of M would outweigh what a
float32 can express. A row whose largest is one, as of words that are forbidden by −1e32, has
unscaled logits for M, and S negative as the sign of that.

The target is left out of the sum. With S = Σ_{j≠y} 2^(x_j − M) over the *other* logits, M the
anchor or the maximum, and z = log₂ S − (x_y − M), everything follows without cancellation, however
confident the token: logp = −softplus(z), 1 − p_y = sigmoid(z), and H = h(p_y) + (1 − p_y)·H_others
with the binary entropy h (all in base 2).
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
    unpack_words,
    wide_order,
)
from .scalar_math import log1p

# below every real logit, finite so that a row of −inf gives no NaN
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# scaled logits from which on M would be rounded by a power of 2⁶⁴
FAR = tl.constexpr(2.0**30)
# nats of a row in which one word is nearly certain; the first reading is right to 1e-6 of a nat
SURE = tl.constexpr(0.125)
# A sum of powers that tells of a good anchor. Below, a few powers underflow that count (2⁻⁴⁶ of the
# sum); above, the entropy's terms outgrow those of an even softmax over a vocabulary, log₂ V = 18.
LEAST_SUM, LARGEST_SUM = tl.constexpr(2.0**-80), tl.constexpr(2.0**18)


@triton.jit
def row_softmax(
    row_ptr,
    V,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    held=None,
    KEPT: tl.constexpr = None,
):
    """(M, S, Σ 2^c·c) of a row without its target, c = x − M.

    For a second reading: the tiles behind the first may have been read already, `held` in
    registers, and the caches are asked to keep the last KEPT and none before them.
    """
    anchor, rest, moment = anchored_sums(
        row_ptr, V, target, scale, THREADS, WIDTH, TILES, held, KEPT
    )
    if not is_near(anchor, rest):
        largest, _ = largest_other(row_ptr, V, target, THREADS, WIDTH)
        rest, moment = sums_below(row_ptr, V, target, V, largest, scale, THREADS, WIDTH)
        anchor, rest, moment, _ = as_state(largest, rest, moment, scale)
    return anchor, rest, moment


@triton.jit
def row_anchor(logits, columns, mine, scale, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest scaled logit among the target's, `mine`, and those of the first tile.

    Only columns that the first tile holds wherever the row lies.
    """
    among = tl.where(columns < (THREADS - 1) * WIDTH, logits, float("-inf"))
    return tl.maximum(tl.maximum(tl.max(among), mine.to(tl.float32)) * scale, LOWEST)


@triton.jit
def is_near(anchor, rest):
    """Whether the anchor of such a sum was good; neither of NaN nor of infinity."""
    return (rest >= LEAST_SUM) & (rest <= LARGEST_SUM) & (tl.abs(anchor) < FAR)


@triton.jit
def anchored_sums(
    row_ptr,
    V,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    held,
    KEPT: tl.constexpr,
):
    """(M, S, Σ 2^c·c) of a row without its target, M its anchor."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    lead = row_lead(row_ptr, WIDTH)
    end, hole = V + lead, target + lead
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    row_ptr = boundary(row_ptr, lead)
    logits = load_part(row_ptr, places, lead, end)
    mine = tl.load(row_ptr + hole)
    anchor = row_anchor(logits, places - lead, mine, scale, THREADS, WIDTH)
    logits = tl.where(places == hole, float("-inf"), logits)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    rest, moment, _, _ = add_powers(zeros, zeros, logits, scale, anchor)
    begin = tile
    if held is not None:
        for k in tl.static_range(len(held)):
            logits = unpack_words(held[k], dtype, THREADS, WIDTH)
            if (hole >= begin) & (hole < begin + tile):
                logits = tl.where(begin + places == hole, float("-inf"), logits)
            rest, moment, _, _ = add_powers(rest, moment, logits, scale, anchor)
            begin += tile
    row = row_ptr, lead, end, hole
    sums = rest, moment
    if KEPT is None:
        sums = add_steps(sums, row, begin, end, scale, anchor, THREADS, WIDTH, TILES, None)
    else:
        kept = begin + tl.maximum(end - begin - KEPT * tile, 0) // step * step
        sums = add_steps(
            sums, row, begin, kept, scale, anchor, THREADS, WIDTH, TILES, "evict_first"
        )
        sums = add_steps(sums, row, kept, end, scale, anchor, THREADS, WIDTH, TILES, "evict_last")
    order = wide_order(lead, THREADS, WIDTH)
    return anchor, sum_in_order(sums[0], order), sum_in_order(sums[1], order)


@triton.jit
def add_steps(
    sums,
    row,
    begin,
    until,
    scale,
    anchor,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Adds a row from place `begin` on, step by step until one begins at `until` or behind."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    rest, moment = sums
    row_ptr, lead, end, hole = row
    for first in range(begin, until, step):
        if is_whole(first, step, lead, end) & ((hole < first) | (hole >= first + step)):
            for k in tl.static_range(TILES):
                logits = load_whole(row_ptr + first + k * tile, THREADS, WIDTH, EVICT)
                rest, moment, _, _ = add_powers(rest, moment, logits, scale, anchor)
        else:
            for start in range(first, tl.minimum(first + step, end), tile):
                logits = load_tile(row_ptr, start, lead, end, THREADS, WIDTH)
                logits = tl.where(start + places == hole, float("-inf"), logits)
                rest, moment, _, _ = add_powers(rest, moment, logits, scale, anchor)
    return rest, moment


@triton.jit
def add_powers(rest, moment, logits, scale, anchor):
    """Adds 2^c and 2^c·c of a tile to the sums; returns also 2^c and c."""
    centred = tl.fma(logits, scale, -anchor)
    power = tl.exp2(centred)
    return rest + power, tl.fma(power, tl.maximum(centred, LOWEST), moment), power, centred


@triton.jit
def largest_other(row_ptr, V, target, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest logit that is not the target's and the first word that has it, else −inf, V."""
    columns = strided_columns(THREADS, WIDTH)
    largest = tl.full([THREADS, WIDTH], float("-inf"), tl.float32)
    word = columns * 0 + V
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target)
        word = tl.where(logits > largest, first + columns, word)
        largest = tl.maximum(largest, logits)
    of_row = tl.max(largest)
    return of_row, tl.min(tl.where(largest == of_row, word, V))


@triton.jit
def sums_below(
    row_ptr,
    V,
    target,
    word,
    largest,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(Σ 2^c, Σ 2^c·c) of a row without its target and a `word`, c relative to `largest`."""
    columns = strided_columns(THREADS, WIDTH)
    rest = tl.zeros([THREADS, WIDTH], tl.float32)
    moment = tl.zeros([THREADS, WIDTH], tl.float32)
    base = finite_base(largest)
    for first in range(0, V, THREADS * WIDTH):
        logits = load_others(row_ptr, first + columns, V, target)
        logits = tl.where(first + columns == word, float("-inf"), logits)
        rest, moment, _, _ = add_powers(rest, moment, logits - base, scale, 0.0)
    order = strided_order(THREADS, WIDTH)
    return sum_in_order(rest, order), sum_in_order(moment, order)


@triton.jit
def finite_base(largest):
    """What is taken off a row's logits: nothing where all are −inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def as_state(largest, rest, moment, scale):
    """(M, S, Σ 2^c·c, by how much their c are larger) from sums relative to the largest."""
    scaled = largest * scale
    real = tl.abs(largest) < float("inf")
    far = real & (tl.abs(scaled) >= FAR)
    peak = tl.where(far, largest, tl.maximum(scaled, LOWEST))
    # what the rounding of M has added
    shift = tl.where(real & (far == 0), tl.fma(largest, scale, -peak), 0.0)
    unit = tl.exp2(shift)
    moment = unit * tl.fma(shift, rest, moment)
    rest = unit * rest
    return peak, tl.where(far, -rest, rest), moment, shift


@triton.jit
def load_others(row_ptr, at, V, target):
    """Some columns as float32, −inf at the target and beyond the row."""
    return tl.where(at == target, float("-inf"), load_part(row_ptr, at, 0, V))


@triton.jit
def target_gap(row_ptr, target, scale, peak, rest):
    """z = log₂ S − (x_y − M), how far the others stand above the target; what its rounding lost."""
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    far = rest < 0
    others = tl.log2(tl.abs(rest))
    mine = tl.fma(target_logit, scale, -peak)
    mine = tl.where(far, (target_logit - peak) * scale, mine)
    z = others - mine
    of_mine = z - others
    lost = tl.where(tl.abs(z) < float("inf"), (others - (z - of_mine)) - (mine + of_mine), 0.0)
    # an infinite target would pass for a certain one
    return tl.where(target_logit == float("inf"), float("nan"), z), lost


@triton.jit
def sigmoid2(z):
    """2ᶻ / (1 + 2ᶻ), each tail with full relative precision."""
    y = tl.exp2(-tl.abs(z))
    return tl.where(z > 0, 1.0, y) / (1 + y)


@triton.jit
def log_sides(z, lost=0.0):
    """log p_y and log(1 − p_y), nats, each with full relative precision; z may have lost a bit."""
    softplus = log1p(tl.exp2(-tl.abs(z)))
    logp = -tl.fma(tl.maximum(z, 0.0), LN2, softplus + lost * LN2 * sigmoid2(z))
    return logp, -tl.fma(tl.maximum(-z, 0.0), LN2, softplus)


@triton.jit
def token_statistics(z, lost, rest, moment):
    """logp and entropy of a token, in nats, from z and what it lost, S and Σ 2^c·c."""
    logp, log_others = log_sides(z, lost)
    rest = tl.abs(rest)
    entropy_others = (tl.log2(rest) - moment / rest) * LN2
    others, mine = sigmoid2(z), sigmoid2(-z)
    # 0·log 0 = 0: a target or a remainder of probability 0 has no entropy
    entropy = tl.where(others > 0, others * (entropy_others - log_others), 0.0)
    entropy -= tl.where(mine > 0, mine * logp, 0.0)
    return logp, entropy


@triton.jit
def is_sure(z, entropy):
    """Whether another word than the target is nearly certain."""
    return (z > 0) & (entropy < SURE)


@triton.jit
def sums_beside_sure(row_ptr, V, target, scale, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """(x_w, w, Σ_{j≠w} 2^c, Σ_{j≠w} 2^c·c), c = (x_j − x_w)·scale, of the most likely other word w.

    p_w = 1/(1 + Σ 2^c), H = log(1 + Σ 2^c) + (log p_w + H): nothing cancels in either part, since
    log p_w + H = −p_w·log 2·Σ 2^c·c.
    """
    largest, word = largest_other(row_ptr, V, target, THREADS, WIDTH)
    rest, moment = sums_below(row_ptr, V, target, word, largest, scale, THREADS, WIDTH)
    mine = tl.maximum((tl.load(row_ptr + target).to(tl.float32) - largest) * scale, LOWEST)
    power = tl.exp2(mine)
    return largest, word, rest + power, tl.fma(power, mine, moment)


@triton.jit
def sure_entropy(entropy, z, row_ptr, V, target, scale, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The entropy, nats; found again where another word than the target is nearly certain.

    There log₂ S − Σ 2^c·c / S takes the logarithm of a sum that has rounded the others away.
    """
    if is_sure(z, entropy):
        _, _, rest, moment = sums_beside_sure(row_ptr, V, target, scale, THREADS, WIDTH)
        entropy = log1p(rest) - LN2 * moment / (1 + rest)
    return entropy


@triton.jit
def weighted_gap(weight, centred, ref_centred):
    """weight·(c − c_ref), and 0 for a word of weight 0, whatever π_ref says of it."""
    return tl.where(weight != 0, weight * (centred - ref_centred), 0.0)
