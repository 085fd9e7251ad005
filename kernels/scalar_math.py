"""Elementary functions of one float32, exact to rounding where the textbook form cancels.

Triton has neither `expm1` nor `log1p` without a vendor library, and the hardware logarithm has an
absolute error of 2⁻²², worthless near 1. Each is evaluated once per token, so a dozen
multiply-adds cost nothing beside a row of the vocabulary.
"""

from .language import tl, triton


@triton.jit
def exp_excess(d):
    """eᵈ − 1 − d, by its Taylor series below |d| = 0.5 (relative error 2e-9) and directly above."""
    series = 1 / 362880
    series = series * d + 1 / 40320
    series = series * d + 1 / 5040
    series = series * d + 1 / 720
    series = series * d + 1 / 120
    series = series * d + 1 / 24
    series = series * d + 1 / 6
    series = series * d + 1 / 2
    return tl.where(tl.abs(d) < 0.5, series * d * d, tl.exp(d) - 1 - d)


@triton.jit
def expm1(d):
    """eᵈ − 1."""
    return tl.where(tl.abs(d) < 0.5, exp_excess(d) + d, tl.exp(d) - 1)


@triton.jit
def log1p(y):
    """log(1 + y) for 0 ≤ y ≤ 1, as 2·artanh(y / (2 + y)): the series has an argument below 1/3."""
    z = y / (2 + y)
    z2 = z * z
    series = 1 / 15
    series = series * z2 + 1 / 13
    series = series * z2 + 1 / 11
    series = series * z2 + 1 / 9
    series = series * z2 + 1 / 7
    series = series * z2 + 1 / 5
    series = series * z2 + 1 / 3
    return 2 * z + 2 * z * z2 * series


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ), each tail with full relative precision."""
    y = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, y) / (1 + y)


@triton.jit
def stop_grad(number):
    """The number itself; in the reference autograd does not look through it."""
    return number


@triton.jit
def is_finite(number):
    """Whether `number` is neither NaN nor infinite."""
    return tl.abs(number) < float("inf")
