"""The same loss, dense and plain: log_softmax, gather, autograd; any floating dtype.

What the kernels are measured against, and the path to read first. It shares with `fused_loss` the
door, the weights and the value of each scalar formula; the softmax, every derivative and every
reduction are PyTorch's own.
"""

from __future__ import annotations

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
    group_id: Tensor | None = None,
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
        group_id=group_id,
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
    loss, (logp, entropy, ratio, kl), kept = _evaluate(rows, spec, tokens)
    if not (kept | ~tokens.valid).all():
        # once more with the dropped rows as constants, or 0·NaN would reach the gradient
        rows = rows.masked_fill(~kept[:, None], 0.0)
        loss, *_ = _evaluate(rows, spec, tokens, constant=(kept, logp.detach()))
    shape, valid = target.shape, tokens.valid
    logp, entropy, ratio, kl = (
        torch.where(valid, vector.detach(), 0.0).view(shape)
        for vector in (logp, entropy, ratio, kl)
    )
    return LossOutput(loss, logp, entropy, ratio, kl, spec, tokens, valid & ~kept)


def _evaluate(
    rows: Tensor, spec: Objective, tokens: Tokens, constant: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(loss, (logp, entropy, ratio, kl), kept) with a graph back to `rows` [N, V].

    `constant` = (kept, logp): only the rows in `kept` are part of the loss, the others keep `logp`.
    """
    log_softmax = torch.log_softmax(rows, dim=-1)
    logp = log_softmax.gather(1, tokens.target.clamp(min=0)[:, None]).squeeze(1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.entropy_coef != 0):
        # 0·log 0 = 0
        entropy = -(log_softmax.exp() * log_softmax.clamp(min=-1e30)).sum(1)
    if constant is not None:
        logp = torch.where(constant[0], logp, constant[1])
    log_ratio = logp - (logp.detach() if tokens.old_logp is None else tokens.old_logp)
    log_ratio = tokens.sequence_ratio(spec).forward(log_ratio)
    at = torch.ones_like(tokens.valid) if constant is None else constant[0]
    loss, kl = _token_loss(logp[at], log_ratio[at], spec, tokens, at)
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * entropy[at]
    ratio = log_ratio.exp()
    kept = tokens.valid[at] & logp[at].isfinite() & ratio[at].float().isfinite() & loss.isfinite()
    weight = torch.where(kept, tokens.weight[at], 0.0)
    total = (weight * torch.where(kept, loss, 0.0)).sum()
    return total, (logp, entropy, ratio, kl), kept


def _token_loss(
    logp: Tensor, log_ratio: Tensor, spec: Objective, tokens: Tokens, at: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, kl) of the tokens marked in `at` [N] bool, before their weights."""
    surrogate = as_torch(spec.surrogate.function)
    loss, *_ = surrogate(logp, log_ratio, tokens.advantage[at], *spec.surrogate.args)
    kl = torch.zeros_like(logp)
    if tokens.ref_logp is not None:
        kl, _ = as_torch(spec.kl_function)(logp, tokens.ref_logp[at])
        if spec.kl_times_ratio:
            kl = kl * log_ratio.exp()
        if spec.beta:
            loss = loss + spec.beta * kl
    return loss, kl
