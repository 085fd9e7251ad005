"""DPO, PPO and GRPO on the same task, from the same base, measured: `python -m grpo_core.compare`.

    SFT      the cold start of R1: long chains of thought that are right
    DPO      pairs sampled from the base once and ranked by the reward
    PPO      a critic as large as the policy, GAE; the KL in the reward
    GRPO     no critic, group advantages; the KL in the loss, or in the reward

All start from the same base model, and all but SFT see as many sampled completions. The table says
what each reaches and costs: accuracy, parameters that are trained and held, peak memory, time.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core import RECIPES, Objective
from grpo_core.cli.options import Parser
from grpo_core.runs.config import CompareConfig, DemoConfig, TaskOptions
from grpo_core.runs.demo.demo import SAMPLED, Demo
from grpo_core.runs.directory import clear
from grpo_core.runs.plots import draw_methods, unless_missing
from grpo_core.trainer.baselines.dpo import PreferenceConfig, sample_pairs, train_preferences
from grpo_core.trainer.baselines.ppo import CriticConfig, PPOTrainer
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.forward import packed_logp, reference_logp, reference_of
from grpo_core.trainer.groups import randomness
from grpo_core.trainer.measure import LiveBytes
from grpo_core.trainer.rollout import Rollout
from grpo_core.trainer.signals import heeding_interrupts
from grpo_core.trainer.trainer import Trainer

METHODS = ("SFT", "DPO", "PPO", "GRPO", "GRPO, KL in the reward")


@dataclass(frozen=True)
class Outcome:
    """What a method reached and what it cost, with one seed.

    Attributes:
        accuracy, traps: held-out, sampled at temperature 1, of all questions and of the traps.
        samples: completions drawn to learn from.
        trained, held: parameters with a gradient, and all in memory, references included.
        peak_mib: most bytes of tensors in one step, beyond the models and optimizers.
        seconds: of the training, without evaluation.
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


class Cost(NamedTuple):
    """Of a training: completions, models trained and held, MiB of a step."""

    samples: int
    trained: int
    held: int
    peak_mib: float


