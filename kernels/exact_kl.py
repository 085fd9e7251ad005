"""The exact KL(π ‖ π_ref) of a row, or another divergence, over the whole vocabulary.

Both rows are read once, side by side (`online_softmax`). With the target y apart from the others,

    KL = p_y·(log p_y − log q_y) + (1 − p_y)·(log(1 − p_y) − log(1 − q_y) + KL_others)
    dKL/dx_j = p_j·(log p_j − log q_j − KL) / T

where KL_others is that of the softmax over the other tokens: Σ 2^c·(c − c_ref) / S − log₂ S +
log₂ S_ref in base 2. Exactly 0 where the two rows are equal, infinite where π_ref forbids a token
that π allows.

That is the *reverse* KL. The *forward* KL(π_ref ‖ π) has the two rows exchanged, and the gradient
(p_j − q_j)/T. A *mixture* has an interpolation β between 0 and 1: with m = (1 − β)·p + β·q

    D = β·KL(q ‖ m) + (1 − β)·KL(p ‖ m),  dD/dx_j = (1 − β)·p_j·(log p_j/m_j − KL(p ‖ m)) / T

the generalised Jensen-Shannon divergence, always finite. Its mixture needs both normalisers, so the
two rows are read once more, from the caches. Without the target's part KL(p ‖ m) is `of_policy`.

Source: GKD (arXiv 2306.13649); the interpolation as in TRL, whose `beta` it is.
"""

from .language import tl, triton
from .online_softmax import LN2, LOG2E, split_anchor
from .row_tiles import boundary, load_tile, row_lead, sum_in_order, tile_places, wide_order
from .scalar_math import expm1, log1p
from .token_statistics import log_sides, sigmoid2


@triton.jit
def exact_kl(z, sum_others, ref_z, ref_sum, cross):
    """KL(π ‖ π_ref) of a row, nats, from the sums of `row_softmax` and both target gaps."""
    logp, log_others = log_sides(z)
    ref_logp, ref_log_others = log_sides(ref_z)
    p_others, p_target = sigmoid2(z), sigmoid2(-z)
    total, ref_total = tl.abs(sum_others), tl.abs(ref_sum)
    kl_others = (cross / total - tl.log2(total) + tl.log2(ref_total)) * LN2
    kl_others = tl.where(cross == float("inf"), cross, kl_others)
    kl = tl.where(p_others > 0, p_others * (log_others - ref_log_others + kl_others), 0.0)
    return kl + tl.where(p_target > 0, p_target * (logp - ref_logp), 0.0)


