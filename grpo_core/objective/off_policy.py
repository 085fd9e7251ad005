"""Tokens that another policy sampled: how far they are from the trainer's, and what follows.

    d_t = log π_old(t) − log π_sampler(t)

A rule is a cell of one table: a measure x, of every token or of every sequence, with bounds
low <= x <= high, and an action for what lies outside.

| measure   | x of a token    | x of a sequence                         | weight inside |
|-----------|-----------------|-----------------------------------------|---------------|
| ratio     | w_t = e^d_t     | Π_t w_t, or (Π_t w_t)^(1 / length)      | x             |
| log_ratio | d_t             | Σ_t d_t, or the mean, or the maximum    | 1             |
| k2        | ½·d_t²          | the same of these                       | 1             |
| k3        | e^d_t − 1 − d_t | the same of these                       | 1             |

| action     | outside                                    | known as                             |
|------------|--------------------------------------------|--------------------------------------|
| "truncate" | weight = the nearer bound                  | TIS; TRL *_truncate, verl rollout_is |
| "zero"     | weight = 0, the token counts in every mean | IcePop, MIS; TRL *_mask, verl lo_hi  |
| "reject"   | weight = 0, the token leaves the mask      | MIS; verl rollout_rs                 |

`SamplerCorrection` is the ratio with every action, `Rejection` another measure with "reject". The
weight multiplies the advantage, so it scales the policy term and never the KL.

A token with a log-probability that is NaN or infinite leaves the mask and is part of no sum. (TRL
1.16 keeps it with w_t = 1; in verl 0.9.1 the loss becomes NaN.) The log of a ratio is clamped to
±80 nats, so that float32 can hold the ratio; verl clamps it to ±20, which differs only for bounds
above e²⁰.

Source: TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(2025); IcePop: Ring-1T (arXiv 2510.18855); sequence level: 2512.23075; off-policy sequences:
DeepSeek-V3.2 (2512.02556, sec. 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.objective.validation import check_choice, is_number

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "zero", "reject"]
Measure = Literal["log_ratio", "k2", "k3"]
Over = Literal["token", "sum", "mean", "max"]

# e⁸⁰ is within the range of float32, e⁸⁹ is not
MAX_LOG_RATIO = 80.0
OVERS: dict[str, Over] = {"token": "token", "sequence": "sum", "geometric": "mean"}


class Rule:
    """A cell of the table: `_cell` says which, `apply` computes it."""

    low: float
    high: float

    @property
    def _cell(self) -> tuple[str, Over, Action]:
        """(measure, over what it is taken, action)."""
        raise NotImplementedError

    @torch.no_grad()
    def apply(
        self,
        old_logp: Tensor,
        sampler_logp: Tensor,
        valid: Tensor,
        sequence: Tensor,
        sequences: int,
    ) -> tuple[Tensor, Tensor]:
        """(weight [N] float32, 0 for a token that does not count; the tokens that stay [N] bool).

        Nothing waits for the device.

        Args:
            old_logp, sampler_logp: [N], the trainer's and the sampling engine's, nats.
            valid: [N] bool, the tokens that count.
            sequence: [N] int64 in [0, sequences).
            sequences: upper bound on the number of sequences.
        """
        measure, over, action = self._cell
        d = old_logp.double() - sampler_logp.double()
        kept = valid & d.isfinite()
        d = torch.where(kept, d, 0.0)
        weight = torch.ones_like(d)
        if measure == "ratio":
            log_weight = combine(d, kept, over, sequence, sequences)
            x = weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        else:
            x = {
                "log_ratio": lambda: d,
                "k2": lambda: 0.5 * d * d,
                "k3": lambda: torch.expm1(d) - d,
            }[measure]()
            x = combine(x, kept, over, sequence, sequences)
        if action == "truncate":
            return torch.where(kept, weight.clamp(self.low, self.high), 0.0).float(), kept
        inside = kept & (x >= self.low) & (x <= self.high)
        factor = torch.where(inside, weight, 0.0).float()
        return factor, inside if action == "reject" else kept


@dataclass(frozen=True)
class SamplerCorrection(Rule):
    """Weights every token by w = π_old / π_sampler, bounded; see the tables above.

    Args:
        level: one w per token, or one per sequence, as a product or a geometric mean.
        action: what happens outside the bounds.
        low, high: bounds of w, 0 <= low <= high; inclusive.
    """

    level: Level = "token"
    action: Action = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        check_choice("level", self.level, get_args(Level))
        check_choice("action", self.action, get_args(Action))
        numbers = is_number(self.low) and is_number(self.high)
        if not numbers or not 0 <= self.low <= self.high:
            raise ValueError(f"low: expected 0 <= low <= high, got {self.low!r} and {self.high!r}")

    @property
    def _cell(self) -> tuple[str, Over, Action]:
        return "ratio", OVERS[self.level], self.action


@dataclass(frozen=True)
class Rejection(Rule):
    """Removes the tokens or sequences outside [low, high] and weighs nothing; see the tables.

    Args:
        measure: the distance x of a token from the sampler.
        over: x of each token, or its sum, mean or maximum over the sequence.
        low, high: bounds of x, inclusive, nats.
    """

    measure: Measure = "log_ratio"
    over: Over = "token"
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, get_args(Measure))
        check_choice("over", self.over, get_args(Over))
        if not (is_number(self.low) and is_number(self.high) and self.low <= self.high):
            raise ValueError(f"low: expected low <= high, got {self.low!r} and {self.high!r}")

    @property
    def _cell(self) -> tuple[str, Over, Action]:
        return self.measure, self.over, "reject"


def combine(x: Tensor, counted: Tensor, over: Over, sequence: Tensor, sequences: int) -> Tensor:
    """[N] x of each token, or its sum, mean or maximum over the counted tokens of the sequence."""
    if over == "token":
        return x
    if over == "max":
        lowest = x.new_full((sequences,), -math.inf)
        x = torch.where(counted, x, -math.inf)
        return lowest.scatter_reduce(0, sequence, x, "amax")[sequence]
    zeros = x.new_zeros(sequences)
    total = zeros.scatter_add(0, sequence, torch.where(counted, x, 0.0))
    if over == "mean":
        total = total / zeros.scatter_add(0, sequence, counted.to(x.dtype)).clamp(min=1)
    return total[sequence]


@torch.no_grad()
def find_off_policy(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    valid: Tensor,
    sequence: Tensor,
    sequences: int,
    delta: float,
) -> Tensor:
    """[N] bool: tokens with A < 0 in sequences with mean_t(old_logp − logp) > δ.

    What the policy has already made unlikely is not pushed down further. A token with a
    log-probability that is NaN or infinite is not part of the mean and is not selected. (TRL counts
    a NaN as difference 0.)

    Args:
        logp: [N], of the policy being trained, nats.
        old_logp: [N], the sampler's where there is one, the trainer's otherwise.
        advantage, valid, sequence, sequences: as in `Rule.apply`.
        delta: nats per token.

    Source: DeepSeek-V3.2 (arXiv 2512.02556, sec. 3.1); TRL's off_policy_mask_threshold.
    """
    drift = old_logp.double() - logp.double()
    counted = valid & drift.isfinite()
    drift = combine(drift, counted, "mean", sequence, sequences)
    return counted & (advantage < 0) & (drift > delta)
