"""verl 0.9.1's actor loss: options of its actor, policy_loss and algorithm -> a preset.

Covers `verl.trainer.ppo.core_algos` (policy losses, agg_loss, kl_penalty, advantage estimators) as
combined by `verl.workers.utils.losses.ppo_loss`. docs/objectives.md lists the differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.formula import as_torch
from grpo_core.integrations.presets.base import Preset, TokenMeans, padded_mask, read_options
from grpo_core.integrations.presets.verl_options import (
    AGGREGATIONS,
    GROUP,
    INSTEAD,
    KLS,
    SURROGATES,
    VerlOptions,
)
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.advantage import relative_advantages
from grpo_core.objective.objective import Objective
from grpo_core.objective.off_policy import MAX_LOG_RATIO, SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.value import gae, whiten

# verl adds this to the weights of geo_mean before taking their logarithm
GEO_MEAN_TINY = 1e-10


@dataclass(frozen=True)
class VerlPreset(Preset):
    """A `Preset` of verl's options."""

    options: VerlOptions
    is_weighted: bool = False

    def weighted(self) -> VerlPreset:
        """The preset for a batch with `rollout_is_weights`; see `sampler_logp`.

        Raises:
            ValueError: bypass_mode, whose loss computes its weights.
        """
        if self.options.loss_mode == "bypass_mode":
            raise ValueError("loss_mode: expected one that takes weights, got 'bypass_mode'")
        return _preset(self.options, weighted=True)

    def sampler_logp(self, old_logp: Tensor, rollout_is_weights: Tensor) -> Tensor:
        """The `sampler_logp` of given weights: old_logp − log weight, in nats.

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
        """([B, T] weights or None, mask after rejections) of a whole batch, as in verl's trainer.

        Raises:
            ValueError: a preset without `rollout_correction`.
        """
        if self.options.rollout_correction is None:
            raise ValueError("rollout_correction: expected a preset with one, got None")
        return self.options.rollout_correction.of_batch(
            old_log_prob, rollout_log_prob, response_mask
        )

    def normalizer(
        self,
        response_mask: Tensor,
        *,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
        loss_scale_factor: float | None = None,
    ) -> Tensor | float | None:
        """The `normalizer` of `fused_loss`; the host does not wait for the device.

        Args:
            response_mask: [B, T] of the micro-batch.
            dp_size: number of data-parallel ranks, over which gradients are averaged.
            batch_num_tokens, global_batch_size: tokens and sequences of the whole mini-batch.
            loss_scale_factor: the length of seq-mean-token-sum-norm; None means the option, or
                the width of the mask if that is None.

        Raises:
            ValueError: a missing count.
        """
        valid, mode = padded_mask("response_mask", response_mask), self.options.aggregation
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
                want = "a count, since rollout_rs rejects sequences inside the loss"
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
        """Returns advantages [B, T], 0 where masked; the arguments have verl's names.

        Args:
            token_level_rewards: [B, T]; for gdpo [B, F], a column per reward key.
            response_mask: [B, T].
            index: [B] integers in [0, B), the prompt of each completion; for estimators of groups.
            values: [B, T], for gae.
            reward_baselines: [B], for remax.

        Raises:
            ValueError: a missing argument, or a wrong number of weights.
        """

        def needed(argument: str, value: Tensor | None) -> Tensor:
            if value is None:
                raise ValueError(f"{argument}: expected a tensor for {name}, got None")
            return value

        options, name, rewards = self.options, self.options.adv_estimator, token_level_rewards
        valid = padded_mask("response_mask", response_mask)
        if name == "gae":
            given, gamma, lam = needed("values", values), options.gamma, options.lam
            return gae(rewards, given, valid, gamma=gamma, lam=lam, whitened=True)[0]
        zeros = torch.zeros_like(rewards)
        if name == "reinforce_plus_plus":
            return gae(rewards, zeros, valid, gamma=options.gamma, lam=1.0, whitened=True)[0]
        if name == "remax":
            returns, _ = gae(rewards, zeros, valid, gamma=1.0, lam=1.0, whitened=False)
            return returns - needed("reward_baselines", reward_baselines)[:, None] * valid
        columns = list(rewards.unbind(1)) if name == "gdpo" else [rewards.sum(1)]
        weights = options.gdpo_reward_weights if name == "gdpo" else None
        weights = weights or (1.0,) * len(columns)
        if len(weights) != len(columns):
            want = f"gdpo_reward_weights: expected {len(columns)}, one per column of rewards"
            raise ValueError(f"{want}, got {len(weights)}")
        assert options.estimator is not None
        groups, total = needed("index", index), torch.zeros_like(columns[0])
        for weight, column in zip(weights, columns, strict=True):
            total = total + weight * relative_advantages(column, groups, options.estimator)
        if name == "gpg":
            # verl averages over the completions with a reward
            total = total * len(total) / (columns[0] != 0).sum().clamp(min=1)
        advantage = total[:, None] * valid
        if name in ("gdpo", "reinforce_plus_plus_baseline"):
            advantage = whiten(advantage, valid)
        return advantage

    @torch.no_grad()
    def metrics(self, out: LossOutput) -> dict[str, Tensor]:
        """The metrics of verl's policy loss, 0-dim each; the host does not wait for the device.

        Those of the rollout correction (`rollout_corr/*`) are not included.
        """
        means, loss = TokenMeans(out), self.options.loss
        if loss == "gpg":
            return {}
        # in bypass_mode the old policy of reinforce is the sampler
        metrics = {"actor/ppo_kl": means.mean(-means.log_ratio)}
        if loss not in ("dro", "reinforce"):
            clipped, clipped_lower = self._clipped(means)
            metrics["actor/pg_clipfrac"] = means.mean(clipped)
            metrics["actor/pg_clipfrac_lower"] = means.mean(clipped_lower)
        return metrics

    def _clipped(self, means: TokenMeans) -> tuple[Tensor, Tensor]:
        """([N], [N]) bool: the tokens that verl counts as clipped, and as clipped below."""
        loss, low, high = self.options.loss, self.options.low, self.options.high
        positive, negative, ratio = means.advantage > 0, means.advantage < 0, means.ratio
        none = torch.zeros_like(positive)
        if loss == "geo_mean":
            outside = (means.log_ratio < -low) | (means.log_ratio > high)
            return outside & positive, outside & negative
        if loss.startswith("dppo"):
            surrogate = self.objective.surrogate
            sign = torch.where(positive, torch.ones_like(ratio), -torch.ones_like(ratio))
            _, dlogp, _ = as_torch(surrogate.function)(
                means.logp, means.log_ratio, sign, *surrogate.args
            )
            return dlogp == 0, (ratio > self.options.clip_ratio_c) & (dlogp != 0)
        above, below = ratio > 1 + high, ratio < 1 - low
        clipped = (above & positive) | (below & negative)
        if loss == "vanilla":
            return clipped, (ratio > self.options.clip_ratio_c) & negative
        return {"gspo": clipped, "cispo": above | below, "sapo": none}[loss], none


def verl_preset(**options: Any) -> VerlPreset:
    """The preset of verl's options; see `presets.preset`."""
    return _preset(read_options(VerlOptions, "verl's loss", options, INSTEAD), weighted=False)


