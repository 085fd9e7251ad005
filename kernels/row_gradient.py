"""Writing the row of a gradient, over its logits or beside them; its formula: `gradient_formula`.

A row is written as it is read in `row_tiles`, 16 bytes to a load and a store, where logits and
gradient lie alike: in place, and nearly always beside. Where they do not (the gradient of a view,
an odd vocabulary) loads and stores are narrow. Each logit's gradient has the same bits either way.
"""

from .gradient_formula import gradient_of_others, row_factors
from .language import tl, triton
from .online_softmax import LN2, split_anchor
from .row_tiles import (
    boundary,
    is_whole,
    load_part,
    load_raw,
    row_lead,
    strided_columns,
    tile_places,
)
from .token_statistics import is_sure, sums_below_sure


@triton.jit
def write_row_gradient(
    row_ptr,
    dlogits_ptr,
    V,
    target_col,
    scale,
    derivatives,
    state,
    ref,
    beta,
    ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """dL/dlogits of a whole row, which may lie over the row.

    `derivatives` = dL by (logp, entropy, exact KL), `state` = (anchor, sum_others, z, H), `ref` =
    (reference row, its anchor, sum_others and z, KL), or None without an exact KL. A mixture's KL
    is `of_policy`, and `beta` its interpolation.

    Where another token than the target is nearly certain, the entropy's gradient there has digits
    only from sums without it, see `sums_below_sure`.
    """
    anchor, sum_others, z, entropy = state
    at_target, factor, of_entropy, log_factor, gap_factor, shift = row_factors(
        scale, derivatives, state, ref, beta, ENTROPY, DIVERGENCE
    )
    # logits too large to be scaled have the anchor subtracted first
    base, anchor = split_anchor(anchor, sum_others)
    lead = row_lead(row_ptr, WIDTH)
    alike = (lead == row_lead(dlogits_ptr, WIDTH)) & ((sum_others < 0) == 0)
    ref_ptr, ref_base, ref_anchor = None, 0.0, 0.0
    if ref is not None:
        ref_ptr = ref[0]
        alike &= (ref[2] < 0) == 0
        ref_base, ref_anchor = split_anchor(ref[1], ref[2])
    sure = False
    sure_col, at_sure = target_col, at_target
    if ENTROPY:
        sure = is_sure(z, entropy)
        if sure:
            largest, sure_col, below, moment = sums_below_sure(
                row_ptr, V, target_col, scale, THREADS, WIDTH
            )
            ref_logit = None
            if ref is not None:
                ref_logit = tl.load(ref_ptr + sure_col).to(tl.float32) - ref_base
            scaled = factor * (scale * LN2)
            factors = scale, anchor, scaled, log_factor, ref_anchor, gap_factor, shift, beta
            at_sure = gradient_of_others(largest - base, ref_logit, factors, False, DIVERGENCE)
            dentropy = derivatives[1] * LN2 * moment / ((1 + below) * (1 + below))
            at_sure += dentropy * (scale * LN2)
    factor = (factor - of_entropy) * (scale * LN2)
    factors = scale, anchor, factor, log_factor, ref_anchor, gap_factor, shift, beta
    pointers = row_ptr, dlogits_ptr, ref_ptr
    # in place, no thread may overwrite the target's logit before all have read it
    tl.debug_barrier()
    if alike:
        write_wide(pointers, V, lead, factors, ENTROPY, DIVERGENCE, THREADS, WIDTH, TILES)
    else:
        columns = strided_columns(THREADS, WIDTH)
        for first in range(0, V, THREADS * WIDTH):
            at = first + columns
            write_part(pointers, at, 0, V, factors, ENTROPY, DIVERGENCE, base, ref_base)
    # written last, over what the thread of its column has written
    tl.debug_barrier()
    tl.store(dlogits_ptr + target_col, at_target.to(dlogits_ptr.dtype.element_ty))
    if sure:
        tl.store(dlogits_ptr + sure_col, at_sure.to(dlogits_ptr.dtype.element_ty))


@triton.jit
def write_wide(
    pointers,
    V,
    lead,
    factors,
    ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient of the others in a row that lies as its logits do."""
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)
    end = V + lead
    row_ptr, dlogits_ptr, ref_ptr = pointers
    row_ptr, dlogits_ptr = boundary(row_ptr, lead), boundary(dlogits_ptr, lead)
    if ref_ptr is not None:
        ref_ptr = boundary(ref_ptr, lead)
    pointers = row_ptr, dlogits_ptr, ref_ptr
    # all steps of whole tiles, then the tiles before and after, of which two are masked
    last = tl.maximum(end // tile, 1) * tile
    whole = tile + (last - tile) // step * step
    for first in range(tile, whole, step):
        write_tiles(pointers, first + places, factors, ENTROPY, DIVERGENCE, tile, TILES)
    for start in range(whole - tile, last + tile, tile):
        first = tl.where(start < whole, 0, start)
        if is_whole(first, tile, lead, end):
            write_tiles(pointers, first + places, factors, ENTROPY, DIVERGENCE, tile, 1)
        else:
            at = tile_places(THREADS, WIDTH, first)
            write_part(pointers, at, lead, end, factors, ENTROPY, DIVERGENCE)


@triton.jit
def write_tiles(
    pointers,
    at,
    factors,
    ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    tile: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient of whole tiles, the first at `at`."""
    row_ptr, dlogits_ptr, ref_ptr = pointers
    # all loads of a step before its first store, which might be to the same place
    tiles = load_raw(row_ptr + at, tile, TILES)
    for k in tl.static_range(TILES):
        ref_logits = None
        if ref_ptr is not None:
            ref_logits = tl.load(ref_ptr + k * tile + at).to(tl.float32)
        logits = tiles[k].to(tl.float32)
        dlogits = gradient_of_others(logits, ref_logits, factors, ENTROPY, DIVERGENCE)
        tl.store(dlogits_ptr + k * tile + at, dlogits.to(dlogits_ptr.dtype.element_ty))


@triton.jit
def write_part(
    pointers,
    at,
    lead,
    end,
    factors,
    ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    base=0.0,
    ref_base=0.0,
):
    """The gradient of those logits at `at` that belong to the row, less a `base`."""
    row_ptr, dlogits_ptr, ref_ptr = pointers
    ref_logits = None
    if ref_ptr is not None:
        ref_logits = load_part(ref_ptr, at, lead, end) - ref_base
    logits = load_part(row_ptr, at, lead, end) - base
    dlogits = gradient_of_others(logits, ref_logits, factors, ENTROPY, DIVERGENCE)
    inside = (at >= lead) & (at < end)
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


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
