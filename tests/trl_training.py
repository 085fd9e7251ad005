"""Tiny trainers of the installed TRL: a two-layer model and a tokenizer of words, made here.

Stock TRL and ours are built from the same directory, so they start from the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(29))]
PAD, EOS = 0, 1
PROMPTS = ["w0 w1", "w2 w3 w4", "w5", "w6 w7 w8 w9"]
# accelerate reads that of a package anew for each of its many questions
_metadata = functools.cache(importlib.metadata.metadata)


@functools.cache
def home(name: str = "qwen2") -> Path:
    """A directory with one of `CONFIGS`' models and its tokenizer, removed at exit."""
    directory = tempfile.TemporaryDirectory(prefix="trl-training-")
    _kept.append(directory)
    save_model(Path(directory.name), name)
    return Path(directory.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "tied": (Qwen2Config, {"tie_word_embeddings": True}),
    # a soft cap of the logits; a scale of theirs; the loss of a router
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 4.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.4, "tie_word_embeddings": False}),
    "mixtral": (MixtralConfig, {"num_local_experts": 2, "router_aux_loss_coef": 0.3}),
}


def save_model(directory: Path, name: str) -> None:
    """Writes model and tokenizer."""
    kind, options = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shared: dict[str, Any] = {
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": None,
        }
        model = AutoModelForCausalLM.from_config(kind(**shared | options))
        # logits that tell words apart
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(12)
        model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def reward(completions: list[str], **_: Any) -> list[float]:
    """Likes low words and short completions: differs within a group, and is exact."""
    numbers = ([int(w[1:]) for w in c.split() if w.startswith("w")] for c in completions)
    return [sum(n < 12 for n in found) / 4 - len(found) / 8 for found in numbers]


@functools.cache
def _model(directory: str) -> PreTrainedModel:
    """The model of a directory, read once."""
    return AutoModelForCausalLM.from_pretrained(directory)


def _copy(directory: str, **_: Any) -> PreTrainedModel:
    """In the place of TRL's reading it from disk for every trainer."""
    return copy.deepcopy(_model(directory))


@functools.cache
def _prompts(times: int) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * times})


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without telemetry, and without reading the same files again and again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(importlib.metadata, "metadata", _metadata))
        for name in ("grpo", "rloo", "dpo", "kto", "sft"):
            module = importlib.import_module(f"trl.trainer.{name}_trainer")
            trainer = getattr(module, f"{name.upper()}Trainer")
            for owner, attribute, value in (
                (trainer, "_send_telemetry", mock.DEFAULT),
                (module, "create_model_from_path", _copy),
            ):
                if hasattr(owner, attribute):
                    stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def make_trainer(
    kind: type[Trainer],
    output: Path,
    *,
    model: str | Callable[[], Any] = "qwen2",
    peft: Any = None,
    config: type[TrainingArguments] = GRPOConfig,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of that class on the CPU in float32.

    Args:
        kind: TRL's or ours.
        output: where it may write.
        model: a name out of `CONFIGS`, or what makes a model.
        peft: a `peft.LoraConfig`, or None.
        config: of its options.
        more: arguments of the trainer; None means those of GRPO.
        options: of `config`.
    """
    chosen: dict[str, Any] = {
        "output_dir": str(output),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        # Adam would blow up the rounding of gradients that are 0
        "optim": "sgd",
        "learning_rate": 0.3,
    }
    if more is None:
        chosen |= {"num_generations": 2, "max_completion_length": 6}
        more = {"reward_funcs": reward, "train_dataset": _prompts(4), "eval_dataset": _prompts(1)}
    with quick():
        return kind(
            model=str(home(model)) if isinstance(model, str) else model(),
            args=config(**chosen | options),
            processing_class=tokenizer(),
            peft_config=peft,
            **more,
        )


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that may be trained."""
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """What it logged, step by step, but for times."""
    timed = ("step_time", "runtime", "per_second", "total_flos")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


@dataclass(frozen=True)
class Batch:
    """How a micro-batch is to be; lengths of completions, 0 for one that is wholly masked."""

    lengths: tuple[int, ...] = (5, 3, 1, 5)
    tools: bool = False  # a tool wrote some tokens
    per_token: bool = False  # advantages [B, T]
    old: bool = True  # old_per_token_logps are given
    seed: int = 0


def micro_batch(trainer: GRPOTrainer, kind: Batch) -> dict[str, Tensor]:
    """Inputs of `_compute_loss`, policies near the trainer's own."""
    g = torch.Generator().manual_seed(kind.seed)
    B, P, T = len(kind.lengths), 4, 5
    before = torch.tensor([4, 2, 1, 3])[:B]
    prompt_mask = (torch.arange(P) >= P - before[:, None]).long()
    completion_mask = (torch.arange(T) < torch.tensor(kind.lengths)[:, None]).long()
    prompt_ids = torch.randint(2, len(WORDS), (B, P), generator=g) * prompt_mask
    completion_ids = torch.randint(1, len(WORDS), (B, T), generator=g) * completion_mask
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt_ids, completion_ids], 1),
            torch.cat([prompt_mask, completion_mask], 1),
            T,
        )

    def near(policy: Tensor, size: float) -> Tensor:
        moved = (
            policy + size * torch.randn(B, T, generator=g) + size * torch.randn(B, 1, generator=g)
        )
        return moved * completion_mask

    shape = (B, T) if kind.per_token else (B,)
    inputs["advantages"] = torch.randn(shape, generator=g)
    inputs["advantages"][0] = 0.0
    old = near(logp, 0.3) if kind.old else logp
    if kind.old:
        inputs["old_per_token_logps"] = old
    if trainer.beta:
        inputs["ref_per_token_logps"] = near(old, 0.2)
    mask = completion_mask
    if kind.tools:
        inputs["tool_mask"] = (torch.rand(B, T, generator=g) < 0.7).long()
        mask = mask * inputs["tool_mask"]
    if trainer.use_vllm:
        sampling = near(old, 0.2)
        inputs["sampling_per_token_logps"] = sampling
        ratio = ((old - sampling) * mask).exp()
        if trainer.vllm_importance_sampling_mode.startswith("sequence"):
            ratio = ((old - sampling) * mask).sum(1, keepdim=True).exp()
        high = trainer.vllm_importance_sampling_clip_max
        outside = ratio > high
        truncates = trainer.vllm_importance_sampling_mode.endswith("truncate")
        inputs["importance_sampling_ratio"] = ratio.masked_fill(outside, high if truncates else 0)
    # of a generation batch of several such
    inputs["num_items_in_batch"] = 3 * mask.sum() + 1
    return inputs


@dataclass(frozen=True)
class Outcome:
    """A loss, the gradients by name, and what was logged."""

    loss: float
    gradients: dict[str, Tensor | None]
    metrics: dict[str, list[float]]


def outcome(trainer: GRPOTrainer, inputs: dict[str, Any], window: int, training: bool) -> Outcome:
    """What `_compute_loss` makes of a micro-batch."""
    trainer.current_gradient_accumulation_steps = window
    trainer.model.train(training)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    named = trainer.model.named_parameters()
    gradients = {n: p.grad for n, p in named if p.requires_grad}
    metrics = trainer._metrics["train" if training else "eval"]
    found = {name: list(values) for name, values in metrics.items()}
    metrics.clear()
    return Outcome(loss.item(), gradients, found)
