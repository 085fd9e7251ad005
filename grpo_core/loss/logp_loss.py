"""The loss from log-probabilities, for training loops that compute these themselves.

It is the part of `fused_loss` after the softmax, with the same objectives, masks, weights, metrics
and treatment of tokens that are not finite. It does not reduce the memory of the logits; for that
use `linear_logp`, whose outputs are valid inputs here, or `fused_linear_loss`, which does both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import RowStats
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective
from grpo_core.objective.validation import check_concrete, check_floats


def logp_loss(
    logp: Tensor,
    *,
    objective: str | Objective = "grpo",
    advantage: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_id: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    factor: Tensor | None = None,
    mask: Tensor | None = None,
    nll_weight: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """The loss of `fused_loss`, from log-probabilities of the targets instead of logits.

    Differentiated with respect to `logp`, and to `entropy` where the objective has a bonus. A
    gradient of the gradient raises an error. Computed in float32.

    Args:
        logp: [B, T], or packed [N] with `sequence_id`; floating point, nats.
        objective: an `Objective`, or the name of one in `RECIPES`; any but with kl="exact",
            "topk" or "topk_tail", which need the logits.
        entropy: shaped like logp, nats; needed by an entropy bonus and by `factor.top_entropy`.
        factor: shaped like logp, a constant that multiplies the surrogate of each unmasked token,
            in addition to `objective.factor`.
        advantage, rewards, group_size, group_id, old_logp, ref_logp, sampler_logp, mask,
        nll_weight, sequence_id, normalizer, backend, validate: as in `fused_loss`.

    Returns:
        `LossOutput`; its `entropy` is NaN where none was given.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: see `fused_loss`.
    """
    spec = find_objective(objective)
    check_concrete(logp=logp, entropy=entropy, factor=factor)
    if check_floats("logp", logp).ndim not in (1, 2):
        raise ValueError(f"logp: expected a tensor [B, T] or [N], got {list(logp.shape)}")
    _check_terms(spec, entropy)
    for name, value in (("entropy", entropy), ("factor", factor)):
        if value is not None:
            check_floats(name, value, tuple(logp.shape), device=logp.device)
    inputs = LossInputs(
        target=torch.zeros_like(logp, dtype=torch.int64),
        objective=spec,
        advantage=advantage,
        rewards=rewards,
        group_size=group_size,
        group_id=group_id,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
        mask=mask,
        nll_weight=nll_weight,
        sequence_id=sequence_id,
        normalizer=normalizer,
        backend=backend,
        validate=validate,
    )
    kernels = choose_backend(backend, logp)
    # logits of a vocabulary of size 1
    tokens = inputs.tokens(logp.detach()[..., None], logit_dtypes=(logp.dtype,))
    if factor is not None:
        given = factor.detach().reshape(-1).float()
        tokens = tokens.scale_factor(torch.where(tokens.valid, given, 1.0))
    # the statistics that a read of the logits would give: 0 where masked
    known = torch.full_like(logp, torch.nan) if entropy is None else entropy
    vectors = (x.detach().reshape(-1).float() for x in (logp, known))
    values, entropies = (torch.where(tokens.read, x, 0.0) for x in vectors)
    stats = RowStats(values, entropies, None, values.new_empty(0, len(values)))
    result, tokens = loss_of_statistics(stats, tokens, kernels)
    row_gradients = tokens.gradients(result)
    loss = with_gradients(
        result.loss.sum(), logp, row_gradients.dlogp, entropy, row_gradients.dentropy
    )
    return LossOutput.of(loss, result, tokens, logp.shape)


def with_gradients(
    value: Tensor,
    logp: Tensor,
    dlogp: Tensor,
    entropy: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> Tensor:
    """`value` as a function of `logp`, and of `entropy`, with given derivatives.

    Args:
        value: 0-dim, or one value per token that depends on that token only.
        logp, entropy: what it is differentiated with respect to.
        dlogp, dentropy: the derivatives, of as many elements; None means constant.
    """
    return _WithGradients.apply(value, logp, dlogp, entropy, dentropy)


class _WithGradients(torch.autograd.Function):
    """A value whose derivatives are computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        logp: Tensor,
        dlogp: Tensor,
        entropy: Tensor | None,
        dentropy: Tensor | None,
    ) -> Tensor:
        ctx.like = tuple(None if x is None else (x.shape, x.dtype) for x in (logp, entropy))
        ctx.save_for_backward(dlogp, dentropy)
        # a copy, which the caller may change in place
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("logp_loss: its gradient cannot be differentiated (create_graph)")
        dlogp, dentropy = ctx.saved_tensors
        logp_like, entropy_like = ctx.like

        def scale(gradient: Tensor | None, like: tuple[torch.Size, torch.dtype] | None) -> Any:
            if gradient is None or like is None:
                return None
            factor = grad_output if grad_output.ndim == 0 else grad_output.reshape(gradient.shape)
            # not 0·∞: a token outside of the loss has gradient 0
            return torch.where(gradient == 0, 0.0, factor * gradient).view(like[0]).to(like[1])

        return None, scale(dlogp, logp_like), None, scale(dentropy, entropy_like), None


def _check_terms(spec: Objective, entropy: Tensor | None) -> None:
    """Raises ValueError if the objective needs more than log-probabilities."""
    if spec.has_row_kl:
        raise ValueError(
            f"objective: expected any kl but {spec.kl!r}, which needs logits: use fused_loss or "
            "fused_linear_loss"
        )
    for name, needs in (
        ("entropy_coef", spec.entropy_coef != 0),
        ("factor.top_entropy", spec.factor.top_entropy < 1),
    ):
        if needs and entropy is None:
            raise ValueError(f"entropy: expected a tensor for objective.{name}, got None")
