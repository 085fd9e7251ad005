"""The same loss in plain PyTorch: log_softmax, gather, autograd; any floating dtype.

The kernels are compared with it. It shares with `fused_loss` the checks, the weights and the value
of each scalar formula; the softmax, every derivative and every reduction are PyTorch's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import sequence_ratio
from grpo_core.backends.formula import as_torch
from grpo_core.backends.topk import LEAST_TAIL, add_tail, divergence
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.outputs import LossOutput
from grpo_core.loss.row_inputs import LOGIT_DTYPES
from grpo_core.loss.tokens import Tokens
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective
from grpo_core.objective.validation import check_tensor


def reference_loss(
    logits: Tensor,
    target: Tensor,
    *,
    objective: str | Objective = "grpo",
    inplace: bool = False,
    **arguments: Any,
) -> LossOutput:
    """`fused_loss` by plain PyTorch: same arguments, same outputs, float64 logits too.

    Args:
        logits: [B, T, V] or [N, V]; computed in float64 if that is their dtype, else in float32.
        inplace: accepted and without effect: autograd keeps the logits.
        backend: only for the group-normalised advantages.

    Everything else, the exceptions and the treatment of rows that are not finite: see `fused_loss`.
    """
    inputs = LossInputs(target=target, objective=find_objective(objective), **arguments)
    check_tensor("logits", logits)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = inputs.tokens(logits, dtype=dtype, logit_dtypes=(*LOGIT_DTYPES, torch.float64))
    if tokens.nll_weight is not None:
        # the gradient of a masked token may be read; its other vectors may hold anything
        names = [n for n in ("old_logp", "ref_logp", "advantage") if getattr(tokens, n) is not None]
        known: dict[str, Any] = {
            name: torch.where(tokens.valid, getattr(tokens, name), 0.0) for name in names
        }
        tokens = replace(tokens, **known)
    rows, ref = (
        None if x is None else x.reshape(-1, x.shape[-1]).to(dtype) / inputs.temperature
        for x in (logits, inputs.ref_logits)
    )
    assert rows is not None
    if tokens.kept is not None:
        ids = tokens.kept.ids.long()
        outside = torch.ones_like(rows, dtype=torch.bool)
        outside[tokens.kept.rows(torch.arange(len(ids), device=ids.device)), ids] = False
        rows = rows.masked_fill(outside, -torch.inf)
        ref = None if ref is None else ref.masked_fill(outside, -torch.inf)
    if ref is not None and tokens.nll_weight is not None:
        ref = torch.where(tokens.valid[:, None], ref, rows.detach())
    reference = ref if inputs.ref_topk is None else inputs.ref_topk
    loss, vectors, finite, tokens = _evaluate(rows, reference, tokens)
    kept = tokens.read & finite
    if not finite.all():
        # once more without the dropped rows, or 0·NaN would reach the gradient
        rows = rows.masked_fill(~kept[:, None], 0.0)
        loss, *_ = _evaluate(rows, reference, tokens, kept)
    shape, valid = target.shape, tokens.valid
    seen = (tokens.read, tokens.read, valid, valid)
    shown = (
        torch.where(there, vector.detach(), 0.0).view(shape)
        for there, vector in zip(seen, vectors, strict=True)
    )
    logp, entropy, ratio, kl = shown
    factor = None if tokens.factor is None else tokens.factor.view(shape)
    return LossOutput(loss, logp, entropy, ratio, kl, factor, tokens, valid, tokens.read & ~kept)


def _evaluate(
    rows: Tensor,
    ref: Tensor | tuple[Tensor, Tensor] | None,
    tokens: Tokens,
    kept: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tokens]:
    """(loss, (logp, entropy, ratio, kl), finite, tokens) with a graph back to `rows` [N, V].

    Args:
        kept: [N] bool, the rows that are part of the loss; None if that is not known yet.
    """
    spec = tokens.objective
    log_softmax = torch.log_softmax(rows, dim=-1)
    logp = log_softmax.gather(1, tokens.target.clamp(min=0)[:, None]).squeeze(1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.entropy_coef != 0):
        # 0·log 0 = 0
        entropy = -(log_softmax.exp() * log_softmax.clamp(min=-1e30)).sum(1)
    exact_kl = None
    if isinstance(ref, tuple):
        exact_kl = _topk_kl(log_softmax, *ref, spec)
    elif ref is not None:
        exact_kl = _exact_kl(log_softmax, torch.log_softmax(ref, dim=-1), spec.interpolation)
    if kept is None and tokens.needs_statistics:
        tokens = tokens.with_statistics(logp.detach(), entropy.detach())
    log_ratio = logp - (logp.detach() if tokens.old_logp is None else tokens.old_logp)
    log_ratio = sequence_ratio.forward(log_ratio, tokens, tokens.terms)
    at = torch.ones_like(tokens.valid) if kept is None else kept
    loss, kl = _token_loss(logp, log_ratio, exact_kl, tokens, at)
    ratio = log_ratio.exp()
    loss = tokens.weight[at] * loss
    if tokens.entropy_weight is not None:
        loss = loss - tokens.entropy_weight[at] * entropy[at]
    finite = logp[at].isfinite() & ratio[at].float().isfinite()
    if tokens.nll_weight is not None:
        # a masked token has −logp alone, and its ratio is nobody's
        finite = logp[at].isfinite() & (finite | ~tokens.valid[at])
        loss = torch.where(tokens.valid[at], loss, 0.0)
        loss = loss - tokens.nll_weight[at] * torch.where(tokens.read[at], logp[at], 0.0)
    finite = finite & loss.isfinite()
    if kept is None:
        broken = sequence_ratio.spread(tokens.valid & ~finite, tokens, tokens.terms)
        finite = finite & ~(broken & tokens.valid)
    total = torch.where(tokens.read[at] & finite, loss, 0.0).sum()
    return total, (logp, entropy, ratio, kl), finite, tokens


def _token_loss(
    logp: Tensor, log_ratio: Tensor, exact_kl: Tensor | None, tokens: Tokens, at: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, kl) of the tokens marked in `at` [N] bool, before their weights."""
    spec = tokens.objective
    logp, log_ratio = logp[at], log_ratio[at]
    surrogate = as_torch(spec.surrogate.function)
    loss, *_ = surrogate(logp, log_ratio, tokens.advantage[at], *spec.surrogate.args)
    if tokens.factor is not None:
        loss = tokens.factor[at] * loss
    kl = torch.zeros_like(logp) if exact_kl is None else exact_kl[at]
    if tokens.ref_logp is not None:
        kl, _ = as_torch(spec.kl_function)(logp, tokens.ref_logp[at])
        if spec.kl_times_ratio:
            kl = kl * log_ratio.exp()
    return (loss + spec.beta * kl if spec.beta else loss), kl


