"""Policy surrogates: one function of one token gives the loss ℓ and its two derivatives.

Signature of every surrogate:

    (logp, log_ratio, advantage, *parameters) -> (loss, dloss/dlogp, dloss/dlog_ratio)

`log_ratio` is logp − old_logp in nats, or what a sequence makes of it; the two derivatives are kept
apart because the second then goes back through the sequence's mean. The same code object is read by
the Triton kernels, by the torch backend and, value only, by the float64 reference, whose autograd
checks the derivatives written here. All but `dro` are positively homogeneous in the advantage, so a
detached correction may multiply it.
"""

from .language import tl, triton
from .scalar_math import expm1, sigmoid, stop_grad


@triton.jit
def clip(logp, log_ratio, advantage, eps_low, eps_high, delta):
    """Clipped policy objective with an optional upper bound δ on the unclipped ratio.

    ℓ = −min(min(r, δ)·A, clip(r, 1 − ε_low, 1 + ε_high)·A); dℓ/dlog_ratio = −r·A where the first
    argument is the smaller one and r ≤ δ, else 0. A tie (r = 1 ± ε) keeps the gradient.

    Source: PPO (arXiv 1707.06347, eq. 7); separate bounds: DAPO (2503.14476, eq. 8);
    δ: dual-clip PPO (1912.09729) and INTELLECT-2 (2505.07291).
    """
    ratio = tl.exp(log_ratio)
    unclipped = tl.minimum(ratio, delta) * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1 - eps_low), 1 + eps_high) * advantage
    acts = (unclipped <= clipped) & (ratio <= delta)
    slope = tl.where(acts, -ratio * advantage, 0.0)
    return -tl.minimum(unclipped, clipped), slope * 0, slope


@triton.jit
def importance(logp, log_ratio, advantage):
    """ℓ = −r·A: importance sampling without a bound; bounded per token it is GMPO's objective.

    Source: GMPO (arXiv 2507.20673).
    """
    loss = -tl.exp(log_ratio) * advantage
    return loss, loss * 0, loss


@triton.jit
def reinforce(logp, log_ratio, advantage):
    """ℓ = −A·logp.

    Source: REINFORCE; RLOO (arXiv 2402.14740); GPG (2504.02546).
    """
    return -advantage * logp, -advantage, advantage * 0


@triton.jit
def cispo(logp, log_ratio, advantage, low, high):
    """ℓ = −sg(clip(r, low, high))·A·logp: every token keeps a gradient, the weight is bounded.

    `low` and `high` bound the ratio itself (absolute, not 1 ± ε).

    Source: MiniMax-M1 (arXiv 2506.13585).
    """
    factor = stop_grad(tl.minimum(tl.maximum(tl.exp(log_ratio), low), high)) * advantage
    return -factor * logp, -factor, factor * 0


@triton.jit
def sapo(logp, log_ratio, advantage, tau_pos, tau_neg):
    """ℓ = −(4/τ)·σ(τ·(r − 1))·A with τ = τ₊ where A > 0, else τ₋: a soft gate for the clip.

    Source: SAPO (arXiv 2511.20347).
    """
    ratio = tl.exp(log_ratio)
    tau = tl.where(advantage > 0, tau_pos + ratio * 0, tau_neg + ratio * 0)
    gate = sigmoid(tau * (ratio - 1))
    slope = -4 * gate * (1 - gate) * ratio * advantage
    return -4 / tau * gate * advantage, slope * 0, slope


@triton.jit
def dro(logp, log_ratio, advantage, beta):
    """ℓ = −A·logp + β/2·log_ratio²: the squared distance takes the place of a clip.

    Source: DRO (arXiv 2405.19107); Kimi k1.5 (2501.12599).
    """
    loss = 0.5 * beta * log_ratio * log_ratio - advantage * logp
    return loss, -advantage, beta * log_ratio


@triton.jit
def dppo_tv(logp, log_ratio, advantage, delta_low, delta_high, cap):
    """ℓ = −A·sg(min(r, cap))·logp inside a trust region of total variation, else no gradient.

    Inside: p − q ≤ δ_high where A > 0, p − q ≥ −δ_low elsewhere, with p = π, q = π_old.

    Source: DPPO (arXiv 2602.04879).
    """
    moved = tl.exp(logp) - tl.exp(logp - log_ratio)
    trusted = tl.where(advantage > 0, moved <= delta_high, moved >= -delta_low)
    factor = tl.where(trusted, tl.minimum(tl.exp(log_ratio), cap) * advantage, 0.0)
    factor = stop_grad(factor)
    return -factor * logp, -factor, factor * 0


@triton.jit
def ipo(logp, log_ratio, advantage, delta):
    """ℓ = −r·A where |p − q| ≤ δ, else 0; p = π, q = π_old, and the bound has no gradient.

    Source: prime-rl's default loss (PrimeIntellect-ai/prime-rl, #3418).
    """
    moved = tl.abs(tl.exp(logp) - tl.exp(logp - log_ratio))
    loss = tl.where(moved <= delta, -tl.exp(log_ratio) * advantage, 0.0)
    return loss, loss * 0, loss


@triton.jit
def dppo_kl(logp, log_ratio, advantage, delta_low, delta_high, cap):
    """ℓ = −A·sg(min(r, cap))·logp inside a trust region of the binary KL, else no gradient.

    Inside: q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)) ≤ δ_high where A > 0, ≤ δ_low elsewhere; or
    p ≤ q where A > 0, p ≥ q elsewhere, since from there A pulls back. p = π, q = π_old.

    Source: DPPO (arXiv 2602.04879); 1e-8, so that certain tokens have a logarithm: verl.
    """
    p, q = tl.exp(logp), tl.exp(logp - log_ratio)
    not_p, not_q = -expm1(logp), -expm1(logp - log_ratio)
    kl = not_q * tl.log((not_q + 1e-8) / (not_p + 1e-8)) - q * log_ratio
    trusted = tl.where(advantage > 0, (kl <= delta_high) | (p <= q), (kl <= delta_low) | (p >= q))
    factor = tl.where(trusted, tl.minimum(tl.exp(log_ratio), cap) * advantage, 0.0)
    factor = stop_grad(factor)
    return -factor * logp, -factor, factor * 0


@triton.jit
def topr(logp, log_ratio, advantage):
    """ℓ = −A·logp where A > 0, −A·sg(clip(r, 0, 1))·logp elsewhere.

    The paper splits by the raw score: give rewards as advantages to do so.

    Source: TOPR (arXiv 2503.14286).
    """
    bounded = stop_grad(tl.minimum(tl.exp(log_ratio), 1.0))
    factor = advantage * tl.where(advantage > 0, bounded * 0 + 1, bounded)
    return -factor * logp, -factor, factor * 0


@triton.jit
def zero(logp, log_ratio, advantage):
    """ℓ = 0: no policy term. What is minimised is the KL alone: distillation."""
    return advantage * 0, advantage * 0, advantage * 0
