"""The table of a run, for at most 100 columns: a block per case and size, a line per contender."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

Run = Mapping[str, Any]
MIB = 2**20
LEGEND = """
vs naive  how many times fewer of 'x floor' than naive takes
x clone   median over that of logits.clone(), which pays for fresh memory
x floor   time over that of the least work, timed before every round; median of the ratios. From
          logits: to read them once, in two phases twice, and to write a gradient once, at the speed
          of a copy into memory already in use. From hidden states: the bare matrix products, 3 with
          a trained head, 2 with a frozen one, 1 for logp
peak      MiB held at one time beyond those before the call, gradients included
x logits  the same over the size of the logits
work      from logits, bytes moved per logit: operands as large as the logits of every operation, as
          inductor counts all for compiled, for Triton kernels each address once per program; from
          hidden states, matrix products of 2 * rows * V * D operations. ours-cpu is not seen: a
          row is read once from memory and once from cache, and written once
off       largest error of loss, logp, entropy and gradients against float64, of the norm of each
""".splitlines()


def table(runs: Iterable[Run]) -> list[str]:
    """The lines of the table.

    Args:
        runs: per benchmark its group, contender, median (seconds), rounds and `extra_info`.
    """
    lines = [
        f"{'contender':<22}{'median ms':>10}{'rounds':>7}{'vs naive':>9}{'x clone':>8}"
        f"{'x floor':>8}{'peak':>10}{'x logits':>9}{'work':>7}{'off':>9}"
    ]
    runs = sorted(runs, key=lambda run: (run["from_hidden"], run["dtype"] != "float32"))
    for group in dict.fromkeys(run["group"] for run in runs):
        block = [run for run in runs if run["group"] == group]
        over = {run["contender"]: run["ratio_to_floor"] for run in block}
        first = block[0]
        size = first["returned_bytes" if first["from_hidden"] else "logits_bytes"] / MIB
        about = f"{'gradients' if first['from_hidden'] else 'logits'} of {size:,.0f} MiB"
        for name in ("products", "clone", "copy"):
            seconds = [run[f"{name}_seconds"] for run in block if f"{name}_seconds" in run]
            about += f", {name} {1e3 * median(seconds):,.1f} ms" if seconds else ""
        lines += ["", group, f"  {about}", *(_line(run, over.get("naive")) for run in block)]
    return lines


def _line(run: Run, naive: float | None) -> str:
    """One contender."""
    speedup = f"{naive / run['ratio_to_floor']:.2f}" if naive else "-"
    clone = "-" if run["from_hidden"] else f"{run['median'] / run['clone_seconds']:.2f}"
    # bytes of large tensors; of all, where nobody tells them apart
    work = run.get("products") or run.get("bytes_per_logit") or run.get("bytes_per_logit_issued")
    off = max(value for name, value in run.items() if name.endswith("_error"))
    peak = run["peak_extra_bytes"]
    return (
        f"  {run['contender']:<20}{1e3 * run['median']:>10,.1f}{run['rounds']:>7}{speedup:>9}"
        f"{clone:>8}{run['ratio_to_floor']:>8.2f}{peak / MIB:>10,.1f}"
        f"{peak / run['logits_bytes']:>9.2f}{'-' if work is None else format(work, '.2f'):>7}"
        f"{off:>9.0e}"
    )
