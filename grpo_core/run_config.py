"""The options of `python -m grpo_core.reinforce`, on the command line or in a YAML file."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from grpo_core.evaluate import check_samples
from grpo_core.options import (
    check_at_least,
    check_unchanged,
    option,
    read_resumed,
    recipe_with_kl,
)
from grpo_core.recipes import RECIPES
from grpo_core.rollout import Sampling
from grpo_core.sampler import SamplerCorrection
from grpo_core.trainer_config import TrainerConfig

# what may differ between a run and the command that goes on with it
FREE = (
    *("resume", "threads", "log", "output", "checkpoint_every", "keep_checkpoints", "console"),
    *("rollout_url", "rollout_memory", "rollout_sleep"),
)


@dataclass(frozen=True)
class RunConfig:
    """Reinforcement learning of a causal language model on verifiable rewards."""

    model: str = option("", "Folder or hub name of a causal language model of transformers.")
    data: str = option(
        "",
        "Prompts: a .jsonl, .json or .parquet file with prompt and answer, a data set of datasets, "
        "or reasoning_gym:NAME.",
    )
    output: str = option("runs/reinforce", "Run directory; replaced, except with --resume.")
    held_out: int = option(
        0, "The first so many problems measure the model and are not trained on."
    )
    rewards: list[str] = field(
        default_factory=lambda: ["math", "format"],
        metadata={"help": "Of math, accuracy, format, brevity, or path.py:function."},
    )
    reward_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "One for each reward; none: 1 and 0.2 for math and format, else 1 for each."
        },
    )
    system: str = option("", "System message before every prompt (needs a chat template).")
    template: str = option("", 'What a string prompt stands in, such as "Question: {prompt}".')
    longest_prompt: int = option(0, "Prompts of more tokens are left out; 0: none are.")
    objective: str = option("dapo", f"Recipe of the loss: {', '.join(RECIPES)}.")
    beta: float = option(0.0, "Weight of the KL to the model that learning starts from; 0: none.")
    loss: Literal["fused", "logits", "naive"] = option(
        "fused", "From hidden states, from the logits, or plain PyTorch."
    )
    steps: int = option(100, "Steps, of one rollout each.")
    prompts: int = option(16, "Prompts per step.")
    group_size: int = option(8, "Completions of each prompt.")
    minibatches: int = option(2, "Updates an epoch makes of a rollout.")
    epochs: int = option(1, "How often a rollout is gone through.")
    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    warmup_steps: int = option(5, "Steps of linear warm-up; then it falls linearly to 0.")
    max_new_tokens: int = option(512, "Longest completion; keep the truncated share below 20 %.")
    temperature: float = option(1.0, "Of rollouts and loss alike.")
    attention: str = option(
        "", "Of transformers: sdpa, eager, flex_attention, flash_attention_2; empty: its choice."
    )
    padding_free: Literal["auto", "always", "never"] = option(
        "auto", "Sequences end to end, without padding: where attention gains by it (flash, flex)."
    )
    mask_truncated: bool = option(False, "Learn nothing from completions cut off by the limit.")
    dynamic_sampling: Literal["off", "filter", "resample"] = option(
        "off", "Groups with equal rewards: stay, leave the batch, or are drawn anew (DAPO)."
    )
    max_resamples: int = option(3, "Further rounds of prompts in a step, with resample.")
    max_log_ratio: float = option(
        20.0, "An update in which a ratio exceeds e to this is skipped; 0: none is for that."
    )
    rollout: Literal["transformers", "vllm", "vllm-server"] = option(
        "transformers", "Who writes completions: the model, vLLM on its GPU, or a server."
    )
    rollout_url: str = option("http://localhost:8000", "Of the server.")
    rollout_memory: float = option(0.4, "Share of the GPU's memory that vLLM takes.")
    rollout_sleep: bool = option(False, "vLLM leaves the GPU's memory between rollouts.")
    sampler_correction: Literal["none", "truncate", "zero", "reject"] = option(
        "none", "What is done where trainer and sampler disagree about a token's probability."
    )
    sampler_level: Literal["token", "sequence", "geometric"] = option(
        "token", "Their ratio: of a token, or of a sequence as a product or a geometric mean."
    )
    sampler_low: float = option(0.0, "The smallest ratio that is left alone.")
    sampler_high: float = option(2.0, "The largest.")
    tokens_per_microbatch: int = option(
        0, "Places of one forward and backward, padding included; 0: a minibatch as a whole."
    )
    autocast: bool = option(False, "Matrix products in bfloat16; weights stay float32.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward.")
    shard: Literal["ddp", "fsdp"] = option(
        "ddp", "Under torchrun: ddp copies the model to every process, fsdp spreads it over them."
    )
    lora_rank: int = option(0, "Train an adapter of this rank (needs peft); 0: the whole model.")
    evaluate_every: int = option(10, "Steps between looks at the held-out problems.")
    eval_samples: int = option(
        1, "Answers to each held-out problem at a look; from 2 on avg@k, pass@k and greedy as well."
    )
    eval_k: list[int] = field(
        default_factory=list,
        metadata={"help": "The k of pass@k, each at most eval_samples; none: eval_samples."},
    )
    eval_temperature: float = option(0.0, "Of these answers; 0: that of the rollouts.")
    samples: int = option(4, "Held-out answers kept in samples.jsonl at every look.")
    console: Literal["rich", "plain", "off"] = option(
        "rich",
        "A live table (plain without rich or a terminal), a line for every step, or nothing.",
    )
    checkpoint_every: int = option(10, "Steps between checkpoints.")
    keep_checkpoints: int = option(2, "How many of them stay.")
    resume: bool = option(False, "Go on from the last checkpoint of the run in --output.")
    log: list[str] = field(
        default_factory=list, metadata={"help": "Also to tensorboard, trackio, wandb."}
    )
    seed: int = option(0, "Seed of sampling, order and adapters.")
    threads: int = option(0, "CPU threads; 0: as torch likes.")

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a value, got nothing")
        if not self.rewards:
            raise ValueError("rewards: expected at least one, got none")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights: expected {len(self.rewards)}, one for each of {self.rewards}, "
                f"got {len(self.reward_weights)}"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights: expected finite numbers, got {self.reward_weights}")
        check_at_least(self, 0, "held_out", "longest_prompt", "lora_rank", "samples", "threads")
        if self.eval_temperature < 0:
            raise ValueError(f"eval_temperature: expected at least 0, got {self.eval_temperature}")
        self.trainer(Sampling(self.max_new_tokens, self.temperature))
        check_samples(self.eval_samples, self.eval_k, "eval_samples", "eval_k")

    @property
    def weights(self) -> list[float]:
        """One for each reward."""
        default = [1.0, 0.2] if self.rewards == ["math", "format"] else [1.0] * len(self.rewards)
        return self.reward_weights or default

    def trainer(self, sampling: Sampling) -> TrainerConfig:
        """The part that the trainer wants to know."""
        objective = recipe_with_kl(self.objective, self.beta)
        if self.sampler_correction != "none":
            correction = SamplerCorrection(
                self.sampler_level, self.sampler_correction, self.sampler_low, self.sampler_high
            )
            objective = objective.replace(factor=replace(objective.factor, sampler=correction))
        return TrainerConfig(
            objective=objective,
            dynamic_sampling=self.dynamic_sampling,
            max_resamples=self.max_resamples,
            max_log_ratio=self.max_log_ratio,
            steps=self.steps,
            prompts_per_step=self.prompts,
            group_size=self.group_size,
            minibatches=self.minibatches,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            sampling=sampling,
            loss=self.loss,
            tokens_per_microbatch=self.tokens_per_microbatch,
            mask_truncated=self.mask_truncated,
            padding_free=self.padding_free,
            autocast=self.autocast,
            evaluate_every=self.evaluate_every,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            shard=self.shard,
        )


def check_resumed(config: RunConfig, directory: Path) -> None:
    """Raises ValueError unless an interrupted run in `directory` had these options."""
    file = directory / "config.json"
    check_unchanged(asdict(config), read_resumed(file), file, FREE)


def clear(directory: Path) -> None:
    """Takes an earlier run out of a run directory."""
    for name in ("metrics.jsonl", "samples.jsonl", "before.json", "results.json"):
        (directory / name).unlink(missing_ok=True)
    for name in ("checkpoints", "model"):
        shutil.rmtree(directory / name, ignore_errors=True)
