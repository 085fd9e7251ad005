"""The autograd function of a loss from hidden states.

Gradients are made in the forward and handed over by the first backward; a second one makes them
again. In float16 they stay float32 until grad_output, a loss scale, has come.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.kernels.records import Rows
from grpo_core.linear.call import LinearCall, Swept, spread
from grpo_core.linear.head import LinearHead
from grpo_core.linear.plans import Sweep
from grpo_core.linear.vocab_slices import LeanSweep

Gradients = list[Tensor | None]


class FusedLinearLoss(torch.autograd.Function):
    """Loss and all gradients in the forward; grad_output in the backward."""

    @staticmethod
    def forward(
        ctx: Any, call: LinearCall, head: LinearHead, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        swept, gradients = evaluate(call, head, tensors)
        # a second backward finds the other policies' log-probabilities where the first left them
        ctx.call, ctx.gradients = replace(call, others=()), gradients
        # the record without its tensors: those are saved where autograd looks after them
        ctx.head = head.of(torch.empty(head.weight.shape, device="meta"), None, None, None)
        ctx.save_for_backward(*tensors)
        loss, *outputs = outputs_of(swept)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_loss: its gradient cannot be differentiated (create_graph)"
            )
        tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if ctx.call.into is not None:
            _check_accumulated(grad_output, gradients)
        if gradients is None:
            gradients = evaluate(ctx.call, ctx.head, tensors)[1]
        for k, tensor in enumerate(tensors):
            gradient = gradients[k]
            if gradient is not None and gradient.numel():
                rows = Rows.of(gradient.view(-1, gradient.shape[-1]))
                ctx.call.kernels.row_scale(rows, grad_output)
                gradients[k] = gradient.to(tensor.dtype)
        return None, None, *gradients


def _check_accumulated(grad_output: Tensor, gradients: Gradients | None) -> None:
    """Raises RuntimeError where what was accumulated in the forward would be wrong."""
    wanted = "fused_linear_loss: accumulate_into expects one backward, of the loss itself"
    if gradients is None:
        raise RuntimeError(f"{wanted}; got a second one")
    if grad_output.is_cuda:
        torch._assert_async(grad_output == 1, f"{wanted}; got a factor")
    elif grad_output != 1:
        raise RuntimeError(f"{wanted}; got the factor {float(grad_output):g}")


def outputs_of(swept: Swept) -> tuple[Tensor, ...]:
    """Loss, logp, entropy, ratio, kl, dropped, factor, valid."""
    found = swept.result
    return found.loss.sum(), *found[:4], found.dropped, swept.factor, swept.valid


@torch.no_grad()
def evaluate(
    call: LinearCall, head: LinearHead, tensors: tuple[Tensor | None, ...]
) -> tuple[Swept, Gradients]:
    """A sweep, and its gradients shaped like the tensors."""
    hidden, weight, *others = tensors
    assert hidden is not None and weight is not None
    sweep = LeanSweep if call.layout.plan == "lean" and any(call.wanted) else Sweep
    # products are in the dtypes that the call says
    with torch.autocast(hidden.device.type, enabled=False):
        swept = sweep(hidden, head.of(weight, *others), call)()
    dhidden, *rest = swept.gradients
    if call.into is not None:
        rest[0] = None
    gradients: Gradients = [None]
    if dhidden is not None:
        gradients = [spread(_rounded(dhidden, hidden), call.rows, hidden)]
    for tensor, gradient in zip(tensors[1:], rest, strict=True):
        gradients.append(None if gradient is None or tensor is None else _rounded(gradient, tensor))
    # the float32 ones would outlive the rounding otherwise
    return swept._replace(gradients=[]), gradients


def _rounded(gradient: Tensor, like: Tensor) -> Tensor:
    """In the tensor's dtype, but for float16, which waits for the loss scale."""
    return gradient if like.dtype == torch.float16 else gradient.to(like.dtype)
