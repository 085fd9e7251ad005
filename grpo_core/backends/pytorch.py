"""The torch backend: the plans of the kernels in PyTorch operations, for tensors without a GPU.

Rows are taken a few at a time, so that everything between reading a logit and writing its gradient
stays in the processor's cache: main memory sees one read and one write, as on a GPU. Signatures
and units are those of the host functions in kernels/; see there for what the arguments mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.backends import sequence_ratio
from grpo_core.backends.formula import as_torch
from grpo_core.backends.pytorch_rows import Chunk, for_each_chunk
from grpo_core.backends.pytorch_softmax import FREE_BLOCKS, RowSoftmax, blocks_at_once
from grpo_core.kernels.kl import times_ratio
from grpo_core.kernels.records import (
    RowLoss,
    Rows,
    RowStats,
    SequenceTokens,
    Slopes,
    Terms,
    TokenLoss,
    TokenVectors,
)


def row_stats(
    rows: Rows, target: Tensor, temperature: float, ref_rows: Rows | None = None
) -> RowStats:
    """Softmax statistics of every row at its target; `state` of the policy alone."""
    vectors = target.new_zeros(5, rows.N, dtype=torch.float32)
    softmax = RowSoftmax(temperature)

    def read(chunk: Chunk) -> None:
        found = softmax.read(chunk)
        kl = torch.zeros_like(found.logp) if found.kl is None else found.kl
        values = (found.logp, found.entropy, kl, *softmax.policy.state())
        vectors[:, chunk.at] = torch.stack(values).float()

    wanted = _readable(target, rows.V)
    for_each_chunk(read, rows, target, wanted, ref_rows=ref_rows, blocks=FREE_BLOCKS)
    logp, entropy, kl = vectors[:3]
    return RowStats(logp, entropy, None if ref_rows is None else kl, vectors[3:])


def row_loss(
    rows: Rows,
    tokens: TokenVectors,
    temperature: float,
    terms: Terms,
    dlogits: Tensor | None,
    ref_rows: Rows | None = None,
) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`, in one pass."""
    target = tokens.target
    vectors = target.new_zeros(7, rows.N, dtype=torch.float32)
    # at once, as a chunk has few rows and many operations
    double = tokens.double()
    bonus = tokens.entropy_weight is not None
    softmax = RowSoftmax(temperature, bonus=bonus)

    def pass_over(chunk: Chunk) -> None:
        at, some = chunk.at, double.at(chunk.at)
        found = softmax.read(chunk)
        logp = found.logp
        log_ratio = logp - (logp if some.old_logp is None else some.old_logp)
        token = token_loss(logp, log_ratio, some, found.entropy, found.kl, terms)
        dlogp = token.dlogp + token.dlog_ratio
        values = (logp, found.entropy, log_ratio.exp(), token.kl, token.loss, dlogp, token.dropped)
        vectors[:, at] = torch.stack(values).float()
        if dlogits is not None:
            exact_beta = None if found.kl is None else terms.beta
            softmax.write_gradient(chunk, some.slopes(dlogp, token.dropped, exact_beta), found)

    wanted = (tokens.weight != 0) & _readable(target, rows.V)
    blocks = blocks_at_once(dlogits, bonus=bonus, exact_kl=ref_rows is not None)
    for_each_chunk(pass_over, rows, target, wanted, dlogits, ref_rows, blocks=blocks)
    logp, entropy, ratio, kl, loss, dlogp, dropped = vectors
    state = vectors.new_empty(0, rows.N)
    return RowLoss(logp, entropy, ratio, kl, loss, dlogp, dropped.bool(), state)


