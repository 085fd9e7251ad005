"""verl's `rollout_correction`: importance weights and rejections between sampler and trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.presets.base import choice, padded, read_options
from grpo_core.objective.off_policy import Measure, Over, Rejection, SamplerCorrection
from grpo_core.objective.validation import check_floats

MEASURES: dict[str, Measure] = {"k1": "log_ratio", "k2": "k2", "k3": "k3"}
OVERS: dict[str, Over] = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "max"}
REJECTIONS = tuple(
    f"{over}_{k}" for over in OVERS for k in MEASURES if (over, k) != ("seq_max", "k1")
)


@dataclass(frozen=True)
class RolloutOptions:
    """verl's `RolloutCorrectionConfig`: once there is one, it weighs sequences by default."""

    rollout_is: str | None = "sequence"
    rollout_is_threshold: str | float | None = 2.0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: str | float | None = None
    bypass_mode: bool = False
    loss_type: str = "ppo_clip"

    def __post_init__(self) -> None:
        choice("rollout_is", self.rollout_is, ("token", "sequence", None))
        choice("loss_type", self.loss_type, ("ppo_clip", "reinforce"))
        for name in ("rollout_is_batch_normalize", "bypass_mode"):
            choice(name, getattr(self, name), (True, False))
        # both are read once, so that a bad threshold is refused here
        _ = self.sampler, self.rejections

    @property
    def sampler(self) -> SamplerCorrection | None:
        """The weights; a single bound truncates, two set to 0 what is outside."""
        if self.rollout_is is None or self.rollout_is_threshold is None:
            return None
        low, high = _bounds("rollout_is_threshold", self.rollout_is_threshold)
        level: Any = self.rollout_is
        if low is None:
            return SamplerCorrection(level, "truncate", 0.0, high)
        return SamplerCorrection(level, "zero", low, high)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """One for each name in `rollout_rs`; k1 is −log w, between the logs of its bounds."""
        if self.rollout_rs is None:
            return ()
        names = list(dict.fromkeys(part.strip() for part in self.rollout_rs.split(",")))
        for name in names:
            choice("rollout_rs", name, REJECTIONS)
        if self.rollout_rs_threshold is None:
            raise ValueError(f"rollout_rs_threshold: expected one for {self.rollout_rs}, got None")
        specs = str(self.rollout_rs_threshold).split(",")
        specs = specs * len(names) if len(specs) == 1 else specs
        if len(specs) != len(names):
            want = f"1 or {len(names)} thresholds, separated by commas"
            raise ValueError(
                f"rollout_rs_threshold: expected {want}, got {self.rollout_rs_threshold!r}"
            )
        return tuple(_rejection(name, spec) for name, spec in zip(names, specs, strict=True))

    def needs_whole_batch(self, loss: str) -> bool:
        """Whether weights cannot be found inside the loss of a micro-batch."""
        if self.sampler is None:
            return False
        # geo_mean bounds every token's weight, then takes their mean
        return self.rollout_is_batch_normalize or loss == "geo_mean"

    def of_batch(
        self, old_logp: Tensor, rollout_logp: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """(weights [B, T], 0 where masked, or None; [B, T] bool, who is left)."""
        valid = padded("response_mask", mask)
        B, T = valid.shape
        sequence = torch.arange(B, device=valid.device).repeat_interleave(T)
        for name, logp in (("old_log_prob", old_logp), ("rollout_log_prob", rollout_logp)):
            check_floats(name, logp, (B, T), device=valid.device)
        vectors = (old_logp.reshape(-1), rollout_logp.reshape(-1), valid.reshape(-1), sequence, B)
        left = valid
        for rule in self.rejections:
            left = left & rule.apply(*vectors)[1].view(B, T)
        if self.sampler is None:
            return None, left
        weights = self.sampler.apply(*vectors)[0].view(B, T).to(old_logp.dtype)
        if not self.rollout_is_batch_normalize:
            return weights, left
        counts = valid.to(weights.dtype)
        if self.rollout_is == "sequence":
            counts = counts / counts.sum(1, keepdim=True).clamp(min=1)
        mean = (weights * counts).sum() / counts.sum().clamp(min=1)
        return torch.where(mean > 1e-8, weights / mean, weights), left


def read_rollout_correction(given: Any, loss_mode: str) -> RolloutOptions | None:
    """verl's mapping, read; bypass_mode has one even if none is given.

    Raises:
        ValueError: an unknown option, or a value it cannot have.
        NotImplementedError: weights of mean 1 that follow from the policy itself.
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
            "rollout_is_batch_normalize: in bypass_mode these weights follow from the policy "
            "itself; leave them as they are, or scale the advantages"
        )
    return given


def _bounds(name: str, spec: str | float) -> tuple[float | None, float]:
    """(lower or None, upper) of a number, or of two in "lower_upper"."""
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
    """The rule of one name and its threshold."""
    over, _, k = name.rpartition("_")
    low, high = _bounds("rollout_rs_threshold", spec.strip())
    if k == "k1":
        low = 1 / high if low is None else low
        return Rejection("log_ratio", OVERS[over], -math.log(high), -math.log(low))
    if low is not None:
        raise ValueError(f"rollout_rs_threshold: expected one number for {name}, got {spec!r}")
    return Rejection(MEASURES[k], OVERS[over], high=high)
