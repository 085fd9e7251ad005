"""The options of TRL's `GRPOConfig` on which the loss and the advantages depend."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_core.integrations.presets.base import choice, number, whole
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
# their divisor is a count over the whole generation batch
GLOBAL = ("dapo", "cispo", "vespo")
SAMPLERS = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "zero"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "zero"),
}
ADVANTAGES: dict[str, Estimator] = {
    "group": Estimator(),
    "batch": Estimator("group", "batch"),
    "none": Estimator(scale=None),
}
# what the loss of this project leaves to the caller, and how
INSTEAD = {
    "use_adaptive_entropy": "change entropy_coef between steps and make a new preset",
    "mask_truncated_completions": "set the mask of such completions to 0",
    "router_aux_loss_coef": "add the router's loss to that of fused_loss",
    "vllm_importance_sampling_cap": "its name is vllm_importance_sampling_clip_max now",
}


@dataclass(frozen=True)
class TrlOptions:
    """What of `GRPOConfig` the loss depends on, with TRL's defaults."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    scale_rewards: str | bool = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    reward_weights: tuple[float, ...] | list[float] | None = None
    num_generations: int = 8
    temperature: float = 1.0
    max_completion_length: int = 512
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None

    def __post_init__(self) -> None:
        choice("loss_type", self.loss_type, AGGREGATIONS)
        choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        choice("scale_rewards", self.scale_rewards, (*ADVANTAGES, True, False))
        kinds = ("sum_then_normalize", "normalize_then_sum")
        choice("multi_objective_aggregation", self.multi_objective_aggregation, kinds)
        choice("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, SAMPLERS)
        for name in ("use_bias_correction_kl", "use_vllm", "vllm_importance_sampling_correction"):
            choice(name, getattr(self, name), (True, False))
        for name in ("epsilon", "beta", *(n for n in vars(self) if n.startswith("vespo_"))):
            number(name, getattr(self, name), 0.0)
        for name in ("epsilon_high", "vllm_importance_sampling_clip_min"):
            number(name, getattr(self, name), 0.0, optional=True)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            number(name, getattr(self, name), 0.0, above=True)
        number("entropy_coef", self.entropy_coef)
        number("top_entropy_quantile", self.top_entropy_quantile, 0.0, 1.0)
        number("off_policy_mask_threshold", self.off_policy_mask_threshold, optional=True)
        for name in ("num_generations", "max_completion_length", "gradient_accumulation_steps"):
            whole(name, getattr(self, name))
        whole("steps_per_generation", self.steps_per_generation, optional=True)
        for i, weight in enumerate(self.reward_weights or ()):
            number(f"reward_weights[{i}]", weight)
        if self.loss_type in CLIPPED:
            number("delta", self.delta, 1 + self.upper, optional=True)
        if self.loss_type == "cispo":
            number("epsilon_high", self.upper, 0.0, above=True)
        self._check_sampler()

    def _check_sampler(self) -> None:
        """Raises ValueError for bounds, or a mode, that TRL refuses, too."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        number("vllm_importance_sampling_clip_max", high, low or 0.0, above=True, optional=True)
        mode = self.vllm_importance_sampling_mode
        if mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_clip_max: expected a bound, here or below, for the mode "
                f"{mode!r}, got None"
            )
        if self.loss_type == "vespo" and self.corrects and not mode.startswith("token"):
            want = "'token_truncate' or 'token_mask' for vespo"
            raise ValueError(f"vllm_importance_sampling_mode: expected {want}, got {mode!r}")

    @property
    def upper(self) -> float:
        """ε_high, which is ε where it is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def corrects(self) -> bool:
        """Whether the ratio of the trainer to vLLM is part of the loss."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def scaling(self) -> str:
        """`scale_rewards` by its name."""
        scale = self.scale_rewards
        return {True: "group", False: "none"}[scale] if isinstance(scale, bool) else scale
