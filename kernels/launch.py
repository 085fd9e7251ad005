"""How kernels are compiled and launched: the only home of block sizes and warps.

A layout follows from vocabulary, dtype and architecture alone. Nothing that depends on the number
of rows may enter: a row must give the same bits in every batch. All row kernels share a layout, so
that a row gives the same bits in every plan.

The layouts are predicted, not measured. The one pass reads a row twice, and the second reading is
free where the caches still hold the row. With one program on each of 132 processors 132 rows are
being read. Of 151,936 bfloat16 they are 40 MB, which fit into the level-2 cache of an H100 (50 MB)
or H200 (60 MB); those of three programs of 8 warps are 120 MB. So long rows have 16 warps, of which
the registers of a processor hold one program. 32 warps would leave 64 registers to a thread, of
which the exact KL spills 18. `bench.tune` measures.

With fewer rows than processors, processors are idle: a row is summed by one program, since sharing
it among several would change the order of summation with the batch. Predicted of an H100's 3 TB/s:
two thirds at 128 rows, a sixth at 32.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .language import triton
from .records import Rows, extent, place_of

# the widest load of one thread
LOAD_BYTES = 16
# of one processor
REGISTERS = 65536
# a row of at most so many bytes is in the caches when it is read again: with three programs of 8
# warps to a processor, and with one of 16
SHORT_ROW, LONG_ROW = 100 * 2**10, 380 * 2**10
# warps that a processor must have room for, see `most_registers`: of kernels that read a row, that
# write one as well, that read two
READING_WARPS, WRITING_WARPS, PAIR_WARPS = 32, 24, 16
# tokens and warps of a program in `sequence_loss`: two tokens to a thread
SEQUENCE_BLOCK, SEQUENCE_WARPS = 512, 8
# the tensors whose strides a kernel takes
STRIDED = ("logits_ptr", "ref_logits_ptr", "dlogits_ptr")


@dataclass(frozen=True)
class Layout:
    """How one program covers a row.

    Attributes:
        warps: of 32 threads, which share the row; they decide the order of summation.
        tiles: loaded in one step, a load of 16 bytes to a thread each.
        num_stages: of the compiler's software pipeline; None leaves it to the compiler.
        registers: of a thread, at most (NVIDIA); None: as the kernel's warps allow.
    """

    warps: int
    tiles: int = 4
    num_stages: int | None = None
    registers: int | None = None


# (architecture, dtype, power of two) -> the fastest layout; written by `python -m bench.tune`
TUNED: dict[tuple[str, str, int], Layout] = {}


def choose_layout(V: int, itemsize: int) -> Layout:
    """The rule where nothing has been measured."""
    if V <= 8192:
        return Layout(4)
    if SHORT_ROW < V * itemsize <= LONG_ROW:
        return Layout(16)
    return Layout(8)


def tuning_bucket(V: int) -> int:
    """The power of two that a vocabulary fills at most: neighbours share an entry of `TUNED`."""
    return 1 << (V - 1).bit_length()


def tuning_key(device: torch.device, dtype: torch.dtype, V: int) -> tuple[str, str, int]:
    """Where `TUNED` holds the layout for some logits."""
    return architecture(device), str(dtype).removeprefix("torch."), tuning_bucket(V)


@cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ...; cpu where kernels are interpreted."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def row_arguments(rows: Rows, warps: int | None = None) -> dict[str, Any]:
    """What the kernels of rows have in common, as keywords of a launch.

    Args:
        warps: as for `row_layout`, without a reference.
    """
    ref, T = rows.ref_logits, rows.temperature
    if ref is not None:
        ref, warps = aligned(ref, rows.logits), PAIR_WARPS
    rows_per_batch, batch_stride, row_stride = place_of(rows.logits)
    _, ref_batch_stride, ref_row_stride = place_of(rows.logits if ref is None else ref)
    kind = "reverse" if ref is None else rows.divergence
    return {
        "logits_ptr": rows.logits,
        "ref_logits_ptr": ref,
        "N": rows.N,
        "V": rows.V,
        "rows_per_batch": rows_per_batch,
        "batch_stride": batch_stride,
        "row_stride": row_stride,
        "ref_batch_stride": ref_batch_stride,
        "ref_row_stride": ref_row_stride,
        "scale": math.log2(math.e) / T,
        "interpolation": rows.interpolation if kind == "mixture" else None,
        "DIVERGENCE": kind,
        **row_layout(rows.logits, warps),
    }


def aligned(logits: Tensor, other: Tensor) -> Tensor:
    """Logits, or a copy, whose rows lie between multiples of 16 bytes as those of `other` do."""
    size = logits.element_size()
    width = LOAD_BYTES // size

    def place(x: Tensor) -> list[int]:
        strides = (stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1)
        return [x.data_ptr() // size, *strides]

    if all((a - b) % width == 0 for a, b in zip(place(logits), place(other), strict=True)):
        return logits
    memory = logits.new_empty(extent(other) + width)
    start = (place(other)[0] - memory.data_ptr() // size) % width
    return memory.as_strided(other.shape, other.stride(), start).copy_(logits)


def row_layout(logits: Tensor, warps: int | None = None) -> dict[str, Any]:
    """The layout of a row kernel as keywords of its launch.

    Args:
        warps: as for `most_registers`, unless the layout has a limit; None sets none.
    """
    itemsize, V = logits.element_size(), logits.shape[-1]
    key = tuning_key(logits.device, logits.dtype, V)
    layout = TUNED.get(key) or choose_layout(V, itemsize)
    threads = 32 * layout.warps
    # AMD's wavefronts have 64 lanes; tiles, and so results, stay those of 32
    lanes = 64 if torch.version.hip else 32
    keywords: dict[str, Any] = {
        "THREADS": threads,
        "WIDTH": LOAD_BYTES // itemsize,
        "TILES": layout.tiles,
        "num_warps": max(1, threads // lanes),
    }
    if layout.num_stages is not None:
        keywords["num_stages"] = layout.num_stages
    if layout.registers is not None:
        keywords |= at_most_registers(min(layout.registers, REGISTERS // threads))
    elif warps is not None:
        keywords |= at_most_registers(most_registers(warps, layout.warps))
    return keywords


def most_registers(warps: int, of_program: int) -> int:
    """Registers of a thread with which a processor holds so many warps, in whole programs.

    A limit has to be set: left alone the assembler spills to use fewer. Programs of 16 warps get
    64, 128 and 128 for 32, 24 and 16 warps, those of 8 warps 64, 80 and 128.
    """
    threads = 32 * of_program * max(1, warps // of_program)
    # threads get them by the eight
    return REGISTERS // threads // 8 * 8


def at_most_registers(most: int) -> dict[str, Any]:
    """The keyword that bounds the registers of a thread on NVIDIA's cards."""
    return {} if torch.version.hip else {"maxnreg": most}


def unspecialized(function: Any) -> Any:
    """`triton.jit` for a kernel that is compiled once for all sizes, strides and alignments.

    Otherwise Triton compiles again where an integer is 1 or a multiple of 16, or a pointer is
    aligned, all of which change with the number of rows and with a view.
    """
    parameters = inspect.signature(function).parameters.values()
    plain = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    pointers = [name for name in plain if name.endswith("_ptr")]
    return triton.jit(
        do_not_specialize=[name for name in plain if name not in pointers],
        do_not_specialize_on_alignment=pointers,
    )(function)


def launch(kernel: Any, programs: int, on: torch.Tensor, **arguments: Any) -> None:
    """Starts `programs` programs on the device of `on`, which need not be the current one.

    Products and sums are contracted only where a kernel names `tl.fma`: what the compiler contracts
    differs from kernel to kernel, and with it the bits of one formula in two kernels.

    Raises:
        ValueError: a tensor that the kernel would read at the wrong places.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in STRIDED and not value.is_contiguous():
            raise ValueError(
                f"{kernel.__name__}: {name}: expected a contiguous tensor, got shape "
                f"{list(value.shape)} with strides {value.stride()}"
            )
    if programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](**arguments, enable_fp_fusion=False)
