"""The tokens of a loss: a padded `[B, T]` batch or packed rows, both as vectors over N tokens.

`valid` is False for masked tokens; `weight` is what the aggregation of the objective gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.kept import Kept
from grpo_core.kernels.records import RowGradients, RowLoss, SequenceTokens, Terms
from grpo_core.objective.aggregation import Aggregation, token_weights
from grpo_core.objective.objective import Objective
from grpo_core.objective.off_policy import combine, find_off_policy
from grpo_core.objective.policy_factor import (
    LARGEST_LOG_RATIO,
    SMALLEST_LOG_RATIO,
    top_share,
    within_second_moment,
)

# the target of a masked token, as in torch.nn.functional.cross_entropy
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Tokens(SequenceTokens):
    """The inputs of a loss and its metrics beside the logits, as vectors over N tokens."""

    objective: Objective
    unmasked: Tensor  # [N] bool, valid before any rejection
    bad_target: Tensor  # [N] bool, neither in [0, V) nor IGNORE
    sampler_logp: Tensor | None  # [N], nats
    normalizer: Tensor | float | None
    groups: tuple[Tensor, int | Tensor] | None  # rewards [B]; their size, or an id for each
    unkept: Tensor | None = None  # [N] bool, not among the kept ids; None without any
    kept: Kept | None = None  # of all tokens of the call
    group: Tensor | None = None  # [N] int64 in [0, prompts), of prompt_mean
    prompts: int = 0  # upper bound on their number
    nll_weight: Tensor | None = None  # [N], of −logp beside the objective, also of masked tokens

    @property
    def waits_for_sampler(self) -> bool:
        """Whether the policy itself, not the old one, is compared with the sampler."""
        factor = self.objective.factor
        return factor.needs_sampler and (factor.current or self.old_logp is None)

    @property
    def couples_sequences(self) -> bool:
        """Whether the loss of a token needs tokens of other sequences."""
        factor = self.objective.factor
        by_moment = self.old_logp is not None and factor.second_moment < math.inf
        return factor.top_entropy < 1 or by_moment or self.waits_for_sampler

    @property
    def read(self) -> Tensor:
        """[N] bool: tokens whose rows are read: valid ones, and those with an nll_weight."""
        return self.valid if self.nll_weight is None else self.valid | (self.nll_weight != 0)

    @property
    def largest_weight(self) -> Tensor:
        """[N] the larger of a token's two weights."""
        return self.weight if self.nll_weight is None else self.weight.maximum(self.nll_weight)

    @property
    def needs_statistics(self) -> bool:
        """Whether the loss of a token is computed from the statistics of rows, in two phases."""
        return self.couples_rows or self.nll_weight is not None

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a token needs the statistics of other rows or of its own row."""
        factor = self.objective.factor
        moves = self.old_logp is not None or self.sampler_logp is not None
        of_sequence = factor.off_policy_delta < math.inf or factor.sequence_weight is not None
        ahead = factor.future_kl is not None and self.old_logp is not None
        token_level = self.objective.is_token_level
        return not token_level or self.couples_sequences or (moves and of_sequence) or ahead

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

    def gradients(self, result: RowLoss) -> RowGradients:
        """The derivatives of a loss by each statistic of a row."""
        exact_beta = float(self.objective.beta) if self.objective.has_row_kl else None
        return self.row_gradients(result.dlogp, result.dropped, exact_beta)

    def has_no_gradient(self) -> Tensor:
        """[N] bool: valid tokens whose gradient is 0 for any logits."""
        spec = self.objective
        others = spec.beta or spec.entropy_coef or self.couples_sequences
        if others or not spec.surrogate.homogeneous:
            return torch.zeros_like(self.valid)
        moves = self.valid & (self.advantage != 0)
        if self.couples_rows:
            moving = self.advantage.new_zeros(self.sequences)
            sequence = self.sequence
            moves = moving.scatter_add_(0, sequence, moves.to(moving.dtype))[sequence] > 0
        if self.nll_weight is not None:
            moves = moves | (self.nll_weight != 0)
        return self.valid & ~moves

    def select(self, rows: slice | Tensor) -> Tokens:
        """Some tokens; their weights stay those of the whole call."""
        vectors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and v.ndim == 1}
        changes: dict[str, Any] = {k: v[rows] for k, v in vectors.items()}
        return replace(self, **changes | {"sequence_id": self.sequence[rows]})

    @torch.no_grad()
    def with_sampler_factor(self, old_logp: Tensor) -> Tokens:
        """With the factor of `sampler`, and without the tokens that a rule rejects."""
        rules = self.objective.factor
        if not rules.needs_sampler:
            return self
        assert self.sampler_logp is not None
        # the loss itself drops a token whose own log-probability is not finite
        old_logp = torch.where(old_logp.isfinite(), old_logp, self.sampler_logp)
        vectors = (old_logp, self.sampler_logp, self.valid, self.sequence, self.sequences)
        tokens, kept = self, self.valid
        if rules.sampler is not None:
            factor, kept = rules.sampler.apply(*vectors)
            # a sequence weight contains it
            tokens = self if rules.sequence_weight is not None else self.scale_factor(factor)
        for rule in rules.rejections:
            inside, stays = rule.apply(*vectors)
            kept = kept & stays
            tokens = tokens.scale_factor(inside) if rule.action == "zero" else tokens
        return tokens.keep(kept)

    @torch.no_grad()
    def with_statistics(self, logp: Tensor, entropy: Tensor) -> Tokens:
        """With every factor that depends on the log-probability or entropy of the tokens."""
        factor = self.objective.factor
        tokens = self.with_sampler_factor(logp) if self.waits_for_sampler else self
        if factor.sequence_weight is not None:
            tokens = tokens.scale_factor(tokens.weigh_sequences(logp))
        if self.old_logp is not None and factor.future_kl is not None:
            vectors = (logp - self.old_logp, tokens.valid, tokens.sequence, tokens.sequences)
            tokens = tokens.scale_factor(factor.future_kl.weigh(*vectors))
        if self.old_logp is not None and factor.second_moment < math.inf:
            moved = (logp - self.old_logp, tokens.advantage, tokens.valid)
            tokens = tokens.scale_factor(within_second_moment(*moved, factor.second_moment))
        before = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
        if factor.off_policy_delta < math.inf and before is not None:
            vectors = (tokens.advantage, tokens.valid, tokens.sequence, tokens.sequences)
            drifted = find_off_policy(logp, before, *vectors, factor.off_policy_delta)
            tokens = tokens.scale_factor(~drifted)
        if factor.top_entropy < 1:
            tokens = tokens.keep_surrogate_on(top_share(entropy, tokens.valid, factor.top_entropy))
        return tokens

    @torch.no_grad()
    def weigh_sequences(self, logp: Tensor) -> Tensor:
        """[N] φ of each token's sequence, masked tokens included; see `SequenceWeight`."""
        factor = self.objective.factor
        assert factor.sequence_weight is not None
        old_logp = logp if self.old_logp is None else self.old_logp
        log_ratio = logp - old_logp
        counted = self.valid & log_ratio.isfinite()
        log_ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        if factor.sampler is not None:
            assert self.sampler_logp is not None
            vectors = (old_logp, self.sampler_logp, self.valid, self.sequence, self.sequences)
            log_w = factor.sampler.apply(*vectors)[0].to(log_ratio.dtype).log()
            log_ratio = log_ratio + log_w.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_RATIO)
        total = combine(log_ratio, counted, "sum", self.sequence, self.sequences)
        return factor.sequence_weight.weigh(total, self.advantage)

    def scale_weights(self, number: Tensor) -> Tokens:
        """Multiplies every weight by a 0-dim tensor."""
        bonus = self.entropy_weight
        bonus = None if bonus is None else bonus * number
        nll = None if self.nll_weight is None else self.nll_weight * number
        return replace(self, weight=self.weight * number, entropy_weight=bonus, nll_weight=nll)

    def scale_factor(self, by: Tensor) -> Tokens:
        """Multiplies the factor of the surrogate by a vector."""
        by = by.to(self.advantage.dtype)
        return replace(self, factor=by if self.factor is None else self.factor * by)

    def keep(self, kept: Tensor) -> Tokens:
        """Takes all tokens but some out of the loss and of every mean."""
        return self.with_valid(self.valid & kept).with_weights()

    def with_valid(self, valid: Tensor) -> Tokens:
        """With other valid tokens; the rows that are not read have no target."""
        tokens = replace(self, valid=valid)
        return replace(tokens, target=torch.where(tokens.read, self.target, IGNORE))

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
        by_prompt = aggregation == "prompt_mean"
        group = self.group if by_prompt else self.sequence
        assert group is not None
        return token_weights(
            valid,
            group,
            aggregation,
            sequences=self.prompts if by_prompt else self.sequences,
            width=self.width,
            normalizer=normalizer,
            dtype=self.advantage.dtype,
        )
