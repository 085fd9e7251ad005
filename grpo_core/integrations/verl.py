"""verl 0.9.1 with our losses, and with log-probabilities that need no logits.

    VERL_USE_EXTERNAL_MODULES=grpo_core.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=grpo_core_verl_vanilla ...

To import this module is to register, in the process that does:

- `grpo_core_verl_<loss_mode>` for verl's own modes: its options, aggregation, weights and metrics;
- `grpo_core_<recipe>` for every method of `RECIPES`: surrogate, ratio and numbers are the recipe's.

`register` adds an objective of your own. KL and entropy terms stay verl's (`use_kl_loss`,
`entropy_coeff`), and so do advantages (`adv_estimator`). The other half, from hidden states, is
`patch_log_probs`, which `grpo_core.integrations.verl_log_probs` calls for those who load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets import VerlPreset, preset
from grpo_core.integrations.presets.base import Tally
from grpo_core.integrations.presets.verl_options import AGGREGATIONS, LOSSES, VerlOptions
from grpo_core.integrations.verl_head import (
    FusedLinear,
    forward_with_torch_backend,
    forward_with_triton_backend,
    linear_cross_entropy,
    patch_log_probs,
    require_verl,
)
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.logp_loss import logp_loss
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

# what verl calls; all tensors [B, T]
PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]
# options of verl's actor that say what a policy term is
OPTIONS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
# the trainer itself chooses that mode, and then by its own name
MODES = tuple(mode for mode in LOSSES if mode != "bypass_mode")


def register(name: str, objective: str | Objective) -> PolicyLoss:
    """Makes an objective a policy loss of verl, to be chosen as `policy_loss.loss_mode=name`.

    Its KL and entropy bonus are left out: verl adds those that its own options ask for, averaged by
    `loss_agg_mode`, which therefore must say what the objective's aggregation says. Options that
    only verl's own modes read must be at their defaults, lest someone think that they act.

    Args:
        name: of the loss mode; one that exists is replaced.
        objective: an `Objective`, or the name of one in `RECIPES`.

    Returns:
        The function that verl calls.

    Raises:
        ValueError: an objective that needs what verl does not hand to a policy loss.
    """
    spec = RECIPES[objective] if isinstance(objective, str) else objective
    if spec.factor.needs_sampler:
        raise ValueError(
            "objective: expected no factor.sampler and no factor.rejections, whose log-"
            "probabilities verl does not hand on; use algorithm.rollout_correction"
        )
    if spec.factor.top_entropy < 1:
        raise ValueError("objective: expected factor.top_entropy = 1, verl gives no entropy")
    spec = spec.replace(kl=None, beta=0.0, kl_times_ratio=False, entropy_coef=0.0)

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The policy term of the objective; arguments and results are those of verl's losses."""
        _check_config(name, spec, loss_agg_mode, config)
        options = _preset("vanilla", loss_agg_mode, _options(config), weighted=False)
        out = logp_loss(
            log_prob,
            objective=spec,
            advantage=advantages,
            old_logp=old_log_prob,
            factor=rollout_is_weights,
            mask=response_mask,
            normalizer=options.normalizer(response_mask, **config.global_batch_info),
        )
        return out.loss, _numbers(_figures(out))

    return register_policy_loss(name)(policy_loss)


def _register_mode(mode: str) -> PolicyLoss:
    """Makes verl's own loss mode, by our code, the one named `grpo_core_verl_<mode>`."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's policy term; arguments and results are those of its own function."""
        _check_present(config)
        ours = _preset(mode, loss_agg_mode, _options(config), rollout_is_weights is not None)
        sampler_logp = None
        if rollout_is_weights is not None:
            sampler_logp = ours.sampler_logp(old_log_prob, rollout_is_weights)
        out = logp_loss(
            log_prob,
            objective=ours.objective,
            advantage=advantages,
            old_logp=old_log_prob,
            sampler_logp=sampler_logp,
            mask=response_mask,
            normalizer=ours.normalizer(response_mask, **config.global_batch_info),
        )
        return out.loss, _numbers(ours.metrics(out) | _left_out(out))

    return register_policy_loss(f"grpo_core_verl_{mode}")(policy_loss)


@lru_cache(maxsize=64)
def _preset(
    mode: str, loss_agg_mode: str, options: tuple[tuple[str, Any], ...], weighted: bool
) -> VerlPreset:
    """The preset of a configuration, made once."""
    given = dict(options)
    if mode != "dro":
        given.pop("dro_beta")
    ours = preset("verl", loss_mode=mode, loss_agg_mode=loss_agg_mode, **given)
    return ours.weighted() if weighted else ours


def _options(config: Any) -> tuple[tuple[str, Any], ...]:
    """What of verl's actor config a policy term depends on."""
    named = [(name, getattr(config, name)) for name in OPTIONS]
    return (*named, ("dro_beta", config.policy_loss.dro_beta))


def _check_present(config: Any) -> None:
    """Raises ValueError without verl's actor config."""
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, got None")


def _check_config(name: str, spec: Objective, loss_agg_mode: str, config: Any) -> None:
    """Raises ValueError for options that contradict the objective, or that it does not read."""
    _check_present(config)
    (wanted,) = (mode for mode, ours in AGGREGATIONS.items() if ours == spec.aggregation)
    if loss_agg_mode != wanted:
        raise ValueError(
            f"loss_agg_mode: expected {wanted!r}, which is {name}'s, got {loss_agg_mode!r}; set "
            f"actor.loss_agg_mode={wanted}, or register an objective with another aggregation"
        )
    defaults = VerlOptions()
    for option, value in _options(config):
        default = getattr(defaults, option)
        if value != default:
            raise ValueError(
                f"{option}: expected verl's default {default!r} with loss_mode={name}, whose "
                f"numbers are the objective's {spec.surrogate.args}, got {value!r}; use a mode "
                "named grpo_core_verl_..., or register an objective with your numbers"
            )


@torch.no_grad()
def _figures(out: LossOutput) -> dict[str, Tensor]:
    """What verl's losses log, for any objective: the clipped share is of all tokens, as there."""
    tally, metrics = Tally(out), out.metrics
    moved = metrics["moved_tokens"] / metrics["tokens"].clamp(min=1)
    return {
        "actor/pg_clipfrac": metrics["clip_fraction"] * moved,
        "actor/ppo_kl": tally.mean(-tally.log_ratio),
        "actor/pg_clipfrac_lower": metrics["clip_fraction_low"] * moved,
        "actor/ratio_mean": metrics["ratio_mean"],
        **_left_out(out),
    }


def _left_out(out: LossOutput) -> dict[str, Tensor]:
    """How many tokens are left out because a term is NaN or infinite, where verl's loss is NaN."""
    return {"actor/nonfinite_tokens": (out._valid & out._dropped).sum()}


def _numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Python numbers, as verl's losses return; the host waits for the device once."""
    values = torch.stack([value.double() for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


for _mode in MODES:
    _register_mode(_mode)
for _recipe in RECIPES:
    register(f"grpo_core_{_recipe}", _recipe)
