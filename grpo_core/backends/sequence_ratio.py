"""Ratios of whole sequences: what becomes of the tokens' log-ratios, and the way back.

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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_core.kernels.records import Level

RatioLevel = Literal["token", "sequence", "sequence_token"]


@dataclass(frozen=True)
class SequenceRatio:
    """The map from tokens' log-ratios to those of a level, and its transpose.

    Args:
        level: a row of the table above.
        token_clip: (low, high) or None.
        valid: [N] bool, tokens that count.
        sequence: [N] int64 in [0, sequences).
        sequences: upper bound on the number of sequences.
        advantage: [N], only its sign is looked at.
    """

    level: str
    token_clip: tuple[float, float] | None
    valid: Tensor
    sequence: Tensor
    sequences: int
    advantage: Tensor

    @classmethod
    def of(cls, level: Level, advantage: Tensor) -> SequenceRatio:
        """The map of a level over its tokens."""
        return cls(
            level.name,
            level.token_clip,
            level.valid,
            level.sequence,
            level.sequences,
            advantage,
        )

    def forward(self, log_ratio: Tensor) -> Tensor:
        """[N] log-ratios of tokens, nats -> [N] log-ratios of the level; differentiable."""
        bounded = self._bounded(log_ratio)
        if self.level == "token":
            return bounded
        mean = self._means(bounded)
        if self.level == "sequence_token":
            return mean.detach() + (bounded - bounded.detach())
        return mean

    def backward(self, log_ratio: Tensor, gradient: Tensor) -> Tensor:
        """The transpose at `log_ratio`: dL by the level's log-ratios -> dL by the tokens'."""
        if self.level == "sequence":
            gradient = self._means(gradient)
        return torch.where(self._bounded(log_ratio) == log_ratio, gradient, 0.0)

    def spread(self, dropped: Tensor) -> Tensor:
        """[N] bool tokens -> those and all tokens that share their ratio."""
        if self.level == "token":
            return dropped
        lost = torch.zeros(self.sequences, dtype=torch.int32, device=dropped.device)
        return lost.index_add_(0, self.sequence, dropped.int())[self.sequence] > 0

    def _bounded(self, log_ratio: Tensor) -> Tensor:
        """The log-ratios after `token_clip`."""
        if self.token_clip is None:
            return log_ratio
        low, high = self.token_clip
        gains = self.advantage > 0
        return torch.where(gains, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))

    def _sums(self, vector: Tensor) -> Tensor:
        """Sum over the valid tokens of a sequence, given back to each of them; symmetric."""
        total = vector.new_zeros(self.sequences)
        present = torch.where(self.valid, vector, torch.zeros_like(vector))
        return total.scatter_add(0, self.sequence, present)[self.sequence] * self.valid

    def _means(self, vector: Tensor) -> Tensor:
        """Mean over the valid tokens of a sequence, given back to each of them; symmetric."""
        lengths = self._sums(torch.ones_like(vector)).clamp(min=1)
        return self._sums(vector) / lengths
