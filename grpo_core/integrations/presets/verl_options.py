"""The options of verl's actor, policy_loss and algorithm on which loss and advantages depend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_core.integrations.presets.base import choice, number, whole
from grpo_core.integrations.presets.verl_advantages import ADVANTAGES, ADVANTAGES_INSTEAD
from grpo_core.integrations.presets.verl_rollout import RolloutOptions, read_rollout_correction
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.objective import KL

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
LOSSES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "geo_mean",
    "dro",
    "cispo",
    "bypass_mode",
)
# these average in their own way, whatever loss_agg_mode says
OWN_AGGREGATION = ("sapo", "geo_mean")
LOSSES_INSTEAD = {
    "clip_cov": "drops tokens at random; give advantage = 0 for tokens you choose",
    "kl_cov": "penalises |log ratio| of some tokens; use importance() with kl='absolute' and give "
    "ref_logp = old_logp for tokens you choose, their logp for the others",
}
# what is left to the caller, and how
INSTEAD = {
    "use_kl_in_reward": "use value.rewards_with_kl and give the advantages",
    "use_pf_ppo": "resample the batch before",
    "calculate_sum_pi_squared": "only optimal_token_baseline reads it",
}


@dataclass(frozen=True)
class VerlOptions:
    """What of verl's configuration the loss and the advantages depend on, with its defaults."""

    # actor
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.2
    clip_ratio_high: float | None = 0.2
    clip_ratio_c: float = 3.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    entropy_coeff: float = 0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    # actor.policy_loss
    loss_mode: str = "vanilla"
    dro_beta: float | None = None
    # algorithm
    rollout_correction: Mapping[str, Any] | RolloutOptions | None = None
    adv_estimator: str = "gae"
    norm_adv_by_std_in_grpo: bool = True
    gamma: float = 1.0
    lam: float = 1.0
    gdpo_reward_keys: tuple[str, ...] | list[str] | None = None
    gdpo_reward_weights: tuple[float, ...] | list[float] | None = None

    def __post_init__(self) -> None:
        for name, instead in (("loss_mode", LOSSES_INSTEAD), ("adv_estimator", ADVANTAGES_INSTEAD)):
            if getattr(self, name) in instead:
                value = getattr(self, name)
                raise NotImplementedError(f"{name}={value!r}: not here; it {instead[value]}")
        if self.kl_loss_type == "full":
            raise NotImplementedError(
                "kl_loss_type='full': nor has verl an implementation; use Objective(kl='exact')"
            )
        choice("loss_mode", self.loss_mode, LOSSES)
        choice("loss_agg_mode", self.loss_agg_mode, AGGREGATIONS)
        choice("kl_loss_type", self.kl_loss_type, KLS)
        choice("adv_estimator", self.adv_estimator, ADVANTAGES)
        choice("use_kl_loss", self.use_kl_loss, (True, False))
        choice("norm_adv_by_std_in_grpo", self.norm_adv_by_std_in_grpo, (True, False))
        number("clip_ratio", self.clip_ratio, 0.0)
        for name in ("clip_ratio_low", "clip_ratio_high"):
            number(name, getattr(self, name), 0.0, optional=True)
        for name in ("tau_pos", "tau_neg"):
            number(name, getattr(self, name), 0.0, above=True)
        number("entropy_coeff", self.entropy_coeff)
        number("kl_loss_coef", self.kl_loss_coef, 0.0)
        number("dro_beta", self.dro_beta, 0.0, above=True, optional=self.loss_mode != "dro")
        for name in ("gamma", "lam"):
            number(name, getattr(self, name), 0.0, 1.0)
        whole("loss_scale_factor", self.loss_scale_factor, optional=True)
        correction = read_rollout_correction(self.rollout_correction, self.loss_mode)
        object.__setattr__(self, "rollout_correction", correction)
        if correction is not None and correction.bypass_mode:
            object.__setattr__(self, "loss_mode", "bypass_mode")
        number("clip_ratio_c", self.clip_ratio_c, 1 + self.high if self.loss == "vanilla" else 0.0)
        self._check_terms()

    def _check_terms(self) -> None:
        """Raises NotImplementedError where verl's KL or entropy has other weights than its loss."""
        if not (self.use_kl_loss or self.entropy_coeff):
            return
        apart = self.loss_mode in OWN_AGGREGATION and self.aggregation != self.loss_agg_mode
        instead = "give loss_agg_mode='seq-mean-token-mean'"
        if self.loss_mode == "bypass_mode" and self.correction and self.correction.rejections:
            apart, instead = True, "reject before the loss, by the mask"
        elif self.loss_mode == "geo_mean":
            apart, instead = True, "compute them in a second call"
        if apart:
            raise NotImplementedError(
                f"use_kl_loss, entropy_coeff: with loss_mode={self.loss_mode!r} verl averages them "
                f"otherwise than the policy term; {instead}"
            )

    @property
    def low(self) -> float:
        """clip_ratio_low, which is clip_ratio where it is None."""
        return self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low

    @property
    def high(self) -> float:
        """clip_ratio_high, which is clip_ratio where it is None."""
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high

    @property
    def correction(self) -> RolloutOptions | None:
        """`rollout_correction`, read."""
        assert not isinstance(self.rollout_correction, Mapping)
        return self.rollout_correction

    @property
    def loss(self) -> str:
        """The loss mode, or what bypass_mode calls."""
        if self.loss_mode != "bypass_mode":
            return self.loss_mode
        assert self.correction is not None
        return {"ppo_clip": "vanilla", "reinforce": "reinforce"}[self.correction.loss_type]

    @property
    def aggregation(self) -> str:
        """The aggregation that the loss mode really uses."""
        return "seq-mean-token-mean" if self.loss_mode in OWN_AGGREGATION else self.loss_agg_mode
