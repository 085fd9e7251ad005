"""A detached factor of each token's surrogate; KL and entropy are not multiplied.

    L = Σ_n weight_n · (factor_n · ℓ_n + beta · kl_n) − entropy_weight_n · H_n

| part              | factor of a token                                                       |
|-------------------|-------------------------------------------------------------------------|
| `sampler`         | π_old / π_sampler, bounded, see `off_policy`                            |
| `off_policy_delta`| 0 where A < 0 and the sequence has moved by more than δ nats a token    |
| `top_entropy`     | 0 below the (1 − ρ)-quantile of the entropies of this call's tokens     |
| `sequence_weight` | φ(W) of the sequence's ratio; `sampler` is then part of W               |

The factors multiply each other. Only `rejections`, and `sampler` with action "reject", take tokens
out of the mask; each of them sees the tokens before any rejection. All other parts leave the KL and
every mean unchanged, except that tokens of low entropy get no entropy bonus, as in
TRL. With an `old_logp`, `sampler` and `rejections` are computed before the logits are read. The
other parts need two phases.

Source: top_entropy: "Beyond the 80/20 rule" (arXiv 2506.01939); the others: where they are defined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.objective.off_policy import Rejection, SamplerCorrection
from grpo_core.objective.validation import check_not_negative, check_type, is_number

# e²⁰ is far above any useful ratio, and far below overflow
LARGEST_LOG_RATIO = 20.0
# a less likely sequence has no weight left
SMALLEST_LOG_RATIO = math.log(1e-8)


@dataclass(frozen=True)
class SequenceWeight:
    """φ(W) = W^k · e^{λ(1 − W)}, a smooth weight of each sequence instead of a clip; φ(1) = 1.

    W = Π_t π(t) / π_old(t), times the sampler's π_old / π_sampler where that is given. In log W a
    token is clamped to ±20, its sampler's ratio to [log 1e-8, 20], and so is the sum. A token with
    a ratio that is not finite, which the loss leaves out, is not part of it.

    Args:
        k_pos, lambda_pos: exponent k and decay λ where the advantage is >= 0.
        k_neg, lambda_neg: the same where it is below.

    Source: VESPO (arXiv 2602.10693); the bounds: its authors' code, and TRL's.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        check_not_negative(**vars(self))

    def weigh(self, log_w: Tensor, advantage: Tensor) -> Tensor:
        """φ of log W [N]; of the advantage [N] only the sign is used."""
        log_w = log_w.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_RATIO)
        gains = advantage >= 0
        k = torch.where(gains, self.k_pos, self.k_neg)
        decay = torch.where(gains, self.lambda_pos, self.lambda_neg)
        return (k * log_w - decay * torch.expm1(log_w)).exp()


@dataclass(frozen=True)
class PolicyFactor:
    """The parts of the factor; by default it is 1.

    Args:
        sampler: correction for tokens that another policy sampled; needs `sampler_logp`.
        off_policy_delta: δ, nats per token; with infinity no sequence is left out. The distance is
            from `sampler_logp` if that is given, else from `old_logp`.
        top_entropy: ρ in [0, 1], the share of the tokens, those of the highest entropy, that the
            surrogate acts on; with 0 the highest alone.
        sequence_weight: a smooth weight of each sequence.
        rejections: which tokens and sequences to leave out; they need `sampler_logp`.
        current: `sampler` and `rejections` compare π, not π_old, with π_sampler.

    Raises:
        ValueError: a wrong type or range, or a `sampler` of sequences beside a `sequence_weight`.
    """

    sampler: SamplerCorrection | None = None
    off_policy_delta: float = math.inf
    top_entropy: float = 1.0
    sequence_weight: SequenceWeight | None = None
    rejections: tuple[Rejection, ...] = ()
    current: bool = False

    def __post_init__(self) -> None:
        weight, rules = self.sequence_weight, self.rejections
        if self.sampler is not None:
            check_type("sampler", self.sampler, SamplerCorrection)
        if weight is not None:
            check_type("sequence_weight", weight, SequenceWeight)
        if not isinstance(rules, tuple) or not all(isinstance(rule, Rejection) for rule in rules):
            raise ValueError(f"rejections: expected a tuple of Rejection, got {rules!r}")
        check_type("current", self.current, bool)
        delta = self.off_policy_delta
        if not is_number(delta) or not -math.inf < delta <= math.inf:
            raise ValueError(f"off_policy_delta: expected a number, got {delta!r}")
        if not is_number(self.top_entropy) or not 0 <= self.top_entropy <= 1:
            raise ValueError(f"top_entropy: expected a share in [0, 1], got {self.top_entropy!r}")
        if self.sequence_weight and self.sampler and self.sampler.level != "token":
            want = "level 'token' beside a sequence_weight"
            raise ValueError(f"sampler: expected {want}, got {self.sampler!r}")

    @property
    def needs_sampler(self) -> bool:
        """Whether a part compares with the sampler's log-probabilities."""
        return self.sampler is not None or bool(self.rejections)


def top_share(values: Tensor, valid: Tensor, share: float) -> Tensor:
    """[N] bool: the valid tokens at or above the (1 − share)-quantile of the valid values.

    The quantile is that of `torch.quantile`, to the bit; without synchronising with the device.
    """
    if not values.numel():
        return valid
    finite = valid & values.isfinite()
    ordered = torch.where(finite, values, math.inf).sort().values
    last = (finite.sum() - 1).clamp(min=0)
    place = torch.full_like(values[:1], 1 - share) * last
    below = place.long()
    low, high = ordered.gather(0, below), ordered.gather(0, torch.minimum(below + 1, last[None]))
    return valid & (values >= torch.lerp(low, high, place - below))
