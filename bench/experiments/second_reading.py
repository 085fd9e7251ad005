"""Ways to read a row a second time, which `python -m bench.tune` times on a GPU.

The one pass reads a row to sum it and once more to write its gradient. The second reading goes to
memory where the caches have lost the row: 6 bytes per bfloat16 logit instead of 4. The kernel here
is the one pass of a plain loss, −logp, with three choices against that:

- BACKWARDS: the second reading goes from the row's end to its beginning, so that it first meets
  what the caches hold.
- HELD: so many tiles behind the first stay in registers.
- KEPT: the caches are asked to keep so many tiles at the row's end, and to give up the rest first,
  the gradient among it.

No bit of logp and gradient depends on them, and both are those of `row_loss` (the test holds it).
If one of them is faster on a GPU than `row_loss`, it is to be moved into kernels/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.kernels.gradient_formula import gradient_of_others, row_factors
from grpo_core.kernels.language import tl, triton
from grpo_core.kernels.launch import LOAD_BYTES, launch, unspecialized
from grpo_core.kernels.online_softmax import LN2, LOG2E, add_powers, row_anchor
from grpo_core.kernels.row_tiles import load_part, sum_in_order, tile_places, wide_order
from grpo_core.kernels.token_statistics import log_sides, target_gap


@dataclass(frozen=True)
class Candidate:
    """A layout, and how a row is read again; `held` and `kept` count tiles."""

    warps: int
    tiles: int = 4
    registers: int | None = None
    backwards: bool = False
    held: int = 0
    kept: int = 0


CANDIDATES = {
    "as in kernels/": Candidate(16, registers=80),
    "as in kernels/, row kept": Candidate(16, registers=80, kept=999),
    "plain": Candidate(8, registers=80),
    "plain, 1 program": Candidate(32, tiles=2),
    "backwards": Candidate(8, registers=80, backwards=True),
    "backwards, 2 programs": Candidate(16, registers=64, backwards=True),
    "backwards, 1 program": Candidate(32, tiles=2, backwards=True),
    "backwards, 64 KiB kept": Candidate(8, registers=80, backwards=True, kept=16),
    # more tiles than these spill
    "9 % held, backwards": Candidate(8, registers=128, backwards=True, held=7),
    "19 % held, backwards": Candidate(16, registers=128, backwards=True, held=7),
    "31 % held": Candidate(8, registers=255, held=23),
}


@triton.jit
def load_tiles(
    row_ptr, first, tile: tl.constexpr, TILES: tl.constexpr, places, EVICT: tl.constexpr
):
    """Several whole tiles in the dtype of the logits."""
    tiles = (tl.load(row_ptr + first + places, eviction_policy=EVICT),)
    for k in tl.static_range(1, TILES):
        more = tl.load(row_ptr + first + k * tile + places, eviction_policy=EVICT)
        tiles = tiles + (more,)  # noqa: RUF005
    return tiles


@triton.jit
def add_steps(
    sums, row, begin, until, places, tile: tl.constexpr, TILES: tl.constexpr, EVICT: tl.constexpr
):
    """Adds the columns of a row from `begin` on and before `until`."""
    row_ptr, target_col, scale, anchor = row
    total, moment = sums
    last = begin + tl.maximum(until - begin, 0) // tile * tile
    first, stop = begin, tl.minimum(tl.maximum(target_col // tile * tile, begin), last)
    # up to the target's tile, then behind it, without a branch in a loop
    for _part in range(2):
        whole = first + (stop - first) // (TILES * tile) * (TILES * tile)
        for start in range(first, whole, TILES * tile):
            tiles = load_tiles(row_ptr, start, tile, TILES, places, EVICT)
            for k in tl.static_range(TILES):
                logits = tiles[k].to(tl.float32)
                total, moment, _, _ = add_powers(total, moment, logits, scale, anchor)
        for start in range(whole, stop, tile):
            (raw,) = load_tiles(row_ptr, start, tile, 1, places, EVICT)
            total, moment, _, _ = add_powers(total, moment, raw.to(tl.float32), scale, anchor)
        logits = load_part(row_ptr, stop + places, 0, until)
        logits = tl.where(stop + places == target_col, float("-inf"), logits)
        total, moment, _, _ = add_powers(total, moment, logits, scale, anchor)
        first = stop + tile
        stop = tl.maximum(first, last)
    return total, moment


@unspecialized
def _second_reading_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    dlogits_ptr,
    V,
    scale,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    KEPT: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # rows of a multiple of 16 bytes
    row_ptr = tl.multiple_of(logits_ptr + row * V, 16)
    out_ptr = tl.multiple_of(dlogits_ptr + row * V, 16)
    target_col = tl.load(target_ptr + row).to(tl.int32)
    tile: tl.constexpr = THREADS * WIDTH
    step: tl.constexpr = TILES * tile
    places = tile_places(THREADS, WIDTH)

    logits = load_part(row_ptr, places, 0, V)
    target_logit = tl.load(row_ptr + target_col)
    anchor = row_anchor(logits, places, target_logit, scale, THREADS, WIDTH)
    logits = tl.where(places == target_col, float("-inf"), logits)
    zeros = tl.zeros([THREADS, WIDTH], tl.float32)
    total, moment, _, _ = add_powers(zeros, zeros, logits, scale, anchor)
    begin: tl.constexpr = (1 + HELD) * tile
    if HELD > 0:
        held = load_tiles(row_ptr, tile, tile, HELD, places, "evict_first")
        for k in tl.static_range(HELD):
            logits = held[k].to(tl.float32)
            at = (1 + k) * tile + places
            logits = tl.where(at == target_col, float("-inf"), logits)
            total, moment, _, _ = add_powers(total, moment, logits, scale, anchor)
    sums = total, moment
    row_of = row_ptr, target_col, scale, anchor
    kept = begin
    if KEPT > 0:
        kept = begin + tl.maximum(V - begin - KEPT * tile, 0) // step * step
        sums = add_steps(sums, row_of, begin, kept, places, tile, TILES, "evict_first")
    last: tl.constexpr = "evict_last" if KEPT > 0 else ""
    sums = add_steps(sums, row_of, kept, V, places, tile, TILES, last)
    sum_others = sum_in_order(sums[0], wide_order(0, THREADS, WIDTH))
    z, error = target_gap(row_ptr, target_col, scale, anchor, sum_others)
    tl.store(logp_ptr + row, log_sides(z, error)[0])

    state = anchor, sum_others, z, 0.0
    derivatives = -1.0, 0.0, 0.0
    at_target, factor, _, _, _, _ = row_factors(
        scale, derivatives, state, None, 1.0, False, "reverse"
    )
    factors = scale, anchor, factor * (scale * LN2), 0.0, 0.0, 0.0, 0.0, 1.0
    again: tl.constexpr = "evict_first" if KEPT > 0 else ""
    # in place, no thread may overwrite the target's logit before all have read it
    tl.debug_barrier()
    steps = tl.maximum(V - begin, 0) // step
    rest = begin + steps * step
    if BACKWARDS:
        write_rest(row_ptr, out_ptr, rest, V, places, tile, factors, again)
    for index in range(0, steps):
        first = begin + (steps - 1 - index if BACKWARDS else index) * step
        tiles = load_tiles(row_ptr, first, tile, TILES, places, again)
        for k in tl.static_range(TILES):
            write(out_ptr, first + k * tile + places, tiles[k], None, factors, again)
    if not BACKWARDS:
        write_rest(row_ptr, out_ptr, rest, V, places, tile, factors, again)
    if HELD > 0:
        for k in tl.static_range(HELD):
            write(out_ptr, (1 + k) * tile + places, held[k], None, factors, again)
    write(out_ptr, places, load_part(row_ptr, places, 0, V), V, factors, again)
    tl.debug_barrier()
    tl.store(out_ptr + target_col, at_target.to(out_ptr.dtype.element_ty))


@triton.jit
def write_rest(
    row_ptr, out_ptr, begin, V, places, tile: tl.constexpr, factors, EVICT: tl.constexpr
):
    """The gradient of the tiles from `begin` on."""
    for first in range(begin, V, tile):
        logits = load_part(row_ptr, first + places, 0, V)
        write(out_ptr, first + places, logits, V, factors, EVICT)


@triton.jit
def write(out_ptr, at, logits, V, factors, EVICT: tl.constexpr):
    """The gradient of a tile of logits, none of which is the target's; V is None if all exist."""
    dlogits = gradient_of_others(logits.to(tl.float32), None, factors, False, "reverse")
    dlogits = dlogits.to(out_ptr.dtype.element_ty)
    inside = None
    if V is not None:
        inside = at < V
    tl.store(out_ptr + at, dlogits, mask=inside, eviction_policy=EVICT)