def run(config: CompareConfig, parser: Parser) -> int:
    """Runs all methods and writes the tables and the picture; returns the exit status."""
    directory = Path(config.output)
    clear(directory)
    try:
        with heeding_interrupts():
            outcomes = [
                outcome
                for seed in range(config.seeds)
                for outcome in Comparison(config, seed).run()
            ]
    except (FloatingPointError, OSError, ValueError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the base models are kept", file=sys.stderr)
        return 128 + signal.SIGINT
    records = [asdict(outcome) for outcome in outcomes]
    (directory / "compare.json").write_text(json.dumps(records, indent=2) + "\n", "utf-8")
    (directory / "compare.md").write_text(markdown(outcomes), "utf-8")
    print("\n".join(lines(outcomes)))
    if config.plot:
        unless_missing(draw_methods, records, directory / "compare.png")
    print(f"all results are in {directory}/")
    return 0


class Comparison:
    """All methods from one base."""

    def __init__(self, config: CompareConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        shared = {each.name: getattr(config, each.name) for each in fields(TaskOptions)}
        shared |= {"output": str(Path(config.output) / f"seed-{seed}")}
        self.demo = Demo(DemoConfig(**shared, seed=seed, steps=config.steps, beta=config.beta))
        self.group_size = self.demo.trainer_config.group_size
        self.samples = config.steps * config.prompts * self.group_size
        self.demo.directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Outcome]:
        """The outcomes of the base and of every method."""
        base = self.demo.base_model()
        outcomes = [self.measure("base", base, Cost(0, 0, 0, 0.0), 0.0)]
        for method in METHODS:
            model = self.demo.base_model()
            start = time.perf_counter()
            cost = self.train(method, model)
            outcomes.append(self.measure(method, model, cost, time.perf_counter() - start))
        return outcomes

    def measure(self, method: str, model: PreTrainedModel, cost: Cost, seconds: float) -> Outcome:
        """The outcome, with held-out figures."""
        figures = evaluate(model, self.demo.held_out, self.demo.reward, SAMPLED).metrics
        size = sum(weight.numel() for weight in model.parameters())
        return Outcome(
            method,
            self.seed,
            accuracy=figures["accuracy"],
            traps=figures["accuracy/trap"],
            samples=cost.samples,
            trained=cost.trained * size,
            held=cost.held * size,
            peak_mib=cost.peak_mib,
            seconds=seconds,
        )

    def train(self, method: str, model: PreTrainedModel) -> Cost:
        """Trains the base by one method."""
        beta, dapo = self.config.beta, RECIPES["dapo"]
        if method == "SFT":
            with LiveBytes() as live:
                self.demo.cold_start(model)
            return Cost(0, 1, 1, live.peak / 2**20)
        if method == "DPO":
            return self.train_dpo(model)
        task = model, self.demo.draw_problems, self.demo.reward
        if method == "PPO":
            settings = self.settings(RECIPES["ppo"])
            critic = CriticConfig(beta=beta)
            trainer: Trainer = PPOTrainer(*task, settings, critic=critic, label=method)
            return self.train_online(trainer, trained=2, held=3)
        if method == "GRPO":
            trainer = Trainer(*task, self.settings(dapo.replace(kl="k3", beta=beta)), label=method)
        else:
            trainer = KLInRewardTrainer(*task, self.settings(dapo), beta=beta, label=method)
        return self.train_online(trainer, trained=1, held=2)

    def train_dpo(self, model: PreTrainedModel) -> Cost:
        """As many completions as the others, all from the base; the update is measured."""
        config, pairs = self.config, []
        for step in range(config.steps):
            with randomness(self.seed, step, model.device) as rng:
                problems = self.demo.draw_problems(config.prompts, rng)
            pairs += sample_pairs(
                model,
                problems,
                self.demo.reward,
                SAMPLED,
                group_size=self.group_size,
                seed=1000 * self.seed + step,
            )
        settings = PreferenceConfig(steps=4 * config.steps, batch_size=16, learning_rate=1e-4)
        with LiveBytes() as live:
            train_preferences(model, pairs, settings, seed=self.seed)
        return Cost(self.samples, 1, 2, live.peak / 2**20)

    def settings(self, objective: Objective) -> TrainerConfig:
        """The same for all methods that sample while they learn."""
        return replace(self.demo.trainer_config, objective=objective)

    def train_online(self, trainer: Trainer, trained: int, held: int) -> Cost:
        """Runs a trainer; its memory is that of one update, where it is highest."""
        peaks: list[int] = []
        update = trainer.update

        def measured_update(*arguments: Any) -> Any:
            # only the first: to watch every operation takes time
            if peaks:
                return update(*arguments)
            with LiveBytes() as live:
                metrics = update(*arguments)
            peaks.append(live.peak)
            return metrics

        trainer.update = measured_update  # type: ignore[assignment, method-assign]
        trainer.train()
        return Cost(self.samples, trained, held, peaks[0] / 2**20)


class KLInRewardTrainer(Trainer):
    """GRPO on the reward minus β times the KL to the initial model.

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
        kl = torch.zeros_like(rewards).index_add(0, rows.sequence, gap)
        return super().minibatches(drawn, rewards - self.beta * kl, order)


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The cells of each method, means over the seeds; the base cost nothing."""
    table = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        of_method = [asdict(outcome) for outcome in outcomes if outcome.method == method]
        value = {name: mean(each[name] for each in of_method) for name in list(of_method[0])[1:]}
        costs = [
            f"{value['samples']:,.0f}",
            f"{value['trained'] / 1e6:.2f} M",
            f"{value['held'] / 1e6:.2f} M",
            f"{value['peak_mib']:.0f} MiB",
            f"{value['seconds']:.0f} s",
        ]
        reached = [method, f"{value['accuracy']:.3f}", f"{value['traps']:.3f}"]
        table.append(reached + (costs if value["held"] else [""] * len(costs)))
    return table


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table for compare.md."""
    head = "| method | accuracy | traps | completions | trained | held | memory of a step | time |"
    lines = [head, "|---" + "|---:" * 7 + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows(outcomes)]) + "\n"


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """The table for a terminal of 80 columns."""
    heads = ["", "accuracy", "traps", "samples", "trained", "held", "memory", "time"]
    widths = (8, 5, 7, 7, 7, 8, 6)
    return [
        f"{name:24}"
        + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in (heads, *rows(outcomes))
    ]
