"""The model of a run and the sampling engine beside it, as the options of `reinforce` say."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.runs.config import RunConfig
from grpo_core.trainer.distributed import in_group
from grpo_core.trainer.engine import Engine
from grpo_core.trainer.generation import positions_of
from grpo_core.trainer.vllm.engine import VllmEngine
from grpo_core.trainer.vllm.server import VllmServer


def from_hub(kind: Any, name: str, **settings: Any) -> Any:
    """`kind.from_pretrained`, with errors that name the option.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name, **settings)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model in {name}: {error}") from error


def check_positions(config: RunConfig, longest: int) -> None:
    """Raises ValueError if prompt and completion may be longer than the model can read.

    Args:
        config: names the model, of which only the configuration is read.
        longest: tokens of the longest prompt.
    """
    positions = positions_of(from_hub(AutoConfig, config.model))
    if positions is None or longest + config.max_new_tokens <= positions:
        return
    raise ValueError(
        f"max_new_tokens: expected at most {positions - longest}, since the model has {positions} "
        f"positions and the longest prompt {longest} tokens, got {config.max_new_tokens}; "
        "--longest_prompt leaves long prompts out"
    )


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The policy, with a LoRA adapter if asked for.

    It gets the tokenizer's end token if it has none.
    """
    # FSDP moves a model to the GPU shard by shard; the whole of it may not fit there
    on_gpu = torch.cuda.is_available() and not (in_group() and config.shard == "fsdp")
    settings = {"dtype": torch.float32, "attn_implementation": config.attention or None}
    model: Any = from_hub(AutoModelForCausalLM, config.model, **settings)
    model.to("cuda" if on_gpu else "cpu")
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


def make_engine(config: RunConfig, model: PreTrainedModel, keeps: bool = False) -> Engine | None:
    """The sampling engine; None for the model itself.

    Args:
        config: of the run.
        model: the policy.
        keeps: whether completions come with the ids that the filters kept.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError, ConnectionError: the engine or the server cannot be used with these options.
    """
    if config.rollout == "transformers":
        return None
    if config.rollout == "vllm-server":
        return VllmServer(config.rollout_url, model, keeps=keeps)
    longest = config.longest_prompt + config.max_new_tokens if config.longest_prompt else None
    return VllmEngine(
        config.model,
        model,
        memory=config.rollout_memory,
        longest=longest,
        sleep=config.rollout_sleep,
        keeps=keeps,
    )
