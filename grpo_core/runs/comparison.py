"""DPO, PPO and GRPO on the same task, from the same base, measured: `python -m grpo_core.compare`.

    SFT      the cold start of R1: long chains of thought that are right
    DPO      pairs sampled from the base once, judged by the reward
    PPO      a critic as large as the policy, GAE; the KL in the reward
    GRPO     no critic, advantages of groups; the KL in the loss, or in the reward

Each sees as many sampled completions, and starts from the same base model. What the textbooks claim
of them (a critic costs a second model, pairs are learnt from once, groups need neither) stands in
the table as numbers: accuracy, parameters that are trained or held, peak memory, time, samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core import RECIPES, Objective
from grpo_core.runs.demo.demo import SAMPLED, Demo
from grpo_core.runs.run_config import CompareConfig, DemoConfig
from grpo_core.trainer.baselines.dpo import PreferenceConfig, sample_pairs, train_preferences
from grpo_core.trainer.baselines.ppo import CriticConfig, PPOTrainer
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.forward import packed_logp, reference_logp, reference_of
from grpo_core.trainer.groups import randomness
from grpo_core.trainer.measure import LiveBytes
from grpo_core.trainer.rollout import Rollout
from grpo_core.trainer.trainer import Trainer

GROUP = 8
METHODS = ("SFT", "DPO", "PPO", "GRPO", "GRPO, KL in the reward")


@dataclass(frozen=True)
class Outcome:
    """What became of a base under one method.

    Attributes:
        accuracy, traps: held-out, sampled at temperature 1, of all questions and of the traps.
        samples: completions drawn to learn from.
        trained, held: parameters with a gradient, and all that were needed, references included.
        peak_mib: most bytes of tensors that one step held, beyond the models and optimizers.
        seconds: of the training, without measuring.
    """

    method: str
    seed: int
    accuracy: float
    traps: float
    samples: int
    trained: int
    held: int
    peak_mib: float
    seconds: float


class Comparison:
    """All methods from one base."""

    def __init__(self, config: CompareConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.demo = Demo(
            DemoConfig(
                output=str(Path(config.output) / f"seed-{seed}"),
                seed=seed,
                base_steps=config.base_steps,
                held_out=config.held_out,
                steps=config.steps,
                prompts=config.prompts,
                beta=config.beta,
            )
        )
        self.demo.directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Outcome]:
        """The base and what each method makes of it."""
        base = self.demo.base_model()
        outcomes = [self.measured("base", base, 0, 0, 0, 0.0, 0.0)]
        for method in METHODS:
            model = self.demo.base_model()
            train = {"SFT": self.sft, "DPO": self.dpo, "PPO": self.ppo}.get(method, self.grpo)
            start = time.perf_counter()
            samples, held, peak = train(model, method)
            seconds = time.perf_counter() - start
            trained = 2 if method == "PPO" else 1
            size = sum(weight.numel() for weight in model.parameters())
            outcomes.append(
                self.measured(method, model, samples, trained * size, held * size, peak, seconds)
            )
        return outcomes

    def measured(
        self,
        method: str,
        model: PreTrainedModel,
        samples: int,
        trained: int,
        held: int,
        peak: float,
        seconds: float,
    ) -> Outcome:
        """With the held-out figures."""
        found = evaluate(model, self.demo.held_out, self.demo.reward, SAMPLED).metrics
        return Outcome(
            method,
            self.seed,
            found["accuracy"],
            found["accuracy/trap"],
            samples,
            trained,
            held,
            peak,
            seconds,
        )

    def sft(self, model: PreTrainedModel, method: str) -> tuple[int, int, float]:
        """(samples, models held, peak MiB) of the cold start."""
        with LiveBytes() as live:
            self.demo.cold_start(model)
        return 0, 1, live.peak / 2**20

    def dpo(self, model: PreTrainedModel, method: str) -> tuple[int, int, float]:
        """As many completions as the others draw, all from the base, in one go per step."""
        config, pairs = self.config, []
        for step in range(config.steps):
            with randomness(self.seed, step, model.device) as rng:
                problems = self.demo.draw_problems(config.prompts, rng)
            pairs += sample_pairs(
                model,
                problems,
                self.demo.reward,
                SAMPLED,
                group_size=GROUP,
                seed=1000 * self.seed + step,
            )
        settings = PreferenceConfig(steps=4 * config.steps, batch_size=16, learning_rate=1e-4)
        with LiveBytes() as live:
            train_preferences(model, pairs, settings, seed=self.seed)
        return config.steps * config.prompts * GROUP, 2, live.peak / 2**20

    def ppo(self, model: PreTrainedModel, method: str) -> tuple[int, int, float]:
        """The KL in the reward; policy, critic and reference."""
        trainer = PPOTrainer(
            *self.task(model),
            self.settings(RECIPES["ppo"]),
            critic=CriticConfig(beta=self.config.beta),
            label=method,
        )
        return self.trained(trainer, held=3)

    def grpo(self, model: PreTrainedModel, method: str) -> tuple[int, int, float]:
        """The KL in the loss (k3), or taken off the reward of every completion."""
        beta = self.config.beta
        if method == "GRPO":
            objective = RECIPES["dapo"].replace(kl="k3", beta=beta)
            return self.trained(
                Trainer(*self.task(model), self.settings(objective), label=method), held=2
            )
        trainer = PricedTrainer(
            *self.task(model), self.settings(RECIPES["dapo"]), beta=beta, label=method
        )
        return self.trained(trainer, held=2)

    def task(self, model: PreTrainedModel) -> tuple[Any, Callable[..., Any], Any]:
        """The first arguments of a trainer."""
        return model, self.demo.draw_problems, self.demo.reward

    def settings(self, objective: Objective) -> TrainerConfig:
        """The same for all that draw as they learn."""
        return TrainerConfig(
            objective=objective,
            steps=self.config.steps,
            prompts_per_step=self.config.prompts,
            group_size=GROUP,
            learning_rate=self.demo.config.learning_rate,
            sampling=SAMPLED,
            seed=self.seed,
        )

    def trained(self, trainer: Trainer, held: int) -> tuple[int, int, float]:
        """Runs it; memory is that of one update, which is where most is held."""
        peaks: list[int] = []
        update = trainer.update

        def watched(*arguments: Any) -> Any:
            # once: watching every operation takes time
            if peaks:
                return update(*arguments)
            with LiveBytes() as live:
                found = update(*arguments)
            peaks.append(live.peak)
            return found

        trainer.update = watched  # type: ignore[assignment, method-assign]
        trainer.train()
        samples = trainer.config.steps * trainer.config.prompts_per_step * GROUP
        return samples, held, peaks[0] / 2**20


class PricedTrainer(Trainer):
    """GRPO whose completions pay for their distance to the reference out of their reward.

    reward − beta·Σ_t (log π − log π_ref), before the group is compared.
    """

    def __init__(self, *args: Any, beta: float, **named: Any) -> None:
        super().__init__(*args, **named)
        self.beta = beta
        self.start = reference_of(self.model)

    def minibatches(self, drawn: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        """As in `Trainer`, from the lower rewards."""
        config, rows = self.config, pack(drawn, rewards).rows
        gap = packed_logp(self.model, rows, config) - reference_logp(self.start, rows, config)
        price = torch.zeros_like(rewards).index_add(0, rows.sequence, gap)
        return super().minibatches(drawn, rewards - self.beta * price, order)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A row for every method, means over the seeds."""
    lines = [
        "| method | accuracy | traps | completions | trained | held | memory of a step | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.method == method]
        mean = {
            name: sum(getattr(outcome, name) for outcome in mine) / len(mine)
            for name in ("accuracy", "traps", "samples", "trained", "held", "peak_mib", "seconds")
        }
        cells = [method, f"{mean['accuracy']:.3f}", f"{mean['traps']:.3f}"]
        if mean["held"]:
            cells += [
                f"{mean['samples']:,.0f}",
                f"{mean['trained'] / 1e6:.2f} M",
                f"{mean['held'] / 1e6:.2f} M",
                f"{mean['peak_mib']:.0f} MiB",
                f"{mean['seconds']:.0f} s",
            ]
        else:
            cells += [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """The same for a terminal of 80 columns."""
    _, _, *rows = (line.strip("| ").split(" | ") for line in markdown(outcomes).splitlines())
    heads = ["", "accuracy", "traps", "samples", "trained", "held", "memory", "time"]
    widths = (8, 5, 7, 7, 7, 8, 6)
    return [
        f"{name:24}"
        + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
        for name, *cells in (heads, *rows)
    ]
