"""Reinforcement learning of a model on prompts: `python -m grpo_core.reinforce`.

    python -m grpo_core.reinforce --model Qwen/Qwen3-0.6B --data train.jsonl --rewards math format
    python -m grpo_core.reinforce run.yaml

The run directory gets config.json, metrics.jsonl, samples.jsonl, checkpoints, and at the end
results.json and the model in the format of `transformers` (of peft, for an adapter).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer

from grpo_core.cli.options import Parser, check_package, check_unchanged, load_from_file
from grpo_core.runs.config import GYM, RunConfig
from grpo_core.runs.console import open_console
from grpo_core.runs.directory import clear, read_resumed
from grpo_core.runs.model import check_positions, from_hub, load_model, load_teacher, make_engine
from grpo_core.runs.report import aligned, print_error, run_to_the_end, user_traceback
from grpo_core.trainer.data import Epochs, fingerprint, problems_of, read_records
from grpo_core.trainer.distributed import barrier, is_main, process_group, rank, world
from grpo_core.trainer.engine import EngineError
from grpo_core.trainer.environment import Episodes
from grpo_core.trainer.evaluate import Evaluation, evaluate
from grpo_core.trainer.monitor import Logger, Metrics, write_whole, writing
from grpo_core.trainer.rewards import FunctionReward, Reward, RewardError, no_reward, shown_name
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.rules import COMPARING, RULES, TAGS, find_reward
from grpo_core.trainer.samples import Samples, shortened
from grpo_core.trainer.sharding import export
from grpo_core.trainer.tasks import reasoning_gym_task
from grpo_core.trainer.trainer import Trainer

# that end a run with a line, without a traceback
ERRORS = (EngineError, FloatingPointError, RewardError)


def run(config: RunConfig, parser: Parser) -> int:
    """Trains, in the process group of the launcher if there is one; returns the exit status."""
    with process_group():
        try:
            reinforcement = Run(config)
        except (OSError, ValueError, ImportError) as error:
            if trace := user_traceback(error):
                print_error(trace)
            parser.error(str(error))
        hint = "the same command with --resume True continues"
        try:
            return run_to_the_end(reinforcement.train, hint, ERRORS)
        except OSError as error:
            # perhaps only in this process, whose exit must not wait for the others
            raise SystemExit(f"\nstopped: {error}") from error


class Run:
    """Model, data and reward of a run, loaded and checked before anything is trained."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.directory = config, Path(config.output)
        self.tokenizer = from_hub(AutoTokenizer, config.model)
        try:
            problems, self.reward = self.task()
        except (OSError, ValueError) as error:
            if str(error).partition(":")[0] in vars(config):
                raise
            raise ValueError(f"data: {error}") from error
        self.environment: Episodes | None = None
        if config.environment:
            make = load_from_file("environment", config.environment)
            self.environment = Episodes(make, self.tokenizer, config.max_turns)
        # includes the held-out problems, of which checkpoints know nothing
        self.data = {"data_fingerprint": fingerprint(problems)}
        if config.resume:
            file = self.directory / "config.json"
            check_unchanged(self.data, read_resumed(file), file)
        self.held_out, self.training = problems[: config.held_out], problems[config.held_out :]
        if not self.training:
            raise ValueError(
                f"held_out: expected fewer than the {len(problems)} problems, got {config.held_out}"
            )
        longest = max(len(problem.prompt) for problem in problems)
        check_positions(config, longest)
        self.model = load_model(config, self.tokenizer)
        self.sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            replay=config.replay_sampling,
        )
        names = config.log if is_main() else []
        loggers = [open_logger(name, self.directory, asdict(config)) for name in names]
        self.trainer = Trainer(
            self.model,
            Epochs(self.training, config.seed),
            self.reward,
            config.trainer(self.sampling),
            metrics_path=self.directory / "metrics.jsonl",
            checkpoints=self.directory / "checkpoints",
            loggers=loggers,
            samples=Samples(self.tokenizer, self.directory / "samples.jsonl", count=config.samples),
            console=open_console(config.console),
            engine=make_engine(
                config, self.model, longest + config.max_new_tokens, self.sampling.keeps
            ),
            teacher=load_teacher(config, self.tokenizer),
            environment=self.environment,
        )
        if world() > 1:
            # every process has its own dropout
            torch.manual_seed(config.seed + rank())

    def task(self) -> tuple[list[Problem], Reward]:
        """Problems and their reward, from a file or from reasoning-gym."""
        config, tokenizer = self.config, self.tokenizer
        names = [shown_name(name) for name in config.rewards]
        functions = list(map(find_reward, config.rewards))
        if config.data.startswith(GYM):
            problems, reward = reasoning_gym_task(
                config.data.removeprefix(GYM),
                tokenizer,
                size=config.held_out + config.steps * config.prompts_per_step,
                seed=config.seed,
                chat=tokenizer.chat_template is not None,
            )
            # its own scoring replaces the comparison of answers
            for place, name in enumerate(config.rewards):
                if name in COMPARING:
                    names[place], functions[place] = "accuracy", reward.functions["accuracy"]
        else:
            problems = problems_of(
                read_records(config.data),
                tokenizer,
                system=config.system or None,
                template=config.template or None,
                longest_prompt=config.longest_prompt or None,
                compared=any(name in COMPARING for name in config.rewards),
            )
        special = sorted({*TAGS} & {*tokenizer.all_special_tokens})
        if special and {*RULES} & {*config.rewards}:
            raise ValueError(
                f"rewards: expected a tokenizer that leaves {', '.join(TAGS)} in a text, this one "
                f"has {special} among its special tokens"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: expected names that differ, got {names}")
        if not names:
            return problems, no_reward
        weights = dict(zip(names, config.weights, strict=True))
        reward = FunctionReward(tokenizer, dict(zip(names, functions, strict=True)), weights)
        reward.check(problems)
        return problems, reward

    def train(self) -> None:
        """Trains from the start or the last checkpoint; writes results.json and the model."""
        if self.config.resume:
            self.trainer.resume()
        elif is_main():
            clear(self.directory)
        barrier()
        self.write("config.json", asdict(self.config) | self.data)
        if self.held_out and not self.trainer.steps_done:
            self.write("before.json", self.measure())
        self.trainer.train(self.evaluate_held_out if self.held_out else None)
        with writing(self.directory / "model"):
            export(self.model, self.directory / "model")
        after = self.measure() if self.held_out else {}
        if is_main():
            self.tokenizer.save_pretrained(self.directory / "model")
        if is_main() and after:
            before = json.loads((self.directory / "before.json").read_text("utf-8"))
            stages = {"before": before, "after": after}
            self.write("results.json", stages)
            print("\n".join(aligned(results_table(stages))))
        if is_main():
            print(f"all results are in {self.directory}/")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file of the run directory, in the main process."""
        if is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self.directory / name, json.dumps(content, indent=2) + "\n")

    def evaluate_held_out(self) -> Metrics:
        """Held-out figures during training; keeps some of the answers."""
        sampled = self.evaluate(greedy=False)
        assert self.trainer.samples is not None
        self.trainer.samples.look(self.trainer.steps_done, self.held_out, sampled)
        if self.config.eval_samples == 1:
            return sampled.metrics
        greedy = self.evaluate(greedy=True).metrics
        return {f"greedy_{name}": greedy[name] for name in sampled.scores.parts} | sampled.metrics

    def evaluate(self, greedy: bool) -> Evaluation:
        """Greedy completions of the held-out problems, or `eval_samples` sampled ones of each."""
        config = self.config
        temperature = 0.0 if greedy else config.eval_temperature or config.temperature
        return evaluate(
            self.model,
            self.held_out,
            self.reward,
            replace(self.sampling, temperature=temperature, replay=False),
            samples=1 if greedy else config.eval_samples,
            k=() if greedy else config.eval_k,
            draw=self.trainer.draw,
            environment=self.environment,
        )

    def measure(self) -> dict[str, Metrics]:
        """Held-out figures, greedy and sampled."""
        return {
            "greedy": self.evaluate(greedy=True).metrics,
            "sampled": self.evaluate(greedy=False).metrics,
        }


def results_table(stages: dict[str, dict[str, Metrics]]) -> list[list[str]]:
    """Every held-out figure before and after, greedy and sampled."""
    columns = [(when, how) for how in ("greedy", "sampled") for when in ("before", "after")]
    rows = [["held out", *(f"{how}, {when}" for when, how in columns)]]
    for name in stages["before"]["sampled"]:
        values = [stages[when][how].get(name) for when, how in columns]
        cells = ("" if value is None else f"{value:.3f}" for value in values)
        rows.append([shortened(name, 35), *cells])
    return rows


def open_logger(name: str, directory: Path, config: Mapping[str, Any]) -> Logger:
    """A function that sends each step's record to a package.

    Args:
        name: tensorboard, trackio or wandb.
        directory: of the run, which is called by its name.
        config: the options, which trackio and wandb show.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """

    def package(module: str) -> ModuleType:
        check_package("log", module, name)
        return import_module(module)

    if name == "tensorboard":
        package(name)
        writer = package("torch.utils.tensorboard").SummaryWriter(str(directory / name))

        def write(record: Metrics) -> None:
            for figure, value in flat(record).items():
                writer.add_scalar(figure, value, record["step"])
            writer.flush()

        return write
    tracker = package(name)
    settings = {"dir": str(directory)} if name == "wandb" else {}
    tracker.init(project="grpo_core", name=directory.name, config=dict(config), **settings)
    return lambda record: tracker.log(flat(record), step=record["step"])


def flat(record: Metrics, prefix: str = "") -> dict[str, float]:
    """The numbers of a record; those of an inner record as "outer/inner"."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flat(dict(value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            numbers[f"{prefix}{name}"] = float(value)
    return numbers
