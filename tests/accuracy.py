"""The rule of tolerance of `grpo_core.verify.accuracy`, as an assertion."""

from __future__ import annotations

from torch import Tensor

from grpo_core.verify.accuracy import FLOOR, compare

__all__ = ["FLOOR", "assert_no_worse"]


def assert_no_worse(
    ours: Tensor, baseline: Tensor, truth: Tensor, *, size: float = 1.0, what: str = ""
) -> None:
    """Our error against float64 is at most that of the same-dtype baseline plus FLOOR·size."""
    found = compare(what, ours, baseline, truth, size=size)
    assert found.ok, f"{found} (share of what is allowed)"
