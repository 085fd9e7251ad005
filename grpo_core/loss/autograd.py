"""The two plans of the loss from logits, and its autograd function.

The gradient is computed together with the loss; the backward multiplies it by grad_output. A second
backward computes it again from the saved logits. For float16 logits the first backward computes it,
because without the loss scale, which is part of grad_output, it would underflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from grpo_core.backends.wrapper import Kernels
from grpo_core.kernels.records import RowLoss, Rows, RowStats
from grpo_core.loss.row_inputs import LOGIT_DTYPES
from grpo_core.loss.tokens import Tokens


@dataclass(frozen=True)
class Call:
    """The arguments of a call beside the logits; constants for autograd."""

    tokens: Tokens
    ref_logits: Tensor | None
    temperature: float
    inplace: bool
    kernels: Kernels

    def rows(self, logits: Tensor) -> Rows:
        """The logits with what the call has of their softmax."""
        interpolation = float(self.tokens.objective.interpolation)
        return Rows(logits.detach(), self.temperature, self.ref_logits, interpolation)

    def allocate_gradient(self, logits: Tensor) -> Tensor:
        """The logits themselves, or a contiguous buffer of their shape."""
        if self.inplace:
            return logits
        return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.no_grad()
def evaluate(rows: Rows, call: Call, dlogits: Tensor | None) -> tuple[RowLoss, Tokens]:
    """The loss of every row, and the tokens with their factor; fills `dlogits` if it is given.

    A loss that depends on the statistics of other rows takes two phases, any other one pass.
    """
    kernels, tokens = call.kernels, call.tokens
    if not tokens.needs_statistics:
        return kernels.row_loss(rows, tokens, tokens.terms, dlogits), tokens
    stats = kernels.row_stats(rows, tokens.target)
    result, tokens = loss_of_statistics(stats, tokens, kernels)
    if dlogits is not None:
        kernels.row_dlogits(rows, tokens.target, tokens.gradients(result), stats, dlogits)
    return result, tokens


def loss_of_statistics(stats: RowStats, given: Tokens, kernels: Kernels) -> tuple[RowLoss, Tokens]:
    """The loss on vectors, from the statistics of all rows that it needs."""
    logp, entropy = stats.logp, stats.entropy
    tokens = given.with_statistics(logp, entropy)
    result = kernels.sequence_loss(stats, tokens, given.terms)
    if tokens.nll_weight is not None:
        # a row that the objective drops is left out as a whole
        finite = logp.isfinite() & ~result.dropped
        weight = torch.where(finite, tokens.nll_weight, 0.0)
        loss = result.loss - weight * torch.where(finite, logp, 0.0)
        dropped = result.dropped | ((tokens.nll_weight != 0) & ~finite)
        result = result._replace(loss=loss, dlogp=result.dlogp - weight, dropped=dropped)
    if tokens.valid is not given.valid:
        # some tokens were rejected after their rows had been read
        logp, entropy = (torch.where(tokens.read, v, 0.0) for v in (logp, entropy))
        result = result._replace(logp=logp, entropy=entropy)
    return result, tokens


class FusedLoss(torch.autograd.Function):
    """The loss of a result of `evaluate`, differentiable with respect to the logits.

    Its `dlogits` are None where the backward computes them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        call: Call,
        result: RowLoss,
        tokens: Tokens,
        dlogits: Tensor | None,
    ) -> Tensor:
        overwritten = call.inplace and dlogits is not None
        if overwritten:
            # autograd must notice if an earlier operation has saved these logits
            increment_version(logits)
        ctx.call, ctx.result, ctx.tokens = call, result, tokens
        ctx.dlogits, ctx.spent = dlogits, False
        ctx.save_for_backward(*(() if overwritten else (logits,)))
        return result.loss.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused_loss: its gradient cannot be differentiated (create_graph)")
        call, kernels = ctx.call, ctx.call.kernels
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is not None:
            ctx.spent = call.inplace
            return kernels.row_scale(dlogits, grad_output), None, None, None, None
        if ctx.spent:
            raise RuntimeError(
                "fused_loss: a second backward needs the logits, which inplace=True has "
                "overwritten; call fused_loss with inplace=False"
            )
        (logits,) = ctx.saved_tensors
        rows = call.rows(logits)
        dlogits = call.allocate_gradient(rows.logits)
        row_gradients = ctx.tokens.gradients(ctx.result).times(grad_output)
        kernels.row_dlogits(rows, ctx.tokens.target, row_gradients, ctx.result, dlogits)
        if call.inplace:
            increment_version(logits)
            ctx.spent = True
        return dlogits, None, None, None, None


def is_readable(logits: Tensor) -> bool:
    """Whether a kernel can read and overwrite logits in place: no row overlaps another."""
    V = logits.shape[-1]
    if V > 1 and logits.stride(-1) != 1:
        return False
    extent = V
    axes = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def make_readable(logits: Tensor) -> Tensor:
    """The logits themselves, or a contiguous copy if a kernel cannot read them in place."""
    return logits if is_readable(logits) else logits.clone(memory_format=torch.contiguous_format)


def prepare_reference(ref_logits: Tensor | None, logits: Tensor, inplace: bool) -> Tensor | None:
    """The reference's logits as a kernel can read them; not in the memory that is overwritten."""
    if ref_logits is None:
        return None
    # empty tensors all begin at 0
    shared = ref_logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    if inplace and logits.numel() and shared:
        raise ValueError("ref_logits: expected memory of its own with inplace=True, got the logits")
    ref_logits = ref_logits.detach()
    if ref_logits.dtype not in LOGIT_DTYPES:
        ref_logits = ref_logits.float()
    ready = ref_logits.dtype == logits.dtype and is_readable(ref_logits)
    return ref_logits if ready else ref_logits.contiguous()
