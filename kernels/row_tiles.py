"""How a program reads a row of logits: 16 bytes to a load, wherever the row lies in memory.

Rows of an odd vocabulary start anywhere between two multiples of 16 bytes. A row is therefore read
from the last such boundary before its start, `lead` logits ahead of it, in tiles of
`[THREADS, WIDTH]`, WIDTH neighbours (16 bytes) to a thread. Only the tiles at the two ends of a row
are masked; nothing outside of the row is read or written. A *place* counts logits from the
boundary, a *column* counts them from the start of the row.

Where two rows must be read together and lie differently, both are read by `strided_columns`: by
narrow loads, of which whole warps read neighbours.
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
def tile_places(THREADS: tl.constexpr, WIDTH: tl.constexpr, first=0):
    """Places of the logits of the tile that begins at `first`: a thread's are neighbours.

    `first` is added before the places within a thread, which would else be held in registers
    through the loop over the tiles.
    """
    return (first + tl.arange(0, THREADS) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def strided_columns(THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first tile where loads are narrow: a thread's are THREADS apart."""
    return tl.arange(0, WIDTH)[None, :] * THREADS + tl.arange(0, THREADS)[:, None]


@triton.jit
def is_whole(first, size, lead, end):
    """Whether the places from `first` on all belong to the row, which ends at `end`."""
    return (first >= lead) & (first + size <= end)


@triton.jit
def load_whole(tile_ptr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """A whole tile as float32.

    bfloat16 is loaded as words of 32 bits, of which a shift makes the lower neighbour a float32 and
    a mask the upper one: one instruction each.
    """
    if tile_ptr.dtype.element_ty == tl.bfloat16:
        word_ptr = tile_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.load(word_ptr + tile_places(THREADS, WIDTH // 2))
        lower = (words << 16).to(tl.float32, bitcast=True)
        upper = (words & -65536).to(tl.float32, bitcast=True)
        logits = tl.reshape(tl.join(lower, upper), [THREADS, WIDTH])
    else:
        logits = tl.load(tile_ptr + tile_places(THREADS, WIDTH)).to(tl.float32)
    return logits


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
        logits = load_part(row_ptr, tile_places(THREADS, WIDTH, first), lead, end)
    return logits


@triton.jit
def load_raw(tile_ptr, tile: tl.constexpr, TILES: tl.constexpr):
    """Several tiles in the dtype of the logits."""
    tiles = (tl.load(tile_ptr),)
    for k in tl.static_range(1, TILES):
        tiles = tiles + (tl.load(tile_ptr + k * tile),)  # type: ignore[assignment]
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


@triton.jit
def store_vectors(vectors_ptr, N, row, values):
    """The values of a row into the vectors `[len(values), N]`."""
    for k in tl.static_range(len(values)):
        tl.store(vectors_ptr + k * N + row, values[k])
