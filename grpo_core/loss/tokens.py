"""The tokens of a loss: a padded `[B, T]` batch or packed rows, both as vectors over N tokens.

A masked token is marked once, by `valid`; every token has the weight that its objective gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.kernels.records import SequenceTokens, Terms
from grpo_core.objective.aggregation import Aggregation, token_weights
from grpo_core.objective.objective import Objective

# the target of a masked token, as in torch.nn.functional.cross_entropy
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Tokens(SequenceTokens):
    """Everything that a loss and its metrics need beside the logits, as vectors over N tokens."""

    objective: Objective
    unmasked: Tensor  # [N] bool, valid before any rejection
    bad_target: Tensor  # [N] bool, neither in [0, V) nor IGNORE
    sampler_logp: Tensor | None  # [N], nats
    normalizer: Tensor | float | None
    groups: tuple[Tensor, int | Tensor] | None  # rewards [B]; their size, or an id for each

    @property
    def needs_statistics(self) -> bool:
        """Whether the loss of a token needs the statistics of other rows or of its own row."""
        spec = self.objective
        return not spec.is_token_level or spec.factor.needs_statistics(self)

    @property
    def couples_sequences(self) -> bool:
        """Whether the loss of a token needs tokens of other sequences."""
        factor = self.objective.factor
        waits = factor.needs_sampler and factor.waits_for_logp(self.old_logp)
        return factor.top_entropy < 1 or waits

    @property
    def terms(self) -> Terms:
        """Surrogate and KL as the kernels take them."""
        spec = self.objective
        return Terms(
            surrogate=spec.surrogate.function,
            surrogate_args=spec.surrogate.args,
            kl=spec.kl_function if self.ref_logp is not None else None,
            kl_times_ratio=spec.kl_times_ratio,
            beta=float(spec.beta),
            ratio_level=spec.ratio_level,
            token_clip=spec.token_clip,
        )

    def has_no_gradient(self) -> Tensor:
        """[N] bool: valid tokens whose gradient is 0 for any logits."""
        spec = self.objective
        others = spec.beta or spec.entropy_coef or self.couples_sequences
        if others or not spec.surrogate.homogeneous:
            return torch.zeros_like(self.valid)
        moves = self.valid & (self.advantage != 0)
        if self.needs_statistics:
            moving = self.advantage.new_zeros(self.sequences)
            sequence = self.sequence
            moves = moving.scatter_add_(0, sequence, moves.to(moving.dtype))[sequence] > 0
        return self.valid & ~moves

    def select(self, rows: slice | Tensor) -> Tokens:
        """Some tokens; their weights stay those of the whole call."""
        vectors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and v.ndim == 1}
        changes: dict[str, Any] = {k: v[rows] for k, v in vectors.items()}
        return replace(self, **changes | {"sequence_id": self.sequence[rows]})

    def scale_weights(self, number: Tensor) -> Tokens:
        """Multiplies every weight by a 0-dim tensor."""
        bonus = self.entropy_weight
        bonus = None if bonus is None else bonus * number
        return replace(self, weight=self.weight * number, entropy_weight=bonus)

    def scale_factor(self, by: Tensor) -> Tokens:
        """Multiplies the factor of the surrogate by a vector."""
        by = by.to(self.advantage.dtype)
        return replace(self, factor=by if self.factor is None else self.factor * by)

    def keep(self, kept: Tensor) -> Tokens:
        """Takes all tokens but some out of the loss and of every mean."""
        valid = self.valid & kept
        target = torch.where(valid, self.target, IGNORE)
        return replace(self, valid=valid, target=target).with_weights()

    def keep_surrogate_on(self, kept: Tensor) -> Tokens:
        """Limits surrogate and entropy bonus to some tokens; all stay in every policy mean."""
        tokens = self.scale_factor(kept)
        return replace(tokens, entropy_weight=tokens._entropy_weight(self.weight, kept))

    def with_weights(self) -> Tokens:
        """Computes the weights of the valid tokens."""
        weight = self._weights(self.valid, self.objective.aggregation, self.normalizer)
        return replace(self, weight=weight, entropy_weight=self._entropy_weight(weight, self.valid))

    def _entropy_weight(self, weight: Tensor, kept: Tensor) -> Tensor | None:
        """entropy_coef times the weight of each entropy, 0 outside `kept`; None without a bonus."""
        spec = self.objective
        if not spec.entropy_coef:
            return None
        if spec.entropy_aggregation is not None:
            weight = self._weights(self.valid & kept, spec.entropy_aggregation, None)
        return spec.entropy_coef * torch.where(kept, weight, 0.0)

    def _weights(
        self, valid: Tensor, aggregation: Aggregation, normalizer: Tensor | float | None
    ) -> Tensor:
        return token_weights(
            valid,
            self.sequence,
            aggregation,
            sequences=self.sequences,
            width=self.width,
            normalizer=normalizer,
            dtype=self.advantage.dtype,
        )
