"""`python -m grpo_core.reinforce`: reinforcement learning of a model of yours on prompts of yours.

    python -m grpo_core.reinforce --model Qwen/Qwen3-0.6B --data train.jsonl --rewards math format
    python -m grpo_core.reinforce run.yaml

A run's directory holds config.json, metrics.jsonl, samples.jsonl, checkpoints, and at the end
results.json and the model in the `transformers` format (or peft's, for an adapter).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from grpo_core.checkpoint import Interrupted, heeding_interrupts
from grpo_core.console import open_console
from grpo_core.data import Epochs, fingerprint, problems_of, read_records
from grpo_core.distributed import barrier, in_group, is_main, process_group, rank, world
from grpo_core.engines import make_engine
from grpo_core.evaluate import Evaluation, evaluate
from grpo_core.extras import extra
from grpo_core.loggers import open_logger
from grpo_core.monitor import Metrics, write_whole, writing
from grpo_core.named_rewards import COMPARING, RULES, find_reward
from grpo_core.options import check_unchanged, read_resumed
from grpo_core.parallel import export
from grpo_core.rewards import TAGS, FunctionReward, RewardError, shown_name
from grpo_core.rollout import Problem, Sampling
from grpo_core.run_config import RunConfig, check_resumed, clear
from grpo_core.samples import Samples
from grpo_core.tasks import reasoning_gym_task
from grpo_core.trainer import Trainer

GYM = "reasoning_gym:"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status."""
    parser = HfArgumentParser(RunConfig, prog="python -m grpo_core.reinforce")  # type: ignore[arg-type]
    given = list(sys.argv[1:] if arguments is None else arguments)
    with process_group(), heeding_interrupts():
        return _run(parser, given)


def _run(parser: HfArgumentParser, given: list[str]) -> int:
    """Reads the options and trains; returns the exit status."""
    try:
        if given and given[0].endswith((".yaml", ".yml")):
            # what follows on the command line counts more
            given = [*_from_file(Path(given[0])), *given[1:]]
        config = parser.parse_args_into_dataclasses(given)[0]
        run = Run(config)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(_told(error))
    try:
        run.train()
    except (FloatingPointError, RewardError) as error:
        say(f"\nstopped: {_told(error)}", error=True)
        return 1
    except OSError as error:
        # of this process alone: others may wait for it, so that the group has to stay open
        raise SystemExit(f"\nstopped: {error}") from error
    except (Interrupted, KeyboardInterrupt) as stop:
        say("\ninterrupted; the same command with --resume True goes on", error=True)
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    return 0


def say(line: str, *, error: bool = False) -> None:
    """A line on the terminal, once however many processes there are."""
    if is_main():
        print(line, file=sys.stderr if error else sys.stdout)


class Run:
    """Model, data and reward of a run, made and checked before anything is trained."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.directory = config, Path(config.output)
        if config.resume:
            check_resumed(config, self.directory)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model)
        problems, self.reward = self.task()
        # with the held-out ones: checkpoints know only of those that are trained on
        self.data = {"data_fingerprint": fingerprint(problems)}
        if config.resume:
            file = self.directory / "config.json"
            check_unchanged(self.data, read_resumed(file), file)
        self.held_out, self.training = problems[: config.held_out], problems[config.held_out :]
        if not self.training:
            raise ValueError(
                f"held_out: expected fewer than the {len(problems)} problems, got {config.held_out}"
            )
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
                size=config.held_out + config.steps * config.prompts,
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
        if dropped and {"math", *RULES} & {*config.rewards}:
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
        # a bar for every checkpoint would run through what the console draws
        logging.disable_progress_bar()
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
        say(f"all of it in {self.directory}/")

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
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, attn_implementation=config.attention or None
    )
    model.to(device)
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
        # transformers saves one that contradicts itself only as it was loaded
        generation.validate(strict=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if config.lora_rank:
        peft = extra("peft", "lora_rank: needs peft", "peft")
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


def table(stages: dict[str, dict[str, Metrics]]) -> list[str]:
    """Every held-out figure before and after, greedy and sampled."""
    heads = [f"{when} {how}" for how in ("greedy", "sampled") for when in ("before", "after")]
    lines = [f"{'held out':24}" + "".join(f"{head:>16}" for head in heads)]
    for name in stages["before"]["sampled"]:
        values = [
            stages[when][how].get(name)
            for how in ("greedy", "sampled")
            for when in ("before", "after")
        ]
        cells = (f"{'' if value is None else f'{value:.3f}':>16}" for value in values)
        lines.append(f"{name:24}" + "".join(cells))
    return lines


def _told(error: Exception) -> str:
    """The message; beneath it the traceback of what a reward has raised."""
    cause = error.__cause__ if isinstance(error, RewardError) else None
    if cause is None:
        return str(error)
    # without the line that calls it
    cause = cause.with_traceback(cause.__traceback__ and cause.__traceback__.tb_next)
    return f"{error}\n{''.join(format_exception(cause))}"


def _from_file(path: Path) -> list[str]:
    """The options of a YAML file as a command line has them; those that are null are not given."""
    options = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected options by name, got {type(options).__name__}")
    known = [option.name for option in fields(RunConfig)]
    if unknown := options.keys() - set(known):
        raise ValueError(f"{path}: expected options among {known}, got {sorted(map(str, unknown))}")
    words = []
    for name, value in options.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif not isinstance(value, list | None):
            # in one word, since a value may begin with a dash
            words.append(f"--{name}={value}")
    return words


if __name__ == "__main__":
    sys.exit(main())