def _preset(options: VerlOptions, *, weighted: bool) -> VerlPreset:
    """The objective of the options, and the descriptions of the other arguments."""
    correction = options.rollout_correction
    if correction is not None and correction.sampler and options.loss_mode != "bypass_mode":
        # only a whole batch has its mean weight; geo_mean averages bounded weights of a sequence
        whole = correction.rollout_is_batch_normalize or options.loss == "geo_mean"
        weighted = weighted or whole
    level = {"gspo": "sequence_token", "geo_mean": "sequence"}.get(options.loss, "token")
    factor, descriptions = _factor(options, weighted)
    objective = Objective(
        surrogate=SURROGATES[options.loss](options),
        kl=KLS[options.kl_loss_type] if options.use_kl_loss else None,
        beta=options.kl_loss_coef if options.use_kl_loss else 0.0,
        ratio_level=level,  # type: ignore[arg-type]
        advantage=options.estimator or GROUP,
        aggregation=AGGREGATIONS[options.aggregation],
        entropy_coef=options.entropy_coeff,
        factor=factor,
        token_clip=(options.low, options.high) if options.loss == "geo_mean" else None,
    )
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
    return VerlPreset(objective, arguments | descriptions, options, weighted)


def _factor(options: VerlOptions, weighted: bool) -> tuple[PolicyFactor, dict[str, str]]:
    """The factors of the policy term and the rejections, and the arguments that they need."""
    correction = options.rollout_correction
    if weighted:
        level = "geometric" if options.loss == "geo_mean" else "token"
        # the mask of the batch contains the rejections
        factor = PolicyFactor(SamplerCorrection(level, "truncate", 0.0, math.inf))  # type: ignore[arg-type]
        weights = "preset.sampler_logp(old_logp, rollout_is_weights), with the weights of the "
        weights += "batch or those that preset.rollout_correction(...) computes for a whole batch"
        return factor, {"mask": "response_mask, after rollout_rs", "sampler_logp": weights}
    if correction is None:
        return PolicyFactor(), {}
    descriptions = {"sampler_logp": "data['rollout_log_probs']"}
    if correction.rejections:
        descriptions["mask"] = "response_mask as it was before rollout_rs"
    if options.loss_mode != "bypass_mode":
        return PolicyFactor(correction.sampler, rejections=correction.rejections), descriptions
    descriptions["old_logp"] = "data['rollout_log_probs']"
    # the clipped ratio is already to the sampler
    sampler = None if options.loss == "vanilla" else correction.sampler
    return PolicyFactor(sampler, rejections=correction.rejections, current=True), descriptions
