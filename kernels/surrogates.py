"""Policy surrogates: one function of one token gives the loss ℓ and its derivative dℓ/dlogp.

Signature of every surrogate: `(logp, log_ratio, advantage, *parameters) -> (loss, dlogp)`, where
`log_ratio = logp − old_logp` in nats, so that d(ratio)/dlogp = ratio. The same code object is read
by the Triton kernels, by the torch backend and, value only, by the float64 reference, whose
autograd checks the derivative written here. ℓ is positively homogeneous in the advantage.
"""

from .language import tl, triton


@triton.jit
def clip(logp, log_ratio, advantage, eps_low, eps_high, delta):
    """Clipped policy objective with an optional upper bound δ on the unclipped ratio.

    ℓ = −min(min(r, δ)·A, clip(r, 1 − ε_low, 1 + ε_high)·A); dℓ/dlogp = −r·A where the first
    argument is the smaller one and r ≤ δ, else 0. A tie (r = 1 ± ε) keeps the gradient.

    Source: PPO (arXiv 1707.06347, eq. 7); separate bounds: DAPO (2503.14476, eq. 8);
    δ: dual-clip PPO (1912.09729, eq. 5) and INTELLECT-2 (2505.07291, sec. 3.4).
    """
    ratio = tl.exp(log_ratio)
    unclipped = tl.minimum(ratio, delta) * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1 - eps_low), 1 + eps_high) * advantage
    acts = (unclipped <= clipped) & (ratio <= delta)
    return -tl.minimum(unclipped, clipped), tl.where(acts, -ratio * advantage, 0.0)
