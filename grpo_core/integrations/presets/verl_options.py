"""The options of verl's actor, policy_loss and algorithm that affect the loss or the advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_core.integrations.presets.base import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    SHARE,
    at_least,
    check,
    check_options,
    one_of,
    option,
    read_options,
)
from grpo_core.integrations.presets.rollout_correction import RolloutOptions
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.objective import KL, Surrogate
from grpo_core.objective.recipes import (
    cispo,
    clip,
    dppo_kl,
    dppo_tv,
    dro,
    importance,
    reinforce,
    sapo,
)

AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant_length",
}
KLS: dict[str, KL] = {
    "kl": "k1",
    "k1": "k1",
    "abs": "absolute",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "kl+": "k1_plus",
    "k1+": "k1_plus",
    "abs+": "absolute_plus",
    "mse+": "k2",
    "k2+": "k2",
    "low_var_kl+": "k3_plus",
    "k3+": "k3_plus",
}
# the policy terms, by the loss mode
SURROGATES: dict[str, Callable[[VerlOptions], Surrogate]] = {
    "vanilla": lambda given: clip(given.low, given.high, given.clip_ratio_c),
    "dppo_tv": lambda given: dppo_tv(given.low, given.high, given.clip_ratio_c),
    "dppo_kl": lambda given: dppo_kl(given.low, given.high, given.clip_ratio_c),
    "gspo": lambda given: clip(given.low, given.high),
    "sapo": lambda given: sapo(given.tau_pos, given.tau_neg),
    "gpg": lambda given: reinforce(),
    "geo_mean": lambda given: importance(),
    "dro": lambda given: dro(given.dro_beta),  # type: ignore[arg-type]
    "cispo": lambda given: cispo(1 + given.high, max(1 - given.low, 0.0)),
}
MODES = tuple(SURROGATES)
# verl's trainer selects bypass_mode itself, whose losses are vanilla and reinforce
LOSSES = (*MODES, "bypass_mode")
SURROGATES["reinforce"] = SURROGATES["gpg"]
# loss modes that ignore loss_agg_mode
OWN_AGGREGATION = ("sapo", "geo_mean")
# the epsilon that verl adds to a standard deviation
EPSILON = 1e-6
GROUP = Estimator("group", "group", 1, EPSILON)
CENTRED = Estimator("group", None)
# how each adv_estimator normalises the rewards of a group; None: it does not compare groups
ESTIMATORS: dict[str, Estimator | None] = {
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
# unsupported values, and what to do instead
UNSUPPORTED = {
    "loss_mode": {
        "clip_cov": "it drops tokens at random; give advantage = 0 for tokens you choose",
        "kl_cov": "it penalises |log ratio| of some tokens; use importance() with kl='absolute' "
        "and give ref_logp = old_logp for tokens you choose, their logp for the others",
    },
    "adv_estimator": {
        "grpo_passk": "it changes only the best of a group; give advantage=",
        "opo": "it weights the rewards of a group by length; give advantage=",
        "optimal_token_baseline": "it needs Σ π² of every token; give advantage=",
        "tir_optimal_token_baseline": "it needs Σ π² of every token; give advantage=",
    },
    "kl_loss_type": {
        "full": "verl has no implementation either; use Objective(kl='exact')",
    },
}
# options that the caller handles, and how
INSTEAD = {
    "use_kl_in_reward": "use value.rewards_with_kl and give the advantages",
    "use_pf_ppo": "resample the batch before",
    "calculate_sum_pi_squared": "only optimal_token_baseline reads it",
}


@dataclass(frozen=True)
class VerlOptions:
    """The options of verl that affect the loss or the advantages, with verl's defaults."""

    # actor
    loss_agg_mode: str = option("token-mean", one_of(AGGREGATIONS))
    loss_scale_factor: int | None = option(None, COUNT)
    clip_ratio: float = option(0.2, NOT_NEGATIVE)
    clip_ratio_low: float | None = option(0.2, NOT_NEGATIVE)
    clip_ratio_high: float | None = option(0.2, NOT_NEGATIVE)
    clip_ratio_c: float = option(3.0, NOT_NEGATIVE)
    tau_pos: float = option(1.0, POSITIVE)
    tau_neg: float = option(1.05, POSITIVE)
    entropy_coeff: float = option(0, NUMBER)
    use_kl_loss: bool = False
    kl_loss_coef: float = option(0.001, NOT_NEGATIVE)
    kl_loss_type: str = option("low_var_kl", one_of(KLS))
    # actor.policy_loss
    loss_mode: str = option("vanilla", one_of(LOSSES))
    dro_beta: float | None = None
    # algorithm; rollout_correction is a mapping, read as `RolloutOptions`, or None
    rollout_correction: Any = None
    adv_estimator: str = option("gae", one_of(ESTIMATORS))
    norm_adv_by_std_in_grpo: bool = True
    gamma: float = option(1.0, SHARE)
    lam: float = option(1.0, SHARE)
    gdpo_reward_keys: tuple[str, ...] | list[str] | None = None
    gdpo_reward_weights: tuple[float, ...] | list[float] | None = None

    def __post_init__(self) -> None:
        for name, values in UNSUPPORTED.items():
            value = getattr(self, name)
            if isinstance(value, str) and value in values:
                raise NotImplementedError(f"{name}={value!r}: not supported; {values[value]}")
        check_options(self)
        if self.loss_mode == "dro":
            check("dro_beta", self.dro_beta, POSITIVE)
        self._read_rollout_correction()
        if self.loss == "vanilla":
            check("clip_ratio_c", self.clip_ratio_c, at_least(1 + self.high))
        self._check_terms()

    def _read_rollout_correction(self) -> None:
        """Reads verl's mapping; bypass_mode has the default one, which may itself select it."""
        given = self.rollout_correction
        if self.loss_mode == "bypass_mode" and given is None:
            given = {}
        if isinstance(given, Mapping):
            given = read_options(RolloutOptions, "verl's rollout_correction", given, {})
        if not isinstance(given, RolloutOptions | None):
            raise ValueError(f"rollout_correction: expected a mapping or None, got {given!r}")
        object.__setattr__(self, "rollout_correction", given)
        if given is not None and given.bypass_mode:
            object.__setattr__(self, "loss_mode", "bypass_mode")
        if self.loss == "reinforce" and given.rollout_is_batch_normalize:
            raise NotImplementedError(
                "rollout_is_batch_normalize: in bypass_mode these weights depend on the current "
                "policy; switch it off, or scale the advantages"
            )

    def _check_terms(self) -> None:
        """Raises NotImplementedError where verl weights KL or entropy unlike its policy term."""
        if not (self.use_kl_loss or self.entropy_coeff):
            return
        if self.loss_mode == "bypass_mode" and self.rollout_correction.rejections:
            instead = "reject before the loss, by the mask"
        elif self.loss_mode == "geo_mean":
            instead = "compute them in a second call"
        elif self.aggregation != self.loss_agg_mode:
            instead = "give loss_agg_mode='seq-mean-token-mean'"
        else:
            return
        raise NotImplementedError(
            f"use_kl_loss, entropy_coeff: with loss_mode={self.loss_mode!r} verl averages them "
            f"unlike the policy term; {instead}"
        )

    @property
    def low(self) -> float:
        """clip_ratio_low; by default clip_ratio."""
        return self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low

    @property
    def high(self) -> float:
        """clip_ratio_high; by default clip_ratio."""
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high

    @property
    def loss(self) -> str:
        """The loss mode, or the loss that bypass_mode calls."""
        if self.loss_mode != "bypass_mode":
            return self.loss_mode
        return {"ppo_clip": "vanilla", "reinforce": "reinforce"}[self.rollout_correction.loss_type]

    @property
    def aggregation(self) -> str:
        """The aggregation that the loss mode uses."""
        return "seq-mean-token-mean" if self.loss_mode in OWN_AGGREGATION else self.loss_agg_mode

    @property
    def estimator(self) -> Estimator | None:
        """How the rewards of a group are normalised; None for estimators without groups."""
        if self.adv_estimator.startswith("grpo") and not self.norm_adv_by_std_in_grpo:
            return CENTRED
        return ESTIMATORS[self.adv_estimator]
