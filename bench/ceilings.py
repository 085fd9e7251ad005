"""What this device can do at all: bandwidth of copying, of reading, of writing.

`python -m bench.ceilings [--json FILE] [--dry-run]`. The kernels of the loss are to be held against
these figures, taken in the same minutes on the same card, rather than against a data sheet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.clock import median_seconds
from bench.machine import describe
from grpo_core.cli.options import Parser, new_file

# of bfloat16, as logits: far beyond any cache
ELEMENTS, DRY_ELEMENTS = 2**30, 2**12
# elements of a program at a time, its warps; the best of them is the ceiling
SHAPES = ((2048, 4), (4096, 8), (8192, 16))
# tiles that one program reads one after another
TILES = 16


@triton.jit
def _copy_kernel(source_ptr, sink_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sink_ptr + at, tl.load(source_ptr + at))


@triton.jit
def _read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK * TILES + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        total += tl.load(source_ptr + at + tile * BLOCK).to(tl.float32)
    tl.store(sums_ptr + program, tl.sum(total, 0))


class Ceiling(NamedTuple):
    """A way to move memory, and how fast it was."""

    name: str
    moved_bytes: int
    seconds: float

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.name:<32}{self.moved_bytes / self.seconds / 1e12:8.3f} TB/s"


def measure(device: str, elements: int) -> Iterator[Ceiling]:
    """Every ceiling; what a kernel computed is checked before it is timed."""
    source = torch.randn(2**12, device=device).bfloat16().repeat(elements // 2**12)
    sink = torch.empty_like(source)
    once = source.nbytes
    yield Ceiling("torch copy_", 2 * once, median_seconds(lambda: sink.copy_(source), device))
    yield Ceiling("torch zero_", once, median_seconds(lambda: sink.zero_(), device))
    for block, warps in SHAPES:
        block = min(block, elements // TILES)
        name = f"{block:,} elements, {warps} warps"
        call = _copier(source, sink, block, warps)
        call()
        assert torch.equal(source, sink), "the copy differs"
        yield Ceiling(f"copy, {name}", 2 * once, median_seconds(call, device))
        sums = torch.empty(elements // (block * TILES), device=device)
        call = _reader(source, sums, block, warps)
        call()
        expected = source.view(sums.numel(), -1).double().sum(1).float()
        torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-1)
        yield Ceiling(f"read, {name}", once, median_seconds(call, device))


def _copier(source: Tensor, sink: Tensor, block: int, warps: int) -> Callable[[], object]:
    """One program a block."""
    grid = (source.numel() // block,)
    return lambda: _copy_kernel[grid](source, sink, BLOCK=block, num_warps=warps)


def _reader(source: Tensor, sums: Tensor, block: int, warps: int) -> Callable[[], object]:
    """One program several blocks, of which it leaves the sum."""
    grid = (sums.numel(),)
    return lambda: _read_kernel[grid](source, sums, BLOCK=block, TILES=TILES, num_warps=warps)


def _main() -> None:
    """Prints the table, and writes JSON where asked to."""
    parser = Parser("bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=new_file, help="write the figures there")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    given = parser.parse_args()
    device = "cpu" if given.dry_run else "cuda"
    elements = DRY_ELEMENTS if given.dry_run else ELEMENTS
    found = []
    for ceiling in measure(device, elements):
        print(ceiling.line, flush=True)
        found.append(ceiling)
    if given.json:
        record: dict[str, Any] = {"machine": describe(), "dry_run": given.dry_run}
        record["ceilings"] = [ceiling._asdict() for ceiling in found]
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    _main()
