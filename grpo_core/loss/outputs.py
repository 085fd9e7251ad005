"""What the losses return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.kernels.records import RowLoss
from grpo_core.loss.metrics import loss_metrics
from grpo_core.loss.tokens import Tokens


class TokenLogp(NamedTuple):
    """Log-probability of each target and entropy of its distribution, nats, shaped like target."""

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LossOutput:
    """The result of `fused_loss`: the loss, and its terms per token.

    Attributes:
        loss: 0-dim float32, differentiable with respect to the logits.
        logp: log π(target), nats, shaped like target, float32, detached, 0 where masked; so are:
        entropy: of the distribution at temperature T, nats.
        ratio: π / π_old; with a sequence-level objective that of the sequence.
        kl: the objective's estimate of KL(π ‖ π_ref), nats.
    """

    loss: Tensor
    logp: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    ratio: Tensor = field(repr=False)
    kl: Tensor = field(repr=False)
    _factor: Tensor | None = field(repr=False)
    _tokens: Tokens = field(repr=False)
    _valid: Tensor = field(repr=False)
    _dropped: Tensor = field(repr=False)
    _skipped: int | Tensor | None = field(default=None, repr=False)
    _metrics: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, loss: Tensor, result: RowLoss, tokens: Tokens, shape: torch.Size) -> LossOutput:
        """The output of a loss whose vectors are in `result`, shaped like its target."""
        vectors = (result.logp, result.entropy, result.ratio, result.kl)
        logp, entropy, ratio, kl = (vector.view(shape) for vector in vectors)
        factor = None if tokens.factor is None else tokens.factor.view(shape)
        return cls(loss, logp, entropy, ratio, kl, factor, tokens, tokens.valid, result.dropped)

    @property
    def factor(self) -> Tensor:
        """The factor of the surrogate, see `policy_factor`; 1 without one."""
        return torch.ones_like(self.logp) if self._factor is None else self._factor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics of this call, see `metrics.METRICS`; computed when first asked for."""
        if not self._metrics:
            self._metrics.update(loss_metrics(self))
        return self._metrics
