"""How a kernel is laid out on the device: the only home of block sizes and warps.

Keyed by vocabulary, dtype and architecture alone. Nothing that depends on the number of rows may
enter: a row must give the same bits in every batch. All row kernels share an entry, so that it
gives them in every plan, too.

The exception to "at the memory's speed" is few rows. A row is summed by one program, since sharing
it among several, as their number asks for, would change the order of summation with the batch. With
fewer rows than twice the processors, processors hold one program or none: 16 KiB are then on their
way at a time, about 1.1 µs for loading and summing them, which is 15 of the 23 KB/µs that are an
H100 processor's share. Predicted of its 3 TB/s: two thirds at 128 rows, a sixth at 32.

The other is the one pass over long rows, which it reads twice. Three rows of 151,936 bfloat16 at a
time on each of 132 processors are 120 MB, more than twice an H100's level-2 cache, so that forwards
nothing is left there of a row when it is read again: 6 bytes a logit from and to memory instead of
4. What may be chosen against it are `backwards`, `held` and `kept` below; no bit depends on them.
`bench.second_reading` predicts, `bench.tune` measures, and until it has, nothing is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .records import Rows

# the widest load of one thread, on every GPU at hand
LOAD_BYTES = 16
# as many loads in flight as registers allow
TILES = 4
# of one processor
REGISTERS = 65536
# a program to a sequence: two tokens to a thread, of at most so many registers
SEQUENCE_BLOCK, SEQUENCE_WARPS, SEQUENCE_REGISTERS = 512, 8, 64
# the one pass: left alone the assembler spills to use fewer; more where 16-bit logits are written
READING_REGISTERS, WRITING_REGISTERS = 64, 80

# rows of logits, whose strides every kernel takes
MATRICES = ("logits_ptr", "ref_logits_ptr", "dlogits_ptr")

# what a kernel is told of a row's second reading where there is none
ONE_READING: dict[str, Any] = {"HELD": 0, "KEPT": None, "BACKWARDS": False}


@dataclass(frozen=True)
class Tuning:
    """What may be chosen of a layout by measuring: an entry of `TUNED`, a candidate of bench/tune.

    Attributes:
        warps: of 32 threads, which share a row.
        tiles: loaded in one step; None means `TILES`.
        num_stages: of the compiler's software pipeline; None leaves it to the compiler.
        registers: of a thread, at most (NVIDIA): fewer let more rows be read at a time; None leaves
            it to the compiler.
        backwards: whether the one pass reads a row the second time from its end to its beginning.
        held: tiles of a row, behind its first, that stay in registers for the second reading, four
            each; none with a reference's logits.
        kept: KiB at the end of a row that the caches are asked to keep for the second reading, all
            else then to give up first; None asks for nothing.
    """

    warps: int
    tiles: int | None = None
    num_stages: int | None = None
    registers: int | None = None
    backwards: bool = False
    held: int = 0
    kept: int | None = None


# (architecture, dtype, bucket of V) -> what was fastest there; written by `python -m bench.tune`
TUNED: dict[tuple[str, str, int], Tuning] = {}


def tuning_bucket(V: int) -> int:
    """The power of two that a vocabulary fills at most: neighbours share an entry of `TUNED`."""
    return 1 << (V - 1).bit_length()


def tuning_key(device: torch.device, dtype: torch.dtype, V: int) -> tuple[str, str, int]:
    """Where `TUNED` holds the entry of some logits."""
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


@dataclass(frozen=True)
class RowLayout:
    """How one program covers a row, see `row_tiles`.

    It decides the order in which a row is summed, so it follows from V, dtype and architecture; how
    rows lie in memory has no say.
    """

    THREADS: int
    WIDTH: int
    TILES: int
    num_warps: int
    num_stages: int | None = None
    maxnreg: int | None = None
    HELD: int = 0
    KEPT: int | None = None
    BACKWARDS: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """As a launch takes them that reads a row once."""
        once = {name: value for name, value in vars(self).items() if name not in ONE_READING}
        return {name: value for name, value in once.items() if value is not None}

    def of_two_readings(self, V: int, gradient: bool, pair: bool) -> dict[str, Any]:
        """As the one pass takes them, which reads a row once more for its gradient, if it has one.

        Neither registers nor caches are asked to keep any of a `pair` of rows: it fills them.
        """
        again = dict(ONE_READING)
        if gradient:
            again["BACKWARDS"] = self.BACKWARDS
            if not pair:
                whole = V // (self.THREADS * self.WIDTH)
                again |= {"HELD": max(0, min(self.HELD, whole - 1)), "KEPT": self.KEPT}
        if pair:
            return again | self.of_a_pair
        if again != ONE_READING:
            # as it was measured
            return again | self.keywords
        most = WRITING_REGISTERS if gradient and self.WIDTH > 4 else READING_REGISTERS
        return again | at_most_registers(most) | self.keywords

    @property
    def of_a_pair(self) -> dict[str, Any]:
        """The same where two rows are read: as many registers as let two programs run at a time."""
        return at_most_registers(REGISTERS // max(self.THREADS, 512)) | self.keywords


def row_layout(rows: Rows) -> RowLayout:
    """Layout of the row kernels, from vocabulary, dtype and architecture alone."""
    key = tuning_key(rows.logits.device, rows.logits.dtype, rows.V)
    tuning = TUNED.get(key) or untuned(rows.V)
    # AMD's wavefronts have 64 lanes; tiles, and so results, stay those of 32
    lanes = 64 if torch.version.hip else 32
    threads = 32 * tuning.warps
    kept = None if tuning.kept is None else 1024 * tuning.kept // (threads * LOAD_BYTES)
    return RowLayout(
        THREADS=threads,
        WIDTH=LOAD_BYTES // rows.logits.element_size(),
        TILES=tuning.tiles or TILES,
        num_warps=max(1, threads // lanes),
        num_stages=tuning.num_stages,
        maxnreg=None if torch.version.hip else tuning.registers,
        HELD=tuning.held,
        KEPT=kept,
        BACKWARDS=tuning.backwards,
    )


def untuned(V: int) -> Tuning:
    """The rule for cards that nobody has measured."""
    return Tuning(warps=4 if V <= 8192 else 8)


def launch(
    kernel: Any,
    programs: int,
    on: torch.Tensor,
    strided: tuple[str, ...] = MATRICES,
    **arguments: Any,
) -> None:
    """Starts `programs` programs on the device of `on`, which need not be the current one.

    Products and sums are contracted only where a kernel names `tl.fma`: what the compiler contracts
    differs from kernel to kernel, and with it the bits of one formula in two kernels.

    Args:
        strided: tensors whose strides the kernel takes; it reads all others as contiguous.

    Raises:
        ValueError: a tensor that the kernel would read at the wrong places.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in strided and not value.is_contiguous():
            raise ValueError(
                f"{kernel.__name__}: {name}: expected a contiguous tensor, got shape "
                f"{list(value.shape)} with strides {value.stride()}"
            )
    if programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](**arguments, enable_fp_fusion=False)


def at_most_registers(most: int) -> dict[str, Any]:
    """Lets NVIDIA's assembler use that many, where left alone it would spill to use fewer."""
    return {} if torch.version.hip else {"maxnreg": most}
