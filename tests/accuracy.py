"""The one rule of tolerance: no worse than the honest PyTorch baseline, plus a small constant."""

from __future__ import annotations

import torch
from torch import Tensor

# a few float32 roundings of a number of size 1
FLOOR = 8 * torch.finfo(torch.float32).eps


def worst(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error; infinite if a NaN or infinity stands where the truth is finite."""
    error = (value.double() - truth.double()).abs()
    error = torch.where(value.double() == truth.double(), 0.0, error)
    return float(error.nan_to_num(nan=float("inf")).amax()) if error.numel() else 0.0


def assert_no_worse(
    ours: Tensor, baseline: Tensor, truth: Tensor, *, size: float = 1.0, what: str = ""
) -> None:
    """Our error against float64 is at most that of the same-dtype baseline plus FLOOR·size.

    Size is the largest number of the truth, at least the given one.
    """
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    size = max(
        size, float(truth.double().abs().nan_to_num(posinf=0).amax()) if truth.numel() else 0
    )
    allowed = worst(baseline, truth) + FLOOR * size
    error = worst(ours, truth)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
