"""TRL 1.16's GRPO loss: the options of `GRPOConfig` -> a preset.

docs/objectives.md lists the differences from `GRPOTrainer._compute_loss`, none of them in ordinary
batches. Metrics are of this rank; TRL sums numerators and denominators over ranks before it
divides. Where completions are padded to a width of 1, TRL takes tokens for sequences and counts
empty rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import Preset, TokenMeans, padded_mask, read_options
from grpo_core.integrations.presets.trl_options import (
    AGGREGATIONS,
    CLIPPED,
    ESTIMATORS,
    GLOBAL,
    INSTEAD,
    TrlOptions,
)
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.advantage import decoupled_advantages, relative_advantages
from grpo_core.objective.objective import Objective, Surrogate
from grpo_core.objective.off_policy import SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor, SequenceWeight, top_share
from grpo_core.objective.recipes import cispo, clip, reinforce, sapo

# TRL clamps λ to at least this
SMALLEST_LAMBDA = 1e-4


@dataclass(frozen=True)
class TrlPreset(Preset):
    """A `Preset` of TRL's options; `evaluation` leaves out a metric, as TRL does."""

    options: TrlOptions
    evaluation: bool = False

    def in_evaluation(self) -> TrlPreset:
        """The loss that TRL computes in `evaluate`, where it does not accumulate gradients."""
        options = dataclasses.replace(
            self.options, gradient_accumulation_steps=1, steps_per_generation=None
        )
        return dataclasses.replace(make_preset(options), evaluation=True)

    def accumulating(self, current_gradient_accumulation_steps: int) -> TrlPreset:
        """The loss in a window of another length, such as the last window of an epoch."""
        options = dataclasses.replace(
            self.options,
            gradient_accumulation_steps=current_gradient_accumulation_steps,
            steps_per_generation=self.options.steps,
        )
        return make_preset(options)

    def normalizer(
        self,
        mask: Tensor,
        *,
        num_items_in_batch: Tensor | float | None = None,
        num_processes: int = 1,
    ) -> Tensor | float:
        """The `normalizer` of `fused_loss`; the host does not wait for the device.

        Args:
            mask: [B, T], completion_mask · tool_mask of the micro-batch; empty rows count.
            num_items_in_batch: tokens of the generation batch on all ranks; needed by dapo, cispo
                and vespo, ignored by the others.
            num_processes: number of ranks.

        Raises:
            ValueError: a mask of another shape, or a missing count.
        """
        valid, options = padded_mask("mask", mask), self.options
        window = options.gradient_accumulation_steps
        if options.loss_type in GLOBAL:
            if num_items_in_batch is None:
                want = f"the tokens of the generation batch for {options.loss_type}"
                raise ValueError(f"num_items_in_batch: expected {want}, got None")
            share = (1 / num_processes) * (window / options.steps)
            if isinstance(num_items_in_batch, Tensor):
                return num_items_in_batch.clamp(min=1) * share
            return max(num_items_in_batch, 1) * share
        if options.loss_type == "bnpo":
            return valid.sum().clamp(min=1) * window
        length = options.max_completion_length if options.loss_type == "dr_grpo" else 1
        return len(valid) * length * window

    def advantages(self, rewards_per_func: Tensor, groups: int | Tensor | None = None) -> Tensor:
        """TRL's advantages of all ranks; TRL then takes those of its own rank.

        Args:
            rewards_per_func: [B, F] of all ranks, NaN where a function returned None.
            groups: completions per prompt or ids, as in `relative_advantages`; None means
                `num_generations`.

        Returns:
            [B] float32, or float64 for float64 rewards.
        """
        groups = self.options.num_generations if groups is None else groups
        if rewards_per_func.ndim != 2:
            raise ValueError(
                f"rewards_per_func: expected shape [B, F], got {list(rewards_per_func.shape)}"
            )
        F = rewards_per_func.shape[1]
        weights = self.options.reward_weights or (1.0,) * F
        if len(weights) != F:
            want = f"reward_weights: expected {F}, one per column of rewards_per_func"
            raise ValueError(f"{want}, got {len(weights)}")
        scored = ~rewards_per_func.isnan()
        if self.options.multi_objective_aggregation == "normalize_then_sum":
            by_function = torch.tensor(weights)
            return decoupled_advantages(rewards_per_func, groups, by_function, mask=scored)
        columns = rewards_per_func.nan_to_num(nan=0.0).unbind(1)
        rewards = torch.stack([w * r for w, r in zip(weights, columns, strict=True)]).sum(0)
        return relative_advantages(rewards, groups, self.objective.advantage, mask=scored.any(1))

    @torch.no_grad()
    def metrics(self, out: LossOutput) -> dict[str, Tensor]:
        """TRL's metrics of this micro-batch, 0-dim each; the host does not wait for the device."""
        options, means = self.options, TokenMeans(out)
        metrics = {"entropy": means.mean(means.entropy)}
        if options.beta:
            metrics["kl"] = means.mean(means.kl)
        if options.entropy_coef:
            metrics["policy_loss"] = self._policy_loss(out, means)
            if not self.evaluation:
                metrics["entropy_coef"] = out.loss.new_full((), options.entropy_coef)
        # of rows, empty ones included, if each sequence has one ratio
        by_token = options.importance_sampling_level == "token"
        mean = means.mean if by_token else means.mean_by_sequence
        positive, negative = means.advantage > 0, means.advantage < 0
        if options.loss_type == "cispo":
            clipped = (means.ratio > options.upper) & positive
            metrics["cispo_clip_ratio"] = mean(clipped)
        elif options.loss_type == "vespo":
            phi = means.tokens.weigh_sequences(means.logp)
            metrics["vespo/phi_seq_mean"] = means.mean_by_sequence(phi)
        elif options.loss_type in CLIPPED:
            ratio = means.ratio.clamp(max=math.inf if options.delta is None else options.delta)
            low = (ratio < 1 - options.epsilon) & negative
            high = (ratio > 1 + options.upper) & positive
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                metrics[f"clip_ratio/{name}_mean"] = mean(clipped)
            metrics["clip_ratio/low_min"] = self._extreme(low, means, largest=False)
            metrics["clip_ratio/high_max"] = self._extreme(high, means, largest=True)
        return metrics

    def _extreme(self, vector: Tensor, means: TokenMeans, *, largest: bool) -> Tensor:
        """The largest or smallest mean of a row, as in `metrics`; NaN without rows."""
        values, present = means.by_sequence(vector)
        if self.options.importance_sampling_level == "sequence":
            present = present | means.is_padded
        values = torch.where(present, values, -math.inf if largest else math.inf)
        extreme = values.amax() if largest else values.amin()
        return torch.where(present.any(), extreme, math.nan)

    def _policy_loss(self, out: LossOutput, means: TokenMeans) -> Tensor:
        """The loss without the entropy bonus, as TRL logs it: before its last division."""
        over = means.valid
        if self.objective.factor.top_entropy < 1:
            over = top_share(means.entropy, over, self.objective.factor.top_entropy)
        bonus = self.objective.entropy_coef * means.mean(means.entropy, over)
        divides_last = self.options.loss_type not in GLOBAL
        window = self.options.gradient_accumulation_steps if divides_last else 1
        return (out.loss.detach() + bonus) * window


