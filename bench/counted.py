"""Bytes, launches and peak memory of every contender: counted, hence exact on any machine.

`python -m bench.counted` writes bench/results/counted.md and counted.json. Triton kernels run in
the interpreter, whose loads and stores are added up; of PyTorch's operations the operands are. Each
figure is what one more row of logits costs, the difference of two small batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # before the first import of a kernel
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch

from bench.batch import CASES, Batch, Case
from bench.contenders import Contender, contenders
from bench.kernel_meter import KernelMeter
from bench.machine import versions
from bench.meter import CompiledMeter, OperandMeter, one_thread, peak_extra_bytes
from grpo_core.cli.options import Parser

# rows of several tiles, unaligned, so that first and last tiles are masked
V = 20_001
ROWS = (4, 7)
RESULTS = Path(__file__).parent / "results"
# packages whose version decides a figure
MAKERS = ("torch", "triton", "liger-kernel", "trl")


def count(contender: Contender, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What one step costs: see the columns of `markdown`."""
    few, many = (_count_at(N, contender, case, dtype) for N in ROWS)
    logits = (ROWS[1] - ROWS[0]) * V
    figures: dict[str, Any] = {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "contender": contender.name,
    }
    for name, amount in many.items():
        per_logit = name in ("issued", "distinct", "peak") and amount is not None
        figures[name] = round((amount - few[name]) / logits, 2) if per_logit else amount
    return figures


def _count_at(N: int, contender: Contender, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Totals of one call over N rows."""
    call = contender.call(Batch.draw(N, V, dtype, "cpu"), case)
    operands = OperandMeter(threshold=V * dtype.itemsize)
    kernels = KernelMeter() if contender.kernels else None
    compiled = CompiledMeter()
    with one_thread(), compiled if contender.compiled else operands, kernels or nullcontext():
        call()
    if contender.compiled:
        moved = {"issued": compiled.accessed, "distinct": compiled.accessed}
        starts = {"kernels": compiled.kernels, "operations": 0, "waits": 0}
    else:
        issued, distinct = kernels.traffic() if kernels else (0, 0)
        moved = {"issued": operands.issued + issued, "distinct": operands.large + distinct}
        starts = {"kernels": len(kernels.launches) if kernels else 0}
        starts |= {"operations": operands.operations, "waits": operands.waits}
    # some have written over their logits by now, which changes no size
    return moved | starts | {"peak": peak_extra_bytes(call, "cpu")}


@cache
def published() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The figures of counted.json, which hold on every machine; a test holds them up to date."""
    kept = json.loads((RESULTS / "counted.json").read_text())["figures"]
    return {(one["contender"], one["case"], one["dtype"]): one for one in kept}


LEGEND = f"""\
Per logit of one more row (the difference of batches of {ROWS[0]} and {ROWS[1]} rows of {V:,}
logits), so what does not grow with the rows cancels.

- *bytes*: what memory has to move. Of Triton kernels every address once per program and direction:
  `ours` is built so that a row's second reading within a program comes from registers or a cache,
  which only a GPU can confirm. Of PyTorch's operations the operands as large as the logits, each
  once per operation.
- *issued*: every lane of every load and store, every operand of every operation.
- *Triton*, *torch*: kernels launched in one step, and operations of PyTorch that touch memory, each
  at least one kernel more on a GPU. *waits*: times the host waits for the device.
- *peak*: most memory held at one time beyond that before the call, the gradient included, over that
  of the logits.
- `compiled` is what inductor says of the code it makes for this CPU; for a GPU it makes other code.
  `naive+entropy`, `trl` and `ours` find the entropy of every token as well.
"""


def markdown(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """One table per dtype and case."""
    lines, last = [], None
    for one in figures:
        if (one["dtype"], one["case"]) != last:
            last = (one["dtype"], one["case"])
            lines += [
                f"\n## {one['dtype']}, {one['case']}\n",
                "| contender | bytes | issued | Triton | torch | waits | peak |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
        bold = "**" if one["contender"].startswith("ours") else ""
        itemsize = getattr(torch, one["dtype"]).itemsize
        lines.append(
            f"| {bold}{one['contender']}{bold} | {one['distinct']:.1f} | {one['issued']:.1f} "
            f"| {one['kernels']} | {one['operations']} | {one['waits']} "
            f"| {one['peak'] / itemsize:.2f} |"
        )
    return lines


def main() -> None:
    """Writes both files, and prints the one for people."""
    Parser("bench.counted", description=__doc__.splitlines()[0]).parse_args()
    figures = [
        count(contender, case, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for case in CASES
        for contender in contenders("interpreter", case)
    ]
    made = ", ".join(f"{name} {versions()[name]}" for name in MAKERS)
    head = ["# Counted: bytes, launches, memory", "", f"By `python -m bench.counted`: {made}.", ""]
    text = "\n".join([*head, *LEGEND.splitlines(), *markdown(figures)])
    (RESULTS / "counted.md").write_text(text + "\n")
    record = {"versions": versions(), "V": V, "rows": ROWS, "figures": figures}
    (RESULTS / "counted.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
