"""The options of a run, checked before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from grpo_core import RECIPES, Objective
from grpo_core.options import check_at_least, check_warmup
from grpo_core.padding import PaddingFree
from grpo_core.parallel import Shard
from grpo_core.rollout import Sampling

DynamicSampling = Literal["off", "filter", "resample"]


@dataclass(frozen=True)
class TrainerConfig:
    """A run. A step is one rollout, and each rollout feeds `minibatches * epochs` updates."""

    objective: Objective = field(
        default_factory=lambda: RECIPES["dapo"].replace(beta=0.04, kl="k3")
    )
    steps: int = 40
    prompts_per_step: int = 16
    group_size: int = 8
    minibatches: int = 2
    epochs: int = 2
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=40))
    # From hidden states inside the model's forward; from its logits; from them in plain PyTorch.
    loss: Literal["fused", "logits", "naive"] = "fused"
    # Where the ratio's denominator comes from: one more forward pass, or what the sampler noted.
    old_logp: Literal["trainer", "sampler"] = "trainer"
    # Sequences end to end in the place of padded ones: where attention gains by it, see `padding`.
    padding_free: PaddingFree = "auto"
    # Places of a forward and backward, padding included; 0 takes a minibatch as a whole. It decides
    # about memory: parts of a minibatch share its divisor, and so make the same update.
    tokens_per_microbatch: int = 0
    mask_truncated: bool = False  # learn nothing from completions that ran into the length limit
    # Groups whose rewards are all equal teach nothing. They stay in the batch, leave it, or leave
    # it and others are drawn in their place, in so many rounds at most, see `resampling`.
    dynamic_sampling: DynamicSampling = "off"
    max_resamples: int = 3
    # An update in which a ratio or the KL exceeds e to this is not made, as one that is not finite;
    # 0: all are. See `sound`.
    max_log_ratio: float = 20.0
    autocast: bool = False  # the trainer's matrix products in bfloat16
    shuffle_rewards: bool = False  # the control: every completion gets another one's reward
    evaluate_every: int = 5
    seed: int = 0
    checkpoint_every: int = 10  # steps, where there is a folder for checkpoints
    keep_checkpoints: int = 2
    max_skipped_updates: int = 8  # in a row; one more stops the run
    # Where there is a process group: replicas of the model (DDP), or shards of it (FSDP2).
    shard: Shard = "ddp"

    def __post_init__(self) -> None:
        counts = ("steps", "prompts_per_step", "minibatches", "epochs", "evaluate_every")
        kept = ("checkpoint_every", "keep_checkpoints", "max_skipped_updates")
        check_at_least(self, 1, *counts, *kept)
        check_at_least(self, 0, "tokens_per_microbatch")
        check_at_least(self, 2, "group_size")
        if self.minibatches > self.prompts_per_step * self.group_size:
            raise ValueError(
                f"minibatches: expected at most {self.prompts_per_step * self.group_size}, the "
                f"completions of a step, got {self.minibatches}"
            )
        check_warmup(self)
        if self.padding_free not in get_args(PaddingFree):
            want = get_args(PaddingFree)
            raise ValueError(f"padding_free: expected one of {want}, got {self.padding_free!r}")
        if self.shard not in get_args(Shard):
            raise ValueError(f"shard: expected one of {get_args(Shard)}, got {self.shard!r}")
        if self.dynamic_sampling not in get_args(DynamicSampling):
            raise ValueError(
                f"dynamic_sampling: expected one of {get_args(DynamicSampling)}, got "
                f"{self.dynamic_sampling!r}"
            )
        check_at_least(self, 0, "max_resamples", "max_log_ratio")
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
        # how the model is spread over processes is compared apart, see `trainer_state`
        kept = {name: value for name, value in vars(self).items() if name not in (*free, "shard")}
        named = {name: repr(value) for name, value in kept.items()}
        numbers = ", ".join(map(str, self.objective.numbers))
        return named | {"objective": f"{self.objective.key} ({numbers})"}
