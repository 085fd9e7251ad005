"""Estimators of KL(π ‖ π_ref) from one sampled token: value and derivative with respect to logp.

Signature of every estimator: `(logp, ref_logp, log_ratio) -> (kl, dkl)`, in nats. All are exactly
0 where logp equals ref_logp. `log_ratio` is there for estimators weighted by the importance ratio.

Source: J. Schulman, "Approximating KL Divergence" (2020); k3 in GRPO: DeepSeekMath
(arXiv 2402.03300, eq. 4).
"""

# the interpreter looks for `tl` in the module of every jitted function
from .language import tl, triton  # noqa: F401
from .scalar_math import exp_excess, expm1


@triton.jit
def k1(logp, ref_logp, log_ratio):
    """logp − ref_logp: unbiased, of either sign."""
    difference = logp - ref_logp
    return difference, difference * 0 + 1


@triton.jit
def k2(logp, ref_logp, log_ratio):
    """½·(logp − ref_logp)²: biased, its gradient is that of the true KL on policy."""
    difference = logp - ref_logp
    return 0.5 * difference * difference, difference


@triton.jit
def k3(logp, ref_logp, log_ratio):
    """eᵈ − 1 − d with d = ref_logp − logp: unbiased and never negative."""
    difference = ref_logp - logp
    return exp_excess(difference), -expm1(difference)
