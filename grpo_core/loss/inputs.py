"""The door: checks what a caller gives and lays it out as rows, before anything is launched.

A padded `[B, T, V]` batch and packed `[N, V]` rows leave here in one form: vectors `[N]` with
masked tokens marked once, by `valid`, and a weight for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.kernels.records import SequenceTokens, Terms
from grpo_core.objective.advantage import estimate_advantages
from grpo_core.objective.aggregation import Aggregation, token_weights
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective
from grpo_core.objective.validation import (
    check_concrete,
    check_floats,
    check_ids,
    check_integers,
    check_mask,
    check_tensor,
    is_number,
    must_validate,
    raise_first,
)

# the target of a masked token, as everywhere in this ecosystem
IGNORE = -100
# below it a float32 of logit / temperature no longer tells neighbours apart
COLDEST = 1e-4
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the metrics of a loss need beside its results."""

    objective: Objective
    given: Tensor  # [N] bool, valid before a sampler correction
    bad_target: Tensor  # [N] bool, neither a word nor IGNORE
    advantage: Tensor  # [N]
    old_logp: Tensor | None = None  # [N], nats
    sampler_logp: Tensor | None = None  # [N], nats
    groups: tuple[Tensor, int | Tensor] | None = None  # rewards [B], and whose they are


@dataclass(frozen=True, kw_only=True)
class Tokens(Measured, SequenceTokens):
    """Everything a loss needs beside the logits, as vectors over N tokens."""

    normalizer: Tensor | float | None

    @property
    def needs_statistics(self) -> bool:
        """Whether a token's loss waits for the statistics of other rows, or of its own."""
        spec = self.objective
        return not spec.is_token_level or spec.factor.needs_statistics(self)

    @property
    def couples_sequences(self) -> bool:
        """Whether a token's loss waits for tokens of other sequences."""
        factor = self.objective.factor
        waits = factor.needs_sampler and factor.waits_for_logp(self.old_logp)
        return factor.top_entropy < 1 or waits

    @property
    def terms(self) -> Terms:
        """Surrogate and KL as the kernels take them."""
        spec = self.objective
        return Terms(
            surrogate=spec.surrogate.function,
            surrogate_args=spec.surrogate.args,
            kl=spec.kl_function if self.ref_logp is not None else None,
            kl_times_ratio=spec.kl_times_ratio,
            beta=float(spec.beta),
            ratio_level=spec.ratio_level,
            token_clip=spec.token_clip,
        )

    def still(self) -> Tensor:
        """[N] bool: valid tokens that can have no gradient, whatever their logits are."""
        spec = self.objective
        if spec.beta or spec.entropy_coef or self.couples_sequences:
            return torch.zeros_like(self.valid)
        if not spec.surrogate.homogeneous:
            return torch.zeros_like(self.valid)
        moves = self.valid & (self.advantage != 0)
        if self.needs_statistics:
            moving = self.advantage.new_zeros(self.sequences)
            moves = moving.scatter_add_(0, self.sequence, moves.to(moving.dtype))[self.sequence] > 0
        return self.valid & ~moves

    def times(self, number: Tensor) -> Tokens:
        """Every weight multiplied by a 0-dim tensor."""
        bonus = self.entropy_weight
        bonus = None if bonus is None else bonus * number
        return replace(self, weight=self.weight * number, entropy_weight=bonus)

    def of_rows(self, place: slice | Tensor) -> Tokens:
        """Those of some rows; a weight stays what it is in the whole call."""
        given: dict[str, Any] = vars(self)
        vectors = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.ndim == 1}
        some: dict[str, Any] = {k: v[place] for k, v in vectors.items()}
        some["sequence_id"] = self.sequence[place]
        return replace(self, **some)

    def multiplied(self, factor: Tensor) -> Tokens:
        """With another factor of the surrogate."""
        factor = factor.to(self.advantage.dtype)
        return replace(self, factor=factor if self.factor is None else self.factor * factor)

    def without(self, rejected: Tensor) -> Tokens:
        """Without some tokens, which then count in no mean."""
        valid = self.valid & ~rejected
        target = torch.where(valid, self.target, IGNORE)
        return replace(self, valid=valid, target=target).weighed()

    def only_entropy_of(self, kept: Tensor) -> Tokens:
        """Surrogate and entropy bonus on some tokens only; the others stay in every policy mean."""
        tokens = self.multiplied(kept)
        return replace(tokens, entropy_weight=tokens._entropy_weight(self.weight, kept))

    def weighed(self) -> Tokens:
        """With the weights of the valid tokens."""
        weight = self._weights(self.valid, self.objective.aggregation, self.normalizer)
        return replace(self, weight=weight, entropy_weight=self._entropy_weight(weight, self.valid))

    def _entropy_weight(self, weight: Tensor, kept: Tensor) -> Tensor | None:
        """entropy_coef times the weight of each entropy, 0 outside `kept`; None without a bonus."""
        spec = self.objective
        if not spec.entropy_coef:
            return None
        if spec.entropy_aggregation is not None:
            weight = self._weights(self.valid & kept, spec.entropy_aggregation, None)
        return spec.entropy_coef * torch.where(kept, weight, 0.0)

    def _weights(
        self, valid: Tensor, aggregation: Aggregation, normalizer: Tensor | float | None
    ) -> Tensor:
        return token_weights(
            valid,
            self.sequence,
            aggregation,
            sequences=self.sequences,
            width=self.width,
            normalizer=normalizer,
            dtype=self.advantage.dtype,
        )


