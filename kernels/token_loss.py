"""Surrogate and KL of one token: from log-probabilities to loss and dloss/dlogp.

`token_terms` is the device function that the one-pass kernel calls row by row; the kernel below
applies it to whole `[N]` vectors, for objectives whose ratio is known only after every row of a
sequence has been read. Reads and writes a few floats per token, nothing of vocabulary size.
"""

from collections.abc import Callable

import torch

from .language import tl, triton
from .launch import VECTOR_BLOCK, vector_grid
from .records import TokenLoss
from .scalar_math import is_finite


@triton.jit
def token_terms(
    logp,
    log_ratio,
    advantage,
    ref_logp_ptr,
    at,
    mask,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """(loss, its surrogate's dlog_ratio, beta·dkl, kl) of a token, before its weight."""
    loss, dpolicy = SURROGATE(logp, log_ratio, advantage, *surrogate_args)
    kl = logp * 0
    dkl = logp * 0
    if ref_logp_ptr is not None:
        ref_logp = tl.load(ref_logp_ptr + at, mask=mask)
        kl, dkl = KL(logp, ref_logp, log_ratio)
        loss += beta * kl
    return loss, dpolicy, beta * dkl, kl


@triton.jit(do_not_specialize=["N"])
def _token_loss_kernel(
    logp_ptr,
    log_ratio_ptr,
    advantage_ptr,
    weight_ptr,
    ref_logp_ptr,
    loss_ptr,
    dpolicy_ptr,
    dkl_ptr,
    kl_ptr,
    dropped_ptr,
    N,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    logp = tl.load(logp_ptr + at, mask=inside, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + at, mask=inside, other=0.0)
    advantage = tl.load(advantage_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    loss, dpolicy, dkl, kl = token_terms(
        logp, log_ratio, advantage, ref_logp_ptr, at, inside, beta, surrogate_args, SURROGATE, KL
    )
    alive = weight != 0
    usable = is_finite(logp) & is_finite(log_ratio) & is_finite(loss) & is_finite(dpolicy + dkl)
    kept = alive & usable
    tl.store(loss_ptr + at, tl.where(kept, weight * loss, 0.0), mask=inside)
    tl.store(dpolicy_ptr + at, tl.where(kept, weight * dpolicy, 0.0), mask=inside)
    tl.store(dkl_ptr + at, tl.where(kept, weight * dkl, 0.0), mask=inside)
    tl.store(kl_ptr + at, tl.where(alive, kl, 0.0), mask=inside)
    tl.store(dropped_ptr + at, alive & (usable == 0), mask=inside)


def token_loss(
    logp: torch.Tensor,
    log_ratio: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    *,
    surrogate: Callable,
    surrogate_args: tuple[float, ...],
    kl: Callable | None,
    beta: float,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives.

    Args:
        logp, log_ratio: [N] float32, nats; `log_ratio` may be a sequence's mean.
        advantage, weight: [N] float32; weight 0 means masked.
        ref_logp: [N] float32 or None.
        surrogate, surrogate_args, kl, beta: the objective, see `surrogates` and `kl`.
    """
    result = TokenLoss.empty(logp.numel(), logp.device)
    if logp.numel():
        _token_loss_kernel[vector_grid(logp.numel())](
            logp_ptr=logp,
            log_ratio_ptr=log_ratio,
            advantage_ptr=advantage,
            weight_ptr=weight,
            ref_logp_ptr=ref_logp,
            loss_ptr=result.loss,
            dpolicy_ptr=result.dpolicy,
            dkl_ptr=result.dkl,
            kl_ptr=result.kl,
            dropped_ptr=result.dropped,
            N=logp.numel(),
            beta=beta,
            surrogate_args=surrogate_args,
            SURROGATE=surrogate,
            KL=kl,
            BLOCK=VECTOR_BLOCK,
        )
    return result
