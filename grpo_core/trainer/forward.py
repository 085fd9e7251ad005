"""Forward passes over packed rows: loss, log-probabilities, and the reference of the KL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.linear.model import HeadOutput, LogpRequest, LossRequest
from grpo_core.loss.fused_loss import LossOutput, fused_loss, token_logp
from grpo_core.loss.reference import reference_loss
from grpo_core.trainer.batch import Batch, TokenRows
from grpo_core.trainer.config import Shard, TrainerConfig
from grpo_core.trainer.distributed import in_group
from grpo_core.trainer.generation import evaluation_mode
from grpo_core.trainer.sharding import shard_model


@torch.no_grad()
def packed_logp(model: PreTrainedModel, rows: TokenRows, config: TrainerConfig) -> Tensor:
    """Log-probabilities of the targets over what they were sampled from, [N] float32."""
    temperature = config.sampling.temperature
    with autocast(rows, config):
        if config.loss == "fused":
            request = LogpRequest(
                rows.target, rows=rows.hidden_mask, temperature=temperature, kept=rows.kept
            )
            logp: Tensor = model(**rows.inputs, request=request).logp
            return logp
        logits = rows.logits(model)
    return token_logp(logits, rows.target, temperature=temperature, kept=rows.kept).logp


def packed_loss(
    policy: Any, part: Batch, divisor: float | None, config: TrainerConfig
) -> HeadOutput | LossOutput:
    """The objective on the rows of a microbatch, with gradient.

    Args:
        policy: a model with a fused head, wrapped or not; for the other losses the model itself.
        divisor: see `distributed.loss_divisor`.
    """
    rows = part.rows
    terms: dict[str, Any] = {
        "objective": config.objective,
        "advantage": part.advantage,
        "old_logp": part.old_logp,
        "ref_logp": part.ref_logp,
        "kept": rows.kept,
        "sequence_id": rows.sequence,
        "normalizer": divisor,
        "temperature": config.sampling.temperature,
    }
    if config.objective.factor.needs_sampler:
        terms["sampler_logp"] = part.sampler_logp
    with autocast(rows, config):
        if config.loss == "fused":
            request = LossRequest(rows.target, rows=rows.hidden_mask, **terms)
            output: HeadOutput = policy(**rows.inputs, request=request)
            return output
        logits = rows.logits(policy)
    if config.loss == "naive":
        return reference_loss(logits, rows.target, **terms)
    # nothing else reads these logits, so the gradient may overwrite them
    return fused_loss(logits, rows.target, inplace=True, **terms)


def autocast(rows: TokenRows, config: TrainerConfig) -> torch.autocast:
    """Matrix products in bfloat16 if configured; weights, optimizer and loss stay float32."""
    return torch.autocast(rows.ids.device.type, torch.bfloat16, enabled=config.autocast)


def reference_of(model: PreTrainedModel, shard: Shard = "ddp") -> PreTrainedModel:
    """The reference model: a frozen copy, or the model itself if it has an adapter to switch off.

    Call it before the policy is sharded; with "fsdp" the copy is sharded as well.
    """
    if hasattr(model, "peft_config"):
        return model
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    return shard_model(reference, keep_root=False) if in_group() and shard == "fsdp" else reference


def reference_logp(reference: PreTrainedModel, rows: TokenRows, config: TrainerConfig) -> Tensor:
    """`packed_logp` under the reference model."""
    with adapter_off(reference):
        return packed_logp(reference, rows, config)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model's adapter, if it has one, is off."""
    if not hasattr(model, "peft_config"):
        yield
        return
    with model.disable_adapter(), evaluation_mode(model):  # type: ignore[operator]
        yield
