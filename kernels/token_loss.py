"""Surrogate and KL of one token: from log-probabilities to loss and dloss/dlogp.

`token_terms` is the device function that the one-pass kernel calls row by row; the kernel below
applies it to whole `[N]` vectors, for objectives whose ratio is known only after every row of a
sequence has been read. Reads and writes a few floats per token, nothing of vocabulary size.
"""

import torch

from .kl import times_ratio
from .language import tl, triton
from .launch import VECTOR_BLOCK, launch, vector_programs
from .records import Terms, TokenLoss, TokenVectors
from .scalar_math import is_finite


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


@triton.jit(
    do_not_specialize=["N"],
    # scalars of a row: their alignment, which changes with N, must not recompile
    do_not_specialize_on_alignment=[
        "logp_ptr",
        "log_ratio_ptr",
        "advantage_ptr",
        "weight_ptr",
        "factor_ptr",
        "ref_logp_ptr",
        "exact_kl_ptr",
        "entropy_ptr",
        "entropy_weight_ptr",
        "loss_ptr",
        "dlogp_ptr",
        "dlog_ratio_ptr",
        "kl_ptr",
        "dropped_ptr",
    ],
)
def _token_loss_kernel(
    logp_ptr,
    log_ratio_ptr,
    advantage_ptr,
    weight_ptr,
    factor_ptr,
    ref_logp_ptr,
    exact_kl_ptr,
    entropy_ptr,
    entropy_weight_ptr,
    loss_ptr,
    dlogp_ptr,
    dlog_ratio_ptr,
    kl_ptr,
    dropped_ptr,
    N,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    logp = tl.load(logp_ptr + at, mask=inside, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + at, mask=inside, other=0.0)
    advantage = tl.load(advantage_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    loss, dlogp, dlog_ratio, kl = vector_terms(
        logp,
        log_ratio,
        advantage,
        weight,
        (factor_ptr, ref_logp_ptr, exact_kl_ptr, entropy_ptr, entropy_weight_ptr),
        at,
        inside,
        beta,
        surrogate_args,
        SURROGATE,
        KL,
        KL_TIMES_RATIO,
    )
    alive = weight != 0
    usable = is_finite(logp) & is_finite(log_ratio) & is_finite(tl.exp(log_ratio))
    usable = usable & is_finite(loss)
    usable = usable & is_finite(dlogp) & is_finite(dlog_ratio)
    kept = alive & usable
    tl.store(loss_ptr + at, tl.where(kept, loss, 0.0), mask=inside)
    tl.store(dlogp_ptr + at, tl.where(kept, weight * dlogp, 0.0), mask=inside)
    tl.store(dlog_ratio_ptr + at, tl.where(kept, weight * dlog_ratio, 0.0), mask=inside)
    tl.store(kl_ptr + at, tl.where(alive, kl, 0.0), mask=inside)
    tl.store(dropped_ptr + at, alive & (usable == 0), mask=inside)


def token_loss(
    logp: torch.Tensor,
    log_ratio: torch.Tensor,
    tokens: TokenVectors,
    entropy: torch.Tensor,
    exact_kl: torch.Tensor | None,
    terms: Terms,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives.

    Args:
        logp, log_ratio: [N] float32, nats; `log_ratio` may be a sequence's mean.
        tokens: weights, advantages and what else is given of each.
        entropy: [N] float32, nats; read only for an entropy bonus.
        exact_kl: [N] float32, nats, or None.
        terms: the objective's formulas.
    """
    result = TokenLoss.empty(logp.numel(), logp.device)
    launch(
        _token_loss_kernel,
        vector_programs(logp.numel()),
        on=logp,
        logp_ptr=logp,
        log_ratio_ptr=log_ratio,
        advantage_ptr=tokens.advantage,
        weight_ptr=tokens.weight,
        factor_ptr=tokens.factor,
        ref_logp_ptr=tokens.ref_logp,
        exact_kl_ptr=exact_kl,
        entropy_ptr=None if tokens.entropy_weight is None else entropy,
        entropy_weight_ptr=tokens.entropy_weight,
        loss_ptr=result.loss,
        dlogp_ptr=result.dlogp,
        dlog_ratio_ptr=result.dlog_ratio,
        kl_ptr=result.kl,
        dropped_ptr=result.dropped,
        N=logp.numel(),
        beta=terms.beta,
        surrogate_args=terms.surrogate_args,
        SURROGATE=terms.surrogate,
        KL=terms.kl,
        KL_TIMES_RATIO=terms.kl_times_ratio,
        BLOCK=VECTOR_BLOCK,
    )
    return result
