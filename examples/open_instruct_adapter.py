"""open-instruct's GRPO loss, computed by grpo_core: the interface of its `compute_grpo_loss`.

Copy this file beside your launch script, then:

    import open_instruct.grpo_utils as grpo_utils
    from open_instruct_adapter import compute_grpo_loss

    grpo_utils.compute_grpo_loss = compute_grpo_loss

open-instruct need not be installed. The formulas are those of its main branch in August 2026. Its
caller masks and averages, so this function returns one value per token. A value that is not finite
stays so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.formula import as_torch
from grpo_core.kernels import kl as estimators
from grpo_core.kernels.kl import times_ratio
from grpo_core.loss.logp_loss import with_gradients
from grpo_core.objective.objective import Surrogate
from grpo_core.objective.recipes import cispo, clip

# open-instruct clamps the log-ratio to the reference to ± this; the gradient beyond is 0
MAX_LOG_RATIO = 40.0
LOSSES = ("dapo", "cispo")
KLS = (estimators.k1, estimators.k2, estimators.k3, estimators.k1)


def compute_grpo_loss(
    new_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (policy loss, whether clipped, KL) of every token, unmasked.

    Args:
        new_logprobs: [B, T], nats, differentiable.
        ratio: [B, T], exp(new_logprobs − old_logprobs) with constant old_logprobs. Its gradient is
            given to `new_logprobs`; `ratio` itself gets none.
        advantages: [B, T].
        ref_logprobs: [B, T], nats, or None for no KL.
        config: with `loss_fn` ("dapo" or "cispo"), `clip_lower`, `clip_higher` and `kl_estimator`
            (0: Δ, 1: Δ²/2, 2: e^−Δ − 1 + Δ, 3: ratio·Δ).
        rho_weights: [B, T], constant factors of the policy loss; 0 drops a token.

    Raises:
        ValueError: an unknown loss or estimator, or a tensor of another shape.

    Source: open-instruct, open_instruct/grpo_utils.py.
    """
    for name, value in (("ratio", ratio), ("advantages", advantages), ("rho_weights", rho_weights)):
        if value.shape != new_logprobs.shape:
            raise ValueError(
                f"{name}: expected shape {list(new_logprobs.shape)}, got {list(value.shape)}"
            )
    with torch.no_grad():
        logp, r, A = (x.double() for x in (new_logprobs, ratio, advantages))
        rho = rho_weights.double()
        surrogate, high = _surrogate(config), 1.0 + config.clip_higher
        loss, dlogp, dlog_ratio = surrogate.plain(logp, r.log(), A, *surrogate.args)
        clipped = r > high
        if surrogate.function.__name__ == "clip":
            clipped = (clipped & (A > 0)) | ((r < 1.0 - config.clip_lower) & (A < 0))
        kl, dkl = _kl(logp, r, ref_logprobs, config)
        shown = [x.to(new_logprobs.dtype) for x in (rho * loss, clipped & (rho != 0), kl)]
    policy_loss = with_gradients(shown[0], new_logprobs, rho * (dlogp + dlog_ratio))
    if ref_logprobs is None:
        return policy_loss, shown[1], shown[2]
    return policy_loss, shown[1], with_gradients(shown[2], new_logprobs, dkl)


def _surrogate(config: Any) -> Surrogate:
    """Returns the policy term named by `config.loss_fn`, a string or a member of an enumeration."""
    name = getattr(config.loss_fn, "value", config.loss_fn)
    if name not in LOSSES:
        raise ValueError(f"loss_fn: expected one of {LOSSES}, got {name!r}")
    if name == "dapo":
        return clip(config.clip_lower, config.clip_higher)
    return cispo(1.0 + config.clip_higher)


def _kl(
    logp: Tensor, ratio: Tensor, ref_logprobs: Tensor | None, config: Any
) -> tuple[Tensor, Tensor]:
    """Returns (KL, its derivative by logp) of every token; zeros without a reference."""
    if ref_logprobs is None:
        return torch.zeros_like(logp), torch.zeros_like(logp)
    which = config.kl_estimator
    if which not in range(len(KLS)):
        raise ValueError(f"kl_estimator: expected one of 0 to {len(KLS) - 1}, got {which!r}")
    ref_logp = ref_logprobs.double()
    gap = logp - ref_logp
    near = gap.abs() <= MAX_LOG_RATIO
    value, slope = as_torch(KLS[which])(
        ref_logp + gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), ref_logp
    )
    slope = torch.where(near, slope, 0.0)
    if which == 3:
        value, slope, by_ratio = as_torch(times_ratio)(value, slope, ratio.log())
        slope = slope + by_ratio
    return value, slope
