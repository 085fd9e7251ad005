"""The loss from log-probabilities that somebody else has made: for loops that bring their own.

Everything `fused_loss` does after the softmax, with the same objectives, masks, weights, metrics
and treatment of tokens that are not finite. It saves no memory of the logits' size; that is what
`linear_logp` is for, whose outputs can be given here, and `fused_linear_loss`, which does both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import RowStats
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.inputs import Tokens, check_loss_arguments
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
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """The loss of `fused_loss`, from log-probabilities of the targets instead of logits.

    Differentiated with respect to `logp`, and to `entropy` where the objective has a bonus; once,
    a gradient of the gradient is refused. Computed in float32.

    Args:
        logp: [B, T], or packed [N] with `sequence_id`; floating point, nats.
        objective: an `Objective`, or the name of one in `RECIPES`; any but kl="exact", which needs
            the logits.
        entropy: shaped like logp, nats; needed by an entropy bonus and by `factor.top_entropy`.
        factor: shaped like logp, a constant that multiplies the surrogate of each token, beside
            what `objective.factor` finds; read where nothing is masked.
        advantage, rewards, group_size, group_id, old_logp, ref_logp, sampler_logp, mask,
        sequence_id, normalizer, backend, validate: as in `fused_loss`.

    Returns:
        `LossOutput`; its `entropy` is NaN where none was given.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: see `fused_loss`.
    """
    arguments: dict[str, Any] = {
        "advantage": advantage,
        "rewards": rewards,
        "group_size": group_size,
        "group_id": group_id,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "mask": mask,
        "sequence_id": sequence_id,
        "normalizer": normalizer,
    }
    check_concrete(logp=logp, entropy=entropy, factor=factor, **arguments)
    spec = find_objective(objective)
    _check_logp(logp)
    _check_terms(spec, entropy)
    for name, value in (("entropy", entropy), ("factor", factor)):
        _check_like(name, value, logp)
    kernels = choose_backend(backend, logp)
    # a vocabulary of one word, for the door to look at
    tokens = check_loss_arguments(
        logp.detach()[..., None],
        torch.zeros_like(logp, dtype=torch.int64),
        objective=spec,
        ref_logits=None,
        backend=backend,
        validate=validate,
        **arguments,
    )
    if factor is not None:
        given = factor.detach().reshape(-1).float()
        tokens = tokens.multiplied(torch.where(tokens.valid, given, 1.0))
    stats = _statistics(logp, entropy, tokens)
    found, tokens = loss_of_statistics(stats, tokens, kernels)
    slopes = tokens.slopes(found.dlogp, found.dropped, None)
    loss = with_slopes(found.loss.sum(), logp, slopes.dlogp, entropy, slopes.dentropy)
    vectors = (found.logp, found.entropy, found.ratio, found.kl)
    values, known, ratio, kl = (vector.view(logp.shape) for vector in vectors)
    shaped = None if tokens.factor is None else tokens.factor.view(logp.shape)
    return LossOutput(loss, values, known, ratio, kl, shaped, tokens, tokens.valid, found.dropped)


def with_slopes(
    value: Tensor,
    logp: Tensor,
    dlogp: Tensor,
    entropy: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> Tensor:
    """`value` with a graph back to `logp`, and `entropy`, whose derivatives are known.

    Args:
        value: 0-dim, or a value for each token of which it alone has a part.
        logp, entropy: what it is a function of, the graph of the one and the other.
        dlogp, dentropy: the derivatives, as many elements; None where there is none.
    """
    return _WithSlopes.apply(value, logp, dlogp, entropy, dentropy)


class _WithSlopes(torch.autograd.Function):
    """A value and its derivatives, found together."""

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
        # a tensor of its own, which a caller may go on adding to in place
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("logp_loss: its gradient cannot be differentiated (create_graph)")
        gradients: list[Tensor | None] = []
        for slope, like in zip(ctx.saved_tensors, ctx.like, strict=True):
            if slope is None or like is None:
                gradients.append(None)
                continue
            shape, dtype = like
            factor = grad_output if grad_output.ndim == 0 else grad_output.reshape(slope.shape)
            # 0·∞: a token that has no part in the loss has no gradient
            part = torch.where(slope == 0, 0.0, factor * slope)
            gradients.append(part.view(shape).to(dtype))
        return None, gradients[0], None, gradients[1], None


def _statistics(logp: Tensor, entropy: Tensor | None, tokens: Tokens) -> RowStats:
    """What a read of the logits would have left behind: 0 where masked."""
    vector = logp.detach().reshape(-1).float()
    if entropy is None:
        known = torch.full_like(vector, torch.nan)
    else:
        known = entropy.detach().reshape(-1).float()
    logp, entropy = (torch.where(tokens.valid, x, 0.0) for x in (vector, known))
    return RowStats(logp, entropy, None, vector.new_empty(0, vector.numel()))


def _check_logp(logp: object) -> None:
    """Raises ValueError unless it is a batch or packed rows of numbers."""
    tensor = check_floats("logp", logp)
    if tensor.ndim not in (1, 2):
        raise ValueError(f"logp: expected a tensor [B, T] or [N], got {list(tensor.shape)}")


def _check_like(name: str, value: object, logp: Tensor) -> None:
    """Raises ValueError unless `value` is None or floating point, shaped and placed like logp."""
    if value is None:
        return
    check_floats(name, value, tuple(logp.shape), device=logp.device)


def _check_terms(spec: Objective, entropy: Tensor | None) -> None:
    """Raises ValueError for what log-probabilities alone cannot tell."""
    if spec.kl == "exact":
        raise ValueError(
            "objective: expected any kl but 'exact', which needs logits: use fused_loss or "
            "fused_linear_loss"
        )
    for name, needs in (
        ("entropy_coef", spec.entropy_coef != 0),
        ("factor.top_entropy", spec.factor.top_entropy < 1),
    ):
        if needs and entropy is None:
            raise ValueError(f"entropy: expected a tensor for objective.{name}, got None")
