"""Reading a row of logits once for its softmax, and writing the row of its gradient.

Both row kernels and the stats kernel call these functions and nothing else touches the vocabulary,
so a row's log-probability is bit for bit the same in every plan and in every batch.

A row is read in tiles `[THREADS, WIDTH]`, WIDTH logits to a thread, and TILES of them in one step.
The state of the online softmax (running maximum, sum, entropy sum) is a vector `[THREADS]`,
rescaled once a step: no thread waits for another until the row is finished. Logits are scaled by
log₂(e)/T inside one multiply-add, and all powers are powers of two. Which thread takes which column
depends on V alone, never on where the row happens to lie in memory: neighbours of 16 bytes where V
allows it (VECTOR), else every THREADS-th column, which costs more and narrower loads but the same
bytes.

The target is left out of the sum. With S = Σ_{j≠y} 2^(x_j − M) over the *other* logits and
z = log₂ S − (x_y − M), everything follows without cancellation, however confident the token:
logp = −softplus(z), 1 − p_y = sigmoid(z), and H = h(p_y) + (1 − p_y)·H_others with the binary
entropy h (all in base 2).
"""

from .language import tl, triton
from .scalar_math import log1p

# a running maximum below every real logit, finite so that a row of −inf gives no NaN
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_start(row, rows_per_batch, batch_stride, row_stride, ALIGNMENT: tl.constexpr):
    """Element offset of a row, known to the compiler as a multiple of ALIGNMENT."""
    start = (row // rows_per_batch) * batch_stride + (row % rows_per_batch) * row_stride
    return tl.multiple_of(start, ALIGNMENT)


@triton.jit
def tile_columns(THREADS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of the first tile `[THREADS, WIDTH]`: a thread's are neighbours, or THREADS apart."""
    thread = tl.arange(0, THREADS)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    if VECTOR:
        return thread * WIDTH + place
    else:
        return place * THREADS + thread


@triton.jit
def absorb(peak, rest, moment, tiles, scale):
    """Takes some tiles `[THREADS, WIDTH]` into the running (M, Σ 2^c, Σ 2^c·c), with c = x − M.

    Rescaled once for all of them, which is what several tiles in one step save.
    """
    top = tiles[0]
    for k in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tiles[k])
    new_peak = tl.maximum(peak, tl.max(top, 1) * scale)
    shift = peak - new_peak
    decay = tl.exp2(shift)
    moment = decay * (moment + shift * rest)
    rest = decay * rest
    powers = tl.zeros_like(top)
    moments = tl.zeros_like(top)
    for k in tl.static_range(len(tiles)):
        centred = tl.fma(tiles[k], scale, -new_peak[:, None])
        power = tl.exp2(centred)
        powers += power
        moments += power * tl.maximum(centred, LOWEST)
    return new_peak, rest + tl.sum(powers, 1), moment + tl.sum(moments, 1)


@triton.jit
def load_tiles(
    step_ptr,
    columns,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """The tiles of a whole step as float32.

    Two neighbouring bfloat16 are read as one word, and each made a float32 by one instruction: the
    lower by a shift, the upper by a mask. That splits a tile into its even and its odd columns.
    """
    tile: tl.constexpr = THREADS * WIDTH
    if VECTOR and step_ptr.dtype.element_ty == tl.bfloat16:
        thread = tl.arange(0, THREADS)[:, None]
        words = thread * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        word_ptr = step_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + words
        tiles = halves(tl.load(word_ptr))
        for k in tl.static_range(1, TILES):
            tiles = tiles + halves(tl.load(word_ptr + k * (tile // 2)))
        return tiles
    else:
        tiles = (tl.load(step_ptr + columns).to(tl.float32),)
        for k in tl.static_range(1, TILES):
            tiles = tiles + (tl.load(step_ptr + k * tile + columns).to(tl.float32),)
        return tiles


@triton.jit
def load_raw(tile_ptr, tile: tl.constexpr, TILES: tl.constexpr):
    """The tiles of a whole step as they lie in memory."""
    tiles = (tl.load(tile_ptr),)
    for k in tl.static_range(1, TILES):
        tiles = tiles + (tl.load(tile_ptr + k * tile),)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_others(row_ptr, at, V, target, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """A tile as float32, −inf at the target and beyond the row."""
    logits = tl.load(row_ptr + at, mask=at < row_end(V, WIDTH, VECTOR), other=float("-inf"))
    return tl.where(at == target, float("-inf"), logits.to(tl.float32))


@triton.jit
def row_end(V, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """V, known to the compiler as a multiple of WIDTH where it is one: whole loads are masked."""
    if VECTOR:
        return V // WIDTH * WIDTH
    else:
        return V


@triton.jit
def halves(words):
    """The lower and the upper bfloat16 of each int32, as float32."""
    upper = words & -65536
    return (words << 16).to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)


@triton.jit
def row_softmax(
    row_ptr,
    V,
    target,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """(M, S, Σ 2^c·c) of a row without its target."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    columns = tile_columns(THREADS, WIDTH, VECTOR)
    peak = tl.full([THREADS], LOWEST, tl.float32)
    rest = tl.zeros([THREADS], tl.float32)
    moment = tl.zeros([THREADS], tl.float32)
    for first in range(0, V, step):
        if (first + step <= V) & ((target < first) | (target >= first + step)):
            tiles = load_tiles(row_ptr + first, columns, THREADS, WIDTH, VECTOR, TILES)
            peak, rest, moment = absorb(peak, rest, moment, tiles, scale)
        else:
            for start in range(first, tl.minimum(first + step, V), tile):
                at = start + columns
                logits = load_others(row_ptr, at, V, target, WIDTH, VECTOR)
                peak, rest, moment = absorb(peak, rest, moment, (logits,), scale)

    row_peak = tl.max(peak, 0)
    shift = peak - row_peak
    decay = tl.exp2(shift)
    moment = tl.sum(decay * (moment + shift * rest), 0)
    return row_peak, tl.sum(decay * rest, 0), moment


@triton.jit
def target_gap(row_ptr, target, scale, peak, rest):
    """z = log₂ S − (x_y − M): how far the other logits, together, stand above the target."""
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    z = tl.log2(rest) - tl.fma(target_logit, scale, -peak)
    # an infinite target would pass for a certain one
    return tl.where(target_logit == float("inf"), float("nan"), z)


@triton.jit
def sigmoid2(z):
    """2ᶻ / (1 + 2ᶻ), each tail with full relative precision."""
    y = tl.exp2(-tl.abs(z))
    return tl.where(z > 0, 1.0, y) / (1 + y)


@triton.jit
def log_sides(z):
    """log p_y and log(1 − p_y), nats, each with full relative precision."""
    softplus = log1p(tl.exp2(-tl.abs(z)))
    return -(tl.maximum(z, 0.0) * LN2 + softplus), -(tl.maximum(-z, 0.0) * LN2 + softplus)


@triton.jit
def token_statistics(z, rest, moment):
    """logp and entropy of a token, in nats, from z, S and Σ 2^c·c."""
    logp, log_others = log_sides(z)
    entropy_others = (tl.log2(rest) - moment / rest) * LN2
    others, mine = sigmoid2(z), sigmoid2(-z)
    # 0·log 0 = 0: a target or a remainder of probability 0 has no entropy
    entropy = tl.where(others > 0, others * (entropy_others - log_others), 0.0)
    entropy -= tl.where(mine > 0, mine * logp, 0.0)
    return logp, entropy


@triton.jit
def write_row_gradient(
    row_ptr,
    dlogits_ptr,
    V,
    target,
    scale,
    slopes,
    state,
    ref,
    ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    """dL/dlogits of a whole row, from what L's derivatives by its statistics are.

    `slopes` = dL by (logp, entropy, exact KL), `state` = (M, S, z, H) of the row, and `ref` = (its
    reference logits, M, S, z, KL), or None without an exact KL. With

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

    the gradient beside the target is 2^c·(factor + slope·c + kl_slope·(c − c_ref)): two more
    multiply-adds at most, and none without entropy (ENTROPY) and KL. May write over the row.
    """
    dlogp, dentropy, dkl = slopes
    peak, rest, z, entropy = state
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    columns = tile_columns(THREADS, WIDTH, VECTOR)
    others = sigmoid2(z)
    at_target = dlogp * others
    share = tl.where(rest > 0, others / rest, 0.0)
    factor = -dlogp * share
    slope = 0.0
    kl_slope = 0.0
    if ENTROPY:
        logp, log_others = log_sides(z)
        spread = tl.where(others > 0, log_others - tl.log2(rest) * LN2 + entropy, 0.0)
        at_target -= tl.where(others < 1, dentropy * sigmoid2(-z) * (logp + entropy), 0.0)
        factor -= dentropy * share * spread
        slope = -dentropy * share * (LN2 * LN2) * scale
    if ref is not None:
        logp, log_others = log_sides(z)
        ref_logp, ref_log_others = log_sides(ref[3])
        spread = log_others - ref_log_others - (tl.log2(rest) - tl.log2(ref[2])) * LN2 - ref[4]
        of_target = sigmoid2(-z) * (logp - ref_logp - ref[4])
        # a KL that is only looked at may be infinite
        at_target += tl.where((dkl != 0) & (others < 1), dkl * of_target, 0.0)
        factor += tl.where((dkl != 0) & (others > 0), dkl * share * spread, 0.0)
        kl_slope = dkl * share * (LN2 * LN2) * scale
    at_target *= scale * LN2
    factor *= scale * LN2
    # in place, no thread may overwrite the target's logit before all have read it
    tl.debug_barrier()
    end = row_end(V, WIDTH, VECTOR)
    for first in range(0, V, step):
        at = first + columns
        if first + step <= V:
            # all loads of a step before its first store, which might be to the same place
            tiles = load_raw(row_ptr + at, tile, TILES)
            for k in tl.static_range(TILES):
                logits = tiles[k].to(tl.float32)
                dlogits = gradient_beside_target(logits, scale, peak, factor, slope, ENTROPY)
                if ref is not None:
                    ref_logits = tl.load(ref[0] + k * tile + at).to(tl.float32)
                    dlogits += gradient_of_kl(logits, ref_logits, scale, peak, ref[1], kl_slope)
                tl.store(dlogits_ptr + k * tile + at, dlogits.to(dlogits_ptr.dtype.element_ty))
        else:
            for start in range(first, V, tile):
                at = start + columns
                logits = tl.load(row_ptr + at, mask=at < end, other=float("-inf")).to(tl.float32)
                dlogits = gradient_beside_target(logits, scale, peak, factor, slope, ENTROPY)
                if ref is not None:
                    ref_logits = tl.load(ref[0] + at, mask=at < end, other=0.0).to(tl.float32)
                    dlogits += gradient_of_kl(logits, ref_logits, scale, peak, ref[1], kl_slope)
                dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + at, dlogits, mask=at < end)
    # and its gradient comes last, over what the thread of its column has written
    tl.debug_barrier()
    tl.store(dlogits_ptr + target, at_target.to(dlogits_ptr.dtype.element_ty))


@triton.jit
def gradient_beside_target(logits, scale, peak, factor, slope, ENTROPY: tl.constexpr):
    """2^c·(factor + slope·c) of a tile, c the scaled logits centred on `peak`."""
    centred = tl.fma(logits, scale, -peak)
    if ENTROPY:
        return tl.exp2(centred) * tl.fma(tl.maximum(centred, LOWEST), slope, factor)
    else:
        return factor * tl.exp2(centred)


@triton.jit
def gradient_of_kl(logits, ref_logits, scale, peak, ref_peak, kl_slope):
    """kl_slope·2^c·(c − c_ref) of a tile."""
    centred = tl.fma(logits, scale, -peak)
    return weighted_gap(kl_slope * tl.exp2(centred), centred, tl.fma(ref_logits, scale, -ref_peak))


@triton.jit
def weighted_gap(weight, centred, ref_centred):
    """weight·(c − c_ref), and 0 for a word of weight 0, whatever π_ref says of it."""
    return tl.where(weight != 0, weight * (centred - ref_centred), 0.0)


@triton.jit
def write_row_zeros(
    dlogits_ptr, V, THREADS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr
):
    """A row of zeros: the gradient of a token that is masked, clipped or dropped."""
    tile: tl.constexpr = THREADS * WIDTH
    columns = tile_columns(THREADS, WIDTH, VECTOR)
    end = row_end(V, WIDTH, VECTOR)
    zeros = tl.zeros([THREADS, WIDTH], dlogits_ptr.dtype.element_ty)
    for first in range(0, V, tile):
        at = first + columns
        tl.store(dlogits_ptr + at, zeros, mask=at < end)
