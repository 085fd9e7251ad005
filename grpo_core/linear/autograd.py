"""The loss from hidden states after the public signature: checks, choice of rows, autograd.

Rows whose weight is 0 or that can have no gradient (`Tokens.has_no_gradient`) are left out before
the first product. Gradients are made in the forward, see `chunks`, and returned by the first
backward; a second backward makes them again. In float16 they stay float32 until grad_output, a loss
scale, is known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import choose_backend
from grpo_core.kernels.records import Rows
from grpo_core.linear.chunks import (
    Gradients,
    LinearCall,
    Workspace,
    loss_over_chunks,
    loss_with_frozen_head,
    scatter_rows,
)
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
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.linear.matmuls import Plan
from grpo_core.linear.vocab_slices import loss_over_slices
from grpo_core.loss.compile import register_function
from grpo_core.loss.inputs import LossInputs, Tokens
from grpo_core.loss.outputs import LossOutput


@register_function
def loss_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    inputs: LossInputs,
    *,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
    plan: Plan | None,
    memory_budget: int | None,
    logits_dtype: torch.dtype | None,
    all_logp: bool,
) -> LossOutput:
    """`fused_linear_loss` outside of `torch.compile`."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    target = check_target_shape(inputs.target, hidden)
    logits = logits_like(hidden, head.V)
    reference = check_reference(inputs, head, hidden, ref_hidden, ref_lm_head)
    exact = reference is not None and inputs.objective.kl == "exact"
    if exact:
        # of the same shape, which is all that is checked
        inputs = replace(inputs, ref_logits=logits)
    elif reference is not None:
        # filled in once it is known which rows are made
        inputs = replace(inputs, ref_logp=torch.zeros(target.shape, device=hidden.device))
    tokens = inputs.tokens(logits, logit_dtypes=HEAD_DTYPES)
    call = LinearCall(
        target=tokens.target,
        temperature=float(inputs.temperature),
        plan=plan,
        memory_budget=memory_budget,
        logits_dtype=dtype_of_logits(logits_dtype),
        autocast=autocast_dtype(hidden),
        kernels=choose_backend(inputs.backend, hidden),
    )
    still = tokens.has_no_gradient()
    if reference is not None and not exact:
        made = tokens.valid if all_logp else tokens.valid & ~still
        with torch.no_grad():
            ref_logp, _ = logp_from_hidden(
                *reference,
                target,
                temperature=inputs.temperature,
                mask=made.view(target.shape),
                plan="fast",
                memory_budget=memory_budget,
                logits_dtype=logits_dtype,
                backend=inputs.backend,
                validate=False,
            )
        tokens = replace(tokens, ref_logp=ref_logp.view(-1))
    call = replace(call, tokens=tokens, reference=reference if exact else None)
    tensors, enabled = (hidden, *head.tensors), torch.is_grad_enabled()
    wanted = tuple(enabled and x is not None and x.requires_grad for x in tensors)
    first = _call_of_rows(call, tokens, tokens.valid & ~still)
    loss, *results = FusedLinearLoss.apply(replace(first, wanted=wanted), head, *tensors)
    parts = [(first, results)]
    if all_logp and bool(still.any()):
        rest = _call_of_rows(call, tokens, still)
        parts.append((rest, list(evaluate_call(rest, head, tensors)[0][1:])))
    return _output(loss, tokens, target.shape, parts)


def _call_of_rows(call: LinearCall, tokens: Tokens, made: Tensor) -> LinearCall:
    """The call over the rows marked in `made` [N] bool, sequence after sequence if one waits."""
    rows, lengths = made.nonzero().squeeze(1), None
    if tokens.needs_statistics and not tokens.couples_sequences:
        rows = rows[tokens.sequence[rows].argsort(stable=True)]
        counts = torch.unique_consecutive(tokens.sequence[rows], return_counts=True)[1]
        lengths = tuple(counts.tolist())
    in_order = lengths is None or bool((rows[1:] > rows[:-1]).all())
    some = call if len(rows) == len(made) and in_order else call.at(rows)
    return replace(some, lengths=lengths)


