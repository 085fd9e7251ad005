"""The options of the commands that train, on the command line or in a YAML file; imports no torch.

`RunConfig` is for `python -m grpo_core.reinforce`; those of the demo task are in `demo.config`.
Those of a training step are the trainer's, see `TrainingOptions`; here they get other defaults.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo_core.cli.options import (
    RECIPE_NAMES,
    check_at_least,
    check_file,
    check_filters,
    check_more_than_0,
    check_package,
    load_from_file,
    nearest,
    option,
    require,
)
from grpo_core.runs.directory import check_output
from grpo_core.trainer.config import TrainerConfig, TrainingOptions

if TYPE_CHECKING:
    from grpo_core.objective.objective import Objective
    from grpo_core.trainer.rollout import Sampling

GYM = "reasoning_gym:"
PROMPTS = 16  # per step
# the names that `trainer.named_rewards` knows
REWARDS = ("math", "accuracy", "format", "brevity")


@dataclass(frozen=True)
class CommandOptions:
    """Options of every command that trains."""

    output: str = option("", "Run directory; one with a run in it is refused.")
    overwrite: bool = option(False, "Delete the run that is in --output and start a new one.")
    threads: int = option(0, "CPU threads; 0: torch's choice. Use 1 on a busy machine.")

    def check_here(self) -> None:
        """Raises ValueError if the run directory cannot be used."""
        check_output(self)


@dataclass(frozen=True)
class LearningOptions(CommandOptions, TrainingOptions):
    """Options of the commands that run one trainer."""

    resume: bool = option(False, "Continue the interrupted run in --output.")
    objective: str = option(
        "dapo",
        f"Loss: path.py:name of your own Objective, or one of {', '.join(RECIPE_NAMES)}.",
    )
    beta: float | None = option(
        None,
        "Weight of the KL to the initial model. Default: 0 for a recipe; an objective from a file "
        "keeps its own.",
    )
    console: Literal["rich", "plain", "off"] = option(
        "rich",
        "rich: a live table (plain lines without rich or a terminal); plain: a line per step; "
        "off: nothing.",
    )

    def check_learning(self, prompts: int) -> None:
        """Raises ValueError if one of these options is out of its range.

        Args:
            prompts: per step.
        """
        self.check(prompts)
        check_at_least(self, 0, "threads")
        is_right = self.beta is None or 0 <= self.beta < math.inf
        require(is_right, "beta", "a finite number >= 0", self.beta)
        check_objective(self.objective)

    def trainer_config(self, **more: Any) -> TrainerConfig:
        """The trainer's configuration, with all options that it shares with the command."""
        shared = {each.name: getattr(self, each.name) for each in fields(TrainingOptions)}
        return TrainerConfig(**shared, **more)


