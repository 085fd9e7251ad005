"""The model of a run and the sampling engine beside it, as the options of `reinforce` say."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_core.runs.config import RunConfig
from grpo_core.trainer.distributed import in_group
from grpo_core.trainer.engine import Engine
from grpo_core.trainer.generation import positions_of
from grpo_core.trainer.vllm.engine import VllmEngine
from grpo_core.trainer.vllm.server import VllmServer


def from_hub(kind: Any, name: str, option: str = "model", **settings: Any) -> Any:
    """`kind.from_pretrained`, with errors that name the option.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name, **settings)
    except (ImportError, OSError, ValueError) as error:
        expected = f"a causal language model in {name}"
        raise ValueError(f"{option}: expected {expected}: {error}") from error


def check_positions(config: RunConfig, longest: int) -> None:
    """Raises ValueError if prompt and completion may be longer than a model can read.

    Args:
        config: names model and teacher, of which only the configuration is read.
        longest: tokens of the longest prompt.
    """
    for option in ("model", "teacher"):
        name = getattr(config, option)
        positions = positions_of(from_hub(AutoConfig, name, option)) if name else None
        if positions is not None and longest + config.max_new_tokens > positions:
            raise ValueError(
                f"max_new_tokens: expected at most {positions - longest}, since the {option} has "
                f"{positions} positions and the longest prompt {longest} tokens, got "
                f"{config.max_new_tokens}; --longest_prompt leaves long prompts out"
            )


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The policy, with a LoRA adapter if asked for.

    It gets the tokenizer's end token if it has none.
    """
    model = _load(config, "model", torch.float32)
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
        # transformers refuses to save a changed configuration that contradicts itself
        generation.validate(strict=True)
    if config.gradient_checkpointing:
        # newer versions deprecate the older name
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


def load_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The teacher, in the dtype of its checkpoint; None if there is none.

    Raises:
        ValueError: it has other tokens than the policy.
    """
    if not config.teacher:
        return None
    theirs = from_hub(AutoTokenizer, config.teacher, "teacher").get_vocab()
    for number, token in sorted((n, token) for token, n in tokenizer.get_vocab().items()):
        if theirs.get(token) != number:
            raise ValueError(
                f"teacher: expected the tokens of {config.model}, where {token!r} is {number}, got "
                f"{theirs.get(token)}"
            )
    teacher: PreTrainedModel = _load(config, "teacher", "auto")
    return teacher


def _load(config: RunConfig, option: str, dtype: torch.dtype | str) -> Any:
    """The model that an option names, on its device."""
    # FSDP moves a model to the GPU shard by shard; the whole of it may not fit there
    on_gpu = torch.cuda.is_available() and not (in_group() and config.shard == "fsdp")
    settings = {"dtype": dtype, "attn_implementation": config.attention or None}
    model = from_hub(AutoModelForCausalLM, getattr(config, option), option, **settings)
    return model.to("cuda" if on_gpu else "cpu")


def make_engine(
    config: RunConfig, model: PreTrainedModel, longest: int, keeps: bool = False
) -> Engine | None:
    """The sampling engine; None for the model itself.

    Args:
        config: of the run.
        model: the policy.
        longest: tokens of the longest prompt and its completion.
        keeps: whether completions come with the ids that the filters kept.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError, ConnectionError: the engine or the server cannot be used with these options.
    """
    if config.rollout == "transformers":
        return None
    folder = config.rollout_folder or None
    if config.rollout == "vllm-server":
        return VllmServer(config.rollout_url, model, longest=longest, folder=folder, keeps=keeps)
    return VllmEngine(
        config.model,
        model,
        memory=config.rollout_memory,
        longest=longest,
        folder=folder,
        sleep=config.rollout_sleep,
        keeps=keeps,
    )
