"""Which tokens the policy term trusts, and how far: a detached factor of the surrogate alone.

    L = Σ_n weight_n · (factor_n · ℓ_n + beta · kl_n) − entropy_weight_n · H_n

| part              | factor of a token                                                       |
|-------------------|-------------------------------------------------------------------------|
| `sampler`         | π_old / π_sampler, bounded, see `sampler`                               |
| `off_policy_delta`| 0 where A < 0 and the sequence has moved by more than δ nats a token    |
| `top_entropy`     | 0 below the (1 − ρ)-quantile of the entropies of this call's tokens     |
| `sequence_weight` | φ(W) of the sequence's ratio, see there; `sampler` is then part of W    |

The factors multiply. The KL and every mean keep such tokens; the entropy bonus leaves out those of
low entropy, as in TRL. Only `rejections`, and `sampler` with action "reject", take tokens out of
the mask: each looks at what was there before all of them. With an `old_logp` the sampler's parts
are known before the logits are read; everything else takes two phases.

Source: sampler, rejections, sequence_weight: see there; off_policy_delta: DeepSeek-V3.2 (arXiv
2512.02556, sec. 3.1); top_entropy: "Beyond the 80/20 rule" (2506.01939).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_core.objective.rejection import Rejection
from grpo_core.objective.sampler import (
    Correction,
    SamplerCorrection,
    off_policy_mask,
    sampler_correction,
)
from grpo_core.objective.sequence_weight import SequenceWeight
from grpo_core.objective.validation import is_number

if TYPE_CHECKING:
    from grpo_core.loss.inputs import Tokens


@dataclass(frozen=True)
class PolicyFactor:
    """The parts of the factor; by default it is 1.

    Args:
        sampler: correction for tokens that another program sampled; needs `sampler_logp`.
        off_policy_delta: δ, nats per token; infinite means that no sequence is left out. The
            distance is from `sampler_logp` if that is given, else from `old_logp`.
        top_entropy: ρ in [0, 1], the share of the tokens, those of the highest entropy, that the
            surrogate acts on; with 0 the highest alone.
        sequence_weight: a smooth weight of each sequence.
        rejections: which tokens and sequences to leave out; they need `sampler_logp`.
        current: `sampler` and `rejections` look at π/π_sampler, not at π_old/π_sampler.

    Raises:
        ValueError: a share outside [0, 1], a δ that is NaN, another record than named here, a
            `sampler` that is not of tokens beside a `sequence_weight`.
    """

    sampler: SamplerCorrection | None = None
    off_policy_delta: float = math.inf
    top_entropy: float = 1.0
    sequence_weight: SequenceWeight | None = None
    rejections: tuple[Rejection, ...] = ()
    current: bool = False

    def __post_init__(self) -> None:
        weight, rules = self.sequence_weight, self.rejections
        if self.sampler is not None and not isinstance(self.sampler, SamplerCorrection):
            raise ValueError(f"sampler: expected a SamplerCorrection, got {self.sampler!r}")
        if weight is not None and not isinstance(weight, SequenceWeight):
            raise ValueError(f"sequence_weight: expected a SequenceWeight, got {weight!r}")
        if not isinstance(rules, tuple) or not all(isinstance(rule, Rejection) for rule in rules):
            raise ValueError(f"rejections: expected a tuple of Rejection, got {rules!r}")
        if not isinstance(self.current, bool):
            raise ValueError(f"current: expected True or False, got {self.current!r}")
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
        """Whether the log-probabilities of another program are part of the factor."""
        return self.sampler is not None or bool(self.rejections)

    def waits_for_logp(self, old_logp: Tensor | None) -> bool:
        """Whether the policy itself is compared with the sampler."""
        return old_logp is None or self.current

    def needs_statistics(self, tokens: Tokens) -> bool:
        """Whether the factor follows from the logits that are about to be read."""
        drifts = tokens.old_logp is not None or tokens.sampler_logp is not None
        return (
            self.top_entropy < 1
            or (drifts and (self.off_policy_delta < math.inf or self.sequence_weight is not None))
            or (self.needs_sampler and self.waits_for_logp(tokens.old_logp))
        )

    @torch.no_grad()
    def of_sampler(self, tokens: Tokens, old_logp: Tensor) -> Tokens:
        """The tokens with the factor of `sampler`, and without those that are rejected."""
        if not self.needs_sampler:
            return tokens
        left, sampler_logp = tokens.valid, tokens.sampler_logp
        assert sampler_logp is not None
        # the loss itself drops a token whose own log-probability is not finite
        old_logp = torch.where(old_logp.isfinite(), old_logp, sampler_logp)
        weighed = tokens
        if self.sampler is not None:
            found = self._correction(self.sampler, tokens, old_logp)
            left = left & found.mask
            if self.sequence_weight is None:
                weighed = tokens.scale_factor(found.factor)
        for rule in self.rejections:
            where = (tokens.valid, tokens.sequence, tokens.sequences)
            left = left & rule.keeps(old_logp, sampler_logp, *where)
        return weighed.drop(tokens.valid & ~left)

    @torch.no_grad()
    def of_statistics(self, tokens: Tokens, logp: Tensor, entropy: Tensor) -> Tokens:
        """The tokens with every factor that had to wait for their log-probability or entropy."""
        if self.waits_for_logp(tokens.old_logp):
            tokens = self.of_sampler(tokens, logp)
        if self.sequence_weight is not None:
            tokens = tokens.scale_factor(self.of_sequences(tokens, logp))
        before = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
        if self.off_policy_delta < math.inf and before is not None:
            found = off_policy_mask(
                logp,
                before,
                tokens.advantage,
                tokens.valid,
                delta=self.off_policy_delta,
                sequence_id=tokens.sequence,
                validate=False,
            )
            # a log-probability that is not finite is no evidence: its token is judged elsewhere
            tokens = tokens.scale_factor(1 - (found.mask & (found.factor == 0)).to(logp.dtype))
        if self.top_entropy < 1:
            tokens = tokens.keep_surrogate_on(top_share(entropy, tokens.valid, self.top_entropy))
        return tokens

    @torch.no_grad()
    def of_sequences(self, tokens: Tokens, logp: Tensor) -> Tensor:
        """[N] what `sequence_weight` makes of each token's sequence, masked tokens included."""
        assert self.sequence_weight is not None
        old_logp = logp if tokens.old_logp is None else tokens.old_logp
        ratio = None
        if self.sampler is not None:
            ratio = self._correction(self.sampler, tokens, old_logp).factor
        return self.sequence_weight.of(
            logp - old_logp,
            ratio,
            tokens.advantage,
            tokens.valid,
            tokens.sequence,
            tokens.sequences,
        )

    @staticmethod
    def _correction(rule: SamplerCorrection, tokens: Tokens, old_logp: Tensor) -> Correction:
        """The rule applied to the valid tokens."""
        assert tokens.sampler_logp is not None
        return sampler_correction(
            old_logp,
            tokens.sampler_logp,
            tokens.valid,
            **vars(rule),
            sequence_id=None if rule.level == "token" else tokens.sequence,
            validate=False,
        )


def top_share(values: Tensor, valid: Tensor, share: float) -> Tensor:
    """[N] bool: the valid tokens at or above the (1 − share)-quantile of the valid values.

    The quantile is that of `torch.quantile`, to the bit; nothing waits for the device.
    """
    if not values.numel():
        return valid
    known = valid & values.isfinite()
    ordered = torch.where(known, values, math.inf).sort().values
    last = (known.sum() - 1).clamp(min=0)
    place = torch.full_like(values[:1], 1 - share) * last
    below = place.long()
    low, high = ordered.gather(0, below), ordered.gather(0, torch.minimum(below + 1, last[None]))
    return valid & (values >= torch.lerp(low, high, place - below))