def trl_preset(**options: Any) -> TrlPreset:
    """The preset of TRL's options; see `presets.preset`."""
    return make_preset(read_options(TrlOptions, "TRL's loss", options, INSTEAD))


def make_preset(options: TrlOptions) -> TrlPreset:
    """The objective of the options, and the descriptions of the other arguments."""
    objective = Objective(
        surrogate=_surrogate(options),
        kl="k3" if options.beta else None,
        beta=options.beta,
        ratio_level="sequence" if options.importance_sampling_level == "sequence" else "token",
        advantage=ESTIMATORS[options.scale_rewards],
        aggregation=AGGREGATIONS[options.loss_type],
        kl_times_ratio=bool(options.beta) and options.use_bias_correction_kl,
        entropy_coef=options.entropy_coef / options.gradient_accumulation_steps,
        entropy_aggregation="token_mean" if options.entropy_coef else None,
        factor=_factor(options),
    )
    return TrlPreset(objective, _arguments(options), options)


def _surrogate(options: TrlOptions) -> Surrogate:
    """The policy term."""
    if options.loss_type == "cispo":
        return cispo(high=options.upper)
    if options.loss_type == "sapo":
        return sapo(options.sapo_temperature_pos, options.sapo_temperature_neg)
    if options.loss_type == "vespo":
        return reinforce()
    return clip(options.epsilon, options.upper, options.delta or math.inf)


def _factor(options: TrlOptions) -> PolicyFactor:
    """The factors of the policy term."""
    sampler = weight = None
    if options.corrects:
        level, _, action = options.vllm_importance_sampling_mode.partition("_")
        high = options.vllm_importance_sampling_clip_max
        sampler = SamplerCorrection(
            level,  # type: ignore[arg-type]
            "zero" if action == "mask" else "truncate",
            options.vllm_importance_sampling_clip_min or 0.0,
            math.inf if high is None else high,
        )
    if options.loss_type == "vespo":
        weight = SequenceWeight(
            options.vespo_k_pos,
            max(options.vespo_lambda_pos, SMALLEST_LAMBDA),
            options.vespo_k_neg,
            max(options.vespo_lambda_neg, SMALLEST_LAMBDA),
        )
    threshold = options.off_policy_mask_threshold
    delta = math.inf if threshold is None else threshold
    return PolicyFactor(sampler, delta, options.top_entropy_quantile, weight)


def _arguments(options: TrlOptions) -> dict[str, str]:
    """Descriptions of the other arguments of `fused_loss`."""
    arguments = {
        "advantage": "inputs['advantages'], or preset.advantages(rewards_per_func); with one "
        "reward function that never returns None also rewards= and group_size=num_generations",
        "mask": "completion_mask · tool_mask",
        "old_logp": "inputs.get('old_per_token_logps')",
        "normalizer": "preset.normalizer(mask)",
        "temperature": repr(options.temperature),
    }
    if options.multi_objective_aggregation == "normalize_then_sum":
        arguments["advantage"] = "inputs['advantages'], or preset.advantages(rewards_per_func)"
    if options.loss_type in GLOBAL:
        arguments["normalizer"] = (
            "preset.normalizer(mask, num_items_in_batch=inputs['num_items_in_batch'], "
            "num_processes=...)"
        )
    if options.beta:
        arguments["ref_logp"] = "inputs['ref_per_token_logps']"
    if options.corrects or options.off_policy_mask_threshold is not None:
        arguments["sampler_logp"] = (
            "inputs.get('sampling_per_token_logps'); a NaN takes its token out of the mask, "
            "old_per_token_logps in its place gives the ratio 1, as in TRL"
        )
    return arguments