def _exact_kl(log_p: Tensor, log_q: Tensor, interpolation: float = 1.0) -> Tensor:
    """Σ_j p_j·(log p_j − log q_j) of each row; an entry of probability 0 adds nothing.

    With another interpolation β than 1 β·KL(q ‖ m) + (1 − β)·KL(p ‖ m), m = (1 − β)·p + β·q.
    """
    if interpolation == 0:
        return _exact_kl(log_q, log_p)
    if interpolation != 1:
        # finite, so that two forbidden entries have a gradient of 0
        floored = (log.clamp(min=-1e30) for log in (log_p, log_q))
        weights = (1 - interpolation, interpolation)
        parts = (log + math.log(w) for log, w in zip(floored, weights, strict=True))
        log_m = torch.logaddexp(*parts)
        kls = (_exact_kl(log, log_m) for log in (log_p, log_q))
        return sum(w * kl for w, kl in zip(weights, kls, strict=True))  # type: ignore[return-value]
    # not 0, or NaN
    possible = log_p.exp() != 0
    gap = torch.where(possible, log_p - log_q, 0.0)
    return (torch.where(possible, log_p.exp(), 0.0) * gap).sum(1)


def _topk_kl(log_p: Tensor, ids: Tensor, log_q: Tensor, spec: Objective) -> Tensor:
    """The KL of each row to the K tokens of a teacher, and to all others as one with a tail."""
    ids, log_q = (x.reshape(len(log_p), -1) for x in (ids.long(), log_q.to(log_p.dtype)))
    V = log_p.shape[1]
    present = (ids >= 0) & (ids < V) & (log_q > -torch.inf)
    if spec.interpolation:
        # finite, so that a forbidden entry has a gradient of 0
        log_p = log_p.clamp(min=-1e30)
    log_p = torch.nn.functional.pad(log_p, (0, 1))
    places = torch.where(present, ids, V)
    p_tail = log_p.exp().scatter(1, places, 0.0)[:, :V].sum(1, keepdim=True)
    has_tail = (present.sum(1) < V) & (spec.kl == "topk_tail")
    p_tail = p_tail.clamp(min=LEAST_TAIL)
    outcomes = add_tail(log_p.gather(1, places), log_q, present, p_tail, has_tail)
    return divergence(*outcomes, spec.interpolation)[0].sum(1)
