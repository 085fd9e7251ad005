"""A smooth weight of the whole sequence, in the place of a clip.

    φ(W) = W^k · e^{λ(1 − W)},   W = Π_t π(t) / π_old(t),   k and λ by the sign of the advantage

φ(1) = 1. Where the sampler's ratios π_old/π_sampler are known, W is their product, too. In log W a
token counts within ±20, its sampler's ratio within [log 1e-8, 20], and so does the sum; a token
whose ratio is not finite, which the loss leaves out, is not counted.

Source: VESPO (arXiv 2602.10693); the bounds: its authors' code, and TRL's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.objective.validation import is_number

# e²⁰ is far beyond any ratio one would trust, and far below what overflows
LARGEST_LOG_RATIO = 20.0
# a sequence this unlikely has no weight left
SMALLEST_LOG_RATIO = math.log(1e-8)


@dataclass(frozen=True)
class SequenceWeight:
    """Exponent k and decay λ where the advantage is >= 0, and where it is below.

    Raises:
        ValueError: a number that is negative or not finite.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not is_number(number) or not 0 <= number < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {number!r}")

    def of(
        self,
        log_ratio: Tensor,
        sampler_ratio: Tensor | None,
        advantage: Tensor,
        valid: Tensor,
        sequence: Tensor,
        sequences: int,
    ) -> Tensor:
        """φ of the sequence of every token, masked tokens included.

        Args:
            log_ratio: [N] logp − old_logp, nats.
            sampler_ratio: [N] bounded π_old/π_sampler, or None for 1.
            advantage: [N], only its sign is looked at.
            valid: [N] bool, the tokens that count.
            sequence: [N] int64 in [0, sequences).
            sequences: upper bound on the number of sequences.

        Returns:
            [N] of the dtype of `log_ratio`.
        """
        counts = valid & log_ratio.isfinite()
        step = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        if sampler_ratio is not None:
            log_w = sampler_ratio.to(step.dtype).log()
            step = step + log_w.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_RATIO)
        total = step.new_zeros(sequences).scatter_add(0, sequence, torch.where(counts, step, 0.0))
        log_w = total.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_RATIO)[sequence]
        gains = advantage >= 0
        k = torch.where(gains, self.k_pos, self.k_neg)
        decay = torch.where(gains, self.lambda_pos, self.lambda_neg)
        return (k * log_w - decay * torch.expm1(log_w)).exp()
