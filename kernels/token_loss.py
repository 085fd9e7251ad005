"""Surrogate and KL of one token: from log-probabilities to loss and dloss/dlogp.

A device function: `row_loss` calls it for the token of its row, `sequence_loss` for a block of
tokens.
"""

from .kl import times_ratio
from .language import tl, triton


@triton.jit
def token_terms(
    logp,
    log_ratio,
    advantage,
    weight,
    exact_kl,
    bonus,
    factor_ptr,
    ref_logp_ptr,
    at,
    mask,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
):
    """(loss, dloss/dlogp, dloss/dlog_ratio, kl) of a token.

    The loss has its weight, exact KL and entropy bonus, which are None if there are none; the
    derivatives have not.
    """
    loss, dlogp, dlog_ratio = SURROGATE(logp, log_ratio, advantage, *surrogate_args)
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + at, mask=mask)
        loss, dlogp, dlog_ratio = factor * loss, factor * dlogp, factor * dlog_ratio
    kl = logp * 0
    if ref_logp_ptr is not None:
        ref_logp = tl.load(ref_logp_ptr + at, mask=mask)
        kl, dkl = KL(logp, ref_logp)
        if KL_TIMES_RATIO:
            kl, dkl, dkl_ratio = times_ratio(kl, dkl, log_ratio)
            if beta != 0:
                dlog_ratio += beta * dkl_ratio
        # with beta 0 the KL is only looked at: an infinite one must not spoil the loss
        if beta != 0:
            loss += beta * kl
            dlogp += beta * dkl
    if exact_kl is not None:
        kl = exact_kl
        if beta != 0:
            loss += beta * kl
    loss = weight * loss
    if bonus is not None:
        loss -= bonus
    return loss, dlogp, dlog_ratio, kl
