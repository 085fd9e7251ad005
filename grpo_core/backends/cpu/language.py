"""The Triton names of the scalar formulas, as compiled functions of one float64.

What `tl` is to a surrogate or a KL estimator when Numba compiles it, and what the functions of
`kernels/scalar_math.py` are then.
"""

import math

from grpo_core.backends.cpu.compiler import compiled


@compiled
def abs(x):
    """|x|."""
    return math.fabs(x)


@compiled
def exp(x):
    """eˣ."""
    return math.exp(x)


@compiled
def log(x):
    """log x; −inf at 0, NaN below."""
    return math.log(x)


@compiled
def minimum(a, b):
    """The smaller of two; NaN where either is."""
    return a if a < b or a != a else b


@compiled
def maximum(a, b):
    """The larger of two; NaN where either is."""
    return a if a > b or a != a else b


@compiled
def where(condition, a, b):
    """a where the condition holds, else b."""
    return a if condition else b


@compiled
def expm1(x):
    """eˣ − 1."""
    return math.expm1(x)


@compiled
def exp_excess(x):
    """eˣ − 1 − x, by a Taylor series where the difference cancels."""
    if math.fabs(x) >= 0.125:
        return math.expm1(x) - x
    term = total = 0.5 * x * x
    for k in range(3, 13):
        term *= x / k
        total += term
    return total


@compiled
def sigmoid(x):
    """1/(1 + e⁻ˣ), each tail with full relative precision."""
    power = math.exp(-math.fabs(x))
    return (1.0 if x > 0 else power) / (1.0 + power)


@compiled
def stop_grad(x):
    """The number itself."""
    return x
