"""How a program walks over a row of logits: 16 bytes to a load, wherever the row lies in memory.

Rows of an odd vocabulary start anywhere between two multiples of 16 bytes. A row is therefore
walked from the last such boundary before its start, `lead` logits ahead of it, in tiles
`[THREADS, WIDTH]` of neighbours, WIDTH logits (16 bytes) to a thread. Only the tiles at the two
ends of a row are masked, and read as narrowly as their masks change; nothing outside of the row is
read or written.

Where two rows must be walked together and lie differently, both are walked by `strided_columns`:
narrow, but whole warps read neighbours.
"""

from .language import tl, triton


@triton.jit
def row_start(row, rows_per_batch, batch_stride, row_stride):
    """Element offset of a row."""
    return (row // rows_per_batch) * batch_stride + (row % rows_per_batch) * row_stride


@triton.jit
def row_lead(row_ptr, WIDTH: tl.constexpr):
    """Logits between the last boundary of 16 bytes and the start of a row."""
    return ((row_ptr.to(tl.int64) // (16 // WIDTH)) % WIDTH).to(tl.int32)


@triton.jit
def boundary(row_ptr, lead):
    """Where the first tile of a row begins, known to the compiler as a multiple of 16 bytes."""
    return tl.multiple_of(row_ptr - lead, 16)


@triton.jit
def tile_places(THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Places of a tile's logits, counted from its first: a thread's are neighbours."""
    return tl.arange(0, THREADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def strided_columns(THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first tile where loads are narrow: a thread's are THREADS apart."""
    return tl.arange(0, WIDTH)[None, :] * THREADS + tl.arange(0, THREADS)[:, None]


@triton.jit
def is_whole(first, size, lead, end):
    """Whether the places from `first` on all belong to the row, which ends at `end`."""
    return (first >= lead) & (first + size <= end)


@triton.jit
def load_whole(tile_ptr, THREADS: tl.constexpr, WIDTH: tl.constexpr, EVICT: tl.constexpr = None):
    """A whole tile as float32; EVICT asks the caches to keep it long, or not."""
    if tile_ptr.dtype.element_ty == tl.bfloat16:
        words = load_words(tile_ptr, None, THREADS, WIDTH, EVICT)
        logits = unpack_words(words, tl.bfloat16, THREADS, WIDTH)
    else:
        places = tile_places(THREADS, WIDTH)
        logits = tl.load(tile_ptr + places, eviction_policy=EVICT).to(tl.float32)
    return logits


@triton.jit
def load_words(
    tile_ptr, wanted, THREADS: tl.constexpr, WIDTH: tl.constexpr, EVICT: tl.constexpr = None
):
    """A whole tile as words of 32 bits, if `wanted`: four registers of a thread, at any dtype."""
    words = tile_places(THREADS, WIDTH * tile_ptr.dtype.element_ty.primitive_bitwidth // 32)
    pointers = tile_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + words
    return tl.load(pointers, mask=wanted, eviction_policy=EVICT)


@triton.jit
def unpack_words(words, dtype: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The logits in such words as float32.

    Of two neighbouring bfloat16 each is made a float32 by one instruction: the lower by a shift,
    the upper by a mask.
    """
    if dtype == tl.float32:
        logits = words.to(tl.float32, bitcast=True)
    else:
        if dtype == tl.bfloat16:
            lower = (words << 16).to(tl.float32, bitcast=True)
            upper = (words & -65536).to(tl.float32, bitcast=True)
        else:
            lower = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            upper = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        logits = tl.reshape(tl.join(lower, upper), [THREADS, WIDTH])
    return logits


@triton.jit
def hold_tiles(row_ptr, wanted, THREADS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """The HELD tiles behind a row's first, as words, if `wanted`; the row must hold them whole."""
    tile: tl.constexpr = THREADS * WIDTH
    tile_ptr = boundary(row_ptr, row_lead(row_ptr, WIDTH)) + tile
    held = (load_words(tile_ptr, wanted, THREADS, WIDTH),)
    for k in tl.static_range(1, HELD):
        more = load_words(tile_ptr + k * tile, wanted, THREADS, WIDTH)
        held = held + (more,)  # type: ignore[assignment]
    return held


@triton.jit
def load_part(row_ptr, at, lead, end):
    """The logits at `at` as float32, −inf outside of the row."""
    inside = (at >= lead) & (at < end)
    return tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def load_tile(row_ptr, first, lead, end, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The tile of a row from place `first` on as float32, −inf outside of the row."""
    if is_whole(first, THREADS * WIDTH, lead, end):
        logits = load_whole(row_ptr + first, THREADS, WIDTH)
    else:
        logits = load_part(row_ptr, first + tile_places(THREADS, WIDTH), lead, end)
    return logits


@triton.jit
def load_raw(tile_ptr, tile: tl.constexpr, TILES: tl.constexpr, EVICT: tl.constexpr):
    """Several tiles as they lie in memory."""
    tiles = (tl.load(tile_ptr, eviction_policy=EVICT),)
    for k in tl.static_range(1, TILES):
        more = tl.load(tile_ptr + k * tile, eviction_policy=EVICT)
        tiles = tiles + (more,)  # type: ignore[assignment]
    return tiles


@triton.jit
def sum_in_order(sums, places):
    """Sum of a tile, always in the order of the row's columns: `places` names each one's place."""
    in_order = tl.gather(tl.reshape(sums, places.shape), places, 0)
    return tl.sum(in_order, 0)


@triton.jit
def wide_order(lead, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile of neighbours holds each column of its row, modulo the tile."""
    tile: tl.constexpr = THREADS * WIDTH
    return (tl.arange(0, tile) + lead) % tile


@triton.jit
def strided_order(THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile of `strided_columns` holds each column of its row, modulo the tile."""
    column = tl.arange(0, THREADS * WIDTH)
    return column % THREADS * WIDTH + column // THREADS
