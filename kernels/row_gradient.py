"""Writing the row of a gradient, over its logits or beside them.

The one home of what the vocabulary is written by. A row is walked as in `row_tiles`, 16 bytes to a
load and a store, where the logits and the gradient lie alike: in place, and nearly always in a
buffer of its own. Where they do not (the gradient of a view, an odd vocabulary), both are walked by
narrow loads and stores. Each logit's gradient has the same bits either way.
"""

from .language import tl, triton
from .online_softmax import (
    LN2,
    LOWEST,
    is_sure,
    log_sides,
    sigmoid2,
    sums_beside_sure,
    weighted_gap,
)
from .row_tiles import (
    boundary,
    is_whole,
    load_part,
    load_raw,
    row_lead,
    strided_columns,
    tile_places,
    unpack_words,
)


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
    TILES: tl.constexpr,
    held=None,
    KEPT: tl.constexpr = None,
    BACKWARDS: tl.constexpr = False,
):
    """dL/dlogits of a whole row, from what L's derivatives by its statistics are.

    Where another word than the target is nearly certain, the entropy's gradient there has digits
    only from sums without it, see `sums_beside_sure`.

    `slopes` = dL by (logp, entropy, exact KL), `state` = (M, S, z, H) of the row, and `ref` = (its
    reference logits, M, S, z, KL), or None without an exact KL. With

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

    the gradient beside the target is 2^c·(factor + slope·c + kl_slope·(c − c_ref)): two more
    multiply-adds at most, and none without entropy (ENTROPY) and KL. May write over the row.

    `held`, KEPT: as `row_softmax` has read the row; what was kept is of no use any more, nor is
    what is written. BACKWARDS meets what the caches hold of the row, its end, before that is lost.
    """
    dlogp, dentropy, dkl = slopes
    peak, rest, z, entropy = state
    others, mine = sigmoid2(z), sigmoid2(-z)
    at_target = dlogp * others
    # logits too large to be scaled are first counted from M
    far = rest < 0
    origin = tl.where(far, peak, 0.0)
    peak = tl.where(far, 0.0, peak)
    rest = tl.abs(rest)
    share = tl.where(rest > 0, others / rest, 0.0)
    factor = -dlogp * share
    of_entropy = 0.0
    slope = 0.0
    kl_slope = 0.0
    if ENTROPY:
        logp, log_others = log_sides(z)
        spread = tl.where(others > 0, log_others - tl.log2(rest) * LN2 + entropy, 0.0)
        at_target -= tl.where(mine > 0, dentropy * mine * (logp + entropy), 0.0)
        of_entropy = dentropy * share * spread
        slope = -dentropy * share * (LN2 * LN2) * scale
    if ref is not None:
        logp, log_others = log_sides(z)
        ref_logp, ref_log_others = log_sides(ref[3])
        ref_rest = tl.abs(ref[2])
        spread = log_others - ref_log_others - (tl.log2(rest) - tl.log2(ref_rest)) * LN2 - ref[4]
        of_target = mine * (logp - ref_logp - ref[4])
        # a KL that is only looked at may be infinite
        at_target += tl.where((dkl != 0) & (mine > 0), dkl * of_target, 0.0)
        factor += tl.where((dkl != 0) & (others > 0), dkl * share * spread, 0.0)
        kl_slope = dkl * share * (LN2 * LN2) * scale
    at_target *= scale * LN2
    lead = row_lead(row_ptr, WIDTH)
    alike = (lead == row_lead(dlogits_ptr, WIDTH)) & (far == 0)
    beside = None
    origins = origin, 0.0
    if ref is not None:
        ref_far = ref[2] < 0
        alike &= (lead == row_lead(ref[0], WIDTH)) & (ref_far == 0)
        beside = ref[0], tl.where(ref_far, 0.0, ref[1]), kl_slope
        origins = origin, tl.where(ref_far, ref[1], 0.0)
    pointers = row_ptr, dlogits_ptr
    sure = False
    word = target
    at_word = at_target
    if ENTROPY:
        sure = is_sure(z, entropy)
        if sure:
            largest, word, below, moment = sums_beside_sure(
                row_ptr, V, target, scale, THREADS, WIDTH
            )
            ref_logit = None
            if ref is not None:
                ref_logit = tl.load(ref[0] + word).to(tl.float32) - origins[1]
            plain = scale, peak, factor * (scale * LN2), slope
            at_word = gradient_beside_target(largest - origin, ref_logit, plain, beside, False)
            at_word += dentropy * LN2 * moment / ((1 + below) * (1 + below)) * (scale * LN2)
    factor = (factor - of_entropy) * (scale * LN2)
    coefficients = scale, peak, factor, slope
    # in place, no thread may overwrite the target's logit before all have read it
    tl.debug_barrier()
    if alike:
        write_wide(
            pointers,
            V,
            lead,
            coefficients,
            beside,
            ENTROPY,
            THREADS,
            WIDTH,
            TILES,
            held,
            None if KEPT is None else "evict_first",
            BACKWARDS,
        )
    else:
        columns = strided_columns(THREADS, WIDTH)
        for first in range(0, V, THREADS * WIDTH):
            write_part(pointers, first + columns, 0, V, coefficients, beside, ENTROPY, origins)
    # and its gradient comes last, over what the thread of its column has written
    tl.debug_barrier()
    tl.store(dlogits_ptr + target, at_target.to(dlogits_ptr.dtype.element_ty))
    if sure:
        tl.store(dlogits_ptr + word, at_word.to(dlogits_ptr.dtype.element_ty))


