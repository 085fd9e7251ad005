"""The gradient of a row's logits, from what L's derivatives by the row's statistics are.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

With c_j the scaled logit relative to the row's anchor, p_j is 2^c_j times what is the same for the
whole row. So the gradient of every other logit than the target's is

    2^c·(factor + log_factor·c) + gap_factor·2^c·(c − c_ref)

with three numbers of the row (`row_factors`): two multiply-adds to a logit at most, and none
without an entropy term and an exact KL. The target's own gradient is computed apart. With another
divergence the last term is −gap_factor·2^c_ref (forward KL) or gap_factor·2^c·log₂ p/m (mixture).
"""

from .exact_kl import log_p_to_mixture, mixture_shares, target_to_mixture
from .language import tl, triton
from .online_softmax import LN2, LOWEST, weighted_gap
from .token_statistics import log_sides, sigmoid2


@triton.jit
def gradient_of_others(
    logits, ref_logits, factors, ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """The formula above for a tile; without an exact KL `ref_logits` are None."""
    scale, anchor, factor, log_factor, ref_anchor, gap_factor, shift, beta = factors
    centred = tl.fma(logits, scale, -anchor)
    power = tl.exp2(centred)
    if ENTROPY:
        factor = tl.fma(tl.maximum(centred, LOWEST), log_factor, factor)
    if ref_logits is None:
        dlogits = power * factor
    else:
        ref_centred = tl.fma(ref_logits, scale, -ref_anchor)
        if DIVERGENCE == "reverse":
            dlogits = tl.fma(power, factor, weighted_gap(gap_factor * power, centred, ref_centred))
        elif DIVERGENCE == "forward":
            # two products, so that the difference of equal rows is exactly 0
            ref_power = tl.where(gap_factor != 0, tl.exp2(ref_centred), 0.0)
            dlogits = power * factor - ref_power * gap_factor
        else:
            to_p = log_p_to_mixture(ref_centred - centred + shift, beta)
            dlogits = power * tl.fma(gap_factor, to_p, factor)
    return dlogits


@triton.jit
def row_factors(
    scale, derivatives, state, ref, beta, ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """(the target's gradient, factor, the entropy's part of it, log_factor, gap_factor, shift).

    The entropy's part has still to be taken off, and neither it nor `factor` is divided by T. The
    shift is that of `mixture_shares`.
    """
    dlogp, dentropy, dkl = derivatives
    _, sum_others, z, entropy = state
    p_others, p_target = sigmoid2(z), sigmoid2(-z)
    logp, log_others = log_sides(z)
    total = tl.abs(sum_others)
    share = tl.where(total > 0, p_others / total, 0.0)
    at_target = dlogp * p_others
    factor = -dlogp * share
    of_entropy, log_factor, gap_factor, shift = 0.0, 0.0, 0.0, 0.0
    if ENTROPY:
        spread = tl.where(p_others > 0, log_others - tl.log2(total) * LN2 + entropy, 0.0)
        at_target -= tl.where(p_target > 0, dentropy * p_target * (logp + entropy), 0.0)
        of_entropy = dentropy * share * spread
        log_factor = -dentropy * share * (LN2 * LN2) * scale
    if ref is not None:
        _, _, ref_sum, ref_z, kl = ref
        if DIVERGENCE == "reverse":
            ref_logp, ref_log_others = log_sides(ref_z)
            spread = log_others - ref_log_others - (tl.log2(total) - tl.log2(tl.abs(ref_sum))) * LN2
            spread -= kl
            of_target = tl.where(p_target > 0, p_target * (logp - ref_logp - kl), 0.0)
            of_others = tl.where(p_others > 0, dkl * share * spread, 0.0)
            gap_factor = dkl * share * (LN2 * LN2) * scale
        elif DIVERGENCE == "forward":
            _, ref_share, _ = mixture_shares(sum_others, z, ref_sum, ref_z)
            ref_others, ref_target = sigmoid2(ref_z), sigmoid2(-ref_z)
            # of likely targets the small difference of what they leave to the others
            likely = tl.minimum(p_target, ref_target) > 0.5
            of_target = tl.where(likely, ref_others - p_others, p_target - ref_target)
            of_others = dkl * share
            gap_factor = dkl * ref_share * (scale * LN2)
        else:
            # `kl` is of_policy, KL(p ‖ m) without the target's part
            _, _, shift = mixture_shares(sum_others, z, ref_sum, ref_z)
            to_p, _ = target_to_mixture(z, ref_z, beta)
            dkl = dkl * (1 - beta)
            of_mixture = tl.where(p_target > 0, p_target * to_p, 0.0)
            of_target = of_mixture * p_others - p_target * kl
            of_others = -dkl * share * (of_mixture + kl)
            gap_factor = dkl * share * (LN2 * LN2) * scale
        # a KL that has no part in the gradient may be infinite or NaN
        at_target += tl.where(dkl != 0, dkl * of_target, 0.0)
        factor += tl.where(dkl != 0, of_others, 0.0)
        gap_factor = tl.where(dkl != 0, gap_factor, 0.0)
    return at_target * (scale * LN2), factor, of_entropy, log_factor, gap_factor, shift
