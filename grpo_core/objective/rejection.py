"""Which sampled tokens are too far from the trainer to learn from: they leave the mask.

    d_t = log π_old(t) − log π_sampler(t)

| measure   | x_t             |   | over  | compared with [low, high] |
|-----------|-----------------|---|-------|---------------------------|
| log_ratio | d_t             |   | token | x_t, token by token       |
| k2        | ½·d_t²          |   | sum   | Σ_t x_t, all of a sequence |
| k3        | e^d_t − 1 − d_t |   | mean  | its mean                  |
|           |                 |   | max   | its largest x_t           |

Unlike the "reject" of a `SamplerCorrection` it weighs nothing. A token of which one log-probability
is NaN or infinite leaves the mask, and counts in no sum.

Source: verl's rollout_rs ("token_k1", "seq_mean_k3", ...), whose k1 bounds −log_ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.objective.validation import is_number

Measure = Literal["log_ratio", "k2", "k3"]
Over = Literal["token", "sum", "mean", "max"]


@dataclass(frozen=True)
class Rejection:
    """Keeps what has low <= x <= high, see the tables above; bounds are inclusive, in nats.

    Raises:
        ValueError: an unknown name, or bounds in the wrong order.
    """

    measure: Measure = "log_ratio"
    over: Over = "token"
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        for name, choices in (("measure", Measure), ("over", Over)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")
        if not (is_number(self.low) and is_number(self.high) and self.low <= self.high):
            raise ValueError(f"low: expected low <= high, got {self.low!r} and {self.high!r}")

    @torch.no_grad()
    def keeps(
        self,
        old_logp: Tensor,
        sampler_logp: Tensor,
        valid: Tensor,
        sequence: Tensor,
        sequences: int,
    ) -> Tensor:
        """[N] bool: the tokens that stay.

        Args:
            old_logp, sampler_logp: [N], the trainer's and the inference engine's, nats.
            valid: [N] bool, the tokens that count.
            sequence: [N] int64 in [0, sequences).
            sequences: upper bound on the number of sequences.
        """
        d = old_logp.double() - sampler_logp.double()
        kept = valid & d.isfinite()
        d = torch.where(kept, d, 0.0)
        x = {
            "log_ratio": lambda: d,
            "k2": lambda: 0.5 * d * d,
            "k3": lambda: torch.expm1(d) - d,
        }[self.measure]()
        if self.over == "max":
            largest = x.new_full((sequences,), -math.inf)
            x = torch.where(kept, x, -math.inf)
            x = largest.scatter_reduce(0, sequence, x, "amax")[sequence]
        elif self.over != "token":
            total = x.new_zeros(sequences).scatter_add(0, sequence, x)
            length = x.new_zeros(sequences).scatter_add(0, sequence, kept.to(x.dtype))
            x = (total / length.clamp(min=1) if self.over == "mean" else total)[sequence]
        return kept & (x >= self.low) & (x <= self.high)
