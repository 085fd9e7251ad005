"""Options of a training run, checked at construction. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from grpo_core.cli.options import (
    check_at_least,
    check_choices,
    check_warmup,
    option,
    require,
    warmup,
)

if TYPE_CHECKING:
    from grpo_core.objective.objective import Objective
    from grpo_core.trainer.rollout import Sampling

DynamicSampling = Literal["off", "filter", "resample"]
PaddingFree = Literal["auto", "always", "never"]
Shard = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options that `TrainerConfig` and the command line share.

    A step is one rollout and `minibatches * epochs` updates.
    """

    steps: int = option(40, "Training steps, one rollout each.")
    group_size: int = option(8, "Completions per prompt.")
    minibatches: int = option(2, "Updates per epoch, each on a part of the rollout.")
    epochs: int = option(2, "Passes over each rollout.")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    warmup_steps: int | None = option(
        None,
        "Steps of linear warm-up; then linear decay to 0. Default: 5, at most steps - 1.",
    )
    loss: Literal["fused", "logits", "naive"] = option(
        "fused",
        "fused: loss in the model's forward, from hidden states; logits: fused_loss on the logits; "
        "naive: plain PyTorch on the logits.",
    )
    padding_free: PaddingFree = option(
        "auto",
        "Concatenate sequences instead of padding them; auto: with flash and flex attention.",
    )
    tokens_per_microbatch: int = option(
        0, "Tokens per forward and backward, padding included; 0: a whole minibatch."
    )
    mask_truncated: bool = option(False, "No loss on completions cut off at the length limit.")
    dynamic_sampling: DynamicSampling = option(
        "off",
        "Groups whose rewards are all equal: off keeps them, filter drops them, resample replaces "
        "them with new prompts (DAPO).",
    )
    max_resamples: int = option(3, "Further rounds of prompts per step, with resample.")
    max_log_ratio: float = option(
        20.0, "Skip updates whose largest ratio or summed KL exceeds exp(x); 0 disables."
    )
    asynchronous: int = option(
        0,
        "1: the rollout of a step is sampled and scored while the step before trains, with weights "
        "one step older; by the sampling engine, or a second process with a copy of the model.",
    )
    autocast: bool = option(False, "Matrix products in bfloat16; weights stay float32.")
    evaluate_every: int = option(5, "Steps between evaluations on the held-out problems.")
    seed: int = option(0, "Random seed.")
    checkpoint_every: int = option(10, "Steps between checkpoints.")
    keep_checkpoints: int = option(2, "How many checkpoints to keep.")
    shard: Shard = option(
        "ddp", "Under torchrun: ddp replicates the model on every process, fsdp shards it."
    )

    @property
    def needs_rewards(self) -> bool:
        """Whether something is learnt only from groups whose rewards differ, not from a teacher."""
        return True

    def check(self, prompts: int) -> None:
        """Raises ValueError for an option outside its range.

        Args:
            prompts: per step.
        """
        counts = ("steps", "minibatches", "epochs", "evaluate_every")
        check_at_least(self, 1, *counts, "checkpoint_every", "keep_checkpoints")
        check_at_least(self, 2 if self.needs_rewards else 1, "group_size")
        zeros = ("tokens_per_microbatch", "max_resamples", "max_log_ratio", "learning_rate")
        check_at_least(self, 0, *zeros)
        require(self.asynchronous in (0, 1), "asynchronous", "0 or 1", self.asynchronous)
        check_choices(self, TrainingOptions)
        check_warmup(self)
        if self.minibatches > prompts * self.group_size:
            raise ValueError(
                f"minibatches: expected at most {prompts * self.group_size}, the completions of a "
                f"step, got {self.minibatches}"
            )


def _default_objective() -> Objective:
    from grpo_core.objective.recipes import RECIPES

    return RECIPES["dapo"].replace(beta=0.04, kl="k3")


def _default_sampling() -> Sampling:
    from grpo_core.trainer.rollout import Sampling

    return Sampling(max_new_tokens=40)


