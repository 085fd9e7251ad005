"""TRL 1.16's GRPO loss: the options of `GRPOConfig`, by name and with their defaults -> a preset.

Differences from `GRPOTrainer._compute_loss`, none of them in ordinary batches:

- A token whose sampler log-probability is NaN is masked and counted. TRL gives it the ratio 1; its
  off-policy mask gives it the distance 0 but counts it in the length of the mean.
- A token whose own loss is not finite is left out and counted. TRL's loss is NaN then.
- TRL gathers the entropies of all ranks for `top_entropy_quantile`; here they are of this call.
- vespo's W in TRL includes the sampler ratios of masked positions; here these are 1. This differs
  only if the bounds exclude 1.
- δ below 1 + ε_high is refused.
- Equal rewards have advantage 0 exactly; in TRL the rounding error over 1e-4.

Metrics are of this rank; TRL sums numerators and denominators over ranks before it divides. Where
completions are padded to a width of 1, TRL takes tokens for sequences and counts empty rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import (
    Preset,
    TokenMeans,
    check_options,
    number,
    option,
    padded_mask,
    read_options,
)
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.advantage import Estimator, decoupled_advantages, relative_advantages
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.objective import Objective, Surrogate
from grpo_core.objective.off_policy import SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor, SequenceWeight, top_share
from grpo_core.objective.recipes import cispo, clip, reinforce, sapo

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant_length",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "luspo": "sequence_sum",
    "vespo": "token_mean",
}
# loss types that divide by a count over the whole generation batch
GLOBAL = ("dapo", "cispo", "vespo")
SAMPLERS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
ESTIMATORS = {
    "group": Estimator(),
    "batch": Estimator("group", "batch"),
    "none": Estimator("group", None),
}
# TRL clamps λ to at least this
SMALLEST_LAMBDA = 1e-4
# options that the caller handles, and how
INSTEAD = {
    "use_adaptive_entropy": "change entropy_coef between steps and make a new preset",
    "mask_truncated_completions": "set the mask of such completions to 0",
    "router_aux_loss_coef": "add the router's loss to that of fused_loss",
    "vllm_importance_sampling_cap": "its name is vllm_importance_sampling_clip_max now",
}


@dataclass(frozen=True)
class TrlOptions:
    """The options of `GRPOConfig` that affect the loss or the advantages, with TRL's defaults."""

    loss_type: str = option("dapo", AGGREGATIONS)
    importance_sampling_level: str = option("token", ("token", "sequence"))
    epsilon: float = option(0.2, low=0)
    epsilon_high: float | None = option(None, low=0, optional=True)
    delta: float | None = None
    beta: float = option(0.0, low=0)
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = option(1.0, above=0)
    sapo_temperature_neg: float = option(1.05, above=0)
    vespo_k_pos: float = option(2.0, low=0)
    vespo_lambda_pos: float = option(3.0, low=0)
    vespo_k_neg: float = option(3.0, low=0)
    vespo_lambda_neg: float = option(2.0, low=0)
    entropy_coef: float = option(0.0)
    top_entropy_quantile: float = option(1.0, low=0, high=1)
    off_policy_mask_threshold: float | None = option(None, optional=True)
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = option("sequence_mask", SAMPLERS)
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = option(None, low=0, optional=True)
    scale_rewards: str | bool = option("group", (*ESTIMATORS, True, False))
    multi_objective_aggregation: str = option(
        "sum_then_normalize", ("sum_then_normalize", "normalize_then_sum")
    )
    reward_weights: tuple[float, ...] | list[float] | None = None
    num_generations: int = option(8, whole=True)
    temperature: float = option(1.0, above=0)
    max_completion_length: int = option(512, whole=True)
    gradient_accumulation_steps: int = option(1, whole=True)
    steps_per_generation: int | None = option(None, whole=True, optional=True)

    def __post_init__(self) -> None:
        check_options(self)
        for i, weight in enumerate(self.reward_weights or ()):
            number(f"reward_weights[{i}]", weight)
        if self.loss_type in CLIPPED:
            number("delta", self.delta, 1 + self.upper, optional=True)
        if self.loss_type == "cispo":
            number("epsilon_high", self.upper, above=0)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        number("vllm_importance_sampling_clip_max", high, above=low or 0, optional=True)
        mode = self.vllm_importance_sampling_mode
        if mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_clip_max: expected an upper or a lower bound for the "
                f"mode {mode!r}, got None"
            )
        if self.loss_type == "vespo" and self.corrects and not mode.startswith("token"):
            want = "'token_truncate' or 'token_mask' for vespo"
            raise ValueError(f"vllm_importance_sampling_mode: expected {want}, got {mode!r}")

    @property
    def upper(self) -> float:
        """ε_high; by default ε."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def corrects(self) -> bool:
        """Whether the loss uses the ratio of the trainer to vLLM."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def estimator(self) -> Estimator:
        """The estimator that `scale_rewards` names."""
        name = self.scale_rewards
        return ESTIMATORS[{True: "group", False: "none"}[name] if isinstance(name, bool) else name]


