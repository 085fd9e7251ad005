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
    SEQUENCE_REGISTERS,
    SEQUENCE_WARPS,
    at_most_registers,
    launch,
)
from .records import RowLoss, RowStats, SequenceTokens, Terms
from .scalar_math import is_finite
from .token_loss import vector_terms


@triton.jit
def own_tokens(at, end, sequence, sequence_ptr, valid_ptr, S):
    """Whether each token is the sequence's, and whether it counts besides."""
    mine = at < end
    if sequence_ptr is not None:
        given = tl.load(sequence_ptr + at, mask=mine, other=0).to(tl.int64)
        mine = mine & (tl.minimum(tl.maximum(given, 0), S - 1) == sequence)
    return mine, mine & (tl.load(valid_ptr + at, mask=mine, other=0) != 0)


@triton.jit
def log_ratios(at, mine, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED: tl.constexpr):
    """(logp, d, d after token_clip) of some tokens."""
    logp = tl.load(logp_ptr + at, mask=mine, other=0.0)
    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + at, mask=mine, other=0.0)
    log_ratio = logp - old_logp
    bounded = log_ratio
    if CLIPPED:
        gains = tl.load(advantage_ptr + at, mask=mine, other=0.0) > 0
        above = tl.where(log_ratio > high, high, log_ratio)
        below = tl.where(log_ratio < -low, -low, log_ratio)
        bounded = tl.where(gains, above, below)
    return logp, log_ratio, bounded


@triton.jit(
    do_not_specialize=["N", "T", "S"],
    # scalars of a row: their alignment, which changes with N, must not recompile
    do_not_specialize_on_alignment=[
        "logp_ptr",
        "entropy_ptr",
        "exact_kl_ptr",
        "valid_ptr",
        "weight_ptr",
        "advantage_ptr",
        "old_logp_ptr",
        "ref_logp_ptr",
        "factor_ptr",
        "entropy_weight_ptr",
        "sequence_ptr",
        "first_ptr",
        "last_ptr",
        "ratio_ptr",
        "kl_ptr",
        "loss_ptr",
        "dlogp_ptr",
        "dropped_ptr",
    ],
)
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

    if LEVEL != "token":
        total = tl.zeros([BLOCK], tl.float32)
        length = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, end, BLOCK):
            at = start + lane
            _, mine = own_tokens(at, end, sequence, sequence_ptr, valid_ptr, S)
            _, _, bounded = log_ratios(
                at, mine, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
            )
            total += tl.where(mine, bounded, 0.0)
            length += mine.to(tl.int32)
        count = tl.maximum(tl.sum(length, 0), 1).to(tl.float32)
        level = tl.sum(total, 0) / count

    through = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + lane
        mine, valid = own_tokens(at, end, sequence, sequence_ptr, valid_ptr, S)
        logp, log_ratio, bounded = log_ratios(
            at, valid, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
        )
        own = bounded == log_ratio
        log_ratio = bounded if LEVEL == "token" else tl.zeros([BLOCK], tl.float32) + level
        advantage = tl.load(advantage_ptr + at, mask=valid, other=0.0)
        weight = tl.load(weight_ptr + at, mask=valid, other=0.0)
        loss, dlogp, dlog_ratio, kl = vector_terms(
            logp,
            log_ratio,
            advantage,
            weight,
            (factor_ptr, ref_logp_ptr, exact_kl_ptr, entropy_ptr, entropy_weight_ptr),
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
        alive = valid & (weight != 0)
        kept = alive & usable
        broken |= (alive & (usable == 0)).to(tl.int32)
        dlogp = tl.where(kept, weight * dlogp, 0.0)
        dlog_ratio = tl.where(kept, weight * dlog_ratio, 0.0)
        if (LEVEL == "token") | (LEVEL == "sequence_token"):
            dlogp += tl.where(kept & own, dlog_ratio, 0.0)
        else:
            through += dlog_ratio
        tl.store(ratio_ptr + at, tl.where(valid, ratio, 0.0), mask=mine)
        tl.store(kl_ptr + at, tl.where(alive, kl, 0.0), mask=mine)
        tl.store(loss_ptr + at, tl.where(kept, loss, 0.0), mask=mine)
        tl.store(dlogp_ptr + at, dlogp, mask=mine)
        tl.store(dropped_ptr + at, alive & (usable == 0), mask=mine)

    if LEVEL != "token":
        lost = tl.max(broken, 0) > 0
        # what is read or written again another thread may have written
        tl.debug_barrier()
        if lost:
            for start in range(begin, end, BLOCK):
                at = start + lane
                _, mine = own_tokens(at, end, sequence, sequence_ptr, valid_ptr, S)
                alive = mine & (tl.load(weight_ptr + at, mask=mine, other=0.0) != 0)
                tl.store(loss_ptr + at, lane * 0.0, mask=alive)
                tl.store(dlogp_ptr + at, lane * 0.0, mask=mine)
                tl.store(dropped_ptr + at, alive, mask=alive)
        elif LEVEL == "sequence":
            back = tl.sum(through, 0) / count
            for start in range(begin, end, BLOCK):
                at = start + lane
                _, mine = own_tokens(at, end, sequence, sequence_ptr, valid_ptr, S)
                logp, log_ratio, bounded = log_ratios(
                    at, mine, logp_ptr, old_logp_ptr, advantage_ptr, low, high, CLIPPED
                )
                own = bounded == log_ratio
                dlogp = tl.load(dlogp_ptr + at, mask=mine, other=0.0)
                tl.store(dlogp_ptr + at, dlogp + tl.where(own, back, 0.0), mask=mine)


def sequence_loss(stats: RowStats, tokens: SequenceTokens, terms: Terms) -> RowLoss:
    """Loss of every token and its derivative by logp, at the ratio level of `terms`.

    Args:
        stats: of every row.
        tokens: weights, advantages and what else is given of each, and their sequences.
        terms: the objective's formulas.
    """
    N = stats.logp.numel()
    result = RowLoss.empty(N, stats.logp.device, stats.state)
    result = result._replace(logp=stats.logp, entropy=stats.entropy)
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
        ratio_ptr=result.ratio,
        kl_ptr=result.kl,
        loss_ptr=result.loss,
        dlogp_ptr=result.dlogp,
        dropped_ptr=result.dropped,
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
        **at_most_registers(SEQUENCE_REGISTERS),
    )
    return result


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
