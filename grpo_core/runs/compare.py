"""Methods on the same task, from the same base, measured: `python -m grpo_core.compare`.

    SFT      the cold start of R1: long chains of thought that are right
    DPO      pairs sampled from the base once and ranked by the reward
    PPO      a critic as large as the policy, GAE; the KL in the reward
    GRPO     no critic, group advantages; the KL in the loss, or in the reward
    R1       GRPO after SFT; then distilled into a smaller base, by SFT on completions of R1, or by
             the KL to R1 on completions of the student (on-policy distillation)

All start from the same base model, and all but SFT see as many sampled completions. The table says
what each reaches and costs: accuracy, parameters that are trained and held, peak memory, time.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core import RECIPES, Objective
from grpo_core.cli.options import Parser
from grpo_core.runs.demo.config import CompareConfig, DemoConfig, TaskOptions
from grpo_core.runs.demo.decimals import SMALL
from grpo_core.runs.demo.demo import SAMPLED, Demo
from grpo_core.runs.directory import clear
from grpo_core.runs.plots import draw_methods, unless_missing
from grpo_core.runs.report import aligned, markdown, run_to_the_end
from grpo_core.trainer.baselines.dpo import PreferenceConfig, sample_pairs, train_preferences
from grpo_core.trainer.baselines.ppo import CriticConfig, PPOTrainer
from grpo_core.trainer.baselines.supervised import Example, SupervisedConfig, train_supervised
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.forward import packed_logp, reference_logp, reference_of
from grpo_core.trainer.groups import randomness
from grpo_core.trainer.measure import LiveBytes
from grpo_core.trainer.rewards import no_reward
from grpo_core.trainer.rollout import Rollout, rollout
from grpo_core.trainer.trainer import Trainer

METHODS = ("SFT", "DPO", "PPO", "GRPO", "GRPO, KL in the reward", "R1")
SMALL_BASE = "small base"
# learning rates: the best of 5e-4, 1e-3, 2e-3 and 4e-3 for each on seed 0
DISTILLED = {"R1 distilled by SFT": 2e-3, "R1 distilled by opd": 1e-3}
# What a method reached and what it cost, with one seed:
#   method, seed
#   accuracy, traps: held-out, sampled at temperature 1, of all questions and of the traps
#   samples: completions to learn from
#   trained, held: parameters with a gradient, and all in memory, references included
#   peak_mib: most bytes of tensors in one step, beyond the models and optimizers
#   seconds: of the training, without evaluation
Outcome = dict[str, Any]


def run(config: CompareConfig, parser: Parser) -> int:
    """Runs all methods and writes the tables and the picture; returns the exit status."""
    directory = Path(config.output)
    clear(directory)
    outcomes: list[Outcome] = []

    def compare() -> None:
        for seed in range(config.seeds):
            outcomes.extend(Comparison(config, seed).run())

    if status := run_to_the_end(compare, "the base models are kept"):
        return status
    rows = table(outcomes)
    (directory / "compare.json").write_text(json.dumps(outcomes, indent=2) + "\n", "utf-8")
    (directory / "compare.md").write_text(markdown(rows), "utf-8")
    print("\n".join(aligned(rows)))
    if config.plot:
        unless_missing(draw_methods, outcomes, directory / "compare.png")
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
        self.models: dict[str, PreTrainedModel] = {}

    def start(self, method: str) -> PreTrainedModel:
        """A copy of the model that a method starts from."""
        if method == "R1":
            return copy.deepcopy(self.models["SFT"])
        if method in (SMALL_BASE, *DISTILLED):
            return self.demo.base_model("small-base", SMALL)
        return self.demo.base_model()

    def run(self) -> list[Outcome]:
        """The outcomes of the bases and of every method."""
        nothing = {"samples": 0, "trained": 0, "held": 0, "peak_mib": 0.0, "seconds": 0.0}
        outcomes = []
        for method in ("base", *METHODS, SMALL_BASE, *DISTILLED):
            model = self.models[method] = self.start(method)
            if method in ("base", SMALL_BASE):
                outcomes.append(self.measure(method, model) | nothing)
                continue
            start = time.perf_counter()
            cost = self.train(method, model)
            cost["seconds"] = time.perf_counter() - start
            size = sum(weight.numel() for weight in model.parameters())
            cost |= {"trained": cost["trained"] * size, "held": cost["held"] * size}
            outcomes.append(self.measure(method, model) | cost)
        return outcomes

    def measure(self, method: str, model: PreTrainedModel) -> Outcome:
        """What a model has reached."""
        figures = evaluate(model, self.demo.held_out, self.demo.reward, SAMPLED).metrics
        reached = {"accuracy": figures["accuracy"], "traps": figures["accuracy/trap"]}
        return {"method": method, "seed": self.seed} | reached

    def train(self, method: str, model: PreTrainedModel) -> dict[str, Any]:
        """Trains the base by one method; returns its cost, `trained` and `held` in models."""
        beta, dapo = self.config.beta, RECIPES["dapo"]
        if method == "SFT":
            with LiveBytes() as live:
                self.demo.cold_start(model)
            return self.cost(live.peak, trained=1, held=1) | {"samples": 0}
        if method == "DPO":
            return self.train_dpo(model)
        if method in DISTILLED:
            return self.distil(model, method)
        task = model, self.demo.draw_problems, self.demo.reward
        if method == "PPO":
            settings = self.settings(RECIPES["ppo"])
            critic = CriticConfig(beta=beta)
            trainer: Trainer = PPOTrainer(*task, settings, critic=critic, label=method)
            return self.train_online(trainer, trained=2, held=3)
        if method in ("GRPO", "R1"):
            trainer = Trainer(*task, self.settings(dapo.replace(kl="k3", beta=beta)), label=method)
        else:
            trainer = KLInRewardTrainer(*task, self.settings(dapo), beta=beta, label=method)
        return self.train_online(trainer, trained=1, held=2)

    def cost(self, peak: int, trained: int, held: float) -> dict[str, Any]:
        """The cost of a method that has had all samples."""
        models = {"trained": trained, "held": held}
        return {"samples": self.samples, **models, "peak_mib": peak / 2**20}

    def train_dpo(self, model: PreTrainedModel) -> dict[str, Any]:
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
        return self.cost(live.peak, trained=1, held=2)

    def distil(self, model: PreTrainedModel, method: str) -> dict[str, Any]:
        """R1 into a smaller model: from as many completions and in as many updates either way."""
        teacher, config = self.models["R1"], self.config
        settings = replace(self.settings(RECIPES["opd"]), learning_rate=DISTILLED[method])
        if method == "R1 distilled by opd":
            task = model, self.demo.draw_problems, no_reward, settings
            sizes = [each.num_parameters() for each in (teacher, model)]
            held = 1 + sizes[0] / sizes[1]
            return self.train_online(Trainer(*task, label=method, teacher=teacher), 1, held)
        examples = []
        for step in range(config.steps):
            with randomness(self.seed, step, model.device) as rng:
                problems = self.demo.draw_problems(config.prompts, rng)
                prompts = [list(p.prompt) for p in problems for _ in range(self.group_size)]
                drawn = rollout(teacher, prompts, SAMPLED).completions()
            examples += [Example(*pair) for pair in zip(prompts, drawn, strict=True)]
        updates = config.steps * settings.minibatches * settings.epochs
        training = SupervisedConfig(
            steps=updates,
            batch_size=len(prompts) // settings.minibatches,
            learning_rate=DISTILLED[method],
            prompt_loss=False,
        )
        with LiveBytes() as live:
            train_supervised(model, examples, training, seed=self.seed, label=method)
        return self.cost(live.peak, trained=1, held=1)

    def settings(self, objective: Objective) -> TrainerConfig:
        """The same for all methods that sample while they learn."""
        return replace(self.demo.trainer_config, objective=objective)

    def train_online(self, trainer: Trainer, trained: int, held: float) -> dict[str, Any]:
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
        return self.cost(peaks[0], trained, held)


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


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row for each method, means over the seeds; the base cost nothing."""
    heads = ["method", "accuracy", "traps", "samples"]
    rows = [[*heads, "trained, M", "held, M", "memory, MiB", "time, s"]]
    for method in dict.fromkeys(outcome["method"] for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome["method"] == method]
        value = {name: mean(run[name] for run in runs) for name in runs[0] if name != "method"}
        costs = [
            f"{value['samples']:,.0f}",
            f"{value['trained'] / 1e6:.2f}",
            f"{value['held'] / 1e6:.2f}",
            f"{value['peak_mib']:.0f}",
            f"{value['seconds']:.0f}",
        ]
        reached = [method, f"{value['accuracy']:.3f}", f"{value['traps']:.3f}"]
        rows.append(reached + (costs if value["held"] else [""] * len(costs)))
    return rows
