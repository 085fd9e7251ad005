"""Corrections for tokens that another policy sampled, such as an inference engine.

    d_t = log π_old(t) − log π_sampler(t)

`SamplerCorrection` weighs a token by the ratio w = π_old / π_sampler of the token or its sequence,
and acts on a ratio outside of low <= w <= high:

| action     | outside                                    | known as                             |
|------------|--------------------------------------------|--------------------------------------|
| "truncate" | weight = the nearer bound                  | TIS; TRL *_truncate, verl rollout_is |
| "zero"     | weight = 0, the token counts in every mean | IcePop, MIS; TRL *_mask, verl lo_hi  |
| "reject"   | weight = 0, the token leaves the mask      | MIS                                  |

`Rejection` takes tokens with a distance outside of its bounds out of the mask, and weighs nothing
(verl rollout_rs). With action "zero" it is a gate: their surrogate is 0 and they count in every
mean (OpenRLHF's gates; FlashREINFORCE gates by the mean binary_kl of a sequence). The weight
multiplies the advantage, so it scales the policy term and never the KL.

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

from grpo_core.objective.validation import check_bounds, check_choice

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "zero", "reject"]
Measure = Literal["log_ratio", "k2", "k3", "binary_kl", "tv"]
Over = Literal["token", "sum", "mean", "max"]

# e⁸⁰ is within the range of float32, e⁸⁹ is not
MAX_LOG_RATIO = 80.0
# distances of probabilities clamp them, as OpenRLHF 0.11.2 does
SMALLEST_PROBABILITY = 1e-6
OVERS: dict[str, Over] = {"token": "token", "sequence": "sum", "geometric": "mean"}


class Rule:
    """What `SamplerCorrection` and `Rejection` share: bounds, and what happens outside."""

    action: str
    low: float
    high: float

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

        Does not synchronise with the device.

        Args:
            old_logp, sampler_logp: [N], the trainer's and the sampling engine's, nats.
            valid: [N] bool, the tokens that count.
            sequence: [N] int64 in [0, sequences).
            sequences: upper bound on the number of sequences.
        """
        d = old_logp.double() - sampler_logp.double()
        known = valid & d.isfinite()
        d, logp = (torch.where(known, vector, 0.0) for vector in (d, old_logp.double()))
        distance, over = self._distance(d, logp)
        weight, x = self._weigh(combine(distance, known, over, sequence, sequences))
        inside = known & (x >= self.low) & (x <= self.high)
        counted = known if self.action == "truncate" else inside
        stays = inside if self.action == "reject" else known
        return torch.where(counted, weight, 0.0).float(), stays

    def _distance(self, d: Tensor, logp: Tensor) -> tuple[Tensor, Over]:
        """[N] of each token from its sampler, and how a sequence combines it; `logp` is π_old's."""
        raise NotImplementedError

    def _weigh(self, combined: Tensor) -> tuple[Tensor, Tensor]:
        """[N] weights inside the bounds, and what is bounded."""
        raise NotImplementedError


@dataclass(frozen=True)
class SamplerCorrection(Rule):
    """Weights every token by w = π_old / π_sampler, bounded; see the table above.

    Args:
        level: w_t = e^d_t of a token; or of a sequence Π_t w_t, or the geometric mean of the w_t.
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
        check_bounds(self.low, self.high, least=0)

    def _distance(self, d: Tensor, logp: Tensor) -> tuple[Tensor, Over]:
        return d, OVERS[self.level]

    def _weigh(self, combined: Tensor) -> tuple[Tensor, Tensor]:
        ratio = combined.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return ratio.clamp(self.low, self.high), ratio


@dataclass(frozen=True)
class Rejection(Rule):
    """Removes the tokens or sequences outside [low, high] and weighs nothing.

    Args:
        measure: the distance x of a token from the sampler: "log_ratio" is d_t, "k2" ½·d_t², "k3"
            e^d_t − 1 − d_t; "binary_kl" is KL(Bern(π_sampler) ‖ Bern(π_old)) and "tv"
            |π_sampler − π_old| of the token's probabilities.
        over: x of each token, or its sum, mean or maximum over the sequence.
        low, high: bounds of x, inclusive; nats, for "tv" a probability.
        action: "reject": they leave the mask; "zero": factor 0, the denominators are kept.
    """

    measure: Measure = "log_ratio"
    over: Over = "token"
    low: float = -math.inf
    high: float = math.inf
    action: Literal["reject", "zero"] = "reject"

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, get_args(Measure))
        check_choice("action", self.action, ("reject", "zero"))
        check_choice("over", self.over, get_args(Over))
        check_bounds(self.low, self.high)

    def _distance(self, d: Tensor, logp: Tensor) -> tuple[Tensor, Over]:
        x = d
        if self.measure == "k2":
            x = 0.5 * d * d
        elif self.measure == "k3":
            x = torch.expm1(d) - d
        elif self.measure in ("binary_kl", "tv"):
            bounds = SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY
            p, q = (log.exp().clamp(*bounds) for log in (logp - d, logp))
            x = (p - q).abs()
            if self.measure == "binary_kl":
                x = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return x, self.over

    def _weigh(self, combined: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(combined), combined


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

    The policy has already made them unlikely, and is not pushed further. A token with a
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
