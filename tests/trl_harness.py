"""The real `trl.GRPOTrainer` as functions: log-probabilities or rewards in, TRL's own numbers out.

Every call runs TRL's unmodified code on a trainer which TRL's own constructor made from the given
options; only what would need a language model is answered from the arguments:

    trl_loss           `_compute_loss`, with `_get_per_token_logps_and_entropies` answered
    trl_advantages     `_generate_and_score_completions`, with `_generate` answered
    trl_sampler_ratio  the same, with both answered

vLLM's engine, telemetry and the network are left out. Written against TRL 1.16.0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

PAD, EOS, WORD = 0, 1, 2
# accelerate reads that of a package anew for each of its many questions
_metadata = functools.cache(importlib.metadata.metadata)


@dataclass(frozen=True)
class TrlCase:
    """What `_compute_loss` is given for one micro-batch; None leaves the key out of its `inputs`.

    Args:
        logp: policy log-probabilities, [B, T] float32 or float64, nats.
        entropy: policy entropies, [B, T], nats.
        advantages: [B] or [B, T].
        completion_mask: 1 where there is a token of the completion, [B, T].
        old_logp: [B, T]; None as TRL leaves it in on-policy steps, where the ratio is 1.
        ref_logp: [B, T]; needed where `beta` is not 0.
        tool_mask: 0 where a tool wrote the token, [B, T].
        importance_sampling_ratio: trainer over sampler, [B, T] or [B, 1]; read where `use_vllm`,
            and by vespo wherever it is given.
        sampling_logp: the sampler's log-probabilities, [B, T]; read by the off-policy mask.
        num_items_in_batch: unmasked tokens of the whole generation batch; None counts this
            micro-batch's.
        gradient_accumulation_steps: micro-batches in this window, which TRL calls
            `current_gradient_accumulation_steps`; also the option's default.
        training: False for the loss of `evaluate`.
    """

    logp: Tensor
    entropy: Tensor
    advantages: Tensor
    completion_mask: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    tool_mask: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None
    sampling_logp: Tensor | None = None
    num_items_in_batch: float | None = None
    gradient_accumulation_steps: int = 1
    training: bool = True


@dataclass(frozen=True)
class TrlResult:
    """The loss, its gradients [B, T] (zeros where TRL's graph has none), and what TRL logged."""

    loss: float
    dlogp: Tensor
    dentropy: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrlAdvantages:
    """Advantages [B] float32, and what TRL logged."""

    advantages: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrlSamplerRatio:
    """Trainer over sampler, [B, T] or [B, 1], the tokens it counts, and what TRL logged."""

    ratio: Tensor
    num_items_in_batch: int
    metrics: dict[str, float]


def trl_loss(case: TrlCase, **options: Any) -> TrlResult:
    """TRL's loss of one micro-batch, its gradients and metrics.

    Args:
        case: the tensors; they are not written to.
        options: arguments of `GRPOConfig` by their names there.
    Raises:
        ValueError: `use_adaptive_entropy`, whose coefficient depends on earlier calls.
    """
    if options.get("use_adaptive_entropy"):
        raise ValueError("use_adaptive_entropy: expected False, the trainer is shared by calls")
    options.setdefault("gradient_accumulation_steps", case.gradient_accumulation_steps)
    trainer = _trainer(1, **options)
    trainer.current_gradient_accumulation_steps = case.gradient_accumulation_steps
    logp = case.logp.detach().clone().requires_grad_()
    entropy = case.entropy.detach().clone().requires_grad_()
    _answer_logp(trainer, logp, entropy)
    trainer.model.train(case.training)
    loss = trainer._compute_loss(trainer.model, _inputs(case))
    dlogp, dentropy = torch.autograd.grad(
        loss, (logp, entropy), allow_unused=True, materialize_grads=True
    )
    mode = "train" if case.training else "eval"
    return TrlResult(loss.item(), dlogp, dentropy, _take_metrics(trainer, mode))


def trl_advantages(rewards_per_func: Tensor, num_generations: int, **options: Any) -> TrlAdvantages:
    """TRL's advantages of one generation batch.

    Args:
        rewards_per_func: [B, F], groups in consecutive rows; NaN where the function returns None.
        num_generations: rows of one group; B is a multiple of it.
        options: arguments of `GRPOConfig` by their names there.
    """
    B, F = rewards_per_func.shape
    trainer = _trainer(F, num_generations=num_generations, **options)
    scored = _score(trainer, [[WORD, EOS]] * B, None, None, rewards_per_func)
    return TrlAdvantages(scored["advantages"], _take_metrics(trainer))


def trl_sampler_ratio(
    old_logp: Tensor,
    sampling_logp: Tensor,
    completion_mask: Tensor,
    tool_mask: Tensor | None = None,
    **options: Any,
) -> TrlSamplerRatio:
    """TRL's correction ratio between the trainer's and vLLM's probabilities.

    Args:
        old_logp: the trainer's log-probabilities, [B, T], B >= 2.
        sampling_logp: vLLM's, [B, T]; NaN where it has none. TRL holds them in float32.
        completion_mask: [B, T], ones then zeros; TRL pads to the longest row, so one row is full.
        tool_mask: 0 where a tool wrote the token, [B, T].
        options: arguments of `GRPOConfig` by their names there; `use_vllm` is set.
    Raises:
        ValueError: a `completion_mask` that TRL could not have made.
    """
    B, T = completion_mask.shape
    lengths = completion_mask.long().sum(1)
    prefix = torch.arange(T) < lengths[:, None]
    if lengths.max() != T or not torch.equal(prefix, completion_mask.bool()):
        raise ValueError("completion_mask: expected rows of ones then zeros, one of them all ones")
    trainer = _trainer(1, **{"num_generations": B, "use_vllm": True} | options)
    _answer_logp(trainer, old_logp, None)
    completions = [[WORD] * (n - 1) + [EOS] * (n > 0) for n in lengths.tolist()]
    sampled = [
        [None if math.isnan(value) else value for value in row[:n]]
        for row, n in zip(sampling_logp.tolist(), lengths.tolist(), strict=True)
    ]
    tools = None
    if tool_mask is not None:
        rows = zip(tool_mask.long().tolist(), lengths.tolist(), strict=True)
        tools = [row[:n] for row, n in rows]
    scored = _score(trainer, completions, tools, sampled, torch.zeros(B, 1))
    return TrlSamplerRatio(
        scored["importance_sampling_ratio"],
        int(scored["num_items_in_batch"]),
        _take_metrics(trainer),
    )


def _inputs(case: TrlCase) -> dict[str, Tensor]:
    """The dictionary `_compute_loss` takes; the token ids in it go to the answered function."""
    mask = case.completion_mask.long()
    tokens = case.num_items_in_batch
    if tokens is None:
        tokens = (mask if case.tool_mask is None else mask * case.tool_mask.long()).sum().item()
    optional = {
        "tool_mask": None if case.tool_mask is None else case.tool_mask.long(),
        "old_per_token_logps": case.old_logp,
        "ref_per_token_logps": case.ref_logp,
        "importance_sampling_ratio": case.importance_sampling_ratio,
        "sampling_per_token_logps": case.sampling_logp,
    }
    return {
        "prompt_ids": torch.full((len(mask), 1), WORD),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.full_like(mask, WORD),
        "completion_mask": mask,
        "advantages": case.advantages,
        # TRL's is int64, which its clamp turns into float32; float64 keeps a float64 case exact
        "num_items_in_batch": torch.tensor(tokens, dtype=case.logp.dtype),
    } | {name: tensor for name, tensor in optional.items() if tensor is not None}


def _score(
    trainer: GRPOTrainer,
    completions: list[list[int]],
    tool_mask: list[list[int]] | None,
    sampling_logp: list[list[float | None]] | None,
    rewards_per_func: Tensor,
) -> dict[str, Tensor]:
    """`_generate_and_score_completions` of completions that need no generating."""
    columns = [[None if math.isnan(r) else r for r in row] for row in rewards_per_func.tolist()]
    examples = [
        {"prompt": "word"} | {f"reward_{i}": reward for i, reward in enumerate(row)}
        for row in columns
    ]

    def generate(prompts: list[str]) -> tuple[Any, ...]:
        texts = ["word"] * len(prompts)
        prompt_ids = [[WORD]] * len(prompts)
        return prompt_ids, completions, tool_mask, texts, sampling_logp, {}, None, []

    trainer._generate = generate
    return trainer._generate_and_score_completions(examples)


def _answer_logp(trainer: GRPOTrainer, logp: Tensor, entropy: Tensor | None) -> None:
    """Puts the given tensors in the place of a pass through the model."""

    def given(
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        assert logp.shape == (input_ids.shape[0], logits_to_keep)
        assert not kwargs.get("compute_entropy") or entropy is not None
        return logp, entropy, None

    trainer._get_per_token_logps_and_entropies = given


def _take_metrics(trainer: GRPOTrainer, mode: str = "train") -> dict[str, float]:
    """What this call logged: TRL appends each name once."""
    logged = {name: values for name, values in trainer._metrics[mode].items() if values}
    trainer._metrics[mode].clear()
    assert all(len(values) == 1 for values in logged.values()), logged
    return {name: float(values[0]) for name, values in logged.items()}


def _reward_function(index: int) -> Callable[..., list[float | None]]:
    """Returns the data set's column of that number."""

    def reward(**columns: Any) -> list[float | None]:
        return columns[f"reward_{index}"]

    reward.__name__ = f"reward_{index}"
    return reward


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """A directory, removed at exit, with a tiny model: TRL loads the reference model from disk."""
    home = tempfile.TemporaryDirectory(prefix="trl-harness-")
    config = Qwen2Config(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(home.name)
    return home


@functools.cache
def _model() -> Qwen2ForCausalLM:
    """That model, read once."""
    return Qwen2ForCausalLM.from_pretrained(_home().name)


def _kept_model(name: str, **kwargs: Any) -> Qwen2ForCausalLM:
    """In the place of TRL's reading it from disk for every trainer, none of which changes it."""
    assert name == _home().name
    return _model()


@functools.cache
def _one_prompt() -> Dataset:
    """The data set that every trainer has and none reads."""
    return Dataset.from_dict({"prompt": ["word"]})


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undoes TRL's seeding, so that a test draws the same numbers whether a trainer was cached."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(legacy_numpy)


def _trainer(functions: int, **options: Any) -> GRPOTrainer:
    """A trainer with so many reward functions, built by TRL from the options and kept."""
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    trainer = _kept_trainer(functions, tuple(sorted(frozen.items())))
    # all share the model, and TRL looks there for the mode
    trainer.model.train()
    return trainer


@functools.lru_cache(maxsize=64)
def _kept_trainer(functions: int, options: tuple[tuple[str, Any], ...]) -> GRPOTrainer:
    """What `_trainer` keeps."""
    home = _home().name
    defaults = {"num_generations": 2, "output_dir": home, "report_to": "none"}
    on_this_cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    chosen = defaults | on_this_cpu | dict(options)
    # the generation batch has to hold whole groups
    chosen.setdefault("per_device_train_batch_size", chosen["num_generations"])
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "word": WORD}, "<pad>"))
    with (
        _random_state_kept(),
        mock.patch.object(grpo_trainer, "VLLMGeneration"),
        mock.patch.object(grpo_trainer, "create_model_from_path", _kept_model),
        mock.patch.object(GRPOTrainer, "_send_telemetry"),
        mock.patch.object(importlib.metadata, "metadata", _metadata),
    ):
        trainer = GRPOTrainer(
            model=home,
            reward_funcs=[_reward_function(i) for i in range(functions)],
            args=GRPOConfig(**chosen),
            train_dataset=_one_prompt(),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
            ),
        )
    return trainer
