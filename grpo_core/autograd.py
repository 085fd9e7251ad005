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
from grpo_core.kernels.records import RowLoss, Rows, RowStats

CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True)
class Call:
    """Everything of a call that is not the logits; the one non-tensor argument of autograd."""

    tokens: Tokens
    ref_logits: Tensor | None
    temperature: float
    inplace: bool
    wants_gradient: bool
    kernels: ModuleType

    @property
    def ref_rows(self) -> Rows | None:
        """The reference policy's logits, for the exact KL."""
        return None if self.ref_logits is None else Rows.of(self.ref_logits)

    @property
    def exact_beta(self) -> float | None:
        """Weight of the exact KL; None without one."""
        return None if self.ref_logits is None else float(self.tokens.objective.beta)


def _one_pass(rows: Rows, call: Call, dlogits: Tensor | None) -> tuple[RowLoss, Tokens]:
    """Token-level objectives: everything in one kernel."""
    result = call.kernels.row_loss(
        rows, call.tokens, call.temperature, call.tokens.terms, dlogits, call.ref_rows
    )
    return result, call.tokens


def _two_phases(rows: Rows, call: Call, dlogits: Tensor | None) -> tuple[RowLoss, Tokens]:
    """Where a loss waits for other rows: statistics, the loss on vectors, then the gradient."""
    kernels, T = call.kernels, call.temperature
    stats = kernels.row_stats(rows, call.tokens.target, T, call.ref_rows)
    result, tokens = loss_of_statistics(stats, call.tokens, kernels)
    if dlogits is not None:
        slopes = tokens.slopes(result.dlogp, result.dropped, call.exact_beta)
        kernels.row_dlogits(rows, tokens.target, T, slopes, stats, dlogits, call.ref_rows)
    return result, tokens


def loss_of_statistics(
    stats: RowStats, given: Tokens, kernels: ModuleType
) -> tuple[RowLoss, Tokens]:
    """The loss on vectors, once every row it waits for has been read; tokens with their factor."""
    logp, entropy, exact_kl, state = stats
    terms = given.terms
    tokens = given.objective.factor.of_statistics(given, logp, entropy)
    token_ratio = logp - (logp if tokens.old_logp is None else tokens.old_logp)
    level = tokens.sequence_ratio()
    log_ratio = level.forward(token_ratio)
    found = kernels.token_loss(logp, log_ratio, tokens, entropy, exact_kl, terms)
    dlogp = found.dlogp + level.backward(token_ratio, found.dlog_ratio)
    dlogp = torch.where(found.dropped, 0.0, dlogp)
    ratio = log_ratio.exp() * tokens.valid
    if tokens.valid is not given.valid:
        # some were rejected after their row had been read
        logp, entropy = (torch.where(tokens.valid, v, 0.0) for v in (logp, entropy))
    result = RowLoss(logp, entropy, ratio, found.kl, found.loss, dlogp, found.dropped, state)
    return result, tokens


class FusedLoss(torch.autograd.Function):
    """Loss and dlogits in the forward; grad_output in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor, ...]:
        rows = Rows.of(logits.detach())
        now = call.wants_gradient and logits.dtype != torch.float16
        dlogits = _room_for_gradient(rows.logits, call) if now else None
        plan = _two_phases if call.tokens.needs_statistics else _one_pass
        result, tokens = plan(rows, call, dlogits)
        if dlogits is rows.logits:
            # an operation upstream that saved these logits must notice that they are gone
            increment_version(logits)
        ctx.call, ctx.result, ctx.dlogits, ctx.spent = call, result, dlogits, False
        ctx.target = tokens.target
        ctx.slopes = tokens.slopes(result.dlogp, result.dropped, call.exact_beta)
        ctx.save_for_backward(*(() if dlogits is rows.logits else (logits,)))
        factor = torch.ones_like(result.logp) if tokens.factor is None else tokens.factor
        vectors = (result.logp, result.entropy, result.ratio, result.kl, result.dropped)
        outputs = (*vectors, factor, tokens.valid.clone())
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
        call.kernels.row_dlogits(
            rows,
            ctx.target,
            call.temperature,
            ctx.slopes.times(grad_output),
            result,
            dlogits,
            call.ref_rows,
        )
        if dlogits is rows.logits:
            increment_version(logits)
            ctx.spent = True
        return dlogits, None


def _room_for_gradient(logits: Tensor, call: Call) -> Tensor:
    """The logits themselves, or a contiguous buffer of their shape."""
    return logits if call.inplace else torch.empty_like(logits, memory_format=CONTIGUOUS)