@dataclass(frozen=True)
class RunConfig(LearningOptions):
    """Reinforcement learning of a causal language model on verifiable rewards."""

    model: str = option("", "Folder or hub name of a causal language model of transformers.")
    data: str = option(
        "",
        "Prompts: a .jsonl, .json or .parquet file with the columns prompt and answer, a data set "
        f"of the datasets library, or {GYM}NAME.",
    )
    teacher: str = option(
        "",
        "Folder or hub name of a model with the same tokens, the reference of the objective: for "
        "opd, --beta or --teacher_coef.",
    )
    teacher_coef: float = option(
        0.0, "c of each token's advantage A - c (logp - teacher's logp), for objectives of tokens."
    )
    interpolation: float | None = option(
        None,
        "Divergence of opd: 1 is the reverse KL, 0 the forward KL, between them Jensen-Shannon. "
        "Default: the objective's own.",
    )
    output: str = "runs/reinforce"
    held_out: int = option(
        0, "Number of problems, the first ones, that are for evaluation and never trained on."
    )
    rewards: list[str] = option(
        [],
        f"Any of {', '.join(REWARDS)}, and path.py:function; none to learn from a teacher alone. "
        "Default: math format; none with --objective opd or --environment.",
    )
    reward_weights: list[float] = option(
        [],
        "Weight of each reward, in their order. Default: 1 and 0.2 for math format, else 1 each.",
    )
    environment: str = option(
        "",
        "path.py:name of what answers the model's turns, such as a tool: a class with reset and "
        "step. Its rewards are added to --rewards, then none by default.",
    )
    max_turns: int = option(8, "Turns of the model in a completion, with --environment.")
    system: str = option("", "System message before every prompt; needs a chat template.")
    template: str = option("", 'Prompt template, for example "Question: {prompt}".')
    longest_prompt: int = option(0, "Leave out prompts of more tokens; 0: keep all.")
    steps: int = 100
    prompts: int | None = option(
        None, "Prompts per step. Default: 16, or the next multiple of the number of processes."
    )
    epochs: int = 1
    learning_rate: float = 1e-6
    max_new_tokens: int = option(
        512, "Longest completion, in tokens. Keep the truncated share below 20%."
    )
    temperature: float = option(1.0, "Temperature of rollouts and loss.")
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens that together have this probability, above 0 to 1, "
        "such as 0.95; 1: from all.",
    )
    top_k: int = option(0, "Sample from the k most likely tokens, such as 512; 0: from all.")
    min_p: float = option(
        0.0,
        "Sample from tokens with at least this share of the largest probability, 0 to below 1, "
        "such as 0.05; 0: from all.",
    )
    replay_sampling: bool = option(
        True,
        "Compute log-probabilities over the tokens that top_p, top_k and min_p kept, as the "
        "sampler did; False: over the vocabulary.",
    )
    attention: str = option(
        "",
        "Attention of transformers: sdpa, eager, flex_attention, flash_attention_2. Default: the "
        "model's own.",
    )
    rollout: Literal["transformers", "vllm", "vllm-server"] = option(
        "transformers",
        "Sampling engine: the model itself, vLLM on the same GPU, or a vLLM server.",
    )
    rollout_url: str = option(
        "http://localhost:8000",
        "URL of the vLLM server, or of several with commas between them, which share the prompts.",
    )
    rollout_weights: Literal["nccl", "folder"] = option(
        "nccl",
        "How vLLM gets weights: by NCCL (CUDA IPC on the same GPU), or as files in rollout_folder.",
    )
    rollout_folder: str = option(
        "", "Folder for weights as files, the same path for trainer and vLLM servers."
    )
    rollout_memory: float = option(0.4, "Share of the GPU's memory that vLLM takes.")
    rollout_sleep: bool = option(False, "Free vLLM's GPU memory between rollouts.")
    sampler_correction: Literal["none", "truncate", "zero", "reject"] = option(
        "none",
        "Importance weight for a sampling engine that differs from the trainer: truncate it at "
        "the bounds; or, outside of them, zero the token or reject it.",
    )
    sampler_level: Literal["token", "sequence", "geometric"] = option(
        "token", "Importance weight per token, or per sequence as a product or geometric mean."
    )
    sampler_low: float = option(0.0, "Lower bound of the importance weight.")
    sampler_high: float = option(2.0, "Upper bound of the importance weight.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    lora_rank: int = option(0, "Train a LoRA adapter of this rank (needs peft); 0: all weights.")
    evaluate_every: int = 10
    eval_samples: int = option(
        1,
        "Completions per held-out problem and evaluation; 2 or more also give avg@k, pass@k and a "
        "greedy evaluation.",
    )
    eval_k: list[int] = option(
        [], "The k of pass@k, each at most eval_samples. Default: eval_samples."
    )
    eval_temperature: float = option(0.0, "Temperature of evaluations; 0: that of the rollouts.")
    samples: int = option(4, "Held-out completions kept in samples.jsonl per evaluation.")
    log: list[Literal["tensorboard", "trackio", "wandb"]] = option(
        [], "Also log to tensorboard, trackio or wandb."
    )

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            require(bool(getattr(self, name)), name, "a value", "nothing")
        self._check_teacher()
        count, weights = len(self.rewards), self.reward_weights
        expected = f"{count}, one for each of {self.rewards}"
        require(len(weights) in (0, count), "reward_weights", expected, len(weights))
        is_finite = all(map(math.isfinite, weights))
        require(is_finite, "reward_weights", "finite numbers", weights)
        check_at_least(self, 0, "held_out", "longest_prompt", "lora_rank", "samples")
        check_at_least(self, 1, "prompts_per_step", "max_new_tokens", "eval_samples", "max_turns")
        check_at_least(self, 0, "eval_temperature", "sampler_low")
        check_more_than_0(self, "temperature", "rollout_memory")
        check_filters(self)
        low, high = self.sampler_low, self.sampler_high
        require(low <= high, "sampler_high", f"at least sampler_low = {low}", high)
        require(self.rollout_memory <= 1, "rollout_memory", "at most 1", self.rollout_memory)
        is_awake = not (self.asynchronous and self.rollout_sleep)
        require(is_awake, "rollout_sleep", "False with --asynchronous 1", self.rollout_sleep)
        has_single_turns = not (self.asynchronous and self.environment)
        require(has_single_turns, "asynchronous", "0 with --environment", self.asynchronous)
        expected = "a folder with --rollout_weights folder, else none"
        is_right = (self.rollout_weights == "folder") == bool(self.rollout_folder)
        require(is_right, "rollout_folder", expected, self.rollout_folder or "none")
        for k in self.eval_k:
            expected = f"1 to {self.eval_samples}, the eval_samples"
            require(1 <= k <= self.eval_samples, "eval_k", expected, k)
        self.check_learning(self.prompts_per_step)

    @property
    def needs_rewards(self) -> bool:
        return self.objective != "opd" and not self.teacher_coef

    def _check_teacher(self) -> None:
        """Whether something is learnt, from rewards or a teacher; resolves `rewards`."""
        has_others = self.objective == "opd" or self.environment
        default = ["none"] if has_others else ["math", "format"]
        rewards = self.rewards or default
        object.__setattr__(self, "rewards", [] if rewards == ["none"] else rewards)
        check_at_least(self, 0, "teacher_coef")
        has_rewards = bool(self.rewards or self.environment)
        require(has_rewards or not self.needs_rewards, "rewards", "at least one", "none")
        is_right = has_rewards or self.dynamic_sampling == "off"
        require(is_right, "dynamic_sampling", "off without rewards", self.dynamic_sampling)
        uses = "--objective opd, --beta or --teacher_coef"
        require(self.needs_rewards or bool(self.teacher), "teacher", f"a model for {uses}", "none")
        # the objective of a file may have a KL term
        is_used = self.beta or self.objective not in RECIPE_NAMES or not self.needs_rewards
        require(not self.teacher or bool(is_used), "teacher", f"none without {uses}", self.teacher)

    @property
    def prompts_per_step(self) -> int:
        """As given, else 16 or the next multiple of the number of processes."""
        if self.prompts is not None:
            return self.prompts
        return -(-PROMPTS // process_count()) * process_count()

    @property
    def weights(self) -> list[float]:
        """One for each reward."""
        default = [1.0, 0.2] if self.rewards == ["math", "format"] else [1.0] * len(self.rewards)
        return self.reward_weights or default

    def check_here(self) -> None:
        """Raises ValueError or ModuleNotFoundError for what this machine lacks.

        Processes, packages, files and the run directory; model and data are read later.
        """
        self._check_processes()
        self._check_rewards()
        self._check_sources()
        for name in self.log:
            check_package("log", name)
        if self.lora_rank:
            check_package("lora_rank", "peft")
        if self.rollout == "vllm":
            check_package("rollout", "vllm", "'vllm>=0.28'")
        code = [("rewards", name) for name in self.rewards] + [("objective", self.objective)]
        code.append(("environment", self.environment))
        files = [(name, given.rpartition(":")[0]) for name, given in code]
        read = [(name, getattr(self, name)) for name in ("model", "teacher", "data")]
        check_output(self, *read, *files)

    def _check_processes(self) -> None:
        """Whether the options suit the number of processes."""
        count, launched = process_count(), "WORLD_SIZE" in os.environ
        require(self.shard == "ddp" or launched, "shard", "ddp, or a start by torchrun", self.shard)
        expected = f"a multiple of {count}, the processes"
        require(self.prompts_per_step % count == 0, "prompts", expected, self.prompts)
        if count > 1:
            where = f"on {count} processes"
            require(self.loss == "fused", "loss", f"fused {where}", self.loss)
            expected = f"transformers or vllm-server {where}"
            require(self.rollout != "vllm", "rollout", expected, self.rollout)
            is_shared = not self.asynchronous or self.rollout == "vllm-server"
            expected = f"vllm-server with --asynchronous 1 {where}"
            require(is_shared, "rollout", expected, self.rollout)

    def _check_rewards(self) -> None:
        """Whether rewards and environment are built in, with their package, or in a file."""
        for name in self.rewards:
            if name in REWARDS:
                continue
            path, expected = name.rpartition(":")[0], f"{', '.join(REWARDS)} or path.py:function"
            require(path.endswith(".py"), "rewards", expected, repr(name) + nearest(name, REWARDS))
            check_file("rewards", path)
        if name := self.environment:
            path = name.rpartition(":")[0]
            require(path.endswith(".py"), "environment", "path.py:name", repr(name))
            check_file("environment", path)
        # the data sets of reasoning-gym have their own scoring
        if "math" in self.rewards and not self.data.startswith(GYM):
            check_package("rewards: math", "math_verify", "math-verify")

    def _check_sources(self) -> None:
        """Whether local data and a local model exist; names on the hub are tried later."""
        kind = Path(self.data).suffix
        if self.data.startswith(GYM):
            check_package("data", "reasoning_gym", "reasoning-gym")
        else:
            if kind in (".jsonl", ".json", ".parquet"):
                check_file("data", self.data)
            if kind not in (".jsonl", ".json"):
                check_package("data", "datasets")
        for role in ("model", "teacher"):
            name = getattr(self, role)
            # names on the hub are NAME or ORGANISATION/NAME
            is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
            folder = Path(name)
            if is_path and not folder.is_dir():
                expected = "a folder or a name of the hub"
                raise ValueError(f"{role}: expected {expected}, found no {folder}")
            if name and folder.is_dir() and not (folder / "config.json").exists():
                raise ValueError(f"{role}: expected a model, found no config.json in {folder}")

    def trainer(self, sampling: Sampling) -> TrainerConfig:
        """The trainer's configuration."""
        from grpo_core.kernels import surrogates
        from grpo_core.objective.off_policy import SamplerCorrection

        objective = find_objective(self.objective, self.beta)
        if self.interpolation is not None:
            objective = objective.replace(interpolation=self.interpolation)
        if self.sampler_correction != "none":
            correction = SamplerCorrection(
                self.sampler_level, self.sampler_correction, self.sampler_low, self.sampler_high
            )
            has_ratio = objective.surrogate.function is not surrogates.reinforce
            expected = "none with --asynchronous 1, since the objective's ratio is to the sampler"
            is_right = not (self.asynchronous and has_ratio)
            require(is_right, "sampler_correction", expected, self.sampler_correction)
            factor = replace(objective.factor, sampler=correction, current=bool(self.asynchronous))
            objective = objective.replace(factor=factor)
        prompts = self.prompts_per_step
        return self.trainer_config(
            objective=objective,
            prompts_per_step=prompts,
            sampling=sampling,
            teacher_coef=self.teacher_coef,
        )


def process_count() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_objective(name: str) -> None:
    """Raises ValueError unless this is a recipe or names a file that exists."""
    if name in RECIPE_NAMES:
        return
    path, expected = name.rpartition(":")[0], f"one of {', '.join(RECIPE_NAMES)} or path.py:name"
    got = repr(name) + nearest(name, RECIPE_NAMES)
    require(path.endswith(".py"), "objective", expected, got)
    check_file("objective", path)


def find_objective(name: str, beta: float | None, default: float = 0.0) -> Objective:
    """An objective: a recipe by its name, or from a file by path.py:name.

    Args:
        name: of either.
        beta: weight of the KL term, which is k3 if the objective has none. None means `default`
            for a recipe, and leaves an objective from a file, or without a policy term, as it is.
        default: weight of the KL term of a recipe.

    Raises:
        ValueError: there is no such objective.
    """
    check_objective(name)
    from grpo_core.objective.objective import Objective
    from grpo_core.objective.recipes import RECIPES

    objective = RECIPES[name] if name in RECIPES else load_from_file("objective", name)
    is_right, got = isinstance(objective, Objective), type(objective).__name__
    require(is_right, "objective", f"an Objective in {name}", got)
    if beta is None and (name not in RECIPES or not objective.has_policy_term):
        return objective
    beta = default if beta is None else beta
    return objective.replace(beta=beta, kl=(objective.kl or "k3") if beta > 0 else None)
