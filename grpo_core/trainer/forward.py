"""Forward passes over packed rows: the loss and log-probabilities, by the model or from its logits.

Inside the model's forward where the loss is "fused", see `head`; hooks around it fire as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.linear.model import HeadOutput, LogpRequest, LossRequest
from grpo_core.loss.fused_loss import LossOutput, fused_loss, token_logp
from grpo_core.loss.reference import reference_loss
from grpo_core.trainer.batch import Batch, Rows
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.reference_model import adapter_off


@torch.no_grad()
def packed_logp(model: PreTrainedModel, rows: Rows, config: TrainerConfig) -> Tensor:
    """The target's log-probability at each row, [N] float32, without gradient."""
    temperature = config.sampling.temperature
    if config.loss != "fused":
        with precision(rows, config):
            logits = rows.logits(model)
        return token_logp(logits, rows.target, temperature=temperature).logp
    request = LogpRequest(rows.target, rows=rows.hidden_places, temperature=temperature)
    with precision(rows, config):
        logp: Tensor = model(**rows.inputs, request=request).logp
    return logp


def reference_logp(reference: PreTrainedModel, rows: Rows, config: TrainerConfig) -> Tensor:
    """The same by the policy that learning began with."""
    with adapter_off(reference):
        return packed_logp(reference, rows, config)


def packed_loss(
    policy: Any, part: Batch, divisor: float | None, config: TrainerConfig
) -> HeadOutput | LossOutput:
    """The objective, with gradient.

    Args:
        policy: a model with a fused head, or what is around it; for the other losses the model.
        part: a microbatch.
        divisor: see `shares.divisor`.
        config: the run.
    """
    rows = part.rows
    terms: dict[str, Any] = {
        "objective": config.objective,
        "advantage": part.advantage,
        "old_logp": part.old_logp,
        "ref_logp": part.ref_logp,
        "sequence_id": rows.sequence,
        "normalizer": divisor,
        "temperature": config.sampling.temperature,
    }
    if config.objective.factor.needs_sampler:
        terms["sampler_logp"] = part.sampler_logp
    if config.loss == "fused":
        request = LossRequest(rows.target, rows=rows.hidden_places, **terms)
        with precision(rows, config):
            found: HeadOutput = policy(**rows.inputs, request=request)
        return found
    with precision(rows, config):
        logits = rows.logits(policy)
    if config.loss == "naive":
        return reference_loss(logits, rows.target, **terms)
    # Nobody else reads these logits, so their gradient may take their place.
    return fused_loss(logits, rows.target, inplace=True, **terms)


def precision(rows: Rows, config: TrainerConfig) -> torch.autocast:
    """Of the matrix products; weights, optimizer and loss are float32 as ever."""
    return torch.autocast(rows.ids.device.type, torch.bfloat16, enabled=config.autocast)
