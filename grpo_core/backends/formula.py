"""Reads a scalar formula written for Triton as plain PyTorch.

A surrogate or KL estimator is one function body. Here its code object is bound to a namespace in
which `tl` stands for a few functions of torch, so that the torch backend and the float64 reference
compute exactly what the kernels compute, and autograd can differentiate its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Operand = Tensor | float


# 1/k! from the highest that |d| < 1/8 needs in float64 down to 1/2!
_EXCESS_SERIES = [1 / math.factorial(k) for k in range(12, 1, -1)]


def _exp_excess(d: Tensor) -> Tensor:
    """eᵈ − 1 − d, by a Taylor series long enough for float64 where the difference cancels."""
    series = d * _EXCESS_SERIES[0] + _EXCESS_SERIES[1]
    for coefficient in _EXCESS_SERIES[2:]:
        series = series * d + coefficient
    return torch.where(d.abs() < 0.125, series * d * d, torch.expm1(d) - d)


def _minimum(a: Operand, b: Operand) -> Tensor:
    """The smaller of two; a number is never made a tensor, which would stall a GPU."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return a.clamp(max=b) if isinstance(a, Tensor) else _minimum(b, a)


def _maximum(a: Operand, b: Operand) -> Tensor:
    """The larger of two."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return a.clamp(min=b) if isinstance(a, Tensor) else _maximum(b, a)


_TL = SimpleNamespace(
    abs=torch.abs,
    exp=torch.exp,
    log=torch.log,
    minimum=_minimum,
    maximum=_maximum,
    where=torch.where,
)
_SCALAR_MATH = {
    "exp_excess": _exp_excess,
    "expm1": torch.expm1,
    "sigmoid": torch.sigmoid,
    "stop_grad": torch.detach,
}


@lru_cache
def as_torch(formula: Callable) -> Callable:
    """The same formula over tensors: value and derivative, elementwise, any floating dtype."""
    return with_globals(formula, {**_SCALAR_MATH, "tl": _TL})


def with_globals(formula: Callable, names: dict[str, Any]) -> Callable:
    """The same function, plain or of Triton, in which some global names mean something else."""
    function = getattr(formula, "fn", formula)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
