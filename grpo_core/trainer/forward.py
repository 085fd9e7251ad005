"""Forward passes over packed rows: loss, log-probabilities, and the reference policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.linear.model import (
    HeadOutput,
    LogpRequest,
    LossRequest,
    ReferenceRequest,
    has_fused_head,
    with_fused_head,
    without_fused_head,
)
from grpo_core.loss.fused_loss import LossOutput, fused_loss, token_logp
from grpo_core.loss.reference import reference_loss
from grpo_core.trainer.batch import Batch, TokenRows
from grpo_core.trainer.config import Shard, TrainerConfig
from grpo_core.trainer.distributed import in_group
from grpo_core.trainer.generation import evaluation_mode
from grpo_core.trainer.sharding import shard_model, unwrap_peft


@torch.no_grad()
def packed_logp(model: PreTrainedModel, rows: TokenRows, config: TrainerConfig) -> Tensor:
    """Log-probabilities of the targets over what they were sampled from, [N] float32."""
    temperature = config.sampling.temperature
    with autocast(rows, config):
        if has_fused_head(model):
            request = LogpRequest(
                rows.target, rows=rows.hidden_mask, temperature=temperature, kept=rows.kept
            )
            logp: Tensor = model(**rows.inputs, request=request).logp
            return logp
        logits = rows.logits(model)
    return token_logp(logits, rows.target, temperature=temperature, kept=rows.kept).logp


def packed_loss(
    policy: Any,
    part: Batch,
    divisor: float | None,
    config: TrainerConfig,
    reference: PreTrainedModel | None = None,
) -> HeadOutput | LossOutput:
    """The objective on the rows of a microbatch, with gradient.

    Args:
        policy: a model with a fused head, wrapped or not; for the other losses the model itself.
        divisor: see `distributed.loss_divisor`.
        reference: the reference policy; its distributions are used by kl="exact" only.
    """
    rows, objective = part.rows, config.objective
    normalizer: Tensor | float | None = divisor
    if part.group_rows is not None and divisor is not None:
        # prompt_mean, also of groups that microbatches split
        objective = objective.replace(aggregation="token_sum")
        normalizer = divisor * part.group_rows
    terms: dict[str, Any] = {
        "objective": objective,
        "advantage": part.advantage,
        "old_logp": part.old_logp,
        "ref_logp": part.ref_logp,
        "kept": rows.kept,
        # numbered without those that have no row, since ids are below N
        "sequence_id": rows.sequence.diff(prepend=rows.sequence[:1]).ne(0).cumsum(0),
        "normalizer": normalizer,
        "temperature": config.sampling.temperature,
    }
    if config.objective.factor.needs_sampler:
        terms["sampler_logp"] = part.sampler_logp
    if reference is not None and config.objective.kl == "exact":
        terms |= reference_distributions(reference, rows, config)
    with autocast(rows, config):
        if config.loss == "fused":
            request = LossRequest(rows.target, rows=rows.hidden_mask, **terms)
            output: HeadOutput = policy(**rows.inputs, request=request)
            return output
        logits = rows.logits(policy)
    if "ref_logits" in terms:
        terms["ref_logits"] = terms["ref_logits"][:, : logits.shape[1]]
    if config.loss == "naive":
        return reference_loss(logits, rows.target, **terms)
    # nothing else reads these logits, so the gradient may overwrite them
    return fused_loss(logits, rows.target, inplace=True, **terms)


def autocast(rows: TokenRows, config: TrainerConfig) -> torch.autocast:
    """Matrix products in bfloat16 if configured; weights, optimizer and loss stay float32."""
    return torch.autocast(rows.ids.device.type, torch.bfloat16, enabled=config.autocast)


def reference_of(
    model: PreTrainedModel,
    shard: Shard = "ddp",
    teacher: PreTrainedModel | None = None,
    keep_root: bool = False,
) -> PreTrainedModel:
    """The reference model, frozen: the teacher, or a copy of the model as it is now.

    Without a teacher, a model with an adapter is its own reference, with the adapter off.

    Args:
        model: the policy, before it is sharded; with a fused head if its loss needs one.
        shard: with "fsdp" the reference is sharded as well.
        teacher: gets a fused head, cut to the vocabulary of the model.
        keep_root: keep its head gathered after a forward, for a loss over the whole vocabulary.

    Raises:
        ValueError: the teacher's vocabulary is smaller than the model's.
    """
    if teacher is None and hasattr(model, "peft_config"):
        return model
    reference = copy.deepcopy(model) if teacher is None else _with_vocabulary_of(model, teacher)
    reference.requires_grad_(False).eval()
    is_sharded = in_group() and shard == "fsdp"
    return shard_model(reference, keep_root=keep_root) if is_sharded else reference


def _with_vocabulary_of(model: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher with a fused head of the model's vocabulary size V; further rows are padding."""
    V, rows = (unwrap_peft(m).get_output_embeddings().weight.shape[0] for m in (model, teacher))
    if has_fused_head(model):
        V = unwrap_peft(model).fused_head.vocabulary or V
    if rows < V:
        raise ValueError(f"teacher: expected a head of V = {V} rows or more, got {rows}")
    if has_fused_head(teacher):
        without_fused_head(teacher)
    return with_fused_head(teacher, vocabulary=V)


def reference_logp(reference: PreTrainedModel, rows: TokenRows, config: TrainerConfig) -> Tensor:
    """`packed_logp` under the reference model."""
    with adapter_off(reference):
        return packed_logp(reference, rows, config)


@torch.no_grad()
def reference_distributions(
    reference: PreTrainedModel, rows: TokenRows, config: TrainerConfig
) -> dict[str, Any]:
    """Loss arguments with the reference's distributions: hidden states and head, or its logits."""
    with adapter_off(reference), autocast(rows, config):
        if config.loss == "fused":
            request = ReferenceRequest(rows=rows.hidden_mask)
            output: HeadOutput = reference(**rows.inputs, request=request)
            return output.reference
        return {"ref_logits": reference(**rows.inputs).logits[rows.hidden_mask]}


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the adapter of a trained model, if it has one, is off."""
    is_trained = any(weight.requires_grad for weight in model.parameters())
    if not hasattr(model, "peft_config") or not is_trained:
        yield
        return
    with model.disable_adapter(), evaluation_mode(model):  # type: ignore[operator]
        yield
