"""The options of `GRPOConfig` that `FusedGRPOTrainer` supports, and the preset of a trainer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from grpo_core.integrations.presets.trl import TrlOptions, TrlPreset, trl_preset

_LOSS = frozenset(field.name for field in dataclasses.fields(TrlOptions))
# options that act before the loss, after it, or in TRL's metrics
_AROUND = (
    "cache_implementation, cast_lm_head_to_fp32, chat_template_kwargs, disable_dropout, "
    "ds3_gather_for_generation, "
    "entropy_coef_delta, entropy_coef_max, entropy_coef_min, entropy_target, "
    "generation_batch_size, generation_kwargs, log_completions, log_completions_hub_repo, "
    "log_multimodal, log_unique_prompts, mask_truncated_completions, max_tool_calling_iterations, "
    "min_p, model_init_kwargs, num_completions_to_print, num_generations_eval, num_iterations, "
    "pad_to_multiple_of, ref_model_mixup_alpha, ref_model_sync_steps, repetition_penalty, "
    "router_aux_loss_coef, shuffle_dataset, sync_ref_model, top_k, top_p, "
    "transformers_continuous_batching_config, trust_remote_code, use_adaptive_entropy, "
    "use_transformers_continuous_batching, use_transformers_paged, vllm_enable_sleep_mode, "
    "vllm_gpu_memory_utilization, vllm_group_port, vllm_importance_sampling_cap, "
    "vllm_max_model_length, vllm_mode, vllm_model_impl, vllm_server_base_url, vllm_server_host, "
    "vllm_server_port, vllm_server_timeout, vllm_structured_outputs_regex, "
    "vllm_tensor_parallel_size"
)
# options of GRPOConfig that the fast level supports, except for the values in `unsupported_option`
SUPPORTED = _LOSS | frozenset(_AROUND.split(", "))
# entries of a micro-batch that the fast level reads
_INPUTS = (
    "prompt_ids, prompt_mask, completion_ids, completion_mask, tool_mask, advantages, "
    "num_items_in_batch, old_per_token_logps, ref_per_token_logps, importance_sampling_ratio, "
    "sampling_per_token_logps"
)
INPUTS = frozenset(_INPUTS.split(", "))


def unsupported_option(trainer: Any) -> tuple[str, str] | None:
    """(name, reason) of the first option that the fast level does not support, or None."""
    args = trainer.args
    theirs = {field.name: field for field in dataclasses.fields(type(args))}
    inherited = {field.name for field in dataclasses.fields(_training_arguments(type(args)))}
    for name in sorted(theirs.keys() - inherited - SUPPORTED):
        if getattr(args, name) != theirs[name].default:
            return name, "not known here"
    if args.torch_compile:
        return "torch_compile", "a compiled forward cannot contain the loss"
    try:
        options_of(trainer)
    except ValueError as error:
        return str(error).partition(":")[0], str(error)
    if trainer.top_entropy_quantile < 1 and trainer.accelerator.num_processes > 1:
        return "top_entropy_quantile", "TRL takes the threshold over the tokens of all processes"
    if trainer.loss_type == "vespo" and options_of(trainer).corrects:
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        if (low is not None and low > 1) or (high is not None and high < 1):
            return (
                "vllm_importance_sampling_clip_max",
                "TRL counts masked positions where the bounds exclude 1",
            )
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        return "peft_config", "prompt learning adds positions to the sequences"
    return None


def options_of(trainer: Any) -> TrlOptions:
    """The current options of the loss; callbacks may change them during training.

    Raises:
        ValueError: a value that `preset("trl", ...)` refuses.
    """
    values = {name: getattr(trainer.args, name) for name in _LOSS}
    attributes = _LOSS & vars(trainer).keys() - {"epsilon_high", "reward_weights", "scale_rewards"}
    values |= {name: getattr(trainer, name) for name in attributes}
    values |= {"epsilon": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        values["entropy_coef"] = 0.0
    if isinstance(values["reward_weights"], list):
        values["reward_weights"] = tuple(values["reward_weights"])
    return TrlOptions(**values)


def preset_of(trainer: Any, *, training: bool) -> TrlPreset:
    """The preset of the trainer's current options and accumulation window."""
    window = trainer.current_gradient_accumulation_steps if training else None
    return _preset(options_of(trainer), window)


@functools.lru_cache(maxsize=64)
def _preset(options: TrlOptions, window: int | None) -> TrlPreset:
    preset = trl_preset(**vars(options))
    return preset.in_evaluation() if window is None else preset.accumulating(window)


def _training_arguments(kind: type) -> type:
    """Returns transformers' `TrainingArguments` among the base classes."""
    return next(base for base in kind.__mro__ if base.__name__ == "TrainingArguments")
