"""The loss of a micro-batch of TRL's GRPO trainer, inside the model's forward.

There the hooks of DDP and FSDP run. TRL's forward for per-token outputs runs the backbone and
gathers the head. At the hook where TRL computes log-probabilities, `fused_linear_loss` computes
loss and gradients instead. The wrapped forward puts the loss into the output.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from grpo_core.integrations.presets.trl import TrlPreset, make_preset
from grpo_core.integrations.presets.trl_options import TrlOptions
from grpo_core.integrations.trl_hook import LogProbPatch, known_hook
from grpo_core.linear.head import LinearHead
from grpo_core.linear.loss import fused_linear_loss
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.objective import Objective

KEYWORD = "grpo_core_request"
_LOSS = frozenset(field.name for field in dataclasses.fields(TrlOptions))
# options that act before the loss, after it, or in TRL's metrics
_AROUND = """
    cache_implementation cast_lm_head_to_fp32 chat_template_kwargs disable_dropout
    ds3_gather_for_generation entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
    generation_batch_size generation_kwargs log_completions log_completions_hub_repo log_multimodal
    log_unique_prompts mask_truncated_completions max_tool_calling_iterations min_p
    model_init_kwargs num_completions_to_print num_generations_eval num_iterations
    pad_to_multiple_of ref_model_mixup_alpha ref_model_sync_steps repetition_penalty
    router_aux_loss_coef shuffle_dataset sync_ref_model top_k top_p
    transformers_continuous_batching_config trust_remote_code use_adaptive_entropy
    use_transformers_continuous_batching use_transformers_paged vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap vllm_max_model_length
    vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size
"""
# options of GRPOConfig that the fast level supports, except for the values in `unsupported_option`
SUPPORTED = _LOSS | frozenset(_AROUND.split())


def unsupported_option(trainer: Any) -> str | None:
    """ "name: reason" of the first option that the fast level does not support, or None."""
    args = trainer.args
    theirs = {field.name: field for field in dataclasses.fields(type(args))}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in sorted(theirs.keys() - inherited - SUPPORTED):
        if getattr(args, name) != theirs[name].default:
            return f"{name}: not known here"
    if args.torch_compile:
        return "torch_compile: a compiled forward cannot contain the loss"
    try:
        options = options_of(trainer)
    except ValueError as error:
        return str(error)
    if options.top_entropy_quantile < 1 and trainer.accelerator.num_processes > 1:
        return "top_entropy_quantile: TRL takes the threshold over the tokens of all processes"
    if options.loss_type == "vespo" and options.corrects:
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        if (low is not None and low > 1) or (high is not None and high < 1):
            return (
                "vllm_importance_sampling_clip_max: TRL counts masked positions where the bounds "
                "exclude 1"
            )
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        return "peft_config: prompt learning adds positions to the sequences"
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
    return TrlOptions(**values)


def preset_of(trainer: Any, *, training: bool) -> TrlPreset:
    """The preset of the trainer's current options and accumulation window."""
    preset = make_preset(options_of(trainer))
    if not training:
        return preset.in_evaluation()
    return preset.accumulating(trainer.current_gradient_accumulation_steps)


class TrlLossRequest:
    """The arguments of the loss of a padded micro-batch, and its result.

    Not a dataclass: FSDP casts the floating-point tensors in lists, mappings and dataclasses among
    the arguments of a forward.

    Args:
        objective: what is minimised.
        mask: [B, T] bool, the tokens of the loss: the last T positions of the model's input.
        normalizer, memory_budget: as in `fused_linear_loss`.
        vectors: its arguments of shape [B, T]: advantage, old_logp, ref_logp, sampler_logp.

    Attributes:
        out: the result; None before the forward.
    """

    def __init__(
        self,
        objective: Objective,
        mask: Tensor,
        normalizer: Tensor | float,
        vectors: dict[str, Tensor],
        memory_budget: int | None = None,
    ) -> None:
        self.objective, self.mask, self.normalizer = objective, mask, normalizer
        self.vectors, self.memory_budget = vectors, memory_budget
        self.out: LossOutput | None = None

    def labels(self, input_ids: Tensor) -> Tensor:
        """Returns [B, P + T] labels, -100 outside the mask."""
        labels = torch.full_like(input_ids, -100)
        T = self.mask.shape[1]
        labels[:, -T:] = torch.where(self.mask, input_ids[:, -T:], -100)
        return labels

    def compute(
        self,
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        temperature: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Computes the loss; returns logp and entropy without gradients, see `LogProbPatch`.

        The rows are all positions except the last of each sequence, or those of the mask.
        """
        B, T = self.mask.shape
        n, device = hidden.shape[0], hidden.device
        before = max(n // B - T, 0)
        is_padded = n == B * (before + T)
        mask = self.mask.to(device)
        if not is_padded and n != int(mask.sum()):
            raise RuntimeError(f"hidden: expected {B} sequences or {int(mask.sum())} rows, got {n}")

        def rows(vector: Tensor) -> Tensor:
            vector = vector.to(device)
            if is_padded:
                return nn.functional.pad(vector, (before, 0)).reshape(-1)
            return vector[mask]

        if is_padded:
            sequence = torch.arange(n, device=device) // (before + T)
        else:
            sequence = torch.arange(B, device=device)[:, None].expand(B, T)[mask]
            # without the sequences that have no row
            sequence = sequence.unique_consecutive(return_inverse=True)[1]
        vectors: dict[str, Any] = {name: rows(vector) for name, vector in self.vectors.items()}
        self.out = fused_linear_loss(
            hidden,
            head,
            target,
            objective=self.objective,
            mask=rows(mask) if is_padded else None,
            sequence_id=sequence,
            normalizer=self.normalizer,
            temperature=temperature,
            memory_budget=self.memory_budget,
            # TRL's metrics include masked tokens
            all_logp=True,
            **vectors,
        )
        return self.out.logp, self.out.entropy, None, None, None


def add_fused_loss(model: nn.Module) -> None:
    """Wraps the forward of a model that has TRL's fused head.

    With the keyword `grpo_core_request` the forward returns TRL's output with the fused loss.
    """
    # unbound, so that a copy of the model calls its own forward
    inner = model.forward.__func__  # type: ignore[attr-defined]

    # `generate` reads the signature
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        request: TrlLossRequest | None = kwargs.pop(KEYWORD, None)
        if request is None:
            return inner(self, *args, **kwargs)
        with LogProbPatch(request.compute, known_hook()):
            output = inner(self, *args, fused_lm_head=True, **kwargs)
        if request.out is None:
            raise RuntimeError("forward: expected TRL's forward to compute log-probabilities")
        output.loss = request.out.loss
        return output

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
