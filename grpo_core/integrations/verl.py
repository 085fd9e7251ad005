"""verl 0.9.1 with the losses of grpo_core, and with log-probabilities without logits.

    VERL_USE_EXTERNAL_MODULES=grpo_core.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=grpo_core_verl_vanilla ...

Importing this module registers, in this process:

- `grpo_core_verl_<loss_mode>`: verl's modes with their options, aggregation, weights and metrics;
- `grpo_core_<recipe>`: every method of `RECIPES` with a policy term, with its numbers.

`register` adds another objective. verl still computes the KL and entropy terms (`use_kl_loss`,
`entropy_coeff`) and the advantages (`adv_estimator`). `patch_log_probs` replaces verl's operators
for log-probabilities; `grpo_core.integrations.verl_log_probs` calls it on import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets import preset
from grpo_core.integrations.presets.base import TokenMeans
from grpo_core.integrations.presets.verl_options import AGGREGATIONS, MODES, VerlOptions
from grpo_core.integrations.verl_head import (
    FusedLinear,
    forward_with_torch_backend,
    forward_with_triton_backend,
    linear_cross_entropy,
    patch_log_probs,
    require_verl,
)
from grpo_core.loss.logp_loss import logp_loss
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import RECIPES

require_verl()
from verl.trainer.ppo.core_algos import register_policy_loss  # noqa: E402

__all__ = [
    "FusedLinear",
    "forward_with_torch_backend",
    "forward_with_triton_backend",
    "linear_cross_entropy",
    "patch_log_probs",
    "register",
]

# the function that verl calls; its tensors are [B, T]
PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]
# options of verl's actor that affect the policy term
OPTIONS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")


def register(name: str, objective: str | Objective) -> PolicyLoss:
    """Registers an objective as a policy loss of verl, selected by `policy_loss.loss_mode=name`.

    Its KL and entropy terms are left out. verl adds its own, averaged by `loss_agg_mode`, which
    must match the aggregation of the objective. Options that only verl's modes read must have their
    defaults.

    Args:
        name: name of the loss mode; an existing one is replaced.
        objective: an `Objective`, or a name in `RECIPES`.

    Returns:
        The function that verl calls.

    Raises:
        ValueError: an objective that needs what verl does not pass to a policy loss.
    """
    spec = RECIPES[objective] if isinstance(objective, str) else objective
    if not spec.has_policy_term:
        raise ValueError("objective: expected a policy term, verl's losses have no teacher")
    if spec.factor.needs_sampler:
        raise ValueError(
            "objective: expected no factor.sampler and no factor.rejections, whose log-"
            "probabilities verl does not pass on; use algorithm.rollout_correction"
        )
    if spec.factor.top_entropy < 1:
        raise ValueError("objective: expected factor.top_entropy = 1, verl passes no entropy")
    if spec.aggregation not in AGGREGATIONS.values():
        raise ValueError(f"objective: expected an aggregation of verl, got {spec.aggregation!r}")
    spec = spec.replace(kl=None, beta=0.0, kl_times_ratio=False, entropy_coef=0.0)
    return _register(name, "vanilla", spec)


def _register(name: str, mode: str, spec: Objective | None = None) -> PolicyLoss:
    """Registers an objective, or without one the preset of verl's loss mode."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The policy term, with the arguments and results of verl's losses."""
        if config is None:
            raise ValueError("config: expected verl's ActorConfig, got None")
        if spec is not None:
            _check_config(name, spec, loss_agg_mode, config)
        ours = preset("verl", loss_mode=mode, loss_agg_mode=loss_agg_mode, **_options(config))
        arguments: dict[str, Any] = {}
        if spec is not None:
            arguments["factor"] = rollout_is_weights
        elif rollout_is_weights is not None:
            ours = ours.weighted()
            arguments["sampler_logp"] = ours.sampler_logp(old_log_prob, rollout_is_weights)
        out = logp_loss(
            log_prob,
            objective=ours.objective if spec is None else spec,
            advantage=advantages,
            old_logp=old_log_prob,
            mask=response_mask,
            normalizer=ours.normalizer(response_mask, **config.global_batch_info),
            **arguments,
        )
        return out.loss, _floats(ours.metrics(out) if spec is None else _metrics(out), out)

    return register_policy_loss(name)(policy_loss)


def _options(config: Any) -> dict[str, Any]:
    """The options in verl's actor config that affect a policy term."""
    options = {name: getattr(config, name) for name in OPTIONS}
    return options | {"dro_beta": config.policy_loss.dro_beta}


def _check_config(name: str, spec: Objective, loss_agg_mode: str, config: Any) -> None:
    """Raises ValueError for options that contradict the objective, or that it ignores."""
    (wanted,) = (mode for mode, ours in AGGREGATIONS.items() if ours == spec.aggregation)
    if loss_agg_mode != wanted:
        raise ValueError(
            f"loss_agg_mode: expected {wanted!r}, which is {name}'s, got {loss_agg_mode!r}; set "
            f"actor.loss_agg_mode={wanted}, or register an objective with another aggregation"
        )
    defaults = VerlOptions()
    for option, value in _options(config).items():
        default = getattr(defaults, option)
        if value != default:
            raise ValueError(
                f"{option}: expected verl's default {default!r} with loss_mode={name}, whose "
                f"numbers are the objective's {spec.surrogate.args}, got {value!r}; use a mode "
                "named grpo_core_verl_..., or register an objective with your numbers"
            )


@torch.no_grad()
def _metrics(out: LossOutput) -> dict[str, Tensor]:
    """The metrics of verl's losses for any objective; as in verl, shares are of all tokens."""
    means, metrics = TokenMeans(out), out.metrics
    moved = metrics["moved_tokens"] / metrics["tokens"].clamp(min=1)
    return {
        "actor/pg_clipfrac": metrics["clip_fraction"] * moved,
        "actor/ppo_kl": means.mean(-means.log_ratio),
        "actor/pg_clipfrac_lower": metrics["clip_fraction_low"] * moved,
        "actor/ratio_mean": metrics["ratio_mean"],
    }


def _floats(metrics: dict[str, Tensor], out: LossOutput) -> dict[str, float]:
    """Python numbers, as verl's losses return; the host waits for the device once.

    Adds the number of tokens left out because a term is not finite; verl's loss is NaN then.
    """
    metrics = metrics | {"actor/nonfinite_tokens": (out._valid & out._dropped).sum()}
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


for _mode in MODES:
    _register(f"grpo_core_verl_{_mode}", _mode)
for _recipe, _spec in RECIPES.items():
    if _spec.has_policy_term and _spec.aggregation in AGGREGATIONS.values():
        register(f"grpo_core_{_recipe}", _recipe)
