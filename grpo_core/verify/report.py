"""The report as text, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from grpo_core.verify.checks import Check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAILURES_SHOWN = 8
LEGEND = """\
PyTorch: float32 log_softmax, gather, autograd. Allowed: its error and a few float32 roundings.
Rows: ordinary, confident (0 to 30 nats), offset by ±1000, a third of the logits at −inf.
Layouts: padded with masks, views, packed, in place, on policy."""


def report_lines(checks: Sequence[Check]) -> Iterator[str]:
    """All tables, and the worst failures in full."""
    losses, confident, bits = (
        [check for check in checks if check.part == part]
        for part in ("losses", "confident", "bits")
    )
    title = "Error against float64, worst of all recipes (dlogits: of the largest)"
    yield from _table(title, losses, _quantity, _errors)
    title = "Gradient of each recipe, ours and PyTorch's (ok: every quantity is)"
    yield from _table(title, losses, lambda check: check.recipe, _errors)
    title = "Confident tokens, 0 to 30 nats: errors relative to each number"
    yield from _table(title, confident, _quantity, _errors)
    title = "Bit for bit: numbers that differ, and all that were compared"
    yield from _table(title, bits, _quantity, _counts, head="all")
    failed = [check for check in (*losses, *confident) if not check.ok]
    if failed:
        yield from ("", "Failed")
    for one in sorted(failed, key=_share, reverse=True)[:FAILURES_SHOWN]:
        quantity, error, baseline, share = one.comparison
        yield (
            f"  {quantity}, {dtype_name(one.dtype)}: {_number(error)}, PyTorch "
            f"{_number(baseline)}, {share:.2f} times what is allowed"
        )
        yield f"    {', '.join(filter(None, (one.recipe, one.case)))}, V = {one.V:,}"
    yield ""


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _table(
    title: str,
    checks: Sequence[Check],
    name_of: Callable[[Check], str],
    cell: Callable[[Sequence[Check]], str],
    head: str = "PyTorch",
) -> Iterator[str]:
    """A line for each name, two columns for each dtype."""
    dtypes = [dtype for dtype in DTYPES if any(check.dtype == dtype for check in checks)]
    names = list(dict.fromkeys(map(name_of, checks)))
    width = max(map(len, names), default=0)
    yield from ("", title)
    heads = (f"{dtype_name(dtype):>10}{head:>10}" for dtype in dtypes)
    yield " " * (2 + width) + "".join(heads)
    for name in names:
        these = [check for check in checks if name_of(check) == name]
        cells = (cell([check for check in these if check.dtype == dtype]) for dtype in dtypes)
        verdict = "ok" if all(check.ok for check in these) else "FAIL"
        yield f"  {name:<{width}}{''.join(cells)}  {verdict}"


def _quantity(check: Check) -> str:
    """The quantity or the claim."""
    return check.comparison.quantity


def _share(check: Check) -> float:
    """The share of the allowed error."""
    return check.comparison.share


def _errors(checks: Sequence[Check]) -> str:
    """Ours with the largest share, and PyTorch's; of the gradient if that is among them."""
    gradients = [check for check in checks if _quantity(check) == "dlogits"]
    _, error, baseline, _ = max(gradients or checks, key=_share).comparison
    return f"{_number(error):>10}{_number(baseline):>10}"


def _counts(checks: Sequence[Check]) -> str:
    """Numbers that differ, and all."""
    different, numbers = (sum(int(check.comparison[field]) for check in checks) for field in (1, 2))
    return f"{different:>10,}{numbers:>10,}"


def _number(error: float) -> str:
    """Two digits: 1.2e-7."""
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent not in ("", "+00") else mantissa