def second_reading(logits: Tensor, target: Tensor, dlogits: Tensor, candidate: Candidate) -> Tensor:
    """logp of every row; its negative's gradient into `dlogits`, which may be the logits.

    Args:
        logits: [N, V] contiguous, V a multiple of 16 bytes.
        target: [N] int64 in [0, V).
    """
    N, V = logits.shape
    width, threads = LOAD_BYTES // logits.element_size(), 32 * candidate.warps
    if V % width:
        raise ValueError(f"logits: expected V to be a multiple of {width}, got {V}")
    whole = V // (threads * width)
    keywords: dict[str, Any] = {}
    if candidate.registers is not None and not torch.version.hip:
        keywords["maxnreg"] = candidate.registers
    logp = torch.empty(N, dtype=torch.float32, device=logits.device)
    launch(
        _second_reading_kernel,
        N,
        on=logits,
        logits_ptr=logits,
        target_ptr=target,
        logp_ptr=logp,
        dlogits_ptr=dlogits,
        V=V,
        scale=LOG2E.value,
        THREADS=threads,
        WIDTH=width,
        TILES=candidate.tiles,
        HELD=max(0, min(candidate.held, whole - 1)),
        KEPT=candidate.kept,
        BACKWARDS=candidate.backwards,
        num_warps=candidate.warps,
        **keywords,
    )
    return logp


def time_candidates(N: int, V: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Milliseconds and TB/s (one reading and one writing) of every candidate, on this GPU."""
    logits = torch.randn(N, V, device="cuda").to(dtype)
    target = torch.randint(V, (N,), device="cuda")
    dlogits, found = torch.empty_like(logits), {}
    for name, candidate in CANDIDATES.items():
        milliseconds = triton.testing.do_bench(
            lambda candidate=candidate: second_reading(logits, target, dlogits, candidate)
        )
        terabytes = 2e-9 * logits.nbytes / milliseconds
        found[name] = asdict(candidate) | {"ms": milliseconds, "TB/s": terabytes}
        print(f"{name:<26}{milliseconds:8.3f} ms{terabytes:7.2f} TB/s", flush=True)
    return found
