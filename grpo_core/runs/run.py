"""Reinforcement learning of a model on prompts, from the options of `reinforce` to results.json.

A run's directory holds config.json, metrics.jsonl, samples.jsonl, checkpoints, and at the end
results.json and the model in the `transformers` format (or peft's, for an adapter).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_core.cli.options import check_unchanged, read_resumed
from grpo_core.runs.console import open_console
from grpo_core.runs.engines import make_engine
from grpo_core.runs.loggers import open_logger
from grpo_core.runs.run_config import GYM, RunConfig, clear
from grpo_core.trainer.data import Epochs, fingerprint, problems_of, read_records
from grpo_core.trainer.distributed import barrier, in_group, is_main, rank, world
from grpo_core.trainer.evaluate import Evaluation, evaluate
from grpo_core.trainer.monitor import Metrics, write_whole, writing
from grpo_core.trainer.rewards import FunctionReward, find_reward, shown_name
from grpo_core.trainer.rollout import Problem, Sampling, positions_of
from grpo_core.trainer.rules import COMPARING, RULES, TAGS
from grpo_core.trainer.samples import Samples, shortened
from grpo_core.trainer.sharding import export
from grpo_core.trainer.tasks import reasoning_gym_task
from grpo_core.trainer.trainer import Trainer


class Run:
    """Model, data and reward of a run, made and checked before anything is trained."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.directory = config, Path(config.output)
        self.tokenizer = from_hub(AutoTokenizer, config.model)
        try:
            problems, self.reward = self.task()
        except (OSError, ValueError) as error:
            if str(error).partition(":")[0] in vars(config):
                raise
            raise ValueError(f"data: {error}") from error
        # of the held-out problems as well: checkpoints know only of those that are trained on
        self.data = {"data_fingerprint": fingerprint(problems)}
        if config.resume:
            file = self.directory / "config.json"
            check_unchanged(self.data, read_resumed(file), file)
        self.held_out, self.training = problems[: config.held_out], problems[config.held_out :]
        if not self.training:
            raise ValueError(
                f"held_out: expected fewer than the {len(problems)} problems, got {config.held_out}"
            )
        check_positions(config, max(len(problem.prompt) for problem in problems))
        self.model = load_model(config, self.tokenizer)
        self.sampling = Sampling(config.max_new_tokens, config.temperature)
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
            engine=make_engine(config, self.model),
        )
        if world() > 1:
            # dropout is every process's own
            torch.manual_seed(config.seed + rank())

    def task(self) -> tuple[list[Problem], FunctionReward]:
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
            # its own scoring takes the place of comparing answers
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
        dropped = sorted({*TAGS} & {*tokenizer.all_special_tokens})
        if dropped and {*RULES} & {*config.rewards}:
            raise ValueError(
                f"rewards: expected a tokenizer that leaves {', '.join(TAGS)} in a text, this one "
                f"has {dropped} among its special tokens"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: expected names that differ, got {names}")
        weights = dict(zip(names, config.weights, strict=True))
        reward = FunctionReward(tokenizer, dict(zip(names, functions, strict=True)), weights)
        reward.check(problems)
        return problems, reward

    def train(self) -> None:
        """From the start or the last checkpoint to results.json and the model."""
        if self.config.resume:
            self.trainer.resume()
        elif is_main():
            clear(self.directory)
        barrier()
        self.write("config.json", asdict(self.config) | self.data)
        if self.held_out and not self.trainer.steps_done:
            self.write("before.json", self.measured())
        self.trainer.train(self.look if self.held_out else None)
        with writing(self.directory / "model"):
            export(self.model, self.directory / "model")
        after = self.measured() if self.held_out else {}
        if is_main():
            self.tokenizer.save_pretrained(self.directory / "model")
        if is_main() and after:
            before = json.loads((self.directory / "before.json").read_text("utf-8"))
            stages = {"before": before, "after": after}
            self.write("results.json", stages)
            print("\n".join(table(stages)))
        if is_main():
            print(f"all of it in {self.directory}/")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """A file of the run directory, by the main process."""
        if is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self.directory / name, json.dumps(content, indent=2) + "\n")

    def look(self) -> Metrics:
        """Held-out figures on the way, at the temperature of the rollouts; keeps some answers."""
        found = self.sampled()
        assert self.trainer.samples is not None
        self.trainer.samples.look(self.trainer.steps_done, self.held_out, found)
        if self.config.eval_samples == 1:
            return found.metrics
        greedy = self.greedy().metrics
        return {f"greedy_{name}": greedy[name] for name in found.scores.parts} | found.metrics

    def greedy(self) -> Evaluation:
        """The most likely answer to every held-out problem."""
        return self.evaluated(Sampling(self.config.max_new_tokens, temperature=0.0))

    def sampled(self) -> Evaluation:
        """As many answers to each as the options say."""
        config = self.config
        temperature = config.eval_temperature or config.temperature
        sampling = Sampling(config.max_new_tokens, temperature)
        return self.evaluated(sampling, samples=config.eval_samples, k=config.eval_k)

    def evaluated(
        self, sampling: Sampling, *, samples: int = 1, k: Sequence[int] = ()
    ) -> Evaluation:
        """Held-out problems, answered by whoever writes the completions of the training."""
        model, held_out, draw = self.model, self.held_out, self.trainer.draw
        return evaluate(model, held_out, self.reward, sampling, samples=samples, k=k, draw=draw)

    def measured(self) -> dict[str, Metrics]:
        """Held-out figures, greedy and sampled."""
        return {"greedy": self.greedy().metrics, "sampled": self.sampled().metrics}


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The policy: whole, or beneath an adapter; with the tokenizer's end token if it names none."""
    # shards go to their device one by one; a whole model may not fit there
    on_gpu = torch.cuda.is_available() and not (in_group() and config.shard == "fsdp")
    device = "cuda" if on_gpu else "cpu"
    settings = {"dtype": torch.float32, "attn_implementation": config.attention or None}
    model: Any = from_hub(AutoModelForCausalLM, config.model, **settings)
    model.to(device)
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
        # transformers saves one that contradicts itself only as it was loaded
        generation.validate(strict=True)
    if config.gradient_checkpointing:
        # the older name is deprecated where there is the newer one
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        model.train()
    if config.lora_rank:
        import peft

        torch.manual_seed(config.seed)
        adapter = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, adapter)
    policy: PreTrainedModel = model
    return policy


