"""The loss from hidden states where `torch.compile` traces it: plain Python around operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.linear import operators as linear_operators
from grpo_core.linear.autograd import check_reference
from grpo_core.linear.head import (
    HEAD_DTYPES,
    LinearHead,
    autocast_dtype,
    check_head,
    check_hidden,
    check_target_shape,
    dtype_of_logits,
    logits_like,
)
from grpo_core.linear.operators import POLICIES, TENSORS, LinearOutcome, head_numbers
from grpo_core.loss.fused_loss import LossOutput, TokenLogp
from grpo_core.loss.in_graph import host_tensor, measured_in_graph, traceable
from grpo_core.loss.inputs import LossInputs, Measured, check_logits


def loss_in_graph(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    inputs: LossInputs,
    *,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
    logits_dtype: torch.dtype | None,
    **options: Any,
) -> LossOutput:
    """`loss_from_hidden`, whose arguments these are.

    Raises:
        ValueError: as there, and an objective that was made inside of the graph.
    """
    spec, target = traceable(inputs.objective), inputs.target
    head = _checked(hidden, lm_head, target, inputs.temperature)
    reference = check_reference(inputs, head, hidden, ref_hidden, ref_lm_head)
    heads = [head, None if ref_lm_head is None or reference is None else reference[1]]
    given = dict(vars(inputs)) | options | {"ref_hidden": ref_hidden}
    normalizer, temperature = given["normalizer"], given.pop("temperature")
    divisor = normalizer if isinstance(normalizer, (int, float)) else None
    numbers = [number for one in heads for number in head_numbers(one)]
    enabled = torch.is_grad_enabled()
    wanted = [enabled and x is not None and x.requires_grad for x in (hidden, *head.tensors)]
    found = linear_operators.fused_linear_loss(
        *_arguments(
            linear_operators.ARGUMENTS,
            given
            | _tensors(heads)
            | {
                "hidden": hidden,
                "target": target,
                "numbers": host_tensor(
                    temperature, 1.0 if divisor is None else divisor, *numbers, *spec.numbers
                ),
                "wanted": wanted,
                "objective": spec.key,
                "normalizer": normalizer if divisor is None else None,
                "divides": divisor is not None,
                "logits_dtype": dtype_of_logits(logits_dtype),
                "autocast": autocast_dtype(hidden),
            },
        )
    )
    loss, *others_found = found
    outcome = LinearOutcome._make((loss, *(vector.detach() for vector in others_found)))
    has_old = given["old_logp"] is not None
    measured: Measured = measured_in_graph(
        spec,
        outcome.unmasked,
        outcome.bad_target,
        outcome.advantage,
        given | {"old_logp": outcome.old_logp if has_old else None},
    )
    shown = (vector.view(target.shape) for vector in outcome[1:6])
    logp, entropy, ratio, kl, factor = shown
    return LossOutput(
        loss,
        logp,
        entropy,
        ratio,
        kl,
        factor,
        measured,
        outcome.valid,
        outcome.dropped,
        _skipped=outcome.skipped,
    )


def logp_in_graph(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float,
    logits_dtype: torch.dtype | None,
    **given: Any,
) -> TokenLogp:
    """`linear_token_logp`, whose arguments these are."""
    head = _checked(hidden, lm_head, target, temperature)
    logp, entropy = linear_operators.linear_token_logp(
        *_arguments(
            linear_operators.LOGP_ARGUMENTS,
            given
            | _tensors([head])
            | {
                "hidden": hidden,
                "target": target,
                "numbers": host_tensor(temperature, *head_numbers(head)),
                "logits_dtype": dtype_of_logits(logits_dtype),
                "autocast": autocast_dtype(hidden),
            },
        )
    )
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


def _checked(
    hidden: Tensor, lm_head: Tensor | LinearHead, target: Tensor, temperature: float
) -> LinearHead:
    """The head, once shapes and dtypes fit; values are looked at inside of the operator."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    check_target_shape(target, hidden)
    check_logits(logits_like(hidden, head.V), temperature, HEAD_DTYPES)
    return head


def _tensors(heads: list[LinearHead | None]) -> dict[str, Any]:
    """Tensors and vocabularies of heads, in the order of `POLICIES`, as the operators take them."""
    found: dict[str, Any] = {}
    for policy, head in zip(POLICIES, heads, strict=False):
        tensors = (None,) * len(TENSORS) if head is None else head.tensors
        for k, name in enumerate(TENSORS):
            found[policy + name] = tensors[k]
        found[policy + "vocabulary"] = None if head is None else head.vocabulary
    return found


def _arguments(names: dict[str, str], values: dict[str, Any]) -> list[Any]:
    """The values in the order of an operator's arguments."""
    return [values[name] for name in names]
