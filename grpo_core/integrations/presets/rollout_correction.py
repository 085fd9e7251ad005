"""verl's rollout correction: weights and rejections for the mismatch of trainer and sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import check, check_options, one_of, option, padded_mask
from grpo_core.objective.off_policy import Action, Measure, Over, Rejection, SamplerCorrection
from grpo_core.objective.validation import check_floats

MEASURES: dict[str, Measure] = {"k1": "log_ratio", "k2": "k2", "k3": "k3"}
OVERS: dict[str, Over] = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "max"}
REJECTIONS = tuple(
    f"{over}_{k}" for over in OVERS for k in MEASURES if (over, k) != ("seq_max", "k1")
)


@dataclass(frozen=True)
class RolloutOptions:
    """verl's `RolloutCorrectionConfig`; by default it weights sequences."""

    rollout_is: str | None = option("sequence", one_of(("token", "sequence")))
    rollout_is_threshold: str | float | None = 2.0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: str | float | None = None
    bypass_mode: bool = False
    loss_type: str = option("ppo_clip", one_of(("ppo_clip", "reinforce")))

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
        action: Action = "truncate" if low is None else "zero"
        return SamplerCorrection(self.rollout_is, action, low or 0.0, high)  # type: ignore[arg-type]

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """One per name in `rollout_rs`."""
        if self.rollout_rs is None:
            return ()
        names = list(dict.fromkeys(part.strip() for part in self.rollout_rs.split(",")))
        for name in names:
            check("rollout_rs", name, one_of(REJECTIONS))
        given = self.rollout_rs_threshold
        if given is None:
            raise ValueError(f"rollout_rs_threshold: expected one for {self.rollout_rs}, got None")
        thresholds = str(given).split(",")
        thresholds = thresholds * len(names) if len(thresholds) == 1 else thresholds
        if len(thresholds) != len(names):
            want = f"1 or {len(names)} thresholds, separated by commas"
            raise ValueError(f"rollout_rs_threshold: expected {want}, got {given!r}")
        return tuple(map(_rejection, names, thresholds))

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
    """The rejection of a name and its threshold; k1 is −log w, between the logs of its bounds."""
    over, _, k = name.rpartition("_")
    low, high = _bounds("rollout_rs_threshold", spec.strip())
    if k == "k1":
        low = 1 / high if low is None else low
        return Rejection("log_ratio", OVERS[over], -math.log(high), -math.log(low))
    if low is not None:
        raise ValueError(f"rollout_rs_threshold: expected one number for {name}, got {spec!r}")
    return Rejection(MEASURES[k], OVERS[over], high=high)
