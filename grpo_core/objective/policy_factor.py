"""A detached factor of each token's surrogate; KL and entropy are not multiplied.

    L = Σ_n weight_n · (factor_n · ℓ_n + beta · kl_n) − entropy_weight_n · H_n

| part              | factor of a token                                                       |
|-------------------|-------------------------------------------------------------------------|
| `sampler`         | π_old / π_sampler, bounded, see `off_policy`                            |
| `off_policy_delta`| 0 where A < 0 and the sequence has moved by more than δ nats a token    |
| `top_entropy`     | 0 below the (1 − ρ)-quantile of the entropies of this call's tokens     |
| `second_moment`   | 0 for the tokens of largest d², so that the mean d² of the others is < τ|
| `future_kl`       | clip(e^{Σ_k≥t γ^{k−t}·d_k}, low, high), d = log π/π_old of later tokens  |
| `sequence_weight` | φ(W) of the sequence's ratio; `sampler` is then part of W               |

The factors multiply each other. Only `rejections`, and `sampler` with action "reject", take tokens
out of the mask; each of them sees the tokens before any rejection. All other parts leave the KL and
every mean unchanged, except that tokens of low entropy get no entropy bonus, as in
TRL. With an `old_logp`, `sampler` and `rejections` are computed before the logits are read. The
other parts need two phases.

Source: top_entropy: "Beyond the 80/20 rule" (arXiv 2506.01939); second_moment: M2PO (2510.01161);
the others: where they are defined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.objective.off_policy import Rejection, SamplerCorrection
from grpo_core.objective.validation import check_bounds, check_number, check_type, is_number
from grpo_core.objective.value import backward_scan

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
        check_number("a finite number >= 0", **vars(self))

    def weigh(self, log_w: Tensor, advantage: Tensor) -> Tensor:
        """φ of log W [N]; of the advantage [N] only the sign is used."""
        log_w = log_w.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_RATIO)
        gains = advantage >= 0
        k = torch.where(gains, self.k_pos, self.k_neg)
        decay = torch.where(gains, self.lambda_pos, self.lambda_neg)
        return (k * log_w - decay * torch.expm1(log_w)).exp()


@dataclass(frozen=True)
class FutureKL:
    """clip(e^F_t, low, high) with F_t = Σ_{k≥t} γ^{k−t}·d_k: how later tokens of a sequence moved.

    d = log π − log π_old, γ = 2^(−1/half_life). Masked tokens cost no discount, so packed rows and
    a padded batch agree.

    Args:
        half_life: tokens after which a later one counts half, > 0.
        low, high: bounds of the factor, 0 <= low <= high.
        max_ratio: tokens with a ratio above it add nothing.

    Source: FIPO (arXiv 2603.19835). Its authors' code also limits the factor to [0.8, 1] for A < 0
    at large ratios, which is not done here.
    """

    half_life: float = 32.0
    low: float = 0.8
    high: float = 1.2
    max_ratio: float = math.inf

    def __post_init__(self) -> None:
        check_number("a number > 0", half_life=self.half_life, max_ratio=self.max_ratio)
        check_bounds(self.low, self.high, least=0)

    def weigh(self, log_ratio: Tensor, valid: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        """The factor of each token [N], in float64; of a masked one e⁰ within the bounds."""
        counted = valid & log_ratio.isfinite() & (log_ratio <= math.log(self.max_ratio))
        d = torch.where(counted, log_ratio, 0.0).double()
        # valid tokens by sequence, in their order; masked ones follow
        owner, order = torch.where(valid, sequence, sequences).sort(stable=True)
        continues = torch.cat([owner[1:] == owner[:-1], owner.new_zeros(1, dtype=torch.bool)])
        gamma = 2 ** (-1 / self.half_life) * continues[: len(owner)].double()
        total = backward_scan(d[order][None], gamma[None], d.new_zeros(1))[0]
        return torch.zeros_like(d).scatter(0, order, total).exp().clamp(self.low, self.high)


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
        second_moment: τ > 0, nats²: of the tokens that move away (r > 1 with A > 0, r < 1 with
            A < 0) those of largest d² get 0, until the mean d² of the others is below τ.
        future_kl: a factor from the log-ratios of the later tokens of a sequence.
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
    second_moment: float = math.inf
    future_kl: FutureKL | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("sampler", SamplerCorrection),
            ("sequence_weight", SequenceWeight),
            ("future_kl", FutureKL),
        ):
            if getattr(self, name) is not None:
                check_type(name, getattr(self, name), kind)
        rules, delta = self.rejections, self.off_policy_delta
        if not isinstance(rules, tuple) or not all(isinstance(rule, Rejection) for rule in rules):
            raise ValueError(f"rejections: expected a tuple of Rejection, got {rules!r}")
        check_type("current", self.current, bool)
        check_number("a number > 0", second_moment=self.second_moment)
        if not is_number(delta) or not -math.inf < delta <= math.inf:
            raise ValueError(f"off_policy_delta: expected a number, got {delta!r}")
        check_number("a number in [0, 1]", top_entropy=self.top_entropy)
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


def within_second_moment(
    log_ratio: Tensor, advantage: Tensor, valid: Tensor, bound: float
) -> Tensor:
    """[N] bool: the tokens that stay under `second_moment`; without synchronising.

    Args:
        log_ratio, advantage: [N].
        valid: [N] bool, the tokens that count.
        bound: τ, nats².
    """
    away = ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))
    away = away & valid & log_ratio.isfinite()
    square = torch.where(away, log_ratio.double().square(), math.inf)
    ordered, order = square.sort(stable=True)
    # ascending, so that the means grow
    mean = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    return ~away | torch.zeros_like(away).scatter(0, order, mean < bound)
