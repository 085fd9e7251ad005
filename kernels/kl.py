"""Estimators of KL(π ‖ π_ref) from one sampled token, with their derivatives.

Signature of every estimator: `(logp, ref_logp) -> (kl, dkl/dlogp)`, nats. All are exactly 0 where
logp equals ref_logp. Those named `_plus` are straight-through: the value of k1, absolute or k3, the
gradient of k2, which on policy is that of the true KL. `times_ratio` makes any of them unbiased off
policy.

Source: J. Schulman, "Approximating KL Divergence" (2020); k3 in GRPO: DeepSeekMath
(arXiv 2402.03300, eq. 4); the ratio factor: DeepSeek-V3.2 (2512.02556); straight-through:
verl's `k1+`, `abs+` and `k3+`.
"""

from .language import tl, triton
from .scalar_math import exp_excess, expm1, sigmoid, stop_grad


@triton.jit
def k1(logp, ref_logp):
    """logp − ref_logp: unbiased, of either sign."""
    difference = logp - ref_logp
    return difference, difference * 0 + 1


@triton.jit
def absolute(logp, ref_logp):
    """|logp − ref_logp|, with the gradient 0 at 0."""
    difference = logp - ref_logp
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference * 0))
    return tl.abs(difference), sign


@triton.jit
def k2(logp, ref_logp):
    """½·(logp − ref_logp)²: biased, its gradient is that of the true KL on policy."""
    difference = logp - ref_logp
    return 0.5 * difference * difference, difference


@triton.jit
def k3(logp, ref_logp):
    """eᵈ − 1 − d with d = ref_logp − logp: unbiased and never negative."""
    difference = ref_logp - logp
    return exp_excess(difference), -expm1(difference)


@triton.jit
def k1_plus(logp, ref_logp):
    """The value of k1, the gradient of k2."""
    difference = logp - ref_logp
    half_square = 0.5 * difference * difference
    return stop_grad(difference - half_square) + half_square, difference


@triton.jit
def absolute_plus(logp, ref_logp):
    """The value of absolute, the gradient of k2."""
    difference = logp - ref_logp
    half_square = 0.5 * difference * difference
    return stop_grad(tl.abs(difference) - half_square) + half_square, difference


@triton.jit
def k3_plus(logp, ref_logp):
    """The value of k3, the gradient of k2."""
    difference = logp - ref_logp
    half_square = 0.5 * difference * difference
    return stop_grad(exp_excess(-difference) - half_square) + half_square, difference


@triton.jit
def gated(logp, ref_logp):
    """sg(σ(5·d))·d with d = ref_logp − logp: raises logp where a teacher is more confident.

    No estimate of a KL: of either sign, and its gradient −σ(5·d) is −½ at d = 0.

    Source: SDAR (arXiv 2605.15155), with its β = 5.
    """
    difference = ref_logp - logp
    gate = stop_grad(sigmoid(5.0 * difference))
    return gate * difference, -gate


@triton.jit
def times_ratio(kl, dlogp, log_ratio):
    """(r·kl, derivative by logp, derivative by log_ratio): r is differentiated as well."""
    ratio = tl.exp(log_ratio)
    return ratio * kl, ratio * dlogp, ratio * kl
