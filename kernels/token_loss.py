"""Surrogate and KL of one token: from log-probabilities to loss and dloss/dlogp.

Device functions: `row_loss` calls `token_terms` for the token of its row, `sequence_loss` calls
`vector_terms` for the tokens of a block.
"""

from .kl import times_ratio
from .language import tl, triton


@triton.jit
def token_terms(
    logp,
    log_ratio,
    advantage,
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
    """(loss, dloss/dlogp, dloss/dlog_ratio, kl) of a token, before its weight."""
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
    return loss, dlogp, dlog_ratio, kl


@triton.jit
def vector_terms(
    logp,
    log_ratio,
    advantage,
    weight,
    pointers,
    at,
    mask,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
):
    """(loss, dloss/dlogp, dloss/dlog_ratio, kl) of tokens whose rows have been read.

    `pointers` = (factor, ref_logp, exact KL, entropy, its weight), None for what there is not. The
    loss has its weight, exact KL and entropy bonus; the derivatives have not.
    """
    factor_ptr, ref_logp_ptr, exact_kl_ptr, entropy_ptr, entropy_weight_ptr = pointers
    loss, dlogp, dlog_ratio, kl = token_terms(
        logp,
        log_ratio,
        advantage,
        factor_ptr,
        ref_logp_ptr,
        at,
        mask,
        beta,
        surrogate_args,
        SURROGATE,
        KL,
        KL_TIMES_RATIO,
    )
    if exact_kl_ptr is not None:
        kl = tl.load(exact_kl_ptr + at, mask=mask, other=0.0)
        if beta != 0:
            loss += beta * kl
    loss *= weight
    if entropy_weight_ptr is not None:
        entropy = tl.load(entropy_ptr + at, mask=mask, other=0.0)
        loss -= tl.load(entropy_weight_ptr + at, mask=mask, other=0.0) * entropy
    return loss, dlogp, dlog_ratio, kl