@dataclass(frozen=True)
class TrainerConfig(TrainingOptions):
    """Configuration of the trainer.

    Attributes:
        objective: the loss to minimise.
        prompts_per_step: prompts of a rollout.
        max_grad_norm: gradients are clipped to this norm.
        sampling: options of the rollouts.
        old_logp: denominator of the ratio: "trainer" computes it by one more forward pass,
            "sampler" takes the log-probabilities recorded while sampling, as `asynchronous` always
            does.
        shuffle_rewards: a control experiment: completions get each other's rewards.
        teacher_coef: c of a token's advantage A − c·(log π_old − log π_ref), where π_ref is the
            teacher's: the reverse KL on sampled tokens ("On-Policy Distillation", Thinking Machines
            2025; slime).
        max_skipped_updates: skipped updates in a row that are allowed; one more stops the run.
    """

    objective: Objective = field(default_factory=_default_objective)
    prompts_per_step: int = 16
    max_grad_norm: float = 1.0
    sampling: Sampling = field(default_factory=_default_sampling)
    old_logp: Literal["trainer", "sampler"] = "trainer"
    shuffle_rewards: bool = False
    teacher_coef: float = 0.0
    max_skipped_updates: int = 8

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prompts_per_step", "max_skipped_updates")
        self.check(self.prompts_per_step)
        check_at_least(self, 0, "teacher_coef")
        if self.teacher_coef and not self.objective.is_token_level:
            level = f"ratio_level {self.objective.ratio_level!r}"
            raise ValueError(f"teacher_coef: expected 0 unless ratios are of tokens, got {level}")
        if self.old_logp not in ("trainer", "sampler"):
            raise ValueError(f"old_logp: expected trainer or sampler, got {self.old_logp!r}")
        if self.asynchronous:
            # older weights have sampled, which only the sampler's log-probabilities tell
            object.__setattr__(self, "old_logp", "sampler")
            factor = self.objective.factor
            if factor.needs_sampler and not factor.current:
                raise ValueError(
                    "objective.factor: expected current=True with asynchronous = 1, since the old "
                    "policy is the sampler's and their ratio is 1, got current=False"
                )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: expected more than 0 to train on, got 0")

    @property
    def on_policy(self) -> bool:
        """Whether each rollout has a single update, so that the ratio is 1."""
        return self.minibatches * self.epochs == 1

    @property
    def needs_old_logp(self) -> bool:
        """Whether the objective compares with the policy that sampled."""
        return bool(self.teacher_coef) or (self.objective.has_policy_term and not self.on_policy)

    @property
    def needs_rewards(self) -> bool:
        return self.objective.has_policy_term and not self.teacher_coef

    def is_update_safe(self, metrics: Mapping[str, float]) -> bool:
        """Whether the optimizer may apply an update with these metrics.

        Loss and gradient norm must be finite. The largest ratio and the KL summed over the tokens
        (k3 grows with the ratio to the reference) must not exceed e^max_log_ratio: beyond it a
        finite gradient would still dominate all others. Ratios below the limit are not changed.
        Rows whose ratio overflows float32 (log-ratio above 88.7) have left the loss already, see
        `nonfinite_rows`.
        """
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if not self.max_log_ratio:
            return is_finite
        limit = math.exp(min(self.max_log_ratio, 700))
        largest = max(metrics["ratio_max"], metrics["kl"] * metrics["tokens"])
        return is_finite and not largest > limit

    def identity(self) -> dict[str, str]:
        """Options that must be equal when a run is resumed."""
        free = ("checkpoint_every", "keep_checkpoints", "max_skipped_updates", "evaluate_every")
        values: dict[str, Any] = vars(self) | {"warmup_steps": warmup(self)}
        # `shard` is compared together with the number of ranks, see `checkpoint`
        kept = {name: value for name, value in values.items() if name not in (*free, "shard")}
        named = {name: repr(value) for name, value in kept.items()}
        numbers = ", ".join(map(str, self.objective.numbers))
        return named | {"objective": f"{self.objective.key} ({numbers})"}
