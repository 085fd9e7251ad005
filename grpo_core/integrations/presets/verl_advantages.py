"""verl's advantage estimators, by the functions of `advantage` and `value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import padded
from grpo_core.objective.advantage import Estimator, relative_advantages
from grpo_core.objective.value import gae, whiten

if TYPE_CHECKING:
    from grpo_core.integrations.presets.verl_options import VerlOptions

# verl's ε beside a standard deviation
EPSILON = 1e-6
GROUP = Estimator("group", "group", 1, EPSILON)
CENTRED = Estimator("group", None)
# what each makes of the rewards of a group; None: it compares no groups
ADVANTAGES: dict[str, Estimator | None] = {
    "gae": None,
    "grpo": GROUP,
    "grpo_vectorized": GROUP,
    "gdpo": GROUP,
    "rloo": Estimator("leave_one_out", None),
    "rloo_vectorized": Estimator("leave_one_out", None),
    "reinforce_plus_plus": None,
    "reinforce_plus_plus_baseline": CENTRED,
    "gpg": CENTRED,
    "remax": None,
}
ADVANTAGES_INSTEAD = {
    "grpo_passk": "moves only the best of a group; compute it, and give advantage=",
    "opo": "weighs a group's rewards by length; compute it, and give advantage=",
    "optimal_token_baseline": "needs Σ π² of every token; compute it, and give advantage=",
    "tir_optimal_token_baseline": "needs Σ π² of every token; compute it, and give advantage=",
}


def estimator_of(options: VerlOptions) -> Estimator:
    """What the objective does with `rewards`, where that is all the estimator does."""
    return _in_groups(options) or GROUP


def _in_groups(options: VerlOptions) -> Estimator | None:
    """The comparison within groups."""
    found = ADVANTAGES[options.adv_estimator]
    grpo = options.adv_estimator in ("grpo", "grpo_vectorized")
    return CENTRED if grpo and not options.norm_adv_by_std_in_grpo else found


def verl_advantages(
    options: VerlOptions, rewards: Tensor, mask: Tensor, given: Mapping[str, Tensor | None]
) -> Tensor:
    """[B, T], 0 where masked; arguments as in `VerlPreset.advantages`."""

    def needed(name: str) -> Tensor:
        value = given[name]
        if value is None:
            raise ValueError(f"{name}: expected a tensor for {options.adv_estimator}, got None")
        return value

    valid, name = padded("response_mask", mask), options.adv_estimator
    if name == "gae":
        values, gamma, lam = needed("values"), options.gamma, options.lam
        return gae(rewards, values, valid, gamma=gamma, lam=lam, whitened=True)[0]
    if name in ("reinforce_plus_plus", "remax"):
        gamma = options.gamma if name == "reinforce_plus_plus" else 1.0
        whitened, none = name == "reinforce_plus_plus", torch.zeros_like(rewards)
        advantage, _ = gae(rewards, none, valid, gamma=gamma, lam=1.0, whitened=whitened)
        if name == "remax":
            advantage = advantage - needed("reward_baselines")[:, None] * valid
        return advantage
    columns = [rewards.sum(1)] if name != "gdpo" else list(rewards.unbind(1))
    weights = options.gdpo_reward_weights or (1.0,) * len(columns)
    if name == "gdpo" and len(weights) != len(columns):
        want = f"gdpo_reward_weights: expected {len(columns)}, one per column of rewards"
        raise ValueError(f"{want}, got {len(weights)}")
    estimator = _in_groups(options)
    assert estimator is not None
    index = needed("index")
    total = torch.zeros_like(columns[0])
    for weight, column in zip(weights, columns, strict=name == "gdpo"):
        total = total + weight * relative_advantages(column, index, estimator)
    if name == "gpg":
        # as if only the completions with a reward had been sampled
        total = total * len(total) / (columns[0] != 0).sum().clamp(min=1)
    advantage = total[:, None] * valid
    if name in ("gdpo", "reinforce_plus_plus_baseline"):
        advantage = whiten(advantage, valid)
    return advantage
