"""The same loss, dense and plain: log_softmax, gather, autograd; any floating dtype.

What the kernels are measured against, and the path to read first. It shares with `fused_loss` the
door, the weights and the value of each scalar formula; the softmax, every derivative and every
reduction are PyTorch's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_core.arguments import LOGIT_DTYPES, Tokens, check_logits, check_loss_arguments
from grpo_core.backends import Backend
from grpo_core.fused_loss import LossOutput
from grpo_core.objective import Objective
from grpo_core.torch_formula import as_torch


def reference_loss(
    logits: Tensor,
    target: Tensor,
    *,
    objective: str | Objective = "grpo",
    advantage: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """`fused_loss` by plain PyTorch: same arguments, same outputs, float64 logits too.

    Args:
        logits: [B, T, V] or [N, V]; computed in float64 if that is their dtype, else in float32.
        inplace: accepted and without effect: autograd keeps the logits.
        backend: only for the group-normalised advantages.

    Everything else, the exceptions and the treatment of rows that are not finite: see `fused_loss`.
    """
    check_logits(logits, temperature, (*LOGIT_DTYPES, torch.float64))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    spec, tokens = check_loss_arguments(
        logits,
        target,
        objective=objective,
        advantage=advantage,
        rewards=rewards,
        group_size=group_size,
        old_logp=old_logp,
        ref_logp=ref_logp,
        mask=mask,
        sequence_id=sequence_id,
        normalizer=normalizer,
        backend=backend,
        validate=validate,
        dtype=dtype,
    )
    rows = logits.reshape(-1, logits.shape[-1]).to(dtype) / temperature
    loss, vectors, kept = _evaluate(rows, spec, tokens)
    if not (kept | ~tokens.valid).all():
        # once more without the dropped rows, or their NaN would reach the gradient through 0·NaN
        vector = ("weight", "advantage", "old_logp", "ref_logp")
        given = {name: v for name in vector if (v := getattr(tokens, name)) is not None}
        alive = replace(tokens, **{name: v.masked_fill(~kept, 0.0) for name, v in given.items()})
        loss, *_ = _evaluate(rows.masked_fill(~kept[:, None], 0.0), spec, alive)
    logp, entropy, ratio, kl = (
        torch.where(tokens.valid, vector.detach(), 0.0).view(target.shape) for vector in vectors
    )
    return LossOutput(loss, logp, entropy, ratio, kl, spec, tokens, tokens.valid & ~kept)


def _evaluate(
    rows: Tensor, spec: Objective, tokens: Tokens
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(loss, (logp, entropy, ratio, kl), kept) with a graph back to `rows` [N, V]."""
    log_softmax = torch.log_softmax(rows, dim=-1)
    logp = log_softmax.gather(1, tokens.target.clamp(min=0)[:, None]).squeeze(1)
    with torch.no_grad():
        # 0·log 0 = 0
        entropy = -(log_softmax.exp() * log_softmax.clamp(min=-1e30)).sum(1)
    log_ratio = logp - (logp.detach() if tokens.old_logp is None else tokens.old_logp)
    log_ratio = tokens.sequence_ratio(spec).forward(log_ratio)
    surrogate = as_torch(spec.surrogate.function)
    loss, *_ = surrogate(logp, log_ratio, tokens.advantage, *spec.surrogate.args)
    kl = torch.zeros_like(logp)
    if spec.kl_function is not None and tokens.ref_logp is not None:
        kl, _ = as_torch(spec.kl_function)(logp, tokens.ref_logp)
        if spec.kl_times_ratio:
            kl = kl * log_ratio.exp()
        loss = loss + spec.beta * kl
    kept = tokens.valid & logp.isfinite() & log_ratio.isfinite() & loss.isfinite()
    total = (tokens.weight * torch.where(tokens.weight != 0, loss, 0.0)).sum()
    return total, (logp, entropy, log_ratio.exp(), kl), kept
