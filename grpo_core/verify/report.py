"""The report as text, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import torch

from grpo_core.verify.accuracy import QUANTITIES
from grpo_core.verify.checks import Check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# width of the place of a worst error; longer text is cut
PLACE_WIDTH = 44
FAILURES_SHOWN = 8
LEGEND = """\
PyTorch: float32 log_softmax, gather, autograd. allowed: PyTorch's error and a few float32 roundings
Rows: ordinary, confident (0 to 30 nats), offset by ±1000, a third of the logits at −inf.
Layouts: padded with masks, views, packed, in place, on policy."""


def report_lines(checks: Sequence[Check]) -> Iterator[str]:
    """All tables."""
    losses, confident, bits = (
        [check for check in checks if check.part == part]
        for part in ("losses", "confident", "bits")
    )
    dtypes = [dtype for dtype in DTYPES if _select(losses, dtype)]
    names = [dtype_name(dtype) for dtype in dtypes]
    errors = f"{'':19}{'ours':>9}{'PyTorch':>10}{'allowed':>9}   worst at"
    yield from ("", "Error against float64, worst of all recipes (dlogits: of the largest)", errors)
    yield from _quantities(losses, dtypes)
    yield from ("", "Gradient of each recipe, ours and PyTorch's (ok: every quantity is)")
    yield f"{'':30}" + "".join(f"{name:>12}{'PyTorch':>9}" for name in names)
    yield from _recipes(losses, dtypes)
    yield from ("", "Confident tokens, 0 to 30 nats: errors relative to each number", errors)
    yield from _quantities(confident, dtypes)
    yield from ("", "Bit for bit: numbers compared, and those that differ")
    yield f"{'':38}" + "".join(f"{name:>14}" for name in names)
    yield from _bits(bits, dtypes)
    yield from _failures([check for check in (*losses, *confident) if not check.ok])
    yield ""


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _quantities(checks: Sequence[Check], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per quantity and dtype."""
    for name, dtype in product(QUANTITIES, dtypes):
        if not (these := _select(checks, dtype, name)):
            continue
        worst = _worst(these)
        _, error, baseline, share = worst.comparison
        place = f"{worst.V:,}, " + ", ".join(filter(None, (worst.case, worst.recipe)))
        if len(place) > PLACE_WIDTH:
            place = place[: PLACE_WIDTH - 1] + "…"
        yield (
            f"  {name:<8}{dtype_name(dtype):<9}{_number(error):>9}{_number(baseline):>10}"
            f"{share:>9.0%}   {place:<{PLACE_WIDTH}} {_verdict(these)}"
        )


def _recipes(checks: Sequence[Check], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per recipe, two columns per dtype."""
    for recipe in dict.fromkeys(check.recipe for check in checks):
        these = [check for check in checks if check.recipe == recipe]
        line = f"  {recipe:<28}"
        for dtype in dtypes:
            _, error, baseline, _ = _worst(_select(these, dtype, "dlogits")).comparison
            line += f"{_number(error):>12}{_number(baseline):>9}"
        yield f"{line}   {_verdict(these)}"


def _bits(checks: Sequence[Check], dtypes: Iterable[torch.dtype]) -> Iterator[str]:
    """A line per claim, a column per dtype."""
    for claim in dict.fromkeys(check.comparison.quantity for check in checks):
        line, these = f"  {claim:<36}", []
        for dtype in dtypes:
            these += (of_dtype := _select(checks, dtype, claim))
            different = sum(int(check.comparison.error) for check in of_dtype)
            numbers = sum(int(check.comparison.baseline) for check in of_dtype)
            cell = f"{different:,} of {numbers:,}" if different else f"{numbers:,}"
            line += f"{cell:>14}"
        yield f"{line}   {_verdict(these)}"


def _failures(failed: Sequence[Check]) -> Iterator[str]:
    """The worst failures in full."""
    if failed:
        yield from ("", "Failed")
    for one in sorted(failed, key=lambda check: -check.comparison.share)[:FAILURES_SHOWN]:
        quantity, error, baseline, share = one.comparison
        yield (
            f"  {quantity}, {dtype_name(one.dtype)}: {_number(error)}, PyTorch "
            f"{_number(baseline)}, {share:.2f} times what is allowed"
        )
        yield f"    {', '.join(filter(None, (one.recipe, one.case)))}, V = {one.V:,}"


def _select(checks: Sequence[Check], dtype: torch.dtype, quantity: str = "") -> list[Check]:
    """The checks of a dtype, and of a quantity or claim if one is given."""
    return [
        check
        for check in checks
        if check.dtype == dtype and quantity in ("", check.comparison.quantity)
    ]


def _worst(checks: Sequence[Check]) -> Check:
    """The check with the largest share of the allowed error."""
    return max(checks, key=lambda check: check.comparison.share)


def _number(error: float) -> str:
    """Two digits: 1.2e-7."""
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent not in ("", "+00") else mantissa


def _verdict(checks: Iterable[Check]) -> str:
    return "ok" if all(check.ok for check in checks) else "FAIL"
