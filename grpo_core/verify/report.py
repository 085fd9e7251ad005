"""The report as text, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import TypeVar

import torch

from grpo_core.verify.accuracy import QUANTITIES
from grpo_core.verify.checks import BitCheck, Measurement, Report

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# width of the place of a worst error; longer text is cut
PLACE_WIDTH = 44
FAILURES_SHOWN = 8
LEGEND = """\
PyTorch: float32 log_softmax, gather, autograd. allowed: PyTorch's error and a few float32 roundings
Rows: ordinary, confident (0 to 30 nats), offset by ±1000, a third of the logits at −inf.
Layouts: padded with masks, views, packed, in place, on policy."""

Check = TypeVar("Check", Measurement, BitCheck)


def report_lines(report: Report) -> Iterator[str]:
    """All tables."""
    dtypes = [dtype for dtype in DTYPES if _of(report.losses, dtype)]
    names = [dtype_name(dtype) for dtype in dtypes]
    errors = f"{'':19}{'ours':>9}{'PyTorch':>10}{'allowed':>9}   worst at"
    yield from ("", "Error against float64, worst of all recipes (dlogits: of the largest)", errors)
    yield from _quantities(report.losses, dtypes)
    yield from ("", "Gradient of each recipe, ours and PyTorch's (ok: every quantity is)")
    yield f"{'':30}" + "".join(f"{name:>12}{'PyTorch':>9}" for name in names)
    yield from _recipes(report.losses, dtypes)
    yield from ("", "Confident tokens, 0 to 30 nats: errors relative to each number", errors)
    yield from _quantities(report.confident, dtypes)
    yield from ("", "Bit for bit: numbers compared, and those that differ")
    yield f"{'':38}" + "".join(f"{name:>14}" for name in names)
    yield from _bits(report.bits, dtypes)
    yield from _failures([m for m in (*report.losses, *report.confident) if not m.ok])
    yield ""


def summary(report: Report, where: str) -> str:
    """The last line."""
    verdict = f"{report.failures} FAILED" if report.failures else "all ok"
    return f"{len(report.checks):,} comparisons in {report.seconds:.1f} s on {where}: {verdict}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _quantities(measured: Sequence[Measurement], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per quantity and dtype."""
    for name, dtype in product(QUANTITIES, dtypes):
        these = [m for m in _of(measured, dtype) if m.comparison.quantity == name]
        if these:
            worst = _worst(these)
            _, error, baseline, share = worst.comparison
            place = f"{worst.V:,}, " + ", ".join(filter(None, (worst.case, worst.recipe)))
            if len(place) > PLACE_WIDTH:
                place = place[: PLACE_WIDTH - 1] + "…"
            yield (
                f"  {name:<8}{dtype_name(dtype):<9}{_number(error):>9}{_number(baseline):>10}"
                f"{share:>9.0%}   {place:<{PLACE_WIDTH}} {_verdict(these)}"
            )


def _recipes(measured: Sequence[Measurement], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per recipe, two columns per dtype."""
    for recipe in dict.fromkeys(m.recipe for m in measured):
        these = [m for m in measured if m.recipe == recipe]
        line = f"  {recipe:<28}"
        for dtype in dtypes:
            gradients = [m for m in _of(these, dtype) if m.comparison.quantity == "dlogits"]
            _, error, baseline, _ = _worst(gradients).comparison
            line += f"{_number(error):>12}{_number(baseline):>9}"
        yield f"{line}   {_verdict(these)}"


def _bits(bits: Sequence[BitCheck], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per claim, a column per dtype."""
    for claim in dict.fromkeys(b.claim for b in bits):
        these = [b for b in bits if b.claim == claim]
        line = f"  {claim:<36}"
        for dtype in dtypes:
            numbers = sum(b.numbers for b in _of(these, dtype))
            different = sum(b.different for b in _of(these, dtype))
            cell = f"{different:,} of {numbers:,}" if different else f"{numbers:,}"
            line += f"{cell:>14}"
        yield f"{line}   {_verdict(these)}"


def _failures(failed: Sequence[Measurement]) -> Iterator[str]:
    """The worst failures in full."""
    if failed:
        yield from ("", "Failed")
    for one in sorted(failed, key=lambda m: -m.comparison.share)[:FAILURES_SHOWN]:
        quantity, error, baseline, share = one.comparison
        yield (
            f"  {quantity}, {dtype_name(one.dtype)}: {_number(error)}, PyTorch "
            f"{_number(baseline)}, {share:.2f} times what is allowed"
        )
        yield f"    {', '.join(filter(None, (one.recipe, one.case)))}, V = {one.V:,}"


def _of(checks: Sequence[Check], dtype: torch.dtype) -> list[Check]:
    """The checks of a dtype."""
    return [check for check in checks if check.dtype == dtype]


def _worst(measured: Sequence[Measurement]) -> Measurement:
    """The measurement with the largest share of the allowed error."""
    return max(measured, key=lambda m: m.comparison.share)


def _number(error: float) -> str:
    """Two digits: 1.2e-7."""
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent not in ("", "+00") else mantissa


def _verdict(checks: Iterable[Measurement | BitCheck]) -> str:
    return "ok" if all(check.ok for check in checks) else "FAIL"
