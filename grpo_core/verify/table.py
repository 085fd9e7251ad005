"""The report as text, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeVar

import torch

from grpo_core.verify.accuracy import QUANTITIES
from grpo_core.verify.checks import Bits, Found
from grpo_core.verify.report import Report

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of the place of a worst error; what does not fit is cut
PLACE_WIDTH = 44
# enough to see a pattern
FAILURES_SHOWN = 8
LEGEND = """\
PyTorch: float32 log_softmax, gather, autograd. allowed: PyTorch's error and a few float32 roundings
Rows: ordinary, confident (0 to 30 nats), offset by ±1000, a third of the words at −inf.
Layouts: padded with masks, views, packed, in place, on policy."""

Where = TypeVar("Where", Found, Bits)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 rather than torch.float32."""
    return str(dtype).removeprefix("torch.")


def table(report: Report) -> list[str]:
    """Every block; a line each."""
    dtypes = [dtype for dtype in DTYPES if any(f.dtype == dtype for f in report.losses)]
    names = [dtype_name(dtype) for dtype in dtypes]
    quantities = f"{'':19}{'ours':>9}{'PyTorch':>10}{'allowed':>9}   worst at"
    recipes = f"{'':30}" + "".join(f"{name:>12}{'PyTorch':>9}" for name in names)
    bits = f"{'':38}" + "".join(f"{name:>14}" for name in names)
    return [
        *_block(
            "Error against float64, worst of all recipes (dlogits: of the largest)", quantities
        ),
        *_quantities(report.losses, dtypes),
        *_block("Gradient of each recipe, ours and PyTorch's (ok: every quantity is)", recipes),
        *_recipes(report.losses, dtypes),
        *_block("Confident tokens, 0 to 30 nats: errors relative to each number", quantities),
        *_quantities(report.confident, dtypes),
        *_block("Bit for bit: numbers compared, and those that differ", bits),
        *_bits(report.bits, dtypes),
        *_failures([f for f in (*report.losses, *report.confident) if not f.comparison.ok]),
        "",
    ]


def summary(report: Report, where: str) -> str:
    """The last line."""
    verdict = f"{report.failures} FAILED" if report.failures else "all ok"
    return f"{report.count:,} comparisons in {report.seconds:.1f} s on {where}: {verdict}"


def _block(title: str, columns: str) -> list[str]:
    return ["", title, columns]


def _quantities(found: Sequence[Found], dtypes: Iterable[torch.dtype]) -> list[str]:
    """A line per quantity and dtype."""
    lines = []
    for name, dtype in product(QUANTITIES, dtypes):
        these = [f for f in _of(found, dtype) if f.comparison.quantity == name]
        if not these:
            continue
        worst = _worst(these)
        _, error, baseline, share = worst.comparison
        lines.append(
            f"  {name:<8}{dtype_name(dtype):<9}{_number(error):>9}{_number(baseline):>10}"
            f"{share:>9.0%}   {_place(worst):<{PLACE_WIDTH}} {_verdict(these)}"
        )
    return lines


def _recipes(found: Sequence[Found], dtypes: Sequence[torch.dtype]) -> list[str]:
    """A line per recipe, two columns per dtype."""
    lines = []
    for recipe in dict.fromkeys(f.recipe for f in found):
        these = [f for f in found if f.recipe == recipe]
        line = f"  {recipe:<28}"
        for dtype in dtypes:
            gradients = [f for f in _of(these, dtype) if f.comparison.quantity == "dlogits"]
            _, error, baseline, _ = _worst(gradients).comparison
            line += f"{_number(error):>12}{_number(baseline):>9}"
        lines.append(f"{line}   {_verdict(these)}")
    return lines


def _bits(bits: Sequence[Bits], dtypes: Sequence[torch.dtype]) -> list[str]:
    """A line per claim, a column per dtype."""
    lines = []
    for claim in dict.fromkeys(b.claim for b in bits):
        these = [b for b in bits if b.claim == claim]
        line = f"  {claim:<36}"
        for dtype in dtypes:
            numbers = sum(b.numbers for b in _of(these, dtype))
            different = sum(b.different for b in _of(these, dtype))
            cell = f"{different:,} of {numbers:,}" if different else f"{numbers:,}"
            line += f"{cell:>14}"
        lines.append(f"{line}   {'ok' if all(b.ok for b in these) else 'FAIL'}")
    return lines


def _failures(failed: Sequence[Found]) -> list[str]:
    """The worst of them in full."""
    if not failed:
        return []
    lines = ["", "Failed"]
    for one in sorted(failed, key=lambda f: -f.comparison.share)[:FAILURES_SHOWN]:
        quantity, error, baseline, share = one.comparison
        lines += [
            f"  {quantity}, {dtype_name(one.dtype)}: {_number(error)}, PyTorch "
            f"{_number(baseline)}, {share:.2f} times what is allowed",
            f"    {', '.join(filter(None, (one.recipe, one.case)))}, V = {one.V:,}",
        ]
    return lines


def _of(found: Sequence[Where], dtype: torch.dtype) -> list[Where]:
    """Those of a dtype."""
    return [f for f in found if f.dtype == dtype]


def _worst(found: Sequence[Found]) -> Found:
    """The one nearest to, or farthest beyond, what is allowed."""
    return max(found, key=lambda f: f.comparison.share)


def _place(found: Found) -> str:
    """Vocabulary, rows and recipe, cut to their column."""
    text = f"{found.V:,}, " + ", ".join(filter(None, (found.case, found.recipe)))
    return text if len(text) <= PLACE_WIDTH else text[: PLACE_WIDTH - 1] + "…"


def _number(error: float) -> str:
    """Two digits: 1.2e-7."""
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent not in ("", "+00") else mantissa


def _verdict(found: Iterable[Found]) -> str:
    return "ok" if all(f.comparison.ok for f in found) else "FAIL"
