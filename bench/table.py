"""The table at the end of a bench run: one block per case, one line per contender."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

MIB = 2**20
LEGEND = """\
x clone     median over that of logits.clone(), x copy over that of copying the logits into memory
            already in use; both timed before every round, with the same clock
vs naive    how many times faster than naive in the same block
peak extra  most bytes held at one time beyond those before the call, the gradient included; on a
            CPU with one thread: each further one of ours-torch holds its own scratch
B/logit     bytes moved per logit: operands of every operation, as inductor counts them for
            compiled; for Triton kernels every lane of every load and store
large       of those, what no cache is meant to hold: operands in storages at least half as large
            as the logits; for Triton kernels each address once per program"""


def table(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of at most 100 columns.

    Args:
        runs: per benchmark its group, contender, median (seconds) and `extra_info`.
    """
    lines = []
    for group, members in groupby(runs, key=lambda run: run["group"]):
        block = list(members)
        first = block[0]
        lines += [
            "",
            f"{group}   logits {first['logits_bytes'] / MIB:,.0f} MiB, "
            f"clone {_milliseconds(first['clone_seconds'])}, "
            f"copy {_milliseconds(first['copy_seconds'])}",
            f"  {'contender':<20}{'median':>11}{'x clone':>9}{'x copy':>8}{'vs naive':>10}"
            f"{'peak extra':>14}{'x logits':>9}{'B/logit':>8}{'large':>7}",
        ]
        naive = next((run["median"] for run in block if run["contender"] == "naive"), None)
        lines += [_line(run, naive) for run in block]
    return [*lines, "", *LEGEND.splitlines()] if lines else []


HIDDEN_LEGEND = """\
x products  time over that of the bare matrix products (3 with a trained head, 2 with a frozen one,
            1 without a gradient), timed before every round into memory already in use: median of
            the rounds' ratios, and the ratio of the best times
vs naive    how many times fewer of them than naive takes
peak extra  most bytes held at one time beyond those before the call, the gradients included, which
            'returned' is the size of
products    counted, in 2 * rows * V * D operations
off         largest error of loss, logp, dhidden and dweight against float64, of the norm of each"""


def hidden_table(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of at most 100 columns for the loss from hidden states; see `table`."""
    lines = []
    for group, members in groupby(runs, key=lambda run: run["group"]):
        block = list(members)
        first = block[0]
        floor = sorted(run["products_seconds"] for run in block)[len(block) // 2]
        lines += [
            "",
            f"{group}   products {_milliseconds(floor)}, returned "
            f"{first['returned_bytes'] / MIB:,.0f} MiB",
            f"  {'contender':<20}{'median':>12}{'x products':>12}{'best':>6}{'vs naive':>10}"
            f"{'peak extra':>16}{'products':>10}{'off':>9}",
        ]
        over = {run["contender"]: run["ratio_to_products"] for run in block}
        for run in block:
            own = run["ratio_to_products"]
            speedup = f"{over['naive'] / own:.2f}" if "naive" in over else "-"
            lines.append(
                f"  {run['contender']:<20}{_milliseconds(run['median']):>12}"
                f"{run['ratio_to_products']:>12.2f}{run['ratio_of_best']:>6.2f}{speedup:>10}"
                f"{run['peak_extra_bytes'] / MIB:>12,.1f} MiB{run['products']:>10.2f}"
                f"{largest_error(run):>9.0e}"
            )
    return [*lines, "", *HIDDEN_LEGEND.splitlines()] if lines else []


def largest_error(run: Mapping[str, Any]) -> float:
    """Of everything that a contender returned."""
    return max(value for name, value in run.items() if name.endswith("_error"))


def kernel_lines(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """What Triton kernels would move on a GPU, for machines that cannot time them."""
    lines = ["", "Triton kernels need a GPU to be timed; bytes per bfloat16 logit, as counted:"]
    eager = ("naive", "compiled")
    kernels = [
        one
        for one in figures
        if one["dtype"] == "bfloat16" and not one["contender"].startswith(eager)
    ]
    for case, members in groupby(kernels, key=lambda one: one["case"]):
        lines.append(f"  {case}")
        lines += [
            f"    {one['contender']:<22}{one['distinct']:5.1f} from memory,"
            f"{one['issued']:5.1f} issued"
            for one in members
        ]
    return lines


def _line(run: Mapping[str, Any], naive: float | None) -> str:
    """One contender."""
    speedup = f"{naive / run['median']:.2f}" if naive else "-"
    peak = run["peak_extra_bytes"]
    return (
        f"  {run['contender']:<20}{_milliseconds(run['median']):>11}{run['ratio_to_clone']:>9.2f}"
        f"{run['ratio_to_copy']:>8.1f}{speedup:>10}{peak / MIB:>10,.1f} MiB"
        f"{peak / run['logits_bytes']:>9.2f}{_count(run['bytes_per_logit_issued']):>8}"
        f"{_count(run['bytes_per_logit']):>7}"
    )


def _count(bytes_per_logit: float | None) -> str:
    """A dash where nobody counted."""
    return "-" if bytes_per_logit is None else f"{bytes_per_logit:.1f}"


def _milliseconds(seconds: float) -> str:
    """Four digits or so."""
    return f"{seconds * 1e3:,.1f} ms"
