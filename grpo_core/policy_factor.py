"""Which tokens the policy term trusts, and how far: a detached factor of the surrogate alone.

    L = Σ_n weight_n · (factor_n · ℓ_n + beta · kl_n) − entropy_weight_n · H_n

| part              | factor of a token                                                       |
|-------------------|-------------------------------------------------------------------------|
| `sampler`         | π_old / π_sampler, bounded, see `sampler`                               |
| `off_policy_delta`| 0 where A < 0 and the sequence has moved by more than δ nats a token    |
| `top_entropy`     | 0 below the (1 − ρ)-quantile of the entropies of this call's tokens     |

The factors multiply. The KL and every mean keep such tokens; the entropy bonus leaves out those of
low entropy, as in TRL. Only `sampler` with action "reject" takes tokens out of the mask. With an
`old_logp` the first part is known before the logits are read; everything else takes two phases.

Source: sampler: see there; off_policy_delta: DeepSeek-V3.2 (arXiv 2512.02556, sec. 3.1);
top_entropy: "Beyond the 80/20 rule" (2506.01939).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_core.sampler import SamplerCorrection, off_policy_mask, sampler_correction

if TYPE_CHECKING:
    from grpo_core.arguments import Tokens


@dataclass(frozen=True)
class PolicyFactor:
    """The parts of the factor; by default it is 1.

    Args:
        sampler: correction for tokens that another program sampled; needs `sampler_logp`.
        off_policy_delta: δ, nats per token; infinite means that no sequence is left out. The
            distance is from `sampler_logp` if that is given, else from `old_logp`.
        top_entropy: ρ in (0, 1], the share of the tokens, those of the highest entropy, that the
            surrogate acts on.

    Raises:
        ValueError: a share outside (0, 1], a δ that is NaN.
    """

    sampler: SamplerCorrection | None = None
    off_policy_delta: float = math.inf
    top_entropy: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler is not None and not isinstance(self.sampler, SamplerCorrection):
            raise ValueError(f"sampler: expected a SamplerCorrection, got {self.sampler!r}")
        if not -math.inf < self.off_policy_delta <= math.inf:
            raise ValueError(f"off_policy_delta: expected a number, got {self.off_policy_delta!r}")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy: expected a share in (0, 1], got {self.top_entropy!r}")

    def needs_statistics(self, tokens: Tokens) -> bool:
        """Whether the factor follows from the logits that are about to be read."""
        drifts = tokens.old_logp is not None or tokens.sampler_logp is not None
        return (
            self.top_entropy < 1
            or (self.off_policy_delta < math.inf and drifts)
            or (self.sampler is not None and tokens.old_logp is None)
        )

    @torch.no_grad()
    def of_sampler(self, tokens: Tokens, old_logp: Tensor) -> Tokens:
        """The tokens with the factor of `sampler`, and without those that it rejects."""
        rule, sampler_logp = self.sampler, tokens.sampler_logp
        if rule is None:
            return tokens
        assert sampler_logp is not None
        found = sampler_correction(
            # the loss itself drops a token whose own log-probability is not finite
            torch.where(old_logp.isfinite(), old_logp, sampler_logp),
            sampler_logp,
            tokens.valid,
            **vars(rule),
            sequence_id=None if rule.level == "token" else tokens.sequence,
            validate=False,
        )
        kept = tokens.multiplied(found.factor)
        return kept.without(tokens.valid & ~found.mask)

    @torch.no_grad()
    def of_statistics(self, tokens: Tokens, logp: Tensor, entropy: Tensor) -> Tokens:
        """The tokens with every factor that had to wait for their log-probability or entropy."""
        if tokens.old_logp is None:
            tokens = self.of_sampler(tokens, logp)
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
            tokens = tokens.multiplied(1 - (found.mask & (found.factor == 0)).to(logp.dtype))
        if self.top_entropy < 1:
            tokens = tokens.only_entropy_of(top_share(entropy, tokens.valid, self.top_entropy))
        return tokens


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