@dataclass(frozen=True)
class TrlPreset(Preset):
    """A `Preset` of TRL's options. In evaluation TRL does not accumulate gradients."""

    options: TrlOptions
    evaluation: bool = False

    @property
    def window(self) -> int:
        """Micro-batches per optimizer step; TRL divides by this."""
        return 1 if self.evaluation else self.options.gradient_accumulation_steps

    def in_evaluation(self) -> TrlPreset:
        """The loss that TRL computes in `evaluate`."""
        return _preset(self.options, evaluation=True)

    def accumulating(self, current_gradient_accumulation_steps: int) -> TrlPreset:
        """The loss in a window of another length, such as the last window of an epoch."""
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
        """The `normalizer` of `fused_loss`; the host does not wait for the device.

        Args:
            mask: [B, T], completion_mask · tool_mask of the micro-batch; empty rows count.
            num_items_in_batch: tokens of the generation batch on all ranks; needed by dapo, cispo
                and vespo, ignored by the others.
            num_processes: number of ranks.

        Raises:
            ValueError: a mask of another shape, or a missing count.
        """
        valid, options, G = padded_mask("mask", mask), self.options, self.window
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
        return relative_advantages(rewards, groups, self.options.estimator, mask=scored.any(1))

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
        positive, negative = means.advantage > 0, means.advantage < 0
        if options.loss_type == "cispo":
            clipped = (means.ratio > options.upper) & positive
            metrics["cispo_clip_ratio"] = self._mean(clipped, means)
        elif options.loss_type == "vespo":
            phi = means.tokens.weigh_sequences(means.logp)
            metrics["vespo/phi_seq_mean"] = means.mean_by_sequence(phi)
        elif options.loss_type in CLIPPED:
            ratio = means.ratio.clamp(max=math.inf if options.delta is None else options.delta)
            low = (ratio < 1 - options.epsilon) & negative
            high = (ratio > 1 + options.upper) & positive
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                metrics[f"clip_ratio/{name}_mean"] = self._mean(clipped, means)
            metrics["clip_ratio/low_min"] = self._extreme(low, means, largest=False)
            metrics["clip_ratio/high_max"] = self._extreme(high, means, largest=True)
        return metrics

    def _mean(self, vector: Tensor, means: TokenMeans) -> Tensor:
        """Mean over tokens; over rows, empty ones included, if each sequence has one ratio."""
        if self.options.importance_sampling_level == "token":
            return means.mean(vector)
        return means.mean_by_sequence(vector)

    def _extreme(self, vector: Tensor, means: TokenMeans, *, largest: bool) -> Tensor:
        """The largest or smallest mean of a row, empty rows as in `_mean`; NaN without rows."""
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
        return (out.loss.detach() + bonus) * (self.window if divides_last else 1)


def trl_preset(**options: Any) -> TrlPreset:
    """The preset of TRL's options; see `presets.preset`."""
    return _preset(read_options(TrlOptions, "TRL's loss", options, INSTEAD), evaluation=False)


def _preset(options: TrlOptions, *, evaluation: bool) -> TrlPreset:
    """Makes the objective and the descriptions of its arguments."""
    window = 1 if evaluation else options.gradient_accumulation_steps
    objective = Objective(
        surrogate=_surrogate(options),
        kl="k3" if options.beta else None,
        beta=options.beta,
        ratio_level="sequence" if options.importance_sampling_level == "sequence" else "token",
        advantage=options.estimator,
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
