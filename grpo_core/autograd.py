"""The autograd function of the loss, and the two plans it can follow.

Gradients are made in the forward, while the logits are at hand; the backward multiplies them by
grad_output and hands them on. A second backward computes them again from the saved logits. In
float16 the backward makes them in the first place: there grad_output is a loss scale, without which
they would underflow before it came.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from grpo_core.arguments import Tokens
from grpo_core.kernels.records import RowLoss, Rows, Terms
from grpo_core.objective import Objective

CONTIGUOUS = torch.contiguous_format


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
            entropy_coef=float(self.spec.entropy_coef),
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
    stats = kernels.row_stats(rows, tokens.target, call.temperature)
    logp, entropy, state = stats
    token_ratio = logp - (logp if tokens.old_logp is None else tokens.old_logp)
    level = tokens.sequence_ratio(call.spec)
    log_ratio = level.forward(token_ratio)
    bonus = entropy if call.spec.entropy_coef else None
    terms = kernels.token_loss(
        logp, log_ratio, tokens.advantage, tokens.weight, tokens.ref_logp, bonus, call.terms
    )
    dlogp = terms.dlogp + level.backward(token_ratio, terms.dlog_ratio)
    dlogp = torch.where(terms.dropped, 0.0, dlogp)
    if dlogits is not None:
        dentropy = call.terms.dentropy(tokens.weight, terms.dropped)
        kernels.row_dlogits(rows, tokens.target, call.temperature, dlogp, dentropy, stats, dlogits)
    ratio = log_ratio.exp() * tokens.valid
    return RowLoss(logp, entropy, ratio, terms.kl, terms.loss, dlogp, terms.dropped, state)


class FusedLoss(torch.autograd.Function):
    """Loss and dlogits in the forward; grad_output in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor, ...]:
        rows = Rows.of(logits.detach())
        now = call.wants_gradient and logits.dtype != torch.float16
        dlogits = _room_for_gradient(rows.logits, call) if now else None
        plan = _one_pass if call.spec.is_token_level else _two_phases
        result = plan(rows, call, dlogits)
        if dlogits is rows.logits:
            # an operation upstream that saved these logits must notice that they are gone
            increment_version(logits)
        ctx.call, ctx.result, ctx.dlogits, ctx.spent = call, result, dlogits, False
        ctx.save_for_backward(*(() if dlogits is rows.logits else (logits,)))
        outputs = (result.logp, result.entropy, result.ratio, result.kl, result.dropped)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return result.loss.sum(), *outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused_loss: its gradient cannot be differentiated (create_graph)")
        call, result = ctx.call, ctx.result
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is not None:
            ctx.spent = call.inplace
            return call.kernels.row_scale(Rows.of(dlogits), grad_output), None
        if ctx.spent:
            raise RuntimeError(
                "fused_loss: a second backward needs the logits, which inplace=True has "
                "overwritten; call fused_loss with inplace=False"
            )
        (logits,) = ctx.saved_tensors
        rows = Rows.of(logits.detach())
        dlogits = _room_for_gradient(rows.logits, call)
        dlogp = result.dlogp * grad_output
        dentropy = call.terms.dentropy(call.tokens.weight, result.dropped)
        if dentropy is not None:
            dentropy = dentropy * grad_output
        call.kernels.row_dlogits(
            rows, call.tokens.target, call.temperature, dlogp, dentropy, result, dlogits
        )
        if dlogits is rows.logits:
            increment_version(logits)
            ctx.spent = True
        return dlogits, None


def _room_for_gradient(logits: Tensor, call: Call) -> Tensor:
    """The logits themselves, or a contiguous buffer of their shape."""
    return logits if call.inplace else torch.empty_like(logits, memory_format=CONTIGUOUS)
