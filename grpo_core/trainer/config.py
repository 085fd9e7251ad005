"""The options of a run, checked before anything is trained; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from grpo_core.cli.options import check_at_least, check_choices, check_warmup, option, warmup

if TYPE_CHECKING:
    from grpo_core.objective.objective import Objective
    from grpo_core.trainer.rollout import Sampling

DynamicSampling = Literal["off", "filter", "resample"]
PaddingFree = Literal["auto", "always", "never"]
Shard = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class TrainingOptions:
    """What a `TrainerConfig` and the command line have in common, declared once.

    A step is one rollout, and each rollout feeds `minibatches * epochs` updates.
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
    autocast: bool = option(False, "Matrix products in bfloat16; weights stay float32.")
    evaluate_every: int = option(5, "Steps between evaluations on the held-out problems.")
    seed: int = option(0, "Random seed.")
    checkpoint_every: int = option(10, "Steps between checkpoints.")
    keep_checkpoints: int = option(2, "How many checkpoints to keep.")
    shard: Shard = option(
        "ddp", "Under torchrun: ddp replicates the model on every process, fsdp shards it."
    )

    def check(self, prompts: int) -> None:
        """Raises ValueError for an option out of its range.

        Args:
            prompts: per step.
        """
        counts = ("steps", "minibatches", "epochs", "evaluate_every")
        check_at_least(self, 1, *counts, "checkpoint_every", "keep_checkpoints")
        check_at_least(self, 2, "group_size")
        zeros = ("tokens_per_microbatch", "max_resamples", "max_log_ratio", "learning_rate")
        check_at_least(self, 0, *zeros)
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
    """A run of the trainer.

    Attributes:
        objective: what is minimised.
        prompts_per_step: prompts of a rollout.
        max_grad_norm: the gradient is scaled down to this norm.
        sampling: how completions are drawn.
        old_logp: where the ratio's denominator comes from: "trainer", one more forward pass, or
            "sampler", the log-probabilities noted while sampling.
        shuffle_rewards: the control: every completion gets another one's reward.
        max_skipped_updates: in a row; one more stops the run.
    """

    objective: Objective = field(default_factory=_default_objective)
    prompts_per_step: int = 16
    max_grad_norm: float = 1.0
    sampling: Sampling = field(default_factory=_default_sampling)
    old_logp: Literal["trainer", "sampler"] = "trainer"
    shuffle_rewards: bool = False
    max_skipped_updates: int = 8

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prompts_per_step", "max_skipped_updates")
        self.check(self.prompts_per_step)
        if self.old_logp not in ("trainer", "sampler"):
            raise ValueError(f"old_logp: expected trainer or sampler, got {self.old_logp!r}")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: expected more than 0 to train on, got 0")

    @property
    def on_policy(self) -> bool:
        """One update to a rollout: the policy that sampled is the one that is trained."""
        return self.minibatches * self.epochs == 1

    def sound(self, update: Mapping[str, float]) -> bool:
        """Whether an update's figures allow for its step.

        Loss and gradient norm have to be finite. The largest ratio is to be at most
        e^max_log_ratio, and so is the KL, summed over the tokens (k3 grows with the ratio to the
        reference): far above it they may still be finite while their gradient drowns all others. A
        log-ratio that float32 cannot hold as a ratio, from 88.7 on, leaves the loss by itself, see
        `nonfinite_rows`; one far below 0 is a ratio of 0. No ratio is bent: what is below the limit
        is learnt from bit for bit as without one.
        """
        finite = math.isfinite(update["loss"]) and math.isfinite(update["grad_norm"])
        if not self.max_log_ratio:
            return finite
        limit = math.exp(min(self.max_log_ratio, 700))
        return finite and not max(update["ratio_max"], update["kl"] * update["tokens"]) > limit

    def identity(self) -> dict[str, str]:
        """What may not change between a checkpoint and the run that goes on from it."""
        free = ("checkpoint_every", "keep_checkpoints", "max_skipped_updates", "evaluate_every")
        values: dict[str, Any] = vars(self) | {"warmup_steps": warmup(self)}
        # how the model is spread over processes is compared apart, see `trainer_state`
        kept = {name: value for name, value in values.items() if name not in (*free, "shard")}
        named = {name: repr(value) for name, value in kept.items()}
        numbers = ", ".join(map(str, self.objective.numbers))
        return named | {"objective": f"{self.objective.key} ({numbers})"}
