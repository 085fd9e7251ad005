"""The loss of tokens whose rows have been read: one program per sequence.

A program reads its tokens up to three times: to sum their log-ratios, to evaluate surrogate and KL,
and to take the gradient back through the mean. At ratio level "token" it needs the second alone,
and a program takes any `BLOCK` neighbours. Reads and writes a few floats per token, nothing of
vocabulary size.

    s_i = mean_t d_t  (or another level of `sequence_ratio`),  d_t = logp_t − old_logp_t
    dL/dlogp_t = weight_t·∂ℓ/∂logp + Σ_{u∈i} weight_u·∂ℓ_u/∂s_i · ∂s_i/∂d_t

Sums run over a sequence's own tokens in their order, so their bits do not depend on the batch.
Where the ratio is the sequence's, one token with a term that is not finite drops it whole.
"""

import torch

from .language import tl, triton
from .launch import (
    SEQUENCE_BLOCK,
    SEQUENCE_WARPS,
    WRITING_WARPS,
    at_most_registers,
    launch,
    most_registers,
    unspecialized,
)
from .records import RowLoss, RowStats, SequenceTokens, Terms
from .scalar_math import is_finite
from .token_loss import token_terms


@triton.jit
def tokens_of(at, end, sequence, sequence_ptr, valid_ptr, S):
    """Whether each token belongs to the sequence, and whether it also counts."""
    inside = at < end
    if sequence_ptr is not None:
        given = tl.load(sequence_ptr + at, mask=inside, other=0).to(tl.int64)
        inside = inside & (tl.minimum(tl.maximum(given, 0), S - 1) == sequence)
    return inside, inside & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)


@triton.jit
def log_ratios(at, valid, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED: tl.constexpr):
    """(logp, d, d after token_clip) of some tokens."""
    logp = tl.load(logp_ptr + at, mask=valid, other=0.0)
    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + at, mask=valid, other=0.0)
    log_ratio = logp - old_logp
    clipped = log_ratio
    if CLIPPED:
        gains = tl.load(advantage_ptr + at, mask=valid, other=0.0) > 0
        above = tl.where(log_ratio > high, high, log_ratio)
        below = tl.where(log_ratio < -low, -low, log_ratio)
        clipped = tl.where(gains, above, below)
    return logp, log_ratio, clipped


@unspecialized
def _sequence_loss_kernel(
    logp_ptr,
    entropy_ptr,
    exact_kl_ptr,
    valid_ptr,
    weight_ptr,
    advantage_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    factor_ptr,
    entropy_weight_ptr,
    sequence_ptr,
    first_ptr,
    last_ptr,
    ratio_ptr,
    kl_ptr,
    loss_ptr,
    dlogp_ptr,
    dropped_ptr,
    N,
    T,
    S,
    low,
    high,
    beta,
    surrogate_args,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    LEVEL: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # tokens, unlike logits, are counted by 32 bits
    begin = (sequence * T).to(tl.int32)
    end = tl.minimum(begin + T, N)
    if first_ptr is not None:
        begin = tl.load(first_ptr + sequence)
        end = tl.load(last_ptr + sequence) + 1

    # the mean log-ratio
    if LEVEL != "token":
        total = tl.zeros([BLOCK], tl.float32)
        length = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, end, BLOCK):
            at = start + lane
            _, valid = tokens_of(at, end, sequence, sequence_ptr, valid_ptr, S)
            _, _, clipped = log_ratios(
                at, valid, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
            )
            total += tl.where(valid, clipped, 0.0)
            length += valid.to(tl.int32)
        count = tl.maximum(tl.sum(length, 0), 1).to(tl.float32)
        mean = tl.sum(total, 0) / count

    # loss and derivatives of every token
    dmean = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + lane
        inside, valid = tokens_of(at, end, sequence, sequence_ptr, valid_ptr, S)
        logp, log_ratio, clipped = log_ratios(
            at, valid, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
        )
        unclipped = clipped == log_ratio
        log_ratio = clipped if LEVEL == "token" else tl.zeros([BLOCK], tl.float32) + mean
        advantage = tl.load(advantage_ptr + at, mask=valid, other=0.0)
        weight = tl.load(weight_ptr + at, mask=valid, other=0.0)
        exact_kl, bonus = None, None
        if exact_kl_ptr is not None:
            exact_kl = tl.load(exact_kl_ptr + at, mask=valid, other=0.0)
        if entropy_weight_ptr is not None:
            entropy = tl.load(entropy_ptr + at, mask=valid, other=0.0)
            bonus = tl.load(entropy_weight_ptr + at, mask=valid, other=0.0) * entropy
        loss, dlogp, dlog_ratio, kl = token_terms(
            logp,
            log_ratio,
            advantage,
            weight,
            exact_kl,
            bonus,
            factor_ptr,
            ref_logp_ptr,
            at,
            valid,
            beta,
            surrogate_args,
            SURROGATE,
            KL,
            KL_TIMES_RATIO,
        )
        ratio = tl.exp(log_ratio)
        usable = is_finite(logp) & is_finite(log_ratio) & is_finite(ratio)
        usable = usable & is_finite(loss) & is_finite(dlogp) & is_finite(dlog_ratio)
        counts = valid & (weight != 0)
        kept, dropped = counts & usable, counts & (usable == 0)
        dlogp = tl.where(kept, weight * dlogp, 0.0)
        dlog_ratio = tl.where(kept, weight * dlog_ratio, 0.0)
        if LEVEL == "sequence":
            dmean += dlog_ratio
        else:
            dlogp += tl.where(kept & unclipped, dlog_ratio, 0.0)
        broken |= dropped.to(tl.int32)
        tl.store(ratio_ptr + at, tl.where(valid, ratio, 0.0), mask=inside)
        tl.store(kl_ptr + at, tl.where(counts, kl, 0.0), mask=inside)
        tl.store(loss_ptr + at, tl.where(kept, loss, 0.0), mask=inside)
        tl.store(dlogp_ptr + at, dlogp, mask=inside)
        tl.store(dropped_ptr + at, dropped, mask=inside)

    # all tokens are dropped with one of them, or have a part of the mean's derivative
    if LEVEL != "token":
        is_broken = tl.max(broken, 0) > 0
        # what is read or written again another thread may have written
        tl.debug_barrier()
        if is_broken:
            for start in range(begin, end, BLOCK):
                at = start + lane
                _, valid = tokens_of(at, end, sequence, sequence_ptr, valid_ptr, S)
                counts = valid & (tl.load(weight_ptr + at, mask=valid, other=0.0) != 0)
                tl.store(loss_ptr + at, lane * 0.0, mask=counts)
                tl.store(dlogp_ptr + at, lane * 0.0, mask=valid)
                tl.store(dropped_ptr + at, counts, mask=counts)
        elif LEVEL == "sequence":
            part = tl.sum(dmean, 0) / count
            for start in range(begin, end, BLOCK):
                at = start + lane
                _, valid = tokens_of(at, end, sequence, sequence_ptr, valid_ptr, S)
                _, log_ratio, clipped = log_ratios(
                    at, valid, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
                )
                dlogp = tl.load(dlogp_ptr + at, mask=valid, other=0.0)
                part_of = tl.where(clipped == log_ratio, part, 0.0)
                tl.store(dlogp_ptr + at, dlogp + part_of, mask=valid)


