"""The arguments of a loss beside its logits: one record, checked once, before any launch.

`LossInputs` holds the arguments as given. `LossInputs.tokens` checks them and returns `Tokens`:
a padded `[B, T, V]` batch and packed `[N, V]` rows both become vectors `[N]`, with masked tokens
marked once, by `valid`, and a weight for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.kernels.records import SequenceTokens, Terms
from grpo_core.objective.advantage import estimate_advantages
from grpo_core.objective.aggregation import Aggregation, token_weights
from grpo_core.objective.objective import Objective
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

# the target of a masked token, as in torch.nn.functional.cross_entropy
IGNORE = -100
# below it a float32 of logit / temperature no longer tells neighbours apart
LOWEST_TEMPERATURE = 1e-4
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The arguments of a loss beside its logits, as the caller gave them; see `fused_loss`."""

    objective: Objective
    advantage: Tensor | None
    rewards: Tensor | None
    group_size: int | None
    group_id: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    ref_logits: Tensor | None = None
    sampler_logp: Tensor | None
    mask: Tensor | None
    sequence_id: Tensor | None
    normalizer: Tensor | float | None
    target: Tensor
    temperature: float = 1.0
    backend: Backend | None
    validate: bool | None

    def tokens(
        self,
        logits: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        logit_dtypes: tuple[torch.dtype, ...] = LOGIT_DTYPES,
    ) -> Tokens:
        """Checks every argument and returns the vectors of the loss in `dtype`.

        Args:
            logits: [B, T, V] or [N, V], of `logit_dtypes`; only its shape, dtype and device are
                used.

        Raises:
            ValueError, NotImplementedError: naming the argument, what was expected and what came.
        """
        spec, validate = self.objective, self.validate
        check_concrete(**vars(self))
        check_logits(logits, self.temperature, logit_dtypes)
        shape, packed = logits.shape[:-1], logits.ndim == 2
        self._check_advantage()
        self._check_references(logits)
        target = check_target(logits, self.target, self.mask, validate)

        def flatten(name: str) -> Tensor | None:
            return _flatten_floats(name, getattr(self, name), (shape,), logits, dtype)

        old_logp, ref_logp = flatten("old_logp"), flatten("ref_logp")
        sampler_logp, normalizer = flatten("sampler_logp"), self._check_normalizer(logits)
        sequence_id = self._check_sequences(logits, target)
        if self.rewards is not None:
            advantage = estimate_advantages(
                self.rewards,
                spec.advantage,
                self.group_size,
                self.group_id,
                backend=self.backend,
                validate=validate,
            ).to(dtype)
        else:
            shapes = (shape,) if packed else (shape, shape[:1])
            found = _flatten_floats("advantage", self.advantage, shapes, logits, dtype)
            assert found is not None
            advantage = found
        flat, valid = target.reshape(-1), find_unmasked(target, self.mask)
        bad_target = valid & ((flat < 0) | (flat >= logits.shape[-1]))
        tokens = Tokens(
            objective=spec,
            target=flat,
            valid=valid & ~bad_target,
            unmasked=valid,
            bad_target=bad_target,
            weight=valid.to(dtype),
            advantage=advantage,
            old_logp=old_logp,
            ref_logp=ref_logp,
            sampler_logp=sampler_logp,
            sequence_id=sequence_id,
            sequences=shape[0],
            width=None if packed else shape[1],
            normalizer=normalizer,
            groups=self.groups,
        )
        per_sequence = self.rewards is not None or advantage.numel() != flat.numel()
        tokens = tokens.assign_sequences(per_sequence).with_weights()
        if old_logp is None or spec.factor.waits_for_logp(old_logp):
            return tokens
        return spec.factor.of_sampler(tokens, old_logp)

    @property
    def groups(self) -> tuple[Tensor, int | Tensor] | None:
        """Rewards and the groups that they belong to, for the metrics."""
        groups = self.group_size if self.group_id is None else self.group_id
        if self.rewards is None or groups is None:
            return None
        return self.rewards.detach(), groups

    def _check_advantage(self) -> None:
        """Raises ValueError unless there are either advantages, or rewards with their groups."""
        if (self.advantage is None) == (self.rewards is None):
            both = "neither" if self.advantage is None else "both"
            raise ValueError(
                f"advantage: expected exactly one of advantage and rewards, got {both}"
            )
        for name in ("group_size", "group_id"):
            groups = getattr(self, name)
            if groups is not None and self.rewards is None:
                raise ValueError(f"{name}: expected None without rewards, got {groups!r}")

    def _check_references(self, logits: Tensor) -> None:
        """Raises ValueError unless exactly the policies that the objective compares are given."""
        spec = self.objective
        exact = spec.kl == "exact"
        name = "ref_logits" if exact else "ref_logp"
        if spec.beta and getattr(self, name) is None:
            raise ValueError(
                f"{name}: expected a tensor for beta = {spec.beta}, got None (or replace beta by 0)"
            )
        if exact and self.ref_logp is not None:
            raise ValueError("ref_logp: expected None for kl = 'exact', which takes ref_logits")
        if self.ref_logits is not None:
            if not exact:
                raise ValueError(
                    f"ref_logits: expected None for kl = {spec.kl!r}; use kl='exact', or give "
                    "ref_logp=token_logp(ref_logits, target, ...).logp"
                )
            check_floats("ref_logits", self.ref_logits, tuple(logits.shape), device=logits.device)
        if spec.factor.needs_sampler and self.sampler_logp is None:
            name = "sampler" if spec.factor.sampler is not None else "rejections"
            raise ValueError(f"sampler_logp: expected a tensor for factor.{name}, got None")

    def _check_sequences(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """The ids of packed rows as int64; every sequence with a token has a reward.

        Raises:
            ValueError, NotImplementedError: naming the argument, what was expected and what came.
        """
        packed, N = logits.ndim == 2, logits.shape[0]
        sequence_id, rewards = self.sequence_id, self.rewards
        if not packed and sequence_id is not None:
            raise ValueError("sequence_id: expected None for logits [B, T, V], got a tensor")
        if packed and sequence_id is None:
            raise ValueError("sequence_id: expected [N] for packed logits [N, V], got None")
        if sequence_id is not None:
            sequence_id = check_integers("sequence_id", sequence_id, (N,), device=logits.device)
            sequence_id = sequence_id.contiguous()
            if must_validate(self.validate, logits):
                check_ids("sequence_id", sequence_id, "N", N, logits, True)
        if rewards is not None:
            shapes = () if packed else (tuple(logits.shape[:1]),)
            check_floats("rewards", rewards, *shapes, device=logits.device)
            if target.numel() and not rewards.numel():
                raise ValueError("rewards: expected one for every sequence, got [0]")
        if sequence_id is None or rewards is None or not must_validate(self.validate, logits):
            return sequence_id
        if N and rewards.numel() == N and int(sequence_id.max()) + 1 < N:
            raise ValueError(
                f"rewards: expected one per sequence, got {N}, one per token, for "
                f"{int(sequence_id.max()) + 1} sequences"
            )
        unknown = find_unmasked(target, self.mask) & (sequence_id >= rewards.numel())
        if unknown.any():
            want = f"ids below the {rewards.numel()} rewards"
            raise_first("sequence_id", want, sequence_id, unknown)
        return sequence_id

    def _check_normalizer(self, logits: Tensor) -> Tensor | float | None:
        """The divisor as a constant: None, a number > 0 or a real 0-dim tensor."""
        spec, normalizer, packed = self.objective, self.normalizer, logits.ndim == 2
        if packed and spec.entropy_coef and spec.entropy_aggregation == "constant_length":
            raise ValueError(
                "entropy_aggregation: expected anything but constant_length for packed rows"
            )
        if normalizer is None:
            if packed and spec.aggregation == "constant_length":
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
            if not must_validate(self.validate, normalizer):
                return normalizer.detach()
            normalizer = normalizer.item()
        if not is_number(normalizer):
            raise ValueError(f"normalizer: expected a number or a 0-dim tensor, got {normalizer!r}")
        if not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer: expected a finite number > 0, got {normalizer!r}")
        return normalizer


@dataclass(frozen=True, kw_only=True)
class Tokens(SequenceTokens):
    """Everything that a loss and its metrics need beside the logits, as vectors over N tokens."""

    objective: Objective
    unmasked: Tensor  # [N] bool, valid before any rejection
    bad_target: Tensor  # [N] bool, neither in [0, V) nor IGNORE
    sampler_logp: Tensor | None  # [N], nats
    normalizer: Tensor | float | None
    groups: tuple[Tensor, int | Tensor] | None  # rewards [B]; their size, or an id for each

    @property
    def needs_statistics(self) -> bool:
        """Whether the loss of a token needs the statistics of other rows or of its own row."""
        spec = self.objective
        return not spec.is_token_level or spec.factor.needs_statistics(self)

    @property
    def couples_sequences(self) -> bool:
        """Whether the loss of a token needs tokens of other sequences."""
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

    def has_no_gradient(self) -> Tensor:
        """[N] bool: valid tokens whose gradient is 0 for any logits."""
        spec = self.objective
        if spec.beta or spec.entropy_coef or self.couples_sequences:
            return torch.zeros_like(self.valid)
        if not spec.surrogate.homogeneous:
            return torch.zeros_like(self.valid)
        moves = self.valid & (self.advantage != 0)
        if self.needs_statistics:
            moving = self.advantage.new_zeros(self.sequences)
            sequence = self.sequence
            moves = moving.scatter_add_(0, sequence, moves.to(moving.dtype))[sequence] > 0
        return self.valid & ~moves

    def select(self, rows: slice | Tensor) -> Tokens:
        """Some tokens; their weights stay those of the whole call."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        vectors = {k: v for k, v in named.items() if isinstance(v, Tensor) and v.ndim == 1}
        changes: dict[str, Any] = {k: v[rows] for k, v in vectors.items()}
        return replace(self, **changes | {"sequence_id": self.sequence[rows]})

    def assign_sequences(self, per_sequence: bool) -> Tokens:
        """Drops tokens of unknown sequences and gives every token its advantage.

        Args:
            per_sequence: whether `advantage` has a number per sequence, not per token.
        """
        valid, advantage, sequence = self.valid, self.advantage, self.sequence
        if self.sequence_id is not None:
            known = advantage.numel() if per_sequence else self.sequences
            valid = valid & (self.sequence_id == sequence) & (sequence < known)
        if per_sequence:
            advantage = advantage[sequence.clamp(max=max(advantage.numel() - 1, 0))]
        target = torch.where(valid, self.target, IGNORE)
        return replace(self, target=target, valid=valid, unmasked=valid, advantage=advantage)

    def scale_weights(self, number: Tensor) -> Tokens:
        """Multiplies every weight by a 0-dim tensor."""
        bonus = self.entropy_weight
        bonus = None if bonus is None else bonus * number
        return replace(self, weight=self.weight * number, entropy_weight=bonus)

    def scale_factor(self, by: Tensor) -> Tokens:
        """Multiplies the factor of the surrogate by a vector."""
        by = by.to(self.advantage.dtype)
        return replace(self, factor=by if self.factor is None else self.factor * by)

    def drop(self, rejected: Tensor) -> Tokens:
        """Takes some tokens out of the loss and of every mean."""
        valid = self.valid & ~rejected
        target = torch.where(valid, self.target, IGNORE)
        return replace(self, valid=valid, target=target).with_weights()

    def keep_surrogate_on(self, kept: Tensor) -> Tokens:
        """Limits surrogate and entropy bonus to some tokens; all stay in every policy mean."""
        tokens = self.scale_factor(kept)
        return replace(tokens, entropy_weight=tokens._entropy_weight(self.weight, kept))

    def with_weights(self) -> Tokens:
        """Computes the weights of the valid tokens."""
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
    if not is_number(temperature) or not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature: expected a finite Python number >= {LOWEST_TEMPERATURE}, "
            f"got {temperature!r}"
        )


def check_target(
    logits: Tensor, target: Tensor, mask: Tensor | None, validate: bool | None
) -> Tensor:
    """The target as int64; it and the mask are checked against the logits.

    Raises:
        ValueError, NotImplementedError: a wrong shape, dtype or device; with `validate` (None: on
            the CPU) also a target that is neither in [0, V) nor -100.
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
        bad = find_unmasked(target, mask) & ((target < 0) | (target >= V)).reshape(-1)
        if bad.any():
            raise_first("target", f"{IGNORE} or an id in [0, V = {V})", target.reshape(-1), bad)
    return target


def flatten_target(target: Tensor) -> Tensor:
    """[N] int64 with a stride of 1: `reshape` would keep a column of a matrix as a view."""
    return target.reshape(-1).long().contiguous()


def find_unmasked(target: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool: tokens that are not masked; `target` is int64."""
    unmasked = target.reshape(-1) != IGNORE
    return unmasked if mask is None else unmasked & (mask.reshape(-1) != 0)


def is_readable(logits: Tensor) -> bool:
    """Whether a kernel can read and overwrite logits in place: no row overlaps another."""
    V = logits.shape[-1]
    if V > 1 and logits.stride(-1) != 1:
        return False
    extent = V
    axes = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def make_readable(logits: Tensor) -> Tensor:
    """The logits themselves, or a contiguous copy if a kernel cannot read them in place."""
    return logits if is_readable(logits) else logits.clone(memory_format=torch.contiguous_format)


def prepare_reference(ref_logits: Tensor | None, logits: Tensor, inplace: bool) -> Tensor | None:
    """The reference's logits as a kernel can read them.

    Raises:
        ValueError: with `inplace` they share memory with the logits.
    """
    if ref_logits is None:
        return None
    # empty tensors all begin at 0
    if (
        inplace
        and logits.numel()
        and ref_logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    ):
        raise ValueError("ref_logits: expected memory of its own with inplace=True, got the logits")
    ref_logits = ref_logits.detach()
    if ref_logits.dtype not in LOGIT_DTYPES:
        ref_logits = ref_logits.float()
    ready = ref_logits.dtype == logits.dtype and is_readable(ref_logits)
    return ref_logits if ready else ref_logits.contiguous()


def _flatten_floats(
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