def from_hub(kind: Any, name: str, **settings: Any) -> Any:
    """`kind.from_pretrained`, whose errors name the option.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        return kind.from_pretrained(name, **settings)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model in {name}: {error}") from error


def check_positions(config: RunConfig, longest: int) -> None:
    """Raises ValueError if prompt and completion may be longer than the model can read.

    Args:
        config: names the model, whose weights are not read.
        longest: tokens of the longest prompt.
    """
    positions = positions_of(from_hub(AutoConfig, config.model))
    if positions is None or longest + config.max_new_tokens <= positions:
        return
    has = f"the model has {positions} positions and the longest prompt {longest} tokens"
    if longest < positions:
        raise ValueError(
            f"max_new_tokens: expected at most {positions - longest}, since {has}, got "
            f"{config.max_new_tokens}; --longest_prompt leaves long prompts out"
        )
    raise ValueError(
        f"longest_prompt: expected 1 to {positions - 1} less max_new_tokens, since {has}, got "
        f"{config.longest_prompt}"
    )


def table(stages: dict[str, dict[str, Metrics]]) -> list[str]:
    """Every held-out figure before and after, greedy and sampled; 80 columns."""
    places = [(when, how) for how in ("greedy", "sampled") for when in ("before", "after")]
    lines = [f"{'held out':36}" + "".join(f"{how:>11}" for _, how in places)]
    lines.append(" " * 36 + "".join(f"{when:>11}" for when, _ in places))
    for name in stages["before"]["sampled"]:
        values = [stages[when][how].get(name) for when, how in places]
        cells = (f"{'' if value is None else f'{value:.3f}':>11}" for value in values)
        lines.append(f"{shortened(name, 35):36}" + "".join(cells))
    return lines
