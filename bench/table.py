"""The table of a run, a block per case and size, in 100 columns; and tables in documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

Run = Mapping[str, Any]
MIB = 2**20
LEGEND = """
vs naive  how many times fewer of 'x floor' than naive takes
x clone   median over that of logits.clone(), which pays for fresh memory
x floor   time over that of the least work, timed before every round; median of the ratios
peak      MiB held at one time beyond those before the call, gradients included
x logits  the same over the size of the logits
work      from logits bytes moved per logit, from hidden states products: see bench/README.md
off       largest error of loss, logp, entropy and gradients against float64, of the norm of each
""".splitlines()


def with_table(path: Path, command: str, text: str) -> str:
    """A document with another text between the markers of the command that writes it."""
    start, end = f"<!-- python -m {command} -->\n", "<!-- end -->\n"
    before, rest = path.read_text("utf-8").split(start)
    return before + start + text + end + rest.split(end, 1)[1]


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
