"""The demo run: base, R1-Zero and R1 on "3.11 and 3.8, which is larger?", in minutes.

    base     a model of a corpus in which most writers fall for the trap
    R1-Zero  reinforcement learning on the base, without demonstrations
    SFT      the base after a few steps on long chains of thought
    R1       reinforcement learning on the SFT model

The run directory gets config.json, metrics.jsonl, samples.jsonl, results.json, report.md,
curves.png and one folder per model in the format of `transformers`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

from grpo_core.cli.options import Parser
from grpo_core.runs.console import open_console
from grpo_core.runs.demo import decimals
from grpo_core.runs.demo.config import DemoConfig
from grpo_core.runs.demo.report import Stage, markdown, plain
from grpo_core.runs.directory import clear
from grpo_core.runs.plots import draw_demo, unless_missing
from grpo_core.runs.report import run_to_the_end
from grpo_core.trainer.baselines.supervised import Example, SupervisedConfig, train_supervised
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.monitor import append_json, keep_records, write_whole, writing
from grpo_core.trainer.rewards import FunctionReward
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.rules import find_reward
from grpo_core.trainer.samples import Samples
from grpo_core.trainer.trainer import Trainer

# the longest style takes 34 tokens
MAX_NEW_TOKENS = 40
GREEDY = Sampling(MAX_NEW_TOKENS, temperature=0.0)
SAMPLED = Sampling(MAX_NEW_TOKENS)


def run(config: DemoConfig, parser: Parser) -> int:
    """Runs all stages and reports them; returns the exit status."""
    start = time.perf_counter()
    try:
        demo = Demo(config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    hint = "and the same command with --resume True continues"
    if status := run_to_the_end(demo.run, f"finished stages are in {demo.directory}/, {hint}"):
        return status
    stages = demo.stages
    (demo.directory / "report.md").write_text(markdown(stages), "utf-8")
    print("\n".join(plain(stages)))
    if config.plot:
        unless_missing(draw_demo, demo.directory, demo.directory / "curves.png")
    seconds = time.perf_counter() - start
    threads = torch.get_num_threads()
    unit = "thread" if threads == 1 else "threads"
    print(f"\n{seconds:.0f} s on {threads} {unit}; all results are in {demo.directory}/")
    return 0


class Demo:
    """Task, tokenizer and run directory shared by the stages."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.trainer_config = config.trainer(SAMPLED)
        self.directory = Path(config.output)
        self.metrics_path = self.directory / "metrics.jsonl"
        self.tokenizer = decimals.build_tokenizer()
        functions = {name: find_reward(name) for name in ("accuracy", "format")}
        self.reward = FunctionReward(self.tokenizer, functions, {"format": 0.2})
        pairs = decimals.held_out_pairs(config.held_out)
        self.excluded = decimals.with_swapped(pairs)
        self.held_out = [decimals.to_problem(pair, self.tokenizer) for pair in pairs]
        self.traps = [problem for problem in self.held_out if problem.tag == "trap"]
        self.stages: list[Stage] = []

    def run(self) -> list[Stage]:
        """Trains, measures and saves every stage that was asked for, in order.

        Raises:
            ValueError: the run directory cannot be used; the base is too weak, see `check_base`.
            Interrupted: by a signal during reinforcement learning, which is saved.
        """
        self.config.check_here()
        if self.config.resume:
            self.read_stages()
        else:
            clear(self.directory)
        self.write_config()
        stages = {"zero": ["R1-Zero"], "r1": ["SFT", "R1"], "both": ["R1-Zero", "SFT", "R1"]}
        done = [stage.name for stage in self.stages]
        for name in ["base", *stages[self.config.stages]]:
            if name not in done:
                self.measure(name, self.build(name))
            if name == "base":
                self.check_base()
        return self.stages

    def build(self, name: str) -> PreTrainedModel:
        """The model of a stage, trained from that of the stage before it."""
        if name == "base":
            return self.base_model()
        if name == "SFT":
            return self.cold_start(self.base_model())
        if name == "R1-Zero":
            return self.reinforce(self.base_model(), name)
        return self.reinforce(LlamaForCausalLM.from_pretrained(self.directory / "sft"), name)

    def write_config(self) -> None:
        """Writes config.json: the options and the environment."""
        environment = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
        record = {"options": asdict(self.config), "environment": environment}
        text = json.dumps(record, indent=2) + "\n"
        (self.directory / "config.json").write_text(text, "utf-8")

    def read_stages(self) -> None:
        """Reads the finished stages of an interrupted run; drops the records of the others."""
        if (results := self.directory / "results.json").exists():
            self.stages = [Stage(**stage) for stage in json.loads(results.read_text("utf-8"))]
        done = [stage.name for stage in self.stages]
        keep_records(self.metrics_path, lambda r: r["stage"] in done or "result" not in r)

    def base_model(
        self, name: str = "base", sizes: Mapping[str, int] = decimals.SIZES
    ) -> PreTrainedModel:
        """A model of the corpus: trained once, then read from its folder in the run directory."""
        config, folder = self.config, self.directory / name
        training = SupervisedConfig(
            steps=config.base_steps,
            batch_size=32,
            learning_rate=3e-3,
            warmup_steps=min(20, config.base_steps - 1),
            prompt_loss=True,
        )
        source = inspect.getsource(decimals)
        recipe = f"{config.seed} {config.held_out} {training} {sizes} {source}"
        fingerprint = hashlib.sha256(recipe.encode()).hexdigest()
        marker = folder / "fingerprint.txt"
        if marker.exists() and marker.read_text("utf-8") == fingerprint:
            return LlamaForCausalLM.from_pretrained(folder)

        rng = random.Random(f"{config.seed}/corpus")
        count = training.steps * training.batch_size
        texts = decimals.draw_texts(count, decimals.CORPUS, rng, self.excluded)
        model = decimals.build_model(self.tokenizer, config.seed, sizes)
        train_supervised(model, self.encode(texts), training, seed=config.seed, label=name)
        self.save(model, name)
        marker.write_text(fingerprint, "utf-8")
        return model

    def cold_start(self, model: PreTrainedModel) -> PreTrainedModel:
        """Trains a model for a few steps on long chains of thought that are right."""
        config = self.config
        training = SupervisedConfig(
            steps=config.sft_steps,
            batch_size=32,
            learning_rate=2e-4,
            warmup_steps=min(2, config.sft_steps - 1),
            prompt_loss=False,
        )
        rng = random.Random(f"{config.seed}/cold start")
        texts = decimals.draw_texts(256, decimals.COLD_START, rng, self.excluded)
        train_supervised(model, self.encode(texts), training, seed=config.seed, label="SFT")
        return model

    def reinforce(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        """Trains a model by GRPO."""
        trainer = Trainer(
            model,
            self.draw_problems,
            self.reward,
            self.trainer_config,
            metrics_path=self.metrics_path,
            checkpoints=self.directory / "checkpoints" / name.lower(),
            label=name,
            samples=Samples(self.tokenizer, self.directory / "samples.jsonl", label=name),
            console=open_console(self.config.console),
        )
        if self.config.resume:
            trainer.resume()
        trainer.train(lambda: self.progress(trainer))
        return model

    def progress(self, trainer: Trainer) -> dict[str, float]:
        """Held-out figures during training: sampled, and greedy on the traps."""
        sampled = evaluate(trainer.model, self.held_out, self.reward, SAMPLED)
        greedy = evaluate(trainer.model, self.traps, self.reward, GREEDY)
        if trainer.samples:
            trainer.samples.look(trainer.steps_done, self.held_out, sampled)
        return {**sampled.metrics, "greedy_accuracy/trap": greedy.metrics["accuracy"]}

    def measure(self, name: str, model: PreTrainedModel) -> None:
        """Saves the model, its held-out figures and its answers to the showcase.

        A stage in results.json is finished, so that file is written last, in one piece.
        """
        greedy = evaluate(model, self.held_out, self.reward, GREEDY)
        sampled = evaluate(model, self.held_out, self.reward, SAMPLED)
        shown = greedy.completions[: len(decimals.SHOWCASE)]
        answers = self.tokenizer.batch_decode(shown, skip_special_tokens=True)
        self.stages.append(Stage(name, greedy.metrics, sampled.metrics, answers))
        if name != "base":
            self.save(model, name)
        figures = {"greedy": greedy.metrics, "sampled": sampled.metrics}
        append_json(self.metrics_path, {"stage": name, "result": figures})
        results = json.dumps([asdict(stage) for stage in self.stages], indent=2)
        write_whole(self.directory / "results.json", results)
        shutil.rmtree(self.directory / "checkpoints" / name.lower(), ignore_errors=True)

    def check_base(self) -> None:
        """Raises ValueError if the base has not learnt the easy pairs.

        Reinforcement learning amplifies what a model can already do; one that cannot copy digits
        gets no reward.
        """
        reached = self.stages[0].greedy["accuracy/easy"]
        if reached < self.config.gate:
            raise ValueError(
                f"base model: expected a greedy accuracy of at least {self.config.gate} on pairs "
                f"that are no trap, got {reached:.3f}; train it longer with --base_steps (now "
                f"{self.config.base_steps}) or lower --gate"
            )

    def draw_problems(self, count: int, rng: random.Random) -> list[Problem]:
        """Training problems, none of them held out."""
        pairs = decimals.draw_training_pairs(count, rng, self.excluded)
        return [decimals.to_problem(pair, self.tokenizer) for pair in pairs]

    def encode(self, texts: Sequence[tuple[str, str]]) -> list[Example]:
        """Token ids of (question, completion) texts, with the end token."""
        questions, completions = zip(*texts, strict=True)
        end = [self.tokenizer.eos_token_id]
        return [
            Example(question, completion + end)
            for question, completion in zip(
                self.tokenizer(list(questions))["input_ids"],
                self.tokenizer(list(completions))["input_ids"],
                strict=True,
            )
        ]

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Model and tokenizer, ready for `AutoModelForCausalLM.from_pretrained`."""
        folder = self.directory / name.lower()
        with writing(folder):
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