def _output(
    loss: Tensor, tokens: Tokens, shape: torch.Size, parts: list[tuple[LinearCall, list[Tensor]]]
) -> LossOutput:
    """The output over all rows, from the vectors of those that were made; 0 elsewhere."""
    like, N = tokens.advantage, len(tokens.target)
    logp, entropy, ratio, kl = like.new_zeros(4, N)
    factor = torch.ones_like(like)
    dropped, valid = like.new_zeros(2, N, dtype=torch.bool)
    whole = (logp, entropy, ratio, kl, dropped, factor, valid)
    made = 0
    for call, results in parts:
        place = slice(None) if call.rows is None else call.rows
        for vector, result in zip(whole, results, strict=True):
            vector[place] = result
        made += len(call.target)
    logp, entropy, ratio, kl, factor = (v.view(shape) for v in (logp, entropy, ratio, kl, factor))
    return LossOutput(
        loss, logp, entropy, ratio, kl, factor, tokens, valid, dropped, _skipped=N - made
    )


def check_reference(
    inputs: LossInputs,
    head: LinearHead,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
) -> tuple[Tensor, LinearHead] | None:
    """Hidden states and head of the reference policy, detached; None if they are not given.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    spec = inputs.objective
    if ref_hidden is None:
        if ref_lm_head is not None:
            raise ValueError("ref_lm_head: expected None without ref_hidden")
        if spec.kl == "exact" and spec.beta:
            raise ValueError(
                f"ref_hidden: expected a tensor for kl = 'exact' and beta = {spec.beta}, got None"
            )
        return None
    if inputs.ref_logp is not None:
        raise ValueError("ref_hidden: expected None with ref_logp, got both")
    check_hidden("ref_hidden", ref_hidden, hidden)
    ref = check_head("ref_lm_head", head if ref_lm_head is None else ref_lm_head, ref_hidden)
    if spec.kl == "exact" and ref.V != head.V:
        raise ValueError(f"ref_lm_head: expected V = {head.V} as in lm_head, got {ref.V}")
    return ref_hidden.detach(), ref.of(*ref.tensors)  # type: ignore[arg-type]


class FusedLinearLoss(torch.autograd.Function):
    """Loss and all gradients in the forward; grad_output in the backward."""

    @staticmethod
    def forward(
        ctx: Any, call: LinearCall, head: LinearHead, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        results, ctx.gradients = evaluate_call(call, head, tensors)
        ctx.call, ctx.head = call, head.without_tensors()
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_loss: its gradient cannot be differentiated (create_graph)"
            )
        tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None:
            gradients = evaluate_call(ctx.call, ctx.head, tensors)[1]
        for k, tensor in enumerate(tensors):
            gradient = gradients[k]
            if gradient is not None and gradient.numel():
                rows = Rows.of(gradient.view(-1, gradient.shape[-1]))
                ctx.call.kernels.row_scale(rows, grad_output)
                gradients[k] = gradient.to(tensor.dtype)
        return None, None, *gradients


@torch.no_grad()
def evaluate_call(
    call: LinearCall, head: LinearHead, tensors: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, ...], Gradients]:
    """The loss and vectors `[n]` of `LossRows`; gradients shaped like `tensors`."""
    hidden, weight, *others = tensors
    tokens = call.tokens
    assert hidden is not None and weight is not None and tokens is not None
    only_dhidden = call.wanted == (True, False, False, False, False)
    only_logp = tokens.entropy_weight is None and not call.exact_beta
    # products are in the dtypes that the call names
    with torch.autocast(hidden.device.type, enabled=False):
        work = Workspace(hidden, head.of(weight, *others), call)
        if work.lean:
            rows = loss_over_slices(work, tokens)
        elif only_dhidden and only_logp and tokens.needs_statistics:
            rows = loss_with_frozen_head(work, tokens)
        else:
            rows = loss_over_chunks(work, tokens)
        dhidden, *rest = work.gradients()
    # the buffers are freed before gradients are rounded
    del work
    gradients: Gradients = [None]
    if dhidden is not None:
        gradients = [scatter_rows(_rounded(dhidden, hidden), call.rows, hidden)]
    for k, tensor in enumerate(tensors[1:]):
        gradient, rest[k] = rest[k], None
        gradients.append(None if gradient is None or tensor is None else _rounded(gradient, tensor))
    loss, *vectors = rows
    return (loss.sum(), *vectors), gradients


def _rounded(gradient: Tensor, like: Tensor) -> Tensor:
    """In the tensor's dtype, but for float16, which waits for the loss scale."""
    return gradient if like.dtype == torch.float16 else gradient.to(like.dtype)