@triton.jit
def write_wide(
    pointers,
    V,
    lead,
    coefficients,
    ref,
    ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    held,
    EVICT: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """The gradient beside the target of a row that lies as its logits do."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    end = V + lead
    pointers = boundary(pointers[0], lead), boundary(pointers[1], lead)
    if ref is not None:
        ref = boundary(ref[0], lead), ref[1], ref[2]
    begin = 0
    if held is not None:
        begin = (1 + len(held)) * tile
    steps = tl.cdiv(tl.maximum(end - begin, 0), step)
    for first in range(begin, end, step):
        at = 2 * begin + (steps - 1) * step - first if BACKWARDS else first
        if is_whole(at, step, lead, end):
            write_tiles(pointers, at + places, coefficients, ref, ENTROPY, tile, TILES, EVICT)
        else:
            for start in range(at, tl.minimum(at + step, end), tile):
                if is_whole(start, tile, lead, end):
                    write_tiles(
                        pointers, start + places, coefficients, ref, ENTROPY, tile, 1, EVICT
                    )
                else:
                    write_part(pointers, start + places, lead, end, coefficients, ref, ENTROPY)
    if held is not None:
        write_held(pointers, held, coefficients, ENTROPY, THREADS, WIDTH, EVICT)
        write_part(pointers, places, lead, end, coefficients, ref, ENTROPY)


@triton.jit
def write_held(
    pointers,
    held,
    coefficients,
    ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The gradient of the tiles in registers: those behind a row's first."""
    row_ptr, dlogits_ptr = pointers
    at = tile_places(THREADS, WIDTH)
    for k in tl.static_range(len(held)):
        logits = unpack_words(held[k], row_ptr.dtype.element_ty, THREADS, WIDTH)
        dlogits = gradient_beside_target(logits, None, coefficients, None, ENTROPY)
        tile_ptr = dlogits_ptr + (1 + k) * THREADS * WIDTH
        tl.store(tile_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), eviction_policy=EVICT)


@triton.jit
def write_tiles(
    pointers,
    at,
    coefficients,
    ref,
    ENTROPY: tl.constexpr,
    tile: tl.constexpr,
    TILES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The gradient of whole tiles, the first at `at`."""
    row_ptr, dlogits_ptr = pointers
    # all loads of a step before its first store, which might be to the same place
    tiles = load_raw(row_ptr + at, tile, TILES, EVICT)
    for k in tl.static_range(TILES):
        ref_logits = None
        if ref is not None:
            ref_logits = tl.load(ref[0] + k * tile + at).to(tl.float32)
        logits = tiles[k].to(tl.float32)
        dlogits = gradient_beside_target(logits, ref_logits, coefficients, ref, ENTROPY)
        dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + k * tile + at, dlogits, eviction_policy=EVICT)


@triton.jit
def write_part(pointers, at, lead, end, coefficients, ref, ENTROPY: tl.constexpr, origins=None):
    """The gradient of those logits at `at` that belong to the row, counted from `origins`."""
    row_ptr, dlogits_ptr = pointers
    ref_logits = None
    if ref is not None:
        ref_logits = load_part(ref[0], at, lead, end)
    logits = load_part(row_ptr, at, lead, end)
    if origins is not None:
        logits -= origins[0]
        if ref is not None:
            ref_logits -= origins[1]
    dlogits = gradient_beside_target(logits, ref_logits, coefficients, ref, ENTROPY)
    inside = (at >= lead) & (at < end)
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_beside_target(logits, ref_logits, coefficients, ref, ENTROPY: tl.constexpr):
    """2^c·(factor + slope·c) + kl_slope·2^c·(c − c_ref) of a tile, c the centred, scaled logits."""
    scale, peak, factor, slope = coefficients
    centred = tl.fma(logits, scale, -peak)
    power = tl.exp2(centred)
    if ENTROPY:
        factor = tl.fma(tl.maximum(centred, LOWEST), slope, factor)
    if ref is None:
        dlogits = power * factor
    else:
        ref_centred = tl.fma(ref_logits, scale, -ref[1])
        dlogits = tl.fma(power, factor, weighted_gap(ref[2] * power, centred, ref_centred))
    return dlogits


@triton.jit
def write_row_zeros(dlogits_ptr, V, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """A row of zeros: the gradient of a token that is masked, clipped or dropped."""
    tile: tl.constexpr = THREADS * WIDTH
    places = tile_places(THREADS, WIDTH)
    lead = row_lead(dlogits_ptr, WIDTH)
    end = V + lead
    dlogits_ptr = boundary(dlogits_ptr, lead)
    zeros = tl.zeros([THREADS, WIDTH], dlogits_ptr.dtype.element_ty)
    for first in range(0, end, tile):
        at = first + places
        if is_whole(first, tile, lead, end):
            tl.store(dlogits_ptr + at, zeros)
        else:
            tl.store(dlogits_ptr + at, zeros, mask=(at >= lead) & (at < end))
