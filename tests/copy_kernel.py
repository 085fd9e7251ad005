"""Kernels whose traffic is counted by hand."""

import torch
import triton
import triton.language as tl


@triton.jit
def _copy_twice_kernel(source_ptr, sink_ptr, V, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    start = tl.program_id(0) * V
    first = tl.load(source_ptr + start + at, mask=at < V)
    second = tl.load(source_ptr + start + at, mask=at < V)
    tl.store(sink_ptr + start + at, (first + second) / 2, mask=at < V)


def copy_twice(source: torch.Tensor, sink: torch.Tensor) -> None:
    """Copies `[N, V]`, reading it twice."""
    N, V = source.shape
    block = triton.next_power_of_2(V)
    _copy_twice_kernel[(N,)](source, sink, V, BLOCK=block, enable_fp_fusion=False)


@triton.jit
def _add_up_kernel(source_ptr, total_ptr, V, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(source_ptr + tl.program_id(0) * V + at, mask=at < V, other=0.0)
    tl.atomic_add(total_ptr, tl.sum(row, 0))


def add_up(source: torch.Tensor, total: torch.Tensor) -> None:
    """Adds `[N, V]` to a single number."""
    N, V = source.shape
    block = triton.next_power_of_2(V)
    _add_up_kernel[(N,)](source, total, V, BLOCK=block, enable_fp_fusion=False)


@triton.jit
def _copy_in_tiles_kernel(source_ptr, sink_ptr, V, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        power = tl.exp2(tl.load(source_ptr + at))
        if TOGETHER:
            power += tl.sum(power, 0)
        tl.store(sink_ptr + at, power)


def copy_in_tiles(source: torch.Tensor, sink: torch.Tensor, together: bool) -> None:
    """Copies 2ˣ of `[V]`, 1,024 at a time; `together` adds to each the sum of its tile."""
    _copy_in_tiles_kernel[(1,)](
        source,
        sink,
        source.numel(),
        TOGETHER=together,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )
