"""TRL 1.16's GRPO loss: `GRPOConfig`'s options, with its names and defaults -> a preset.

What stays different from `GRPOTrainer._compute_loss`, all of it outside of ordinary batches:

- a token whose sampler log-probability is NaN leaves the mask and is counted; TRL gives it the
  ratio 1, and the off-policy mask the distance 0 but keeps it in the mean's length;
- a token whose own loss is not finite is left out and counted; TRL's loss is NaN then;
- TRL gathers the entropies of all ranks for `top_entropy_quantile`, here they are this call's;
- vespo's W there has the sampler's ratios of masked positions, too; they are 1, which only counts
  if the bounds exclude 1;
- δ below 1 + ε_high is refused;
- the advantages of equal rewards are exactly 0; TRL's are what rounding leaves, over 1e-4.

Metrics are this rank's; TRL adds up numerators and denominators of all ranks before it divides.
Where completions are padded to a width of 1, it takes tokens for sequences, and empty rows count.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import Preset, Tally, padded, read_options
from grpo_core.integrations.presets.trl_options import (
    ADVANTAGES,
    AGGREGATIONS,
    CLIPPED,
    GLOBAL,
    INSTEAD,
    SAMPLERS,
    TrlOptions,
)
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.advantage import decoupled_advantages, relative_advantages
from grpo_core.objective.objective import Objective, Surrogate
from grpo_core.objective.off_policy import SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor, SequenceWeight, top_share
from grpo_core.objective.recipes import cispo, clip, reinforce, sapo

# TRL holds λ above this
SMALLEST_LAMBDA = 1e-4


@dataclass(frozen=True)
class TrlPreset(Preset):
    """See `Preset`; the options are TRL's. In evaluation there is no accumulation."""

    options: TrlOptions
    evaluation: bool = False

    @property
    def window(self) -> int:
        """Micro-batches per optimizer step, by whose number TRL divides."""
        return 1 if self.evaluation else self.options.gradient_accumulation_steps

    def in_evaluation(self) -> TrlPreset:
        """The loss as TRL computes it in `evaluate`."""
        return _preset(self.options, evaluation=True)

    def accumulating(self, current_gradient_accumulation_steps: int) -> TrlPreset:
        """The loss in a window of another length, such as the last one of an epoch."""
        steps = self.options.steps_per_generation or self.options.gradient_accumulation_steps
        options = dataclasses.replace(
            self.options,
            gradient_accumulation_steps=current_gradient_accumulation_steps,
            steps_per_generation=steps,
        )
        return _preset(options, evaluation=False)

    def normalizer(
        self,
        mask: Tensor,
        *,
        num_items_in_batch: Tensor | float | None = None,
        num_processes: int = 1,
    ) -> Tensor | float:
        """What `fused_loss` is to divide by; nothing waits for the device.

        Args:
            mask: [B, T], completion_mask · tool_mask of the micro-batch; empty rows count.
            num_items_in_batch: tokens of the generation batch, all ranks together; needed by dapo,
                cispo and vespo, read by no other.
            num_processes: ranks.

        Raises:
            ValueError: a mask of another shape, a count that is missing.
        """
        valid, options, G = padded("mask", mask), self.options, self.window
        B = len(valid)
        if options.loss_type in GLOBAL:
            if num_items_in_batch is None:
                want = f"the tokens of the generation batch for {options.loss_type}"
                raise ValueError(f"num_items_in_batch: expected {want}, got None")
            share = 1.0 / num_processes
            if not self.evaluation:
                share *= G / (options.steps_per_generation or options.gradient_accumulation_steps)
            if isinstance(num_items_in_batch, Tensor):
                return num_items_in_batch.clamp(min=1) * share
            return max(num_items_in_batch, 1) * share
        if options.loss_type == "bnpo":
            return valid.sum().clamp(min=1) * G
        if options.loss_type == "dr_grpo":
            return B * options.max_completion_length * G
        return B * G

    def advantages(self, rewards_per_func: Tensor, groups: int | Tensor | None = None) -> Tensor:
        """TRL's advantages, from which it then takes this rank's.

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
        norm = ADVANTAGES[self.options.scaling]
        return relative_advantages(rewards, groups, norm, mask=scored.any(1))

    @torch.no_grad()
    def metrics(self, out: LossOutput) -> dict[str, Tensor]:
        """What TRL logs of this micro-batch, by its names; 0-dim, nothing waits for the device."""
        options, tally = self.options, Tally(out)
        found = {"entropy": tally.mean(tally.entropy)}
        if options.beta:
            found["kl"] = tally.mean(tally.kl)
        if options.entropy_coef:
            found["policy_loss"] = self._policy_loss(out, tally)
            if not self.evaluation:
                found["entropy_coef"] = out.loss.new_full((), options.entropy_coef)
        gains, losses = tally.advantage > 0, tally.advantage < 0
        if options.loss_type == "cispo":
            clipped = (tally.ratio > options.upper) & gains
            found["cispo_clip_ratio"] = self._mean(clipped, tally)
        elif options.loss_type == "vespo":
            phi = self.objective.factor.of_sequences(tally.tokens, tally.logp)
            found["vespo/phi_seq_mean"] = tally.mean_by_sequence(phi)
        elif options.loss_type in CLIPPED:
            ratio = tally.ratio.clamp(max=math.inf if options.delta is None else options.delta)
            low = (ratio < 1 - options.epsilon) & losses
            high = (ratio > 1 + options.upper) & gains
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                found[f"clip_ratio/{name}_mean"] = self._mean(clipped, tally)
            found["clip_ratio/low_min"] = self._extreme(low, tally, largest=False)
            found["clip_ratio/high_max"] = self._extreme(high, tally, largest=True)
        return found

    def _mean(self, vector: Tensor, tally: Tally) -> Tensor:
        """Over tokens, or over rows, empty ones included, where a row has one ratio."""
        if self.options.importance_sampling_level == "token":
            return tally.mean(vector)
        return tally.mean_by_sequence(vector)

    def _extreme(self, vector: Tensor, tally: Tally, *, largest: bool) -> Tensor:
        """The largest or smallest mean of a row, empty rows as in `_mean`; NaN without any."""
        means, present = tally.by_sequence(vector)
        if self.options.importance_sampling_level == "sequence":
            present = present | tally.is_padded
        far = -math.inf if largest else math.inf
        found = torch.where(present, means, far)
        found = found.amax() if largest else found.amin()
        return torch.where(present.any(), found, math.nan)

    def _policy_loss(self, out: LossOutput, tally: Tally) -> Tensor:
        """The loss without the entropy bonus; undivided by the window where TRL divides last."""
        acts = tally.valid
        if self.objective.factor.top_entropy < 1:
            acts = top_share(tally.entropy, acts, self.objective.factor.top_entropy)
        bonus = self.objective.entropy_coef * tally.mean(tally.entropy, of=acts)
        last = self.options.loss_type not in GLOBAL
        return (out.loss.detach() + bonus) * (self.window if last else 1)


def trl_preset(**options: Any) -> TrlPreset:
    """The preset of TRL's options; see `presets.preset`."""
    return _preset(read_options(TrlOptions, "TRL's loss", options, INSTEAD), evaluation=False)


