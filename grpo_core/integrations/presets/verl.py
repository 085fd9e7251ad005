"""verl 0.9.1's actor loss: options of its actor, policy_loss and algorithm -> a preset.

Covers `verl.trainer.ppo.core_algos` (policy losses, agg_loss, kl_penalty, advantage estimators) as
`verl.workers.utils.losses.ppo_loss` puts them together. What stays different:

- verl holds log-ratios of tokens within ±20 (gspo: below 10; dro, geo_mean: not at all); here they
  are as they come, and a ratio beyond float32 leaves its token out;
- verl's k3 has log-ratios within ±20, a value of at most 10, and no gradient beyond either;
- a group of one has A = R there (rloo_vectorized: 0), here 0;
- a token whose rollout log-probability is NaN leaves the mask here; the loss is NaN there;
- verl adds 1e-8 to counts; a batch without a token is NaN there (token-sum: 0), here 0;
- geo_mean with advantages per token: where A = 0 verl counts the log-ratio as 0, here it is held
  above −clip_ratio_low as where A < 0; equal for one advantage per completion;
- `clip_ratio_c` below 1 + clip_ratio_high is refused for vanilla.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.formula import as_torch
from grpo_core.integrations.presets.base import Preset, Tally, padded, read_options
from grpo_core.integrations.presets.verl_advantages import estimator_of, verl_advantages
from grpo_core.integrations.presets.verl_options import AGGREGATIONS, INSTEAD, KLS, VerlOptions
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.objective import Objective, Surrogate
from grpo_core.objective.off_policy import MAX_LOG_RATIO, SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.recipes import (
    cispo,
    clip,
    dppo_kl,
    dppo_tv,
    dro,
    importance,
    reinforce,
    sapo,
)

# verl adds it to the weights of geo_mean before it takes their logarithm
GEO_MEAN_TINY = 1e-10


@dataclass(frozen=True)
class VerlPreset(Preset):
    """See `Preset`; the options are verl's."""

    options: VerlOptions
    is_weighted: bool = False

    def weighted(self) -> VerlPreset:
        """The same for a batch that brings its `rollout_is_weights`; see `sampler_logp`.

        Raises:
            ValueError: bypass_mode, whose loss finds its own weights.
        """
        if self.options.loss_mode == "bypass_mode":
            raise ValueError("loss_mode: expected one that takes weights, got 'bypass_mode'")
        return _preset(self.options, weighted=True)

    def sampler_logp(self, old_logp: Tensor, rollout_is_weights: Tensor) -> Tensor:
        """What `fused_loss` takes for weights that are given: old_logp − log weight, in nats.

        Args:
            old_logp: [B, T], as given to `fused_loss`.
            rollout_is_weights: [B, T]; a weight of 0 becomes e⁻⁸⁰.
        """
        if self.options.loss_mode == "geo_mean":
            return old_logp - (rollout_is_weights + GEO_MEAN_TINY).log()
        return old_logp - rollout_is_weights.log().clamp(min=-MAX_LOG_RATIO)

    def rollout_correction(
        self, old_log_prob: Tensor, rollout_log_prob: Tensor, response_mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """(weights [B, T] or None, the mask that is left) of a whole batch, as verl's trainer does.

        Raises:
            ValueError: a preset without `rollout_correction`.
        """
        if self.options.correction is None:
            raise ValueError("rollout_correction: expected a preset with one, got None")
        return self.options.correction.of_batch(old_log_prob, rollout_log_prob, response_mask)

    def normalizer(
        self,
        response_mask: Tensor,
        *,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
        loss_scale_factor: float | None = None,
    ) -> Tensor | float | None:
        """What `fused_loss` is to divide by, None for its own count; nothing waits for the device.

        Args:
            response_mask: [B, T] of the micro-batch.
            dp_size: data-parallel ranks, over which gradients are averaged.
            batch_num_tokens, global_batch_size: tokens and sequences of the whole mini-batch.
            loss_scale_factor: the length of seq-mean-token-sum-norm; None means the option, or
                else the width of the mask.

        Raises:
            ValueError: a count that is missing.
        """
        valid, mode = padded("response_mask", response_mask), self.options.aggregation
        if self.options.loss_mode == "geo_mean":
            return len(valid)
        if mode == "token-sum":
            return 1 / dp_size
        name, count = "global_batch_size", global_batch_size
        if mode == "token-mean":
            name, count = "batch_num_tokens", batch_num_tokens
        if count is None and dp_size > 1:
            raise ValueError(f"{name}: expected a count for dp_size = {dp_size}, got None")
        if mode != "seq-mean-token-sum-norm":
            return None if count is None else count / dp_size
        length = loss_scale_factor or self.options.loss_scale_factor
        if count is None and length is None:
            return None
        if count is None:
            if self.objective.factor.rejections:
                want = "a count, since rollout_rs takes sequences out inside the loss"
                raise ValueError(f"global_batch_size: expected {want}, got None")
            count = valid.any(1).sum().clamp(min=1)
        return count * (valid.shape[1] if length is None else length) / dp_size

    def advantages(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Tensor | None = None,
        *,
        values: Tensor | None = None,
        reward_baselines: Tensor | None = None,
    ) -> Tensor:
        """Advantages [B, T], 0 where masked; arguments by verl's names.

        Args:
            token_level_rewards: [B, T]; for gdpo instead [B, F], a column per reward key.
            response_mask: [B, T].
            index: [B] integers in [0, B), the prompt of each; needed by all that compare in groups.
            values: [B, T], for gae.
            reward_baselines: [B], for remax.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        given = {"index": index, "values": values, "reward_baselines": reward_baselines}
        return verl_advantages(self.options, token_level_rewards, response_mask, given)

    @torch.no_grad()
    def metrics(self, out: LossOutput) -> dict[str, Tensor]:
        """What verl's policy loss logs, by its names; 0-dim, nothing waits for the device.

        The figures of the rollout correction (`rollout_corr/*`) are not among them.
        """
        tally, loss = Tally(out), self.options.loss
        if loss == "gpg":
            return {}
        # the ratio of a bypassed REINFORCE is to the sampler, which is its old policy
        found = {"actor/ppo_kl": tally.mean(-tally.log_ratio)}
        if loss in ("dro", "reinforce"):
            return found
        upper, lower = self._clipped(tally)
        return {
            "actor/pg_clipfrac": tally.mean(upper),
            **found,
            "actor/pg_clipfrac_lower": tally.mean(lower),
        }

    def _clipped(self, tally: Tally) -> tuple[Tensor, Tensor]:
        """([N], [N]) bool: what verl's loss counts as clipped, and as clipped below."""
        loss, low, high = self.options.loss, self.options.low, self.options.high
        gains, losses, ratio = tally.advantage > 0, tally.advantage < 0, tally.ratio
        none = torch.zeros_like(gains)
        beyond = (ratio < 1 - low) | (ratio > 1 + high)
        clipped = ((ratio > 1 + high) & gains) | ((ratio < 1 - low) & losses)
        if loss == "vanilla":
            return clipped, (ratio > self.options.clip_ratio_c) & losses
        if loss.startswith("dppo"):
            surrogate = self.objective.surrogate
            sign = torch.where(gains, torch.ones_like(ratio), -torch.ones_like(ratio))
            _, slope, _ = as_torch(surrogate.function)(
                tally.logp, tally.log_ratio, sign, *surrogate.args
            )
            return slope == 0, (ratio > self.options.clip_ratio_c) & (slope != 0)
        if loss == "geo_mean":
            beyond = (tally.log_ratio < -low) | (tally.log_ratio > high)
            return beyond & gains, beyond & losses
        return {"gspo": clipped, "cispo": beyond, "sapo": none}[loss], none


def verl_preset(**options: Any) -> VerlPreset:
    """The preset of verl's options; see `presets.preset`."""
    return _preset(read_options(VerlOptions, "verl's loss", options, INSTEAD), weighted=False)


def _preset(options: VerlOptions, *, weighted: bool) -> VerlPreset:
    """The objective of the options, and how to call it."""
    correction = options.correction
    if correction is not None and options.loss_mode != "bypass_mode":
        weighted = weighted or correction.needs_whole_batch(options.loss)
    level = {"gspo": "sequence_token", "geo_mean": "sequence"}.get(options.loss, "token")
    objective = Objective(
        surrogate=_surrogate(options),
        kl=KLS[options.kl_loss_type] if options.use_kl_loss else None,
        beta=options.kl_loss_coef if options.use_kl_loss else 0.0,
        ratio_level=level,  # type: ignore[arg-type]
        advantage=estimator_of(options),
        aggregation=AGGREGATIONS[options.aggregation],
        entropy_coef=options.entropy_coeff,
        factor=_factor(options, weighted),
        token_clip=(options.low, options.high) if options.loss == "geo_mean" else None,
    )
    return VerlPreset(objective, _arguments(options, weighted), options, weighted)


def _surrogate(options: VerlOptions) -> Surrogate:
    """The policy term."""
    low, high, c = options.low, options.high, options.clip_ratio_c
    makers = {
        "vanilla": lambda: clip(low, high, c),
        "dppo_tv": lambda: dppo_tv(low, high, c),
        "dppo_kl": lambda: dppo_kl(low, high, c),
        "gspo": lambda: clip(low, high),
        "sapo": lambda: sapo(options.tau_pos, options.tau_neg),
        "gpg": reinforce,
        "reinforce": reinforce,
        "geo_mean": importance,
        "dro": lambda: dro(options.dro_beta),  # type: ignore[arg-type]
        "cispo": lambda: cispo(1 + high, max(1 - low, 0.0)),
    }
    return makers[options.loss]()


def _factor(options: VerlOptions, weighted: bool) -> PolicyFactor:
    """What multiplies the policy term, and what is rejected."""
    correction = options.correction
    rejections = () if correction is None else correction.rejections
    sampler = None if correction is None else correction.sampler
    current = options.loss_mode == "bypass_mode"
    if options.loss_mode == "bypass_mode" and options.loss == "vanilla":
        # the clipped ratio is to the sampler already
        sampler = None
    if weighted:
        # who was rejected shows in the batch's mask
        rejections, level = (), "geometric" if options.loss == "geo_mean" else "token"
        sampler = SamplerCorrection(level, "truncate", 0.0, math.inf)  # type: ignore[arg-type]
    return PolicyFactor(sampler, rejections=rejections, current=current)


def _arguments(options: VerlOptions, weighted: bool) -> dict[str, str]:
    """How to give the other arguments of `fused_loss`."""
    counts = "dp_size=..., batch_num_tokens=..., global_batch_size=..."
    arguments = {
        "advantage": "data['advantages'], or preset.advantages(...)",
        "mask": "response_mask",
        "old_logp": "data['old_log_probs']",
        "normalizer": f"preset.normalizer(response_mask, {counts}), which are of the mini-batch",
        "temperature": "rollout.temperature",
    }
    if options.use_kl_loss:
        arguments["ref_logp"] = "data['ref_log_prob']"
    correction = options.correction
    if weighted:
        arguments["mask"] = "response_mask, after rollout_rs"
        arguments["sampler_logp"] = (
            "preset.sampler_logp(old_logp, rollout_is_weights), with the batch's weights or those "
            "that preset.rollout_correction(...) finds, beside the mask, for a whole batch"
        )
    elif options.loss_mode == "bypass_mode":
        arguments["old_logp"] = "data['rollout_log_probs']"
        arguments["sampler_logp"] = "data['rollout_log_probs']"
    elif correction is not None:
        arguments["sampler_logp"] = "data['rollout_log_probs']"
    if not weighted and correction is not None and correction.rejections:
        arguments["mask"] = "response_mask as it was before rollout_rs"
    return arguments
