"""Ratios of sequences: what a ratio level makes of the log-ratio of every token, and the transpose.

| ratio level    | log-ratio of every token of sequence i | its gradient                     |
|----------------|----------------------------------------|----------------------------------|
| token          | d_t                                    | to the token                     |
| sequence       | mean over t of d_t                     | to every token, over the mean    |
| sequence_token | the same mean                          | to the token, as if it were d_t  |

With `token_clip` = (low, high) each d_t is first bounded on its pessimistic side: above by `high`
where the advantage is positive, below by −`low` elsewhere.

Source: sequence and sequence_token: GSPO (arXiv 2507.18071, sec. 4); token_clip: GMPO (2507.20673).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grpo_core.kernels.records import SequenceTokens, Terms

RatioLevel = Literal["token", "sequence", "sequence_token"]


def forward(log_ratio: Tensor, tokens: SequenceTokens, terms: Terms) -> Tensor:
    """[N] log-ratios of tokens, nats -> [N] log-ratios of the level; differentiable."""
    clipped = _clipped(log_ratio, tokens, terms)
    if terms.ratio_level == "token":
        return clipped
    mean = _means(clipped, tokens)
    if terms.ratio_level == "sequence_token":
        return mean.detach() + (clipped - clipped.detach())
    return mean


def backward(log_ratio: Tensor, gradient: Tensor, tokens: SequenceTokens, terms: Terms) -> Tensor:
    """The transpose at `log_ratio`: dL by the level's log-ratios -> dL by the tokens'."""
    if terms.ratio_level == "sequence":
        gradient = _means(gradient, tokens)
    return torch.where(_clipped(log_ratio, tokens, terms) == log_ratio, gradient, 0.0)


def spread(dropped: Tensor, tokens: SequenceTokens, terms: Terms) -> Tensor:
    """[N] bool: the dropped tokens and all tokens that share their ratio."""
    if terms.ratio_level == "token":
        return dropped
    count = torch.zeros(tokens.sequences, dtype=torch.int32, device=dropped.device)
    return count.index_add_(0, tokens.sequence, dropped.int())[tokens.sequence] > 0


def _clipped(log_ratio: Tensor, tokens: SequenceTokens, terms: Terms) -> Tensor:
    """The log-ratios after `token_clip`."""
    if terms.token_clip is None:
        return log_ratio
    low, high = terms.token_clip
    return torch.where(tokens.advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))


def _means(vector: Tensor, tokens: SequenceTokens) -> Tensor:
    """For each valid token the mean over the valid tokens of its sequence; symmetric."""
    return _sums(vector, tokens) / _sums(torch.ones_like(vector), tokens).clamp(min=1)


def _sums(vector: Tensor, tokens: SequenceTokens) -> Tensor:
    """For each valid token the sum over the valid tokens of its sequence; symmetric."""
    total = vector.new_zeros(tokens.sequences)
    present = torch.where(tokens.valid, vector, torch.zeros_like(vector))
    return total.scatter_add(0, tokens.sequence, present)[tokens.sequence] * tokens.valid
