"""The options of the commands on the demo task; imports no torch.

`DemoConfig` is for `python -m grpo_core.train`, `CompareConfig` for `grpo_core.compare`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from grpo_core.cli.options import check_at_least, check_more_than_0, option, require
from grpo_core.runs.config import CommandOptions, LearningOptions, find_objective
from grpo_core.runs.directory import check_output

if TYPE_CHECKING:
    from grpo_core.trainer.config import TrainerConfig
    from grpo_core.trainer.rollout import Sampling


@dataclass(frozen=True)
class TaskOptions(CommandOptions):
    """Options of the commands on the demo task."""

    overwrite: bool = option(False, "Delete the run that is in --output, except its base model.")
    prompts: int = option(16, "Prompts per step, 8 completions each.")
    base_steps: int = option(700, "Training steps of the base model, 32 texts each.")
    held_out: int = option(512, "Number of held-out questions.")
    plot: bool = option(True, "Draw the results (needs matplotlib); --no_plot: do not.")


@dataclass(frozen=True)
class DemoConfig(TaskOptions, LearningOptions):
    """The demo run of a tiny model, in minutes; the defaults are those of the README's figures."""

    output: str = "runs/demo"
    stages: Literal["zero", "r1", "both"] = option("both", "Which models to train from the base.")
    prompts: int = option(16, "Prompts per step.")
    learning_rate: float = 2e-4
    beta: float | None = option(
        None,
        "Weight of the KL to the model that a stage starts from. Default: 0.01 for a recipe; an "
        "objective from a file keeps its own.",
    )
    old_logp: Literal["trainer", "sampler"] = option(
        "trainer",
        "Denominator of the ratio: the trainer's log-probabilities (one more forward pass) or the "
        "sampler's, as always with --asynchronous 1.",
    )
    shuffle_rewards: bool = option(False, "Permute the rewards before each update, as a control.")
    sft_steps: int = option(10, "Steps on 32 long chains of thought each, before R1's learning.")
    gate: float = option(
        0.9, "Stop if the base model's greedy accuracy on pairs that are not traps is lower."
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "prompts", "base_steps", "sft_steps", "held_out")
        check_more_than_0(self, "learning_rate")
        check_at_least(self, 0, "gate")
        require(self.objective != "opd", "objective", "one that learns from rewards", "opd")
        self.check_learning(self.prompts)

    def check_here(self) -> None:
        """Raises ValueError if the model is to be sharded or the run directory cannot be used."""
        require(self.shard == "ddp", "shard", "ddp for the demo run", self.shard)
        check_output(self, ("objective", self.objective.rpartition(":")[0]))

    def trainer(self, sampling: Sampling) -> TrainerConfig:
        """The trainer's configuration."""
        return self.trainer_config(
            objective=find_objective(self.objective, self.beta, default=0.01),
            prompts_per_step=self.prompts,
            sampling=sampling,
            old_logp=self.old_logp,
            shuffle_rewards=self.shuffle_rewards,
        )


@dataclass(frozen=True)
class CompareConfig(TaskOptions):
    """DPO, PPO and GRPO from the same base; the defaults are those of the README's table."""

    output: str = "runs/compare"
    seeds: int = option(2, "Seeds per method, from 0 on.")
    steps: int = option(20, "Steps of PPO and GRPO; DPO gets as many completions.")
    beta: float = option(0.01, "Weight of the KL, in the loss or in the reward.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seeds", "steps", "prompts", "base_steps", "held_out")
        check_at_least(self, 0, "threads", "beta")
