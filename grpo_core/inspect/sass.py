"""Reads the text of machine code: NVIDIA's SASS as `nvdisasm -c` writes it, and AMD's amdgcn.

Only what counting needs is kept of an instruction, the same for both makers. What a mask looks like
differs: in SASS a masked load carries a predicate, `@P0 LDG`; in amdgcn it stands where the
execution mask has been narrowed, behind a `saveexec`, and gets the guard "exec" here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_LINE = re.compile(r"\s+((?:[sv]|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
AMD_BYTES = {"x4": 16, "128": 16, "x3": 12, "96": 12, "x2": 8, "64": 8, "dword": 4, "32": 4}
AMD_BYTES |= {"short": 2, "16": 2, "byte": 1, "8": 1}
AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
AMD_WAIT = re.compile(r"s_barrier|ds_(bpermute|permute|swizzle)|v_permlane|\w+_dpp\b")
LABEL = re.compile(r"\s*([.$\w]+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction of either maker, as far as counting goes.

    Attributes:
        guard: the predicate without which it does nothing, "" if none.
        targets: labels it may jump to.
        falls_through: whether the next instruction may follow.
        expected: for a branch that nearly always goes one way, whether it jumps.
        loads, stores: bytes of global memory, of one thread.
        special: whether the special-function units compute it (MUFU: exp2, log2, 1/x).
        waits: whether threads wait for each other or exchange registers.
    """

    opcode: str
    operands: str = ""
    guard: str = ""
    targets: tuple[str, ...] = ()
    falls_through: bool = True
    expected: bool | None = None
    loads: int = 0
    stores: int = 0
    special: bool = False
    waits: bool = False


def sass(text: str) -> Iterator[str | Instruction]:
    """Labels and instructions of `nvdisasm -c`."""
    for line in text.splitlines():
        if found := SASS_LINE.search(line):
            guard, opcode, operands = found.groups(default="")
            name, *suffixes = opcode.split(".")
            width = next((SASS_BYTES[s] for s in suffixes if s in SASS_BYTES), 4)
            jumps = name in ("BRA", "JMP", "BRX", "BRXU")
            # a jump may also have a predicate among its operands: BRA.U UP0, `(.L_x_3)
            certain = not guard and (operands.startswith("`") or "BRANCH_TARGETS" in operands)
            ends = certain if jumps else name in ("EXIT", "RET") and not guard
            yield Instruction(
                opcode,
                operands,
                guard,
                targets=tuple(re.findall(r"\.L_\w+", operands)) if jumps else (),
                falls_through=not ends,
                expected=False if "DIV" in suffixes else None,
                loads=width if name in ("LDG", "LDGSTS") else 0,
                stores=width if name == "STG" else 0,
                special=name == "MUFU",
                waits=name in ("BAR", "SHFL", "REDUX", "CREDUX"),
            )
        elif label := LABEL.match(line):
            yield label[1]


def amdgcn(text: str) -> Iterator[str | Instruction]:
    """Labels and instructions of an amdgcn assembly; under a narrowed mask the guard is "exec"."""
    narrowed = ""
    carried: dict[str, str] = {}
    for line in text.splitlines():
        if found := AMD_LINE.match(line):
            opcode, operands = found[1], found[2].strip()
            access = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
            width = next((b for key, b in AMD_BYTES.items() if access and key in access[2]), 0)
            if opcode.startswith("s_or_b") and operands.startswith("exec"):
                narrowed = ""
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            if jumps:
                carried[operands] = narrowed
            yield Instruction(
                opcode,
                operands,
                "" if jumps else narrowed,
                targets=(operands,) if jumps else (),
                falls_through=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
                expected={"s_cbranch_execz": False, "s_cbranch_execnz": True}.get(opcode),
                loads=width if access and access[1] == "load" else 0,
                stores=width if access and access[1] == "store" else 0,
                special=bool(AMD_SPECIAL.match(opcode)),
                waits=bool(AMD_WAIT.match(opcode)),
            )
            if "saveexec" in opcode:
                narrowed = "exec"
        elif label := LABEL.match(line):
            narrowed = carried.get(label[1], narrowed)
            yield label[1]
