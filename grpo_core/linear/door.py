"""The door from hidden states: checks, the other policies' log-probabilities, then the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.linear.call import Other
from grpo_core.linear.checks import (
    autocast_dtype,
    check_accumulation,
    check_policy,
    check_target_shape,
    dtype_of_logits,
    stand_in,
    temperature_of_rows,
)
from grpo_core.linear.head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear.memory import Plan
from grpo_core.linear.reading import ScoreCall, score_rows
from grpo_core.linear.rows import loss_of_rows
from grpo_core.loss.compile import register_function, register_record
from grpo_core.loss.inputs import (
    LossInputs,
    Tokens,
    check_logits,
    check_target,
    find_unmasked,
    flatten_target,
)
from grpo_core.loss.outputs import LossOutput, TokenLogp


@register_record
@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """The arguments of `fused_linear_loss` that `fused_loss` does not have."""

    old_hidden: Tensor | None
    old_lm_head: Tensor | LinearHead | None
    ref_hidden: Tensor | None
    ref_lm_head: Tensor | LinearHead | None
    plan: Plan | None
    memory_budget: int | None
    logits_dtype: torch.dtype | None
    all_logp: bool
    accumulate_into: Tensor | None


register_record(LinearHead)


@register_function
def loss_from_hidden(
    hidden: Tensor, lm_head: Tensor | LinearHead, inputs: LossInputs, options: LinearOptions
) -> LossOutput:
    """`fused_linear_loss` outside of `torch.compile`."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    target = check_target_shape(inputs.target, hidden)
    kernels = choose_backend(inputs.backend, hidden)
    spec, old_logp, ref_logp = inputs.objective, inputs.old_logp, inputs.ref_logp
    old_hidden, old_lm_head = options.old_hidden, options.old_lm_head
    ref_hidden, ref_lm_head = options.ref_hidden, options.ref_lm_head
    plan, memory_budget, all_logp = options.plan, options.memory_budget, options.all_logp
    accumulate_into = options.accumulate_into
    logits = stand_in(hidden, head.V)
    heat, temperature = temperature_of_rows(inputs.temperature, target, inputs.validate)
    check_logits(logits, temperature, HEAD_DTYPES)
    dtype = dtype_of_logits(options.logits_dtype)
    autocast = autocast_dtype(hidden)
    inputs = replace(
        inputs,
        target=target,
        temperature=temperature,
        # of the same shape, which is all that is checked
        ref_logits=logits if spec.kl == "exact" and ref_hidden is not None else None,
    )
    check_policy("old", old_logp, old_hidden, old_lm_head, hidden)
    check_policy("ref", ref_logp, ref_hidden, ref_lm_head, hidden)
    vectors: dict[str, Any] = {"old_logp": old_logp, "ref_logp": ref_logp}
    others, reference = [], None
    if old_hidden is not None:
        others.append(_other("old", old_hidden, old_lm_head, head))
    if ref_hidden is not None:
        others.append(_other("ref", ref_hidden, ref_lm_head, head))
    if spec.kl == "exact":
        if ref_hidden is None and spec.beta:
            raise ValueError(
                f"ref_hidden: expected a tensor for kl = 'exact' and beta = {spec.beta}, got None"
            )
        if ref_hidden is not None:
            _, states, matrix = others.pop()
            if matrix.V != head.V:
                raise ValueError(
                    f"ref_lm_head: expected V = {head.V} words as in lm_head, got {matrix.V}"
                )
            reference = (states, matrix)
    if accumulate_into is not None:
        check_accumulation(accumulate_into, head, hidden, autocast, plan)
        plan = "fast"
    for other in others:
        # what is still to be found cannot be told from 0 by any check
        vectors[other.name] = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
    tokens = replace(inputs, **vectors).tokens(logits)
    early = [other for other in others if must_be_early(other, head, tokens)]
    late = tuple(other for other in others if not must_be_early(other, head, tokens))
    for name, states, matrix in early:
        every = spec.factor.needs_sampler or all_logp
        call = ScoreCall(
            target=flatten_target(target),
            valid=tokens.unmasked if every else tokens.unmasked & ~tokens.has_no_gradient(),
            temperature=float(temperature),
            heat=heat,
            plan=plan,
            memory_budget=memory_budget,
            logits_dtype=dtype,
            autocast=autocast,
            kernels=kernels,
        )
        vectors[name] = score_rows(states, matrix, call).over(target.numel())[0].view(target.shape)
    if early:
        tokens = replace(inputs, **vectors).tokens(logits)
    return loss_of_rows(
        hidden,
        head,
        tokens,
        target.shape,
        plan=plan,
        memory_budget=memory_budget,
        all_logp=all_logp,
        accumulate_into=accumulate_into,
        logits_dtype=dtype,
        autocast=autocast,
        temperature=float(temperature),
        heat=heat,
        kernels=kernels,
        reference=reference,
        others=late,
    )


@register_function
@torch.no_grad()
def logp_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    memory_budget: int | None,
    logits_dtype: torch.dtype | None,
    backend: Backend | None,
    validate: bool | None,
) -> TokenLogp:
    """`linear_token_logp` outside of `torch.compile`."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    target = check_target_shape(target, hidden)
    kernels = choose_backend(backend, hidden)
    logits = stand_in(hidden, head.V)
    heat, temperature = temperature_of_rows(temperature, target, validate)
    check_logits(logits, temperature, HEAD_DTYPES)
    check_target(logits, target, mask, validate)
    valid = find_unmasked(target, mask) & ((target >= 0) & (target < head.V)).reshape(-1)
    call = ScoreCall(
        target=flatten_target(target),
        valid=valid,
        temperature=float(temperature),
        heat=heat,
        plan=None,
        memory_budget=memory_budget,
        logits_dtype=dtype_of_logits(logits_dtype),
        autocast=autocast_dtype(hidden),
        kernels=kernels,
    )
    logp, entropy = score_rows(hidden, head, call).over(target.numel())
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


def _other(
    name: str, states: Tensor, matrix: Tensor | LinearHead | None, head: LinearHead
) -> Other:
    """Another policy, without a graph; its head is the policy's own unless one is given."""
    found = check_head(f"{name}_lm_head", head if matrix is None else matrix, states)
    return Other(
        f"{name}_logp",
        states.detach(),
        found.of(found.weight, found.bias, found.lora_A, found.lora_B),
    )


def must_be_early(other: Other, head: LinearHead, tokens: Tokens) -> bool:
    """Whether another policy's log-probabilities need a walk of their own before the loss's.

    That is where weights of other rows follow from them, and where the head's buffer is too small.
    """
    factor = tokens.objective.factor
    weighs = factor.needs_sampler and not factor.waits_for_logp(tokens.old_logp)
    return (weighs and other.name == "old_logp") or other.head.V > head.V
