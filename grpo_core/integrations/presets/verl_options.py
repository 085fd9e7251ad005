"""The options of verl's actor, policy_loss and algorithm that affect the loss or the advantages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import (
    check_options,
    choice,
    number,
    option,
    padded_mask,
    read_options,
)
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.objective import KL
from grpo_core.objective.off_policy import Measure, Over, Rejection, SamplerCorrection
from grpo_core.objective.validation import check_floats

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
MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo")
# verl's trainer selects bypass_mode itself
LOSSES = (*MODES, "bypass_mode")
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
    (
        "loss_mode",
        "clip_cov",
    ): "it drops tokens at random; give advantage = 0 for tokens you choose",
    ("loss_mode", "kl_cov"): "it penalises |log ratio| of some tokens; use importance() with "
    "kl='absolute' and give ref_logp = old_logp for tokens you choose, their logp for the others",
    ("adv_estimator", "grpo_passk"): "it changes only the best of a group; give advantage=",
    ("adv_estimator", "opo"): "it weights the rewards of a group by length; give advantage=",
    ("adv_estimator", "optimal_token_baseline"): "it needs Σ π² of every token; give advantage=",
    (
        "adv_estimator",
        "tir_optimal_token_baseline",
    ): "it needs Σ π² of every token; give advantage=",
    ("kl_loss_type", "full"): "verl has no implementation either; use Objective(kl='exact')",
}
# options that the caller handles, and how
INSTEAD = {
    "use_kl_in_reward": "use value.rewards_with_kl and give the advantages",
    "use_pf_ppo": "resample the batch before",
    "calculate_sum_pi_squared": "only optimal_token_baseline reads it",
}
MEASURES: dict[str, Measure] = {"k1": "log_ratio", "k2": "k2", "k3": "k3"}
OVERS: dict[str, Over] = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "max"}
REJECTIONS = tuple(
    f"{over}_{k}" for over in OVERS for k in MEASURES if (over, k) != ("seq_max", "k1")
)


@dataclass(frozen=True)
class RolloutOptions:
    """verl's `RolloutCorrectionConfig`; by default it weights sequences."""

    rollout_is: str | None = option("sequence", ("token", "sequence", None))
    rollout_is_threshold: str | float | None = 2.0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: str | float | None = None
    bypass_mode: bool = False
    loss_type: str = option("ppo_clip", ("ppo_clip", "reinforce"))

    def __post_init__(self) -> None:
        check_options(self)
        # raise for a wrong threshold now
        _ = self.sampler, self.rejections

    @property
    def sampler(self) -> SamplerCorrection | None:
        """The weights; one bound truncates them, two bounds set those outside to 0."""
        if self.rollout_is is None or self.rollout_is_threshold is None:
            return None
        low, high = _bounds("rollout_is_threshold", self.rollout_is_threshold)
        level: Any = self.rollout_is
        if low is None:
            return SamplerCorrection(level, "truncate", 0.0, high)
        return SamplerCorrection(level, "zero", low, high)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """One per name in `rollout_rs`; k1 is −log w, between the logs of its bounds."""
        if self.rollout_rs is None:
            return ()
        names = list(dict.fromkeys(part.strip() for part in self.rollout_rs.split(",")))
        for name in names:
            choice("rollout_rs", name, REJECTIONS)
        if self.rollout_rs_threshold is None:
            raise ValueError(f"rollout_rs_threshold: expected one for {self.rollout_rs}, got None")
        thresholds = str(self.rollout_rs_threshold).split(",")
        thresholds = thresholds * len(names) if len(thresholds) == 1 else thresholds
        if len(thresholds) != len(names):
            want = f"1 or {len(names)} thresholds, separated by commas"
            raise ValueError(
                f"rollout_rs_threshold: expected {want}, got {self.rollout_rs_threshold!r}"
            )
        return tuple(_rejection(*pair) for pair in zip(names, thresholds, strict=True))

    def needs_whole_batch(self, loss: str) -> bool:
        """Whether the loss of a micro-batch cannot compute the weights."""
        # geo_mean averages the bounded weights of a sequence
        return self.sampler is not None and (self.rollout_is_batch_normalize or loss == "geo_mean")

    def of_batch(
        self, old_logp: Tensor, rollout_logp: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """([B, T] weights, 0 where masked, or None; [B, T] bool, the mask after rejections)."""
        valid = padded_mask("response_mask", mask)
        B, T = valid.shape
        sequence = torch.arange(B, device=valid.device).repeat_interleave(T)
        for name, logp in (("old_log_prob", old_logp), ("rollout_log_prob", rollout_logp)):
            check_floats(name, logp, (B, T), device=valid.device)
        vectors = (old_logp.reshape(-1), rollout_logp.reshape(-1), valid.reshape(-1), sequence, B)
        kept = valid
        for rule in self.rejections:
            kept = kept & rule.apply(*vectors)[1].view(B, T)
        if self.sampler is None:
            return None, kept
        weights = self.sampler.apply(*vectors)[0].view(B, T).to(old_logp.dtype)
        if not self.rollout_is_batch_normalize:
            return weights, kept
        counts = valid.to(weights.dtype)
        if self.rollout_is == "sequence":
            counts = counts / counts.sum(1, keepdim=True).clamp(min=1)
        mean = (weights * counts).sum() / counts.sum().clamp(min=1)
        return torch.where(mean > 1e-8, weights / mean, weights), kept


@dataclass(frozen=True)
class VerlOptions:
    """The options of verl that affect the loss or the advantages, with verl's defaults."""

    # actor
    loss_agg_mode: str = option("token-mean", AGGREGATIONS)
    loss_scale_factor: int | None = option(None, whole=True, optional=True)
    clip_ratio: float = option(0.2, low=0)
    clip_ratio_low: float | None = option(0.2, low=0, optional=True)
    clip_ratio_high: float | None = option(0.2, low=0, optional=True)
    clip_ratio_c: float = option(3.0, low=0)
    tau_pos: float = option(1.0, above=0)
    tau_neg: float = option(1.05, above=0)
    entropy_coeff: float = option(0)
    use_kl_loss: bool = False
    kl_loss_coef: float = option(0.001, low=0)
    kl_loss_type: str = option("low_var_kl", KLS)
    # actor.policy_loss
    loss_mode: str = option("vanilla", LOSSES)
    dro_beta: float | None = None
    # algorithm
    rollout_correction: Mapping[str, Any] | RolloutOptions | None = None
    adv_estimator: str = option("gae", ESTIMATORS)
    norm_adv_by_std_in_grpo: bool = True
    gamma: float = option(1.0, low=0, high=1)
    lam: float = option(1.0, low=0, high=1)
    gdpo_reward_keys: tuple[str, ...] | list[str] | None = None
    gdpo_reward_weights: tuple[float, ...] | list[float] | None = None

    def __post_init__(self) -> None:
        for (name, value), instead in UNSUPPORTED.items():
            if getattr(self, name) == value:
                raise NotImplementedError(f"{name}={value!r}: not supported; {instead}")
        check_options(self)
        number("dro_beta", self.dro_beta, above=0, optional=self.loss_mode != "dro")
        correction = read_rollout_correction(self.rollout_correction, self.loss_mode)
        object.__setattr__(self, "rollout_correction", correction)
        if correction is not None and correction.bypass_mode:
            object.__setattr__(self, "loss_mode", "bypass_mode")
        if self.loss == "vanilla":
            number("clip_ratio_c", self.clip_ratio_c, 1 + self.high)
        self._check_terms()

    def _check_terms(self) -> None:
        """Raises NotImplementedError where verl weights KL or entropy unlike its policy term."""
        if not (self.use_kl_loss or self.entropy_coeff):
            return
        if self.loss_mode == "bypass_mode" and self.correction and self.correction.rejections:
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
    def correction(self) -> RolloutOptions | None:
        """`rollout_correction` as an object."""
        assert not isinstance(self.rollout_correction, Mapping)
        return self.rollout_correction

    @property
    def loss(self) -> str:
        """The loss mode, or the loss that bypass_mode calls."""
        if self.loss_mode != "bypass_mode":
            return self.loss_mode
        assert self.correction is not None
        return {"ppo_clip": "vanilla", "reinforce": "reinforce"}[self.correction.loss_type]

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


def read_rollout_correction(given: Any, loss_mode: str) -> RolloutOptions | None:
    """Reads verl's mapping; bypass_mode has the default one.

    Raises:
        ValueError: an unknown option, or a value outside its limits.
        NotImplementedError: weights of mean 1 that depend on the current policy.
    """
    if given is None and loss_mode != "bypass_mode":
        return None
    if isinstance(given, Mapping) or given is None:
        given = read_options(RolloutOptions, "verl's rollout_correction", given or {}, {})
    if not isinstance(given, RolloutOptions):
        raise ValueError(f"rollout_correction: expected a mapping or None, got {given!r}")
    bypass = given.bypass_mode or loss_mode == "bypass_mode"
    if bypass and given.loss_type == "reinforce" and given.rollout_is_batch_normalize:
        raise NotImplementedError(
            "rollout_is_batch_normalize: in bypass_mode these weights depend on the current "
            "policy; switch it off, or scale the advantages"
        )
    return given


def _bounds(name: str, spec: str | float) -> tuple[float | None, float]:
    """(lower or None, upper) from a number, or from two numbers in "lower_upper"."""
    low, bar, high = str(spec).partition("_")
    try:
        bounds = (float(low), float(high)) if bar else (None, float(low))
    except ValueError:
        bounds = (0.0, 0.0)
    least = bounds[1] if bounds[0] is None else bounds[0]
    if isinstance(spec, bool) or not 0 < least <= bounds[1] < math.inf:
        want = "a number > 0, or two in order, 'lower_upper'"
        raise ValueError(f"{name}: expected {want}, got {spec!r}")
    return bounds


def _rejection(name: str, spec: str) -> Rejection:
    """The rejection of a name and its threshold."""
    over, _, k = name.rpartition("_")
    low, high = _bounds("rollout_rs_threshold", spec.strip())
    if k == "k1":
        low = 1 / high if low is None else low
        return Rejection("log_ratio", OVERS[over], -math.log(high), -math.log(low))
    if low is not None:
        raise ValueError(f"rollout_rs_threshold: expected one number for {name}, got {spec!r}")
    return Rejection(MEASURES[k], OVERS[over], high=high)
