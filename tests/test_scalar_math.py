"""The elementary functions of the kernels against float64, relative error over many magnitudes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

import triton
import triton.language as tl

from grpo_core.kernels import scalar_math

DEVICE = "cuda" if HAS_GPU else "cpu"


@triton.jit
def _map_kernel(x_ptr, y_ptr, N, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(y_ptr + at, FUNCTION(x).to(tl.float32), mask=at < N)


def mapped(function: object, x: torch.Tensor) -> torch.Tensor:
    """The jitted function over a vector, through a kernel."""
    y = torch.full_like(x, math.nan, device=DEVICE)
    block = triton.next_power_of_2(x.numel())
    there = x.to(DEVICE)
    _map_kernel[(1,)](there, y, x.numel(), FUNCTION=function, BLOCK=block, enable_fp_fusion=False)
    return y.cpu()


MAGNITUDES = [10.0**-k for k in range(0, 12)] + [0.49, 0.51, 0.3, 0.999]


@pytest.mark.parametrize(
    ("name", "exact", "points"),
    [
        ("log1p", math.log1p, MAGNITUDES),
        ("expm1", math.expm1, MAGNITUDES + [-m for m in MAGNITUDES] + [5.0, -5.0, 20.0]),
        (
            "exp_excess",
            lambda d: math.fsum(d**k / math.factorial(k) for k in range(2, 80)),
            [m for m in MAGNITUDES if m > 1e-9] + [-m for m in MAGNITUDES if m > 1e-9] + [6.0],
        ),
    ],
)
def test_relative_error_is_a_few_roundings(name: str, exact: object, points: list[float]) -> None:
    x = torch.tensor(points, dtype=torch.float32)
    truth = torch.tensor([exact(float(p)) for p in x], dtype=torch.float64)  # type: ignore[operator]
    error = (mapped(getattr(scalar_math, name), x).double() - truth).abs() / truth.abs()
    assert error.max() < 16 * torch.finfo(torch.float32).eps, dict(zip(points, error, strict=True))


def test_is_finite() -> None:
    x = torch.tensor([0.0, -3e38, math.inf, -math.inf, math.nan])
    assert mapped(scalar_math.is_finite, x).tolist() == [1, 1, 0, 0, 0]