@triton.jit
def mixture_kl(
    row_ptr,
    ref_ptr,
    V,
    target_col,
    scale,
    state,
    ref_state,
    beta,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(D, of_policy) of a mixture, nats; a state is (anchor, sum_others, z) of its row."""
    z, ref_z = state[2], ref_state[2]
    share, ref_share, shift = mixture_shares(state[1], z, ref_state[1], ref_z)
    base, anchor = split_anchor(state[0], state[1])
    ref_base, ref_anchor = split_anchor(ref_state[0], ref_state[1])
    lead = row_lead(row_ptr, WIDTH)
    end, target_place = V + lead, target_col + lead
    row_ptr, ref_ptr = boundary(row_ptr, lead), boundary(ref_ptr, lead)
    both = tl.zeros([THREADS, WIDTH], tl.float32)
    of_policy = tl.zeros([THREADS, WIDTH], tl.float32)
    for first in range(0, end, THREADS * WIDTH):
        other = tile_places(THREADS, WIDTH, first) != target_place
        logits = load_tile(row_ptr, first, lead, end, THREADS, WIDTH) - base
        ref_logits = load_tile(ref_ptr, first, lead, end, THREADS, WIDTH) - ref_base
        centred = tl.fma(tl.where(other, logits, float("-inf")), scale, -anchor)
        ref_centred = tl.fma(tl.where(other, ref_logits, float("-inf")), scale, -ref_anchor)
        power, ref_power = tl.exp2(centred), tl.exp2(ref_centred)
        to_p, to_q = log_to_mixture(power, ref_power, ref_centred - centred + shift, beta)
        of_p = tl.where(power > 0, power * share * to_p, 0.0)
        of_q = tl.where(ref_power > 0, ref_power * ref_share * to_q, 0.0)
        of_policy += of_p
        both += (1 - beta) * of_p + beta * of_q
    order = wide_order(lead, THREADS, WIDTH)
    kl, of_others = sum_in_order(both, order) * LN2, sum_in_order(of_policy, order) * LN2
    p_target, ref_target = sigmoid2(-z), sigmoid2(-ref_z)
    to_p, to_q = target_to_mixture(z, ref_z, beta)
    kl += tl.where(p_target > 0, (1 - beta) * p_target * to_p, 0.0)
    # not hidden where it is NaN
    kl += tl.where(ref_target == 0, 0.0, beta * ref_target * to_q)
    return kl, of_others


@triton.jit
def mixture_shares(sum_others, z, ref_sum, ref_z):
    """(p per 2^c, q per 2^c_ref, log₂ of the second over the first) of the other tokens."""
    total, ref_total = tl.abs(sum_others), tl.abs(ref_sum)
    _, log_others = log_sides(z)
    _, ref_log_others = log_sides(ref_z)
    # a sum of 0 has no powers
    share = tl.where(total > 0, sigmoid2(z) / total, 0.0)
    ref_share = tl.where(ref_total > 0, sigmoid2(ref_z) / ref_total, 0.0)
    shift = (ref_log_others - log_others) * LOG2E - (tl.log2(ref_total) - tl.log2(total))
    return share, ref_share, tl.where((total > 0) & (ref_total > 0), shift, 0.0)


@triton.jit
def log_to_mixture(power, ref_power, gap, beta):
    """(log₂ p/m, log₂ q/m), m = (1 − β)·p + β·q, gap = log₂ q/p; a power of 0 is a p or q of 0."""
    gap = tl.where(power > 0, gap, float("inf"))
    gap = tl.where(ref_power > 0, gap, float("-inf"))
    weight = tl.where(gap > 0, 1 - beta, beta)
    rest = tl.where(gap > 0, beta, 1 - beta)
    # of m, relative to the larger of p and q
    log_m = tl.log2(tl.fma(weight, tl.exp2(-tl.abs(gap)), rest))
    return -log_m - tl.maximum(gap, 0.0), tl.minimum(gap, 0.0) - log_m


@triton.jit
def log_p_to_mixture(gap, beta):
    """log₂ p/m, finite, for a gradient that is 0 where p is; gap = log₂ q/p, NaN if both are 0."""
    # a p further below q is nearly 0
    gap = tl.where(gap < 126, gap, 126.0)
    return -tl.log2(tl.fma(tl.exp2(gap), beta, 1 - beta))


@triton.jit
def target_to_mixture(z, ref_z, beta):
    """(log p/m, log q/m) of the target, nats, exact for likely and impossible ones."""
    logp, _ = log_sides(z)
    ref_logp, _ = log_sides(ref_z)
    gap = tl.where(logp == float("-inf"), float("inf"), ref_logp - logp)
    gap = tl.where(ref_logp == float("-inf"), float("-inf"), gap)
    weight = tl.where(gap > 0, 1 - beta, beta)
    rest = tl.where(gap > 0, beta, 1 - beta)
    missing = -weight * expm1(-tl.abs(gap))
    log_m = tl.log(rest + weight * tl.exp(-tl.abs(gap)))
    log_m = tl.where(missing < 0.5, -log1p(missing / (1 - missing)), log_m)
    return -log_m - tl.maximum(gap, 0.0), tl.minimum(gap, 0.0) - log_m
