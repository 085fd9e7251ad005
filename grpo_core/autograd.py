"""The autograd function of the loss, and the two plans it can follow.

Gradients are made in the forward, while the logits are at hand; the backward multiplies them by
grad_output and hands them on. A second backward computes them again from the saved logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from grpo_core.arguments import Tokens
from grpo_core.kernels.records import RowLoss, Rows, Terms
from grpo_core.objective import Objective


@dataclass(frozen=True)
class Call:
    """Everything of a call that is not the logits; the one non-tensor argument of autograd."""

    spec: Objective
    tokens: Tokens
    temperature: float
    inplace: bool
    wants_gradient: bool
    kernels: ModuleType

    @property
    def terms(self) -> Terms:
        """Surrogate and KL as the kernels take them."""
        return Terms(
            surrogate=self.spec.surrogate.function,
            surrogate_args=self.spec.surrogate.args,
            kl=self.spec.kl_function if self.tokens.ref_logp is not None else None,
            kl_times_ratio=self.spec.kl_times_ratio,
            beta=float(self.spec.beta),
        )


def _one_pass(rows: Rows, call: Call, dlogits: Tensor | None) -> RowLoss:
    """Token-level objectives: everything in one kernel."""
    tokens = call.tokens
    return call.kernels.row_loss(
        rows,
        tokens.target,
        call.temperature,
        tokens.weight,
        tokens.advantage,
        tokens.old_logp,
        tokens.ref_logp,
        call.terms,
        dlogits,
    )


def _two_phases(rows: Rows, call: Call, dlogits: Tensor | None) -> RowLoss:
    """Sequence-level ratios: statistics of all rows, the loss on vectors, then the gradient."""
    tokens, kernels = call.tokens, call.kernels
    logp, entropy, state = kernels.row_stats(rows, tokens.target, call.temperature)
    token_ratio = logp - (logp if tokens.old_logp is None else tokens.old_logp)
    level = tokens.sequence_ratio(call.spec)
    log_ratio = level.forward(token_ratio)
    terms = kernels.token_loss(
        logp, log_ratio, tokens.advantage, tokens.weight, tokens.ref_logp, call.terms
    )
    dlogp = terms.dlogp + level.backward(token_ratio, terms.dlog_ratio)
    if dlogits is not None:
        kernels.row_dlogits(rows, tokens.target, call.temperature, dlogp, state, dlogits)
    ratio = log_ratio.exp() * tokens.valid
    return RowLoss(logp, entropy, ratio, terms.kl, terms.loss, dlogp, terms.dropped, state)


class FusedLoss(torch.autograd.Function):
    """Loss and dlogits in the forward; grad_output in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor, ...]:
        rows = Rows.of(logits.detach())
        dlogits = None
        if call.wants_gradient:
            dlogits = rows.logits if call.inplace else _like(rows.logits)
        plan = _one_pass if call.spec.is_token_level else _two_phases
        result = plan(rows, call, dlogits)
        if dlogits is rows.logits:
            # an operation upstream that saved these logits must notice that they are gone
            increment_version(logits)
        ctx.call, ctx.dlogits, ctx.result = call, dlogits, result
        ctx.save_for_backward(*(() if call.inplace else (logits,)))
        outputs = (result.logp, result.entropy, result.ratio, result.kl, result.dropped)
        ctx.mark_non_differentiable(*outputs)
        return result.loss.sum(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, None]:
        dlogits, ctx.dlogits = ctx.dlogits, None
        kernels = ctx.call.kernels
        if dlogits is not None:
            return kernels.row_scale(Rows.of(dlogits), grad_output), None
        if ctx.call.inplace:
            raise RuntimeError(
                "fused_loss: a second backward needs the logits, which inplace=True has "
                "overwritten; call fused_loss with inplace=False"
            )
        (logits,) = ctx.saved_tensors
        rows, result = Rows.of(logits), ctx.result
        kernels.row_dlogits(
            rows,
            ctx.call.tokens.target,
            ctx.call.temperature,
            result.dlogp * grad_output,
            result.state,
            gradient := _like(logits),
        )
        return gradient, None


def _like(logits: Tensor) -> Tensor:
    """Room for a gradient, row by row where the logits' rows are, gaps included."""
    return torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    )
