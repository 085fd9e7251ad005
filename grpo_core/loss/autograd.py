"""The autograd function of the loss, and its two plans.

The forward computes the gradient while it has the logits; the backward multiplies it by
grad_output. A second backward computes it again from the saved logits. In float16 the first
backward computes it as well: without the loss scale, which is grad_output, it would underflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from grpo_core.kernels.records import RowLoss, Rows, RowStats
from grpo_core.loss.inputs import Tokens

CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True)
class Call:
    """Everything that a call needs beside the logits; constant for autograd."""

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
    """Objectives that need other rows: statistics, the loss on vectors, then the gradient."""
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
    """The loss on vectors, from the statistics of all rows that it needs."""
    logp, entropy = stats.logp, stats.entropy
    tokens = given.objective.factor.of_statistics(given, logp, entropy)
    result = kernels.sequence_loss(stats, tokens, given.terms)
    if tokens.valid is not given.valid:
        # some tokens were rejected after their rows had been read
        logp, entropy = (torch.where(tokens.valid, v, 0.0) for v in (logp, entropy))
        result = result._replace(logp=logp, entropy=entropy)
    return result, tokens


def evaluate(rows: Rows, call: Call, dlogits: Tensor | None) -> tuple[RowLoss, Tokens]:
    """The loss of every row by the plan of its objective, and the tokens with their factor."""
    plan = _two_phases if call.tokens.needs_statistics else _one_pass
    return plan(rows, call, dlogits)


class FusedLoss(torch.autograd.Function):
    """Loss and dlogits in the forward; grad_output in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor | None, ...]:
        rows = Rows.of(logits.detach())
        now = call.wants_gradient and logits.dtype != torch.float16
        dlogits = _allocate_gradient(rows.logits, call) if now else None
        result, tokens = evaluate(rows, call, dlogits)
        if dlogits is rows.logits:
            # autograd must notice if an earlier operation has saved these logits
            increment_version(logits)
        ctx.call, ctx.tokens, ctx.result = call, tokens, result
        ctx.dlogits, ctx.spent = dlogits, False
        ctx.save_for_backward(*(() if dlogits is rows.logits else (logits,)))
        shown = (result.logp, result.entropy, result.ratio, result.kl, result.dropped)
        # None if the statistics have changed nothing
        changed = (tokens.factor, None if tokens is call.tokens else tokens.valid.clone())
        ctx.mark_non_differentiable(*shown, *(vector for vector in changed if vector is not None))
        ctx.set_materialize_grads(False)
        return result.loss.sum(), *shown, *changed

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
        dlogits = _allocate_gradient(rows.logits, call)
        slopes = ctx.tokens.slopes(result.dlogp, result.dropped, call.exact_beta)
        call.kernels.row_dlogits(
            rows,
            ctx.tokens.target,
            call.temperature,
            slopes.times(grad_output),
            result,
            dlogits,
            call.ref_rows,
        )
        if dlogits is rows.logits:
            increment_version(logits)
            ctx.spent = True
        return dlogits, None


def _allocate_gradient(logits: Tensor, call: Call) -> Tensor:
    """The logits themselves, or a contiguous buffer of their shape."""
    return logits if call.inplace else torch.empty_like(logits, memory_format=CONTIGUOUS)
