"""A method is a value: five independent axes, and a table of the published choices.

    L = Σ_n weight_n · (surrogate(logp_n, log_ratio_n, A_n) + beta · kl(logp_n, ref_logp_n))

| axis         | field         | where it is computed                  |
|--------------|---------------|---------------------------------------|
| advantage    | `advantage`   | advantages.py, kernels/group_norm.py  |
| ratio level  | `ratio_level` | fused_loss.py (mean over a sequence)  |
| surrogate    | `surrogate`   | kernels/surrogates.py                 |
| KL estimator | `kl`, `beta`  | kernels/kl.py                         |
| aggregation  | `aggregation` | weights.py                            |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from grpo_core.advantages import GroupNorm
from grpo_core.kernels import kl as kl_estimators
from grpo_core.kernels import surrogates
from grpo_core.weights import Aggregation

RatioLevel = Literal["token", "sequence"]
KL = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class Surrogate:
    """A function of kernels/surrogates.py and its parameters, floats all."""

    function: Callable
    args: tuple[float, ...]


def clip(eps_low: float, eps_high: float | None = None, delta: float = math.inf) -> Surrogate:
    """PPO's clipped ratio: bounds 1 − eps_low and 1 + eps_high (eps_low if None), outer bound δ.

    Raises:
        ValueError: a negative bound, or δ < 1 + eps_high (there δ and dual clip would differ).
    """
    eps_high = eps_low if eps_high is None else eps_high
    for name, bound in (("eps_low", eps_low), ("eps_high", eps_high)):
        if not 0 <= bound < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {bound!r}")
    if not delta >= 1 + eps_high:
        raise ValueError(f"delta: expected >= 1 + eps_high = {1 + eps_high}, got {delta!r}")
    return Surrogate(surrogates.clip, (float(eps_low), float(eps_high), float(delta)))


@dataclass(frozen=True)
class Objective:
    """What is minimised. Immutable and hashable; `replace` makes a variant.

    Args:
        surrogate: the policy term, for example `clip(0.2, 0.28)`.
        kl: estimator of the KL to the reference policy, or None.
        beta: weight of the KL term; with 0 a given `ref_logp` is only measured.
        ratio_level: "token", or "sequence" for one ratio a sequence (GSPO, arXiv 2507.18071).
        advantage: how `rewards` become advantages when the loss is given rewards.
        aggregation: how tokens are averaged, see `weights.token_weights`.

    Raises:
        ValueError: an unknown name, a negative or infinite beta, beta without a KL estimator.
    """

    surrogate: Surrogate
    kl: KL | None = None
    beta: float = 0.0
    ratio_level: RatioLevel = "token"
    advantage: GroupNorm = field(default_factory=GroupNorm)
    aggregation: Aggregation = "token_mean"

    def __post_init__(self) -> None:
        _one_of("kl", self.kl, (*get_args(KL), None))
        _one_of("ratio_level", self.ratio_level, get_args(RatioLevel))
        _one_of("aggregation", self.aggregation, get_args(Aggregation))
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta: expected a finite number >= 0, got {self.beta!r}")
        if self.beta and self.kl is None:
            raise ValueError(f"kl: expected an estimator for beta = {self.beta}, got None")

    @property
    def kl_function(self) -> Callable | None:
        """The estimator of kernels/kl.py."""
        return getattr(kl_estimators, self.kl) if self.kl else None

    def replace(self, **changes: Any) -> Objective:
        """The same objective with some fields changed."""
        return dataclasses.replace(self, **changes)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


RECIPES: dict[str, Objective] = {
    # DeepSeekMath, arXiv 2402.03300, eq. 3; beta: sec. 4.2
    "grpo": Objective(clip(0.2), kl="k3", beta=0.04, aggregation="sequence_mean"),
    # Understanding R1-Zero-like training, arXiv 2503.20783, sec. 3.2
    "dr_grpo": Objective(
        clip(0.2), advantage=GroupNorm(scale=False), aggregation="constant_length"
    ),
    # DAPO, arXiv 2503.14476, eq. 8; pass the global token count as `normalizer`
    "dapo": Objective(clip(0.2, 0.28), aggregation="token_mean"),
    # TRL's name for the token mean of the local batch
    "bnpo": Objective(clip(0.2), aggregation="token_mean"),
}


def find_objective(objective: str | Objective) -> Objective:
    """The objective itself, or the recipe of that name.

    Raises:
        ValueError: neither an `Objective` nor a name in `RECIPES`.
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in RECIPES:
        raise ValueError(
            f"objective: expected an Objective or one of {sorted(RECIPES)}, got {objective!r}"
        )
    return RECIPES[objective]