def row_dlogits(
    rows: Rows,
    target: Tensor,
    temperature: float,
    slopes: Slopes,
    stats: RowStats | RowLoss,
    dlogits: Tensor,
    ref_rows: Rows | None = None,
) -> Tensor:
    """Writes dL/dlogits into `dlogits`; the softmax is found again from the logits alone."""
    entropy, bonus = stats.entropy.double(), slopes.dentropy is not None
    softmax = RowSoftmax(temperature, bonus=bonus)

    def write(chunk: Chunk) -> None:
        found = softmax.read(chunk, entropy=entropy[chunk.at])
        softmax.write_gradient(chunk, slopes.at(chunk.at), found)

    wanted = slopes.any & _readable(target, rows.V)
    ref_rows = None if slopes.dkl is None else ref_rows
    blocks = blocks_at_once(dlogits, bonus=bonus, exact_kl=ref_rows is not None)
    for_each_chunk(write, rows, target, wanted, dlogits, ref_rows, blocks=blocks)
    return dlogits


def row_scale(rows: Rows, factor: Tensor) -> Tensor:
    """Scales `rows` in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    return rows.logits if factor == 1 else rows.logits.mul_(factor)


def token_loss(
    logp: Tensor,
    log_ratio: Tensor,
    tokens: TokenVectors,
    entropy: Tensor,
    exact_kl: Tensor | None,
    terms: Terms,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives; computed in float64."""
    given = (logp, log_ratio, tokens.advantage, tokens.weight)
    logp, log_ratio, advantage, weight = (vector.double() for vector in given)
    policy = as_torch(terms.surrogate)(logp, log_ratio, advantage, *terms.surrogate_args)
    if tokens.factor is not None:
        policy = tuple(tokens.factor.double() * part for part in policy)
    loss, dlogp, dlog_ratio = policy
    kl_value = dkl = dkl_ratio = torch.zeros_like(logp)
    if exact_kl is not None:
        kl_value = exact_kl.double()
    if tokens.ref_logp is not None and terms.kl is not None:
        kl_value, dkl = as_torch(terms.kl)(logp, tokens.ref_logp.double())
        if terms.kl_times_ratio:
            kl_value, dkl, dkl_ratio = as_torch(times_ratio)(kl_value, dkl, log_ratio)
    # with beta 0 the KL is only looked at: an infinite one must not spoil the loss
    if terms.beta:
        loss = loss + terms.beta * kl_value
        dlogp, dlog_ratio = dlogp + terms.beta * dkl, dlog_ratio + terms.beta * dkl_ratio
    # at once, as a chunk has few rows and many operations
    weighted = torch.stack([loss, dlogp, dlog_ratio]) * weight
    if tokens.entropy_weight is not None:
        weighted[0] -= tokens.entropy_weight.double() * entropy.double()
    ratio = log_ratio.exp()
    checked = torch.cat([weighted, torch.stack([logp, log_ratio, ratio])]).float()
    alive, usable = weight != 0, checked.isfinite().all(0)
    unused = ~(alive & usable)
    loss, dlogp, dlog_ratio = checked[:3].masked_fill_(unused, 0.0)
    kl_value = kl_value.float().masked_fill_(~alive, 0.0)
    return TokenLoss(loss, dlogp, dlog_ratio, kl_value, dropped=alive & unused)


def sequence_loss(stats: RowStats, tokens: SequenceTokens, terms: Terms) -> RowLoss:
    """Loss of every token and its derivative by logp, at the ratio level of `terms`."""
    logp, entropy, exact_kl, state = stats
    d = logp - (logp if tokens.old_logp is None else tokens.old_logp)
    log_ratio = sequence_ratio.forward(d, tokens, terms)
    token = token_loss(logp, log_ratio, tokens, entropy, exact_kl, terms)
    dlogp = token.dlogp + sequence_ratio.backward(d, token.dlog_ratio, tokens, terms)
    dropped = sequence_ratio.spread(token.dropped, tokens, terms)
    dlogp, loss = (vector.masked_fill(dropped, 0.0) for vector in (dlogp, token.loss))
    dropped = dropped & tokens.valid & (tokens.weight != 0)
    ratio = torch.where(tokens.valid, log_ratio.exp(), 0.0)
    return RowLoss(logp, entropy, ratio, token.kl, loss, dlogp, dropped, state)


def _readable(target: Tensor, V: int) -> Tensor:
    """Where the target is a word."""
    return (target >= 0) & (target < V)
