"""Reads NVIDIA's machine code (SASS) as `nvdisasm -c` prints it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"\s*([.$\w]+):")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    """One instruction, as far as counting needs it.

    Attributes:
        guard: the predicate that enables it, "" if none.
        targets: labels it may jump to.
        falls_through: whether the next instruction may follow.
        loads, stores: bytes of global memory per thread.
        special: whether a special-function unit executes it (MUFU: exp2, log2, 1/x).
        waits: whether threads wait for each other or exchange registers.
        spills: whether it stores or loads a spilled register.
    """

    opcode: str
    operands: str = ""
    guard: str = ""
    targets: tuple[str, ...] = ()
    falls_through: bool = True
    loads: int = 0
    stores: int = 0
    special: bool = False
    waits: bool = False
    spills: bool = False


def sass(text: str) -> Iterator[str | Instruction]:
    """Labels and instructions in the output of `nvdisasm -c`."""
    for line in text.splitlines():
        if found := LINE.search(line):
            guard, opcode, operands = found.groups(default="")
            name, *suffixes = opcode.split(".")
            width = next((BYTES[s] for s in suffixes if s in BYTES), 4)
            # a warp rarely diverges: the common path does not take BRA.DIV. For sm_80 the assembler
            # also leaves a loop by CALL.REL, from which nothing returns.
            jumps = name in ("BRA", "JMP", "BRX", "BRXU", "CALL") and "DIV" not in suffixes
            # a predicate may also be an operand: BRA.U UP0, `(.L_x_3)
            certain = not guard and (operands.startswith("`") or "BRANCH_TARGETS" in operands)
            ends = certain and name != "CALL" if jumps else name in ("EXIT", "RET") and not guard
            yield Instruction(
                opcode,
                operands,
                guard,
                targets=tuple(re.findall(r"\.L_\w+", operands)) if jumps else (),
                falls_through=not ends,
                loads=width if name in ("LDG", "LDGSTS") else 0,
                stores=width if name == "STG" else 0,
                special=name == "MUFU",
                waits=name in ("BAR", "SHFL", "REDUX", "CREDUX"),
                spills=name in ("LDL", "STL"),
            )
        elif label := LABEL.match(line):
            yield label[1]
