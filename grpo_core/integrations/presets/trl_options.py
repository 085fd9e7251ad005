"""The options of `GRPOConfig` that affect the loss or the advantages."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_core.integrations.presets.base import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    SHARE,
    above,
    at_least,
    check,
    check_options,
    one_of,
    option,
)
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.aggregation import Aggregation

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
MULTI_OBJECTIVE = ("sum_then_normalize", "normalize_then_sum")
# by the values of scale_rewards
ESTIMATORS: dict[str | bool, Estimator] = {
    "group": Estimator(),
    "batch": Estimator("group", "batch"),
    "none": Estimator("group", None),
    True: Estimator(),
    False: Estimator("group", None),
}
# options that the caller handles, and how
INSTEAD = {
    "use_adaptive_entropy": "change entropy_coef between steps and make a new preset",
    "mask_truncated_completions": "set the mask of such completions to 0",
    "router_aux_loss_coef": "add the router's loss to that of fused_loss",
    "vllm_importance_sampling_cap": "its name is vllm_importance_sampling_clip_max now",
}


@dataclass(frozen=True)
class TrlOptions:
    """The options, with TRL's defaults."""

    loss_type: str = option("dapo", one_of(AGGREGATIONS))
    importance_sampling_level: str = option("token", one_of(("token", "sequence")))
    epsilon: float = option(0.2, NOT_NEGATIVE)
    epsilon_high: float | None = option(None, NOT_NEGATIVE)
    delta: float | None = None
    beta: float = option(0.0, NOT_NEGATIVE)
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = option(1.0, POSITIVE)
    sapo_temperature_neg: float = option(1.05, POSITIVE)
    vespo_k_pos: float = option(2.0, NOT_NEGATIVE)
    vespo_lambda_pos: float = option(3.0, NOT_NEGATIVE)
    vespo_k_neg: float = option(3.0, NOT_NEGATIVE)
    vespo_lambda_neg: float = option(2.0, NOT_NEGATIVE)
    entropy_coef: float = option(0.0, NUMBER)
    top_entropy_quantile: float = option(1.0, SHARE)
    off_policy_mask_threshold: float | None = option(None, NUMBER)
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = option("sequence_mask", one_of(SAMPLERS))
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = option(None, NOT_NEGATIVE)
    scale_rewards: str | bool = option("group", one_of(ESTIMATORS))
    multi_objective_aggregation: str = option("sum_then_normalize", one_of(MULTI_OBJECTIVE))
    reward_weights: tuple[float, ...] | list[float] | None = None
    num_generations: int = option(8, COUNT)
    temperature: float = option(1.0, POSITIVE)
    max_completion_length: int = option(512, COUNT)
    gradient_accumulation_steps: int = option(1, COUNT)
    steps_per_generation: int | None = option(None, COUNT)

    def __post_init__(self) -> None:
        check_options(self)
        for i, weight in enumerate(self.reward_weights or ()):
            check(f"reward_weights[{i}]", weight, NUMBER)
        if self.loss_type in CLIPPED:
            check("delta", self.delta, at_least(1 + self.upper), optional=True)
        if self.loss_type == "cispo":
            check("epsilon_high", self.upper, POSITIVE)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        check("vllm_importance_sampling_clip_max", high, above(low or 0), optional=True)
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
    def steps(self) -> int:
        """Micro-batches of a generation batch; by default those of an optimizer step."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def corrects(self) -> bool:
        """Whether the loss uses the ratio of the trainer to vLLM."""
        return self.use_vllm and self.vllm_importance_sampling_correction