def check_logits(logits: Tensor, temperature: float, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless `logits` and `temperature` can be computed with."""
    check_concrete(logits=logits)
    shape = list(check_tensor("logits", logits).shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"logits: expected a tensor [B, T, V] or [N, V], got {shape}")
    if logits.dtype not in dtypes:
        raise ValueError(f"logits: expected one of {dtypes}, got {logits.dtype}")
    if shape[-1] == 0:
        raise ValueError(f"logits: expected V >= 1, got shape {shape}")
    if not is_number(temperature) or not COLDEST <= temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite Python number >= {COLDEST}, got {temperature!r}"
        )


def check_target(
    logits: Tensor, target: Tensor, mask: Tensor | None, validate: bool | None
) -> Tensor:
    """The target as int64, once it and the mask go with the logits.

    Raises:
        ValueError, NotImplementedError: a wrong shape, dtype or device; with `validate` (None: on
            the CPU) also a target that is neither a word nor -100.
    """
    check_concrete(target=target, mask=mask)
    shape, V = tuple(logits.shape[:-1]), logits.shape[-1]
    target = check_integers("target", target)
    if target.shape != shape and target.ndim == len(shape):
        raise ValueError(
            f"target: expected shape {list(shape)} for logits {list(logits.shape)}, got "
            f"{list(target.shape)}; position t predicts token t + 1: give logits[:, :-1], or pad "
            f"the shifted target with {IGNORE}"
        )
    check_integers("target", target, shape, device=logits.device)
    if mask is not None:
        check_mask("mask", mask, shape, device=logits.device)
    if must_validate(validate, logits):
        bad = present(target, mask) & ((target < 0) | (target >= V)).reshape(-1)
        if bad.any():
            raise_first("target", f"{IGNORE} or a word in [0, V = {V})", target.reshape(-1), bad)
    return target


def check_loss_arguments(
    logits: Tensor,
    target: Tensor,
    *,
    objective: str | Objective,
    advantage: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    group_id: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    ref_logits: Tensor | None,
    sampler_logp: Tensor | None,
    mask: Tensor | None,
    sequence_id: Tensor | None,
    normalizer: Tensor | float | None,
    backend: Backend | None,
    validate: bool | None,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """The token vectors and their objective, in `dtype`; arguments as in `fused_loss`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    spec = find_objective(objective)
    check_concrete(
        target=target,
        advantage=advantage,
        rewards=rewards,
        group_id=group_id,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_logits=ref_logits,
        sampler_logp=sampler_logp,
        mask=mask,
        sequence_id=sequence_id,
        normalizer=normalizer,
    )
    shape, packed = logits.shape[:-1], logits.ndim == 2
    if (advantage is None) == (rewards is None):
        both = "neither" if advantage is None else "both"
        raise ValueError(f"advantage: expected exactly one of advantage and rewards, got {both}")
    for name, grouping in (("group_size", group_size), ("group_id", group_id)):
        if grouping is not None and rewards is None:
            raise ValueError(f"{name}: expected None without rewards, got {grouping!r}")
    _check_references(spec, logits, ref_logp, ref_logits, sampler_logp)
    target = check_target(logits, target, mask, validate)
    old_logp = _floats("old_logp", old_logp, (shape,), logits, dtype)
    ref_logp = _floats("ref_logp", ref_logp, (shape,), logits, dtype)
    sampler_logp = _floats("sampler_logp", sampler_logp, (shape,), logits, dtype)
    normalizer = _check_normalizer(normalizer, spec, logits, validate)
    sequence_id = _check_sequences(logits, sequence_id, target, mask, rewards, validate)
    sequence_id = None if sequence_id is None else sequence_id.contiguous()
    groups: tuple[Tensor, int | Tensor] | None = None
    if rewards is not None:
        advantage = estimate_advantages(
            rewards, spec.advantage, group_size, group_id, backend=backend, validate=validate
        ).to(dtype)
        whose = group_size if group_id is None else group_id
        assert whose is not None
        groups = (rewards.detach(), whose)
    else:
        shapes = (shape,) if packed else (shape, shape[:1])
        advantage = _floats("advantage", advantage, shapes, logits, dtype)
        assert advantage is not None
    target, valid, bad_target, advantage = _flattened(
        target, mask, sequence_id, advantage, rewards is not None, logits
    )
    tokens = Tokens(
        objective=spec,
        target=target,
        valid=valid,
        given=valid,
        bad_target=bad_target,
        weight=advantage,  # replaced by `weighed`
        advantage=advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sequence_id=sequence_id,
        sequences=shape[0],
        width=None if packed else shape[1],
        normalizer=normalizer,
        sampler_logp=sampler_logp,
        groups=groups,
    ).weighed()
    if old_logp is None or spec.factor.waits_for_logp(old_logp):
        return tokens
    return spec.factor.of_sampler(tokens, old_logp)


def _flattened(
    target: Tensor,
    mask: Tensor | None,
    sequence_id: Tensor | None,
    advantage: Tensor,
    per_sequence: bool,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, valid, bad_target, advantage), `[N]` each; a target that is not valid is IGNORE.

    `per_sequence`: an advantage is that of a sequence although there are as many as tokens.
    """
    valid = present(target, mask)
    target = target.reshape(-1)
    bad_target = valid & ((target < 0) | (target >= logits.shape[-1]))
    valid = valid & ~bad_target
    per_sequence = per_sequence or advantage.numel() != target.numel()
    known = advantage.numel() if per_sequence else logits.shape[0]
    sequence = sequence_id
    if sequence is not None:
        valid = valid & (sequence >= 0) & (sequence < min(known, logits.shape[0]))
    else:
        sequence = torch.arange(target.numel(), device=target.device) // max(logits.shape[1], 1)
    if per_sequence:
        advantage = advantage[sequence.clamp(0, max(known - 1, 0))]
    return torch.where(valid, target, IGNORE), valid, bad_target, advantage


def _check_references(
    spec: Objective,
    logits: Tensor,
    ref_logp: Tensor | None,
    ref_logits: Tensor | None,
    sampler_logp: Tensor | None,
) -> None:
    """Raises ValueError unless what the objective compares with is there, and nothing else."""
    exact = spec.kl == "exact"
    name, given = ("ref_logits", ref_logits) if exact else ("ref_logp", ref_logp)
    if spec.beta and given is None:
        raise ValueError(
            f"{name}: expected a tensor for beta = {spec.beta}, got None (or replace beta by 0)"
        )
    if exact and ref_logp is not None:
        raise ValueError("ref_logp: expected None for kl = 'exact', which takes ref_logits")
    if ref_logits is not None and not exact:
        raise ValueError(
            f"ref_logits: expected None for kl = {spec.kl!r}; use kl='exact', or give "
            "ref_logp=token_logp(ref_logits, target, ...).logp"
        )
    if ref_logits is not None:
        check_floats("ref_logits", ref_logits, tuple(logits.shape), device=logits.device)
    if spec.factor.needs_sampler and sampler_logp is None:
        name = "sampler" if spec.factor.sampler is not None else "rejections"
        raise ValueError(f"sampler_logp: expected a tensor for factor.{name}, got None")


def words_of(target: Tensor) -> Tensor:
    """[N] int64 of its own stride: a column of a matrix stays a view under `reshape`."""
    return target.reshape(-1).long().contiguous()


def present(target: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool: tokens that are not masked; `target` is int64."""
    present = target.reshape(-1) != IGNORE
    return present if mask is None else present & (mask.reshape(-1) != 0)


def _check_sequences(
    logits: Tensor,
    sequence_id: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    rewards: Tensor | None,
    validate: bool | None,
) -> Tensor | None:
    """The ids as int64, once packed rows, and only they, say whose they are, each rewarded.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    packed, N = logits.ndim == 2, logits.shape[0]
    if not packed and sequence_id is not None:
        raise ValueError("sequence_id: expected None for logits [B, T, V], got a tensor")
    if packed and sequence_id is None:
        raise ValueError("sequence_id: expected [N] for packed logits [N, V], got None")
    if sequence_id is not None:
        sequence_id = check_integers("sequence_id", sequence_id, (N,), device=logits.device)
        if must_validate(validate, logits):
            check_ids("sequence_id", sequence_id, "N", N, logits, True)
    if rewards is not None:
        shapes = () if packed else (tuple(logits.shape[:1]),)
        check_floats("rewards", rewards, *shapes, device=logits.device)
        if target.numel() and not rewards.numel():
            raise ValueError("rewards: expected one for every sequence, got [0]")
    if sequence_id is None or rewards is None or not must_validate(validate, logits):
        return sequence_id
    if N and rewards.numel() == N and int(sequence_id.max()) + 1 < N:
        raise ValueError(
            f"rewards: expected one per sequence, got {N}, one per token, for "
            f"{int(sequence_id.max()) + 1} sequences"
        )
    unknown = present(target, mask) & (sequence_id >= rewards.numel())
    if unknown.any():
        want = f"ids below the {rewards.numel()} rewards"
        raise_first("sequence_id", want, sequence_id, unknown)
    return sequence_id


def _floats(
    name: str,
    value: Tensor | None,
    shapes: tuple[tuple[int, ...], ...],
    logits: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """An optional floating-point argument as a contiguous vector of constants, or None."""
    if value is None:
        return None
    vector = check_floats(name, value, *shapes, device=logits.device)
    return vector.detach().to(dtype).reshape(-1).contiguous()


def _check_normalizer(
    normalizer: Tensor | float | None, spec: Objective, logits: Tensor, validate: bool | None
) -> Tensor | float | None:
    """The divisor as a constant, once it is None, a number > 0 or a real 0-dim tensor."""
    if logits.ndim == 2 and spec.entropy_coef and spec.entropy_aggregation == "constant_length":
        raise ValueError(
            "entropy_aggregation: expected anything but constant_length for packed rows"
        )
    if normalizer is None:
        if logits.ndim == 2 and spec.aggregation == "constant_length":
            raise ValueError(
                "normalizer: expected sequences · length for constant_length over packed rows, "
                "got None"
            )
        return None
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer)
        if normalizer.ndim or normalizer.is_complex() or normalizer.dtype == torch.bool:
            got = f"{list(normalizer.shape)} {normalizer.dtype}"
            raise ValueError(f"normalizer: expected a real 0-dim tensor, got {got}")
        if normalizer.device.type != "cpu" and normalizer.device != logits.device:
            raise ValueError(
                f"normalizer: expected device {logits.device} or cpu, got {normalizer.device}"
            )
        if not must_validate(validate, normalizer):
            return normalizer.detach()
        normalizer = normalizer.item()
    if not is_number(normalizer):
        raise ValueError(f"normalizer: expected a number or a 0-dim tensor, got {normalizer!r}")
    if not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer: expected a finite number > 0, got {normalizer!r}")
    return normalizer