def _preset(options: TrlOptions, *, evaluation: bool) -> TrlPreset:
    """The objective of the options, and how to call it."""
    window = 1 if evaluation else options.gradient_accumulation_steps
    objective = Objective(
        surrogate=_surrogate(options),
        kl="k3" if options.beta else None,
        beta=options.beta,
        ratio_level="sequence" if options.importance_sampling_level == "sequence" else "token",
        advantage=ADVANTAGES[options.scaling],
        aggregation=AGGREGATIONS[options.loss_type],
        kl_times_ratio=bool(options.beta) and options.use_bias_correction_kl,
        entropy_coef=options.entropy_coef / window,
        entropy_aggregation="token_mean" if options.entropy_coef else None,
        factor=_factor(options),
    )
    return TrlPreset(objective, _arguments(options), options, evaluation)


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
    """What multiplies the policy term."""
    sampler = weight = None
    if options.corrects:
        level, action = SAMPLERS[options.vllm_importance_sampling_mode]
        high = options.vllm_importance_sampling_clip_max
        sampler = SamplerCorrection(
            level,  # type: ignore[arg-type]
            action,  # type: ignore[arg-type]
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
    return PolicyFactor(
        sampler,
        math.inf if threshold is None else threshold,
        options.top_entropy_quantile,
        weight,
    )


def _arguments(options: TrlOptions) -> dict[str, str]:
    """How to give the other arguments of `fused_loss`."""
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
