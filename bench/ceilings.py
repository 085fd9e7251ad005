"""The bandwidth of this device: copying, reading, writing.

`python -m bench.ceilings [--json FILE] [--dry-run]`. Compare the kernels of the loss with these
figures, taken within minutes on the same card, rather than with a data sheet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from bench.machine import describe, median_seconds
from grpo_core.cli.options import Parser, new_file

# of bfloat16, as logits: far beyond any cache
ELEMENTS, DRY_ELEMENTS = 2**30, 2**12
# elements of a program at a time, its warps; the best of them is the ceiling
SHAPES = ((2048, 4), (4096, 8), (8192, 16))
# tiles that one program reads one after another
TILES = 16


@triton.jit
def _read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK * TILES + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        total += tl.load(source_ptr + at + tile * BLOCK).to(tl.float32)
    tl.store(sums_ptr + program, tl.sum(total, 0))


def measure(device: str, elements: int) -> Iterator[tuple[str, int, float]]:
    """(name, bytes moved, seconds) of each; a kernel is timed once its result is checked."""
    source = torch.randn(2**12, device=device).bfloat16().repeat(elements // 2**12)
    sink = torch.empty_like(source)
    once = source.nbytes
    yield ("torch copy_", 2 * once, median_seconds(lambda: sink.copy_(source)))
    yield ("torch zero_", once, median_seconds(sink.zero_))
    for block, warps in SHAPES:
        block = min(block, elements // TILES)
        name = f"{block:,} elements, {warps} warps"
        sums = torch.empty(elements // (block * TILES), device=device)
        read = partial(
            _read_kernel[(len(sums),)],
            source,
            sums,
            BLOCK=block,
            TILES=TILES,
            num_warps=warps,
            enable_fp_fusion=False,
        )
        read()
        expected = source.view(sums.numel(), -1).double().sum(1).float()
        torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-1)
        yield (f"read, {name}", once, median_seconds(read))


def _main() -> None:
    """Prints the table, and writes JSON where asked to."""
    parser = Parser("bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=new_file, help="write the figures there")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    given = parser.parse_args()
    found = []
    for name, moved, seconds in measure(
        *("cpu", DRY_ELEMENTS) if given.dry_run else ("cuda", ELEMENTS)
    ):
        print(f"{name:<32}{moved / seconds / 1e12:8.3f} TB/s", flush=True)
        found.append({"name": name, "moved_bytes": moved, "seconds": seconds})
    if given.json:
        record = {"machine": describe(), "dry_run": given.dry_run, "ceilings": found}
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    _main()
