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

from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import RowLoss, Rows, RowStats
from grpo_core.loss.inputs import IGNORE, LOGIT_DTYPES, Tokens, check_logits, check_target, words_of
from grpo_core.loss.layout import readable

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
    logp, entropy = stats.logp, stats.entropy
    tokens = given.objective.factor.of_statistics(given, logp, entropy)
    result = kernels.sequence_loss(stats, tokens, given.terms)
    if tokens.valid is not given.valid:
        # some were rejected after their row had been read
        logp, entropy = (torch.where(tokens.valid, v, 0.0) for v in (logp, entropy))
        result = result._replace(logp=logp, entropy=entropy)
    return result, tokens


def evaluate(rows: Rows, call: Call, dlogits: Tensor | None) -> tuple[RowLoss, Tokens]:
    """The loss of every row by the plan that its objective needs, and the tokens as they ended."""
    plan = _two_phases if call.tokens.needs_statistics else _one_pass
    return plan(rows, call, dlogits)


def logp_of_rows(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    backend: Backend | None,
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) `[N]` of every target, nats; arguments as in `token_logp`."""
    check_logits(logits, temperature, LOGIT_DTYPES)
    target = check_target(logits, target, mask, validate)
    kernels = choose_backend(backend, logits)
    # one that is no word is passed over where the row would be read
    target = words_of(target)
    if mask is not None:
        target = torch.where(mask.reshape(-1) != 0, target, IGNORE)
    stats = kernels.row_stats(Rows.of(readable(logits)), target, float(temperature))
    return stats.logp, stats.entropy


class FusedLoss(torch.autograd.Function):
    """Loss and dlogits in the forward; grad_output in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor | None, ...]:
        rows = Rows.of(logits.detach())
        now = call.wants_gradient and logits.dtype != torch.float16
        dlogits = _room_for_gradient(rows.logits, call) if now else None
        result, tokens = evaluate(rows, call, dlogits)
        if dlogits is rows.logits:
            # an operation upstream that saved these logits must notice that they are gone
            increment_version(logits)
        ctx.call, ctx.tokens, ctx.result = call, tokens, result
        ctx.dlogits, ctx.spent = dlogits, False
        ctx.save_for_backward(*(() if dlogits is rows.logits else (logits,)))
        shown = (result.logp, result.entropy, result.ratio, result.kl, result.dropped)
        # what the statistics have changed; None where all is as it was given
        found = (tokens.factor, None if tokens is call.tokens else tokens.valid.clone())
        ctx.mark_non_differentiable(*shown, *(vector for vector in found if vector is not None))
        ctx.set_materialize_grads(False)
        return result.loss.sum(), *shown, *found

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


def _room_for_gradient(logits: Tensor, call: Call) -> Tensor:
    """The logits themselves, or a contiguous buffer of their shape."""
    return logits if call.inplace else torch.empty_like(logits, memory_format=CONTIGUOUS)
