"""Bytes, launches and peak memory of every contender: counted, hence exact on any machine.

`python -m bench.counted` writes bench/results/counted.md and counted.json. Triton kernels run in
the interpreter, whose loads and stores are added up; of PyTorch's operations the operands are. Each
figure is what one more row of logits costs, the difference of two small batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # before the first import of a kernel
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch

from bench.batch import CASES, Batch, Case
from bench.contenders import Contender, contenders
from bench.machine import versions
from bench.meter import CompiledMeter, KernelMeter, Meter, one_thread, peak_extra_bytes
from bench.table import with_table
from grpo_core.cli.options import Parser
from grpo_core.runs.report import markdown
from grpo_core.verify.report import dtype_name

# rows of several tiles, unaligned, so that first and last tiles are masked
V = 20_001
ROWS = (4, 7)
RESULTS = Path(__file__).parent / "results"
DOCUMENT = RESULTS / "counted.md"
# packages whose version decides a figure
MAKERS = ("torch", "triton", "liger-kernel", "trl")


def count(contender: Contender, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What one step costs: see the columns of `markdown`."""
    few, many = (_count_at(N, contender, case, dtype) for N in ROWS)
    figures: dict[str, Any] = {
        "case": case.name,
        "dtype": dtype_name(dtype),
        "contender": contender.name,
    }
    for name in ("issued", "distinct", "peak"):
        many[name] = round((many[name] - few[name]) / ((ROWS[1] - ROWS[0]) * V), 2)
    return figures | many


def _count_at(N: int, contender: Contender, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Totals of one call over N rows."""
    call = contender.call(Batch.draw(N, V, dtype, "cpu"), case)
    meter: Any = CompiledMeter() if contender.compiled else Meter(V * dtype.itemsize)
    kernels = KernelMeter()
    with one_thread(), meter, kernels if contender.kernels else nullcontext():
        call()
    traffic = kernels.traffic()
    return {
        "issued": meter.issued + traffic.issued,
        "distinct": meter.large + traffic.distinct,
        "kernels": meter.kernels + len(kernels.launches),
        "operations": meter.operations,
        "waits": meter.waits,
        # some have written over their logits by now, which changes no size
        "peak": peak_extra_bytes(call, "cpu"),
    }


@cache
def published() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The figures of counted.json, which hold on every machine; a test holds them up to date."""
    kept = json.loads((RESULTS / "counted.json").read_text())["figures"]
    return {(one["contender"], one["case"], one["dtype"]): one for one in kept}


def tables(figures: Sequence[Mapping[str, Any]]) -> str:
    """One table per dtype and case."""
    text = ""
    for (dtype, case), block in groupby(figures, key=lambda one: (one["dtype"], one["case"])):
        rows = [("contender", "bytes", "issued", "Triton", "torch", "waits", "peak")]
        for one in block:
            bold = "**" if one["contender"].startswith("ours") else ""
            peak = f"{one['peak'] / getattr(torch, dtype).itemsize:.2f}"
            counts = (str(one[name]) for name in ("kernels", "operations", "waits"))
            moved = (f"{one[name]:.1f}" for name in ("distinct", "issued"))
            rows.append((f"{bold}{one['contender']}{bold}", *moved, *counts, peak))
        text += f"\n## {dtype}, {case}\n\n{markdown(rows)}"
    return text


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
    text = with_table(DOCUMENT, "bench.counted", f"\nWith {made}.\n{tables(figures)}\n")
    DOCUMENT.write_text(text)
    record = {"versions": versions(), "V": V, "rows": ROWS, "figures": figures}
    (RESULTS / "counted.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