def sequence_loss(stats: RowStats, tokens: SequenceTokens, terms: Terms) -> RowLoss:
    """Loss of every token and its derivative by logp, at the ratio level of `terms`.

    Args:
        stats: of every row.
        tokens: weights, advantages and what else is given of each, and their sequences.
        terms: the objective's formulas.
    """
    N = stats.logp.numel()
    ratio, kl, loss, dlogp = stats.logp.new_empty(4, N)
    dropped = loss.new_empty(N, dtype=torch.bool)
    programs, width, sequence_id = tokens.sequences, tokens.width or N, tokens.sequence_id
    if terms.ratio_level == "token":
        programs, width, sequence_id = -(-N // SEQUENCE_BLOCK), SEQUENCE_BLOCK, None
    first, last = (None, None) if sequence_id is None else find_spans(tokens)
    low, high = terms.token_clip or (0.0, 0.0)
    launch(
        _sequence_loss_kernel,
        programs if N else 0,
        on=stats.logp,
        logp_ptr=stats.logp,
        entropy_ptr=None if tokens.entropy_weight is None else stats.entropy,
        exact_kl_ptr=stats.kl,
        valid_ptr=tokens.valid,
        weight_ptr=tokens.weight,
        advantage_ptr=tokens.advantage,
        old_logp_ptr=tokens.old_logp,
        ref_logp_ptr=tokens.ref_logp,
        factor_ptr=tokens.factor,
        entropy_weight_ptr=tokens.entropy_weight,
        sequence_ptr=sequence_id,
        first_ptr=first,
        last_ptr=last,
        ratio_ptr=ratio,
        kl_ptr=kl,
        loss_ptr=loss,
        dlogp_ptr=dlogp,
        dropped_ptr=dropped,
        N=N,
        T=width,
        S=tokens.sequences,
        low=float(low),
        high=float(high),
        beta=terms.beta,
        surrogate_args=terms.surrogate_args,
        SURROGATE=terms.surrogate,
        KL=terms.kl,
        KL_TIMES_RATIO=terms.kl_times_ratio,
        LEVEL=terms.ratio_level,
        CLIPPED=terms.token_clip is not None,
        BLOCK=SEQUENCE_BLOCK,
        num_warps=SEQUENCE_WARPS,
        **at_most_registers(most_registers(WRITING_WARPS, SEQUENCE_WARPS)),
    )
    return RowLoss(stats.logp, stats.entropy, ratio, kl, loss, dlogp, dropped, stats.state)


def find_spans(tokens: SequenceTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """[S] int32: the first and the last token of each sequence of packed rows.

    Tokens of other sequences may lie between them. Without any token the first is above the last.
    """
    N, sequence = tokens.valid.numel(), tokens.sequence
    places = torch.arange(N, dtype=torch.int32, device=sequence.device)
    none = places.new_full((tokens.sequences,), N)
    first = none.scatter_reduce(0, sequence, places, "amin")
    last = torch.full_like(none, -1).scatter_reduce(0, sequence, places, "amax")
    return first, last
