"""The arguments of a loss beside its logits: one record, checked once, before any kernel runs.

`LossInputs` holds the arguments as given. `LossInputs.tokens` checks them and returns `Tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.backends.kept import Kept
from grpo_core.backends.sharded import (
    Shards,
    announce_failure,
    check_unsharded,
    find_shards,
    whole_logits,
)
from grpo_core.backends.topk import TopK
from grpo_core.backends.wrapper import Kernels
from grpo_core.loss.kept import check_kept
from grpo_core.loss.tokens import IGNORE, Tokens
from grpo_core.objective.advantage import estimate_advantages
from grpo_core.objective.objective import Objective
from grpo_core.objective.validation import (
    check_concrete,
    check_floats,
    check_ids,
    check_integers,
    check_mask,
    check_tensor,
    check_topk,
    is_int,
    is_number,
    must_validate,
    raise_first,
)

# below it float32 cannot distinguish neighbouring logits / temperature
LOWEST_TEMPERATURE = 1e-4
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The arguments of a loss beside its logits, as the caller gave them; see `fused_loss`."""

    objective: Objective
    advantage: Tensor | None = None
    rewards: Tensor | None = None
    group_size: int | None = None
    group_id: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_logits: Tensor | None = None
    ref_topk: tuple[Tensor, Tensor] | None = None
    sampler_logp: Tensor | None = None
    mask: Tensor | None = None
    kept: Kept | Tensor | None = None
    nll_weight: Tensor | None = None
    sequence_id: Tensor | None = None
    normalizer: Tensor | float | None = None
    target: Tensor
    temperature: float = 1.0
    group: Any = None
    vocabulary_start: int | None = None
    backend: Backend | None = None
    validate: bool | None = None

    def shards(self, logits: Tensor, **same: object) -> Shards | None:
        """The shards of the vocabulary, once all ranks agree on these arguments and on `same`."""
        if self.group is None:
            return find_shards(None, self.vocabulary_start, logits, {})
        with announce_failure(self.group, logits):
            check_logits(logits, self.temperature, LOGIT_DTYPES)
            if self.ref_logits is not None:
                # the size of its last axis is this rank's own
                device, shape = logits.device, tuple(logits.shape)
                check_floats("ref_logits", self.ref_logits, shape, device=device)
        own, spec = {"group", "vocabulary_start"}, self.objective
        same |= {name: value for name, value in vars(self).items() if name not in own}
        # numbers and names; a function has its address in its repr
        same["objective"] = {**vars(spec), "surrogate": spec.surrogate.args}
        for name in ("ref_logits", "ref_topk", "kept"):
            same[name] = getattr(self, name) is not None
        return find_shards(self.group, self.vocabulary_start, logits, same)

    def tokens(
        self,
        logits: Tensor,
        *,
        shards: Shards | None = None,
        dtype: torch.dtype = torch.float32,
        logit_dtypes: tuple[torch.dtype, ...] = LOGIT_DTYPES,
    ) -> Tokens:
        """Checks every argument and returns the vectors of the loss in `dtype`.

        Args:
            logits: [B, T, V] or [N, V], of `logit_dtypes`; only its shape, dtype and device are
                used.
            shards: of which the logits have one, and the targets all.

        Raises:
            ValueError, NotImplementedError: naming the argument, what was expected and what came.
        """
        check_concrete(**vars(self))
        check_logits(logits, self.temperature, logit_dtypes)
        self._check_policies(logits)
        shape, packed = logits.shape[:-1], logits.ndim == 2
        whole = whole_logits(logits, shards)
        target = check_target(whole, self.target, self.mask, self.validate)

        def flatten(name: str, *shapes: tuple[int, ...]) -> Tensor | None:
            """An optional floating-point argument as a contiguous vector of constants."""
            value = getattr(self, name)
            if value is None:
                return None
            vector = check_floats(name, value, *shapes or (shape,), device=logits.device)
            return vector.detach().to(dtype).reshape(-1).contiguous()

        old_logp, ref_logp = flatten("old_logp"), flatten("ref_logp")
        sampler_logp, normalizer = flatten("sampler_logp"), self._check_normalizer(logits)
        sequence_id = self._check_sequences(logits, target)
        flat, valid = target.reshape(-1), find_unmasked(target, self.mask)
        if self.rewards is not None:
            advantage = estimate_advantages(
                self.rewards,
                self.objective.advantage,
                self.group_size,
                self.group_id,
                backend=self.backend,
                validate=self.validate,
            ).to(dtype)
        else:
            given = flatten("advantage", shape, *([] if packed else [shape[:1]]))
            advantage = flat.new_zeros(flat.shape, dtype=dtype) if given is None else given
        mixed = None if self.objective.interpolation == 1 else self.objective.interpolation
        check_unsharded(shards, kept=self.kept, ref_topk=self.ref_topk, interpolation=mixed)
        for name in ("ref_topk", "nll_weight"):
            if self.kept is not None and getattr(self, name) is not None:
                raise ValueError(f"kept: expected None with {name}, got both")
        if self.ref_topk is not None:
            check_topk(self.ref_topk, logits, valid, self.validate)
        bad_target = valid & ((flat < 0) | (flat >= whole.shape[-1]))
        present = valid & ~bad_target
        kept = check_kept(self.kept, logits, present, self.validate)
        unkept = None if kept is None else present & (kept.places(flat) < 0)
        tokens = Tokens(
            objective=self.objective,
            target=flat,
            valid=present if unkept is None else present & ~unkept,
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
            unkept=unkept,
            kept=kept,
            nll_weight=self._check_nll(whole, target, flatten("nll_weight")),
        )
        per_sequence = self.rewards is not None or advantage.numel() != flat.numel()
        tokens = self._assign_groups(_assign_sequences(tokens, per_sequence)).with_weights()
        if old_logp is None or self.objective.factor.current:
            return tokens
        return tokens.with_sampler_factor(old_logp)

    @property
    def groups(self) -> tuple[Tensor, int | Tensor] | None:
        """Rewards and the groups that they belong to, for the metrics."""
        groups = self.group_size if self.group_id is None else self.group_id
        if self.rewards is None or groups is None:
            return None
        return self.rewards.detach(), groups

    def with_topk(self, kernels: Kernels) -> Kernels:
        """The row functions with the KL to the tokens of `ref_topk`, if that is given."""
        if self.ref_topk is None:
            return kernels
        ids, logp = (x.detach().reshape(-1, x.shape[-1]) for x in self.ref_topk)
        tail, interpolation = self.objective.kl == "topk_tail", self.objective.interpolation
        return TopK(kernels, ids.long(), logp.float(), tail, interpolation)

    def _check_policies(self, logits: Tensor) -> None:
        """Checks for advantages or rewards, and for the policies that the objective needs."""
        spec = self.objective
        given = (self.advantage is not None) + (self.rewards is not None)
        # without a policy term advantages have no effect
        if given == 2 or (given == 0 and spec.has_policy_term):
            both = "both" if given else "neither"
            raise ValueError(
                f"advantage: expected exactly one of advantage and rewards, got {both}"
            )
        for name in ("group_size", "group_id"):
            groups = getattr(self, name)
            if groups is not None and self.rewards is None and not spec.averages_prompts:
                want = "None without rewards"
                raise ValueError(f"{name}: expected {want}, got {groups!r}")
        if spec.averages_prompts and (self.group_size is None) == (self.group_id is None):
            got = "neither" if self.group_size is None else "both"
            raise ValueError(f"group_size: expected it or group_id for prompt_mean, got {got}")
        name = spec.reference
        if spec.beta and getattr(self, name) is None:
            expected = "(ids, logp)" if name == "ref_topk" else "a tensor"
            raise ValueError(
                f"{name}: expected {expected} for beta = {spec.beta}, got None (or replace beta by "
                "0)"
            )
        if name != "ref_logp" and self.ref_logp is not None:
            raise ValueError(f"ref_logp: expected None for kl = {spec.kl!r}, which takes {name}")
        if name != "ref_topk" and self.ref_topk is not None:
            raise ValueError(
                f"ref_topk: expected None for kl = {spec.kl!r}; use kl='topk_tail' or kl='topk'"
            )
        if self.ref_logits is not None:
            if name != "ref_logits":
                raise ValueError(
                    f"ref_logits: expected None for kl = {spec.kl!r}; use kl='exact', or give "
                    "ref_logp=token_logp(ref_logits, target, ...).logp"
                )
            check_floats("ref_logits", self.ref_logits, tuple(logits.shape), device=logits.device)
        if spec.factor.needs_sampler and self.sampler_logp is None:
            name = "sampler" if spec.factor.sampler is not None else "rejections"
            raise ValueError(f"sampler_logp: expected a tensor for factor.{name}, got None")

    def _check_sequences(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """The ids of packed rows as int64; every sequence with a token has a reward."""
        packed, N, ids, rewards = logits.ndim == 2, len(logits), self.sequence_id, self.rewards
        if not packed and ids is not None:
            raise ValueError("sequence_id: expected None for logits [B, T, V], got a tensor")
        if packed:
            if ids is None:
                raise ValueError("sequence_id: expected [N] for packed logits [N, V], got None")
            ids = check_integers("sequence_id", ids, (N,), device=logits.device).contiguous()
            if must_validate(self.validate, logits):
                check_ids("sequence_id", ids, "N", N, logits, True)
        if rewards is None:
            return ids
        shapes = () if packed else (tuple(logits.shape[:1]),)
        check_floats("rewards", rewards, *shapes, device=logits.device)
        if target.numel() and not rewards.numel():
            raise ValueError("rewards: expected one for every sequence, got [0]")
        if ids is None or not must_validate(self.validate, logits):
            return ids
        if N and rewards.numel() == N and int(ids.max()) + 1 < N:
            raise ValueError(
                f"rewards: expected one per sequence, got {N}, one per token, for "
                f"{int(ids.max()) + 1} sequences"
            )
        unknown = find_unmasked(target, self.mask) & (ids >= rewards.numel())
        if unknown.any():
            raise_first("sequence_id", f"ids below the {rewards.numel()} rewards", ids, unknown)
        return ids

    def _assign_groups(self, tokens: Tokens) -> Tokens:
        """Gives every token the prompt of its sequence, where the aggregation needs that."""
        if not self.objective.averages_prompts:
            return tokens
        sequence, size, ids = tokens.sequence, self.group_size, self.group_id
        if ids is None:
            B = tokens.sequences if self.rewards is None else self.rewards.numel()
            uneven = is_int(size) and size >= 1 and B % size and tokens.width is not None
            if not is_int(size) or size < 1 or uneven:
                raise ValueError(f"group_size: expected an int that divides B = {B}, got {size!r}")
            return replace(tokens, group=sequence // size, prompts=tokens.sequences)
        # packed rows of given advantages do not say how many sequences there are
        B = check_tensor("group_id", ids).numel()
        if self.rewards is not None or tokens.width is not None:
            B = tokens.sequences if self.rewards is None else self.rewards.numel()
        given = check_integers("group_id", ids, (B,), device=sequence.device)
        given, _ = check_ids("group_id", given, "B", B, given, self.validate)
        known = sequence < B
        unknown = tokens.valid & ~known
        if must_validate(self.validate, given) and unknown.any():
            raise_first("sequence_id", f"ids below the {B} of group_id", sequence, unknown)
        group = given[sequence.clamp(max=max(B - 1, 0))] if B else torch.zeros_like(sequence)
        valid = tokens.valid & known
        return replace(tokens.with_valid(valid), unmasked=valid, group=group, prompts=max(B, 1))

    def _check_nll(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor | None:
        """The weights of −logp [N], 0 where the target is IGNORE or no id."""
        if weight is None:
            return None
        flat, V = target.reshape(-1), logits.shape[-1]
        given, inside = (flat != IGNORE) & (weight != 0), (flat >= 0) & (flat < V)
        if must_validate(self.validate, logits):
            low = given & ~((weight > 0) & weight.isfinite())
            if low.any():
                raise_first("nll_weight", "finite numbers >= 0", weight, low)
            if (given & ~inside).any():
                raise_first("target", f"an id in [0, V = {V})", flat, given & ~inside)
        return torch.where(given & inside, weight, 0.0)

    def _check_normalizer(self, logits: Tensor) -> Tensor | float | None:
        """The divisor as a constant: None, a number > 0 or a real 0-dim tensor."""
        spec, normalizer, packed = self.objective, self.normalizer, logits.ndim == 2
        if packed and spec.entropy_coef and spec.entropy_aggregation == "constant_length":
            raise ValueError(
                "entropy_aggregation: expected anything but constant_length for packed rows"
            )
        if packed and spec.aggregation == "constant_length" and normalizer is None:
            raise ValueError(
                "normalizer: expected sequences · length for constant_length over packed rows, "
                "got None"
            )
        if normalizer is None:
            return None
        if isinstance(normalizer, Tensor):
            device = None if normalizer.device.type == "cpu" else logits.device
            check_mask("normalizer", normalizer, (), device=device)
            if not must_validate(self.validate, normalizer):
                return normalizer.detach()
            normalizer = normalizer.item()
        if not is_number(normalizer):
            raise ValueError(f"normalizer: expected a number or a 0-dim tensor, got {normalizer!r}")
        if not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer: expected a finite number > 0, got {normalizer!r}")
        return normalizer


def _assign_sequences(tokens: Tokens, per_sequence: bool) -> Tokens:
    """Drops tokens of unknown sequences and gives every token its advantage.

    Args:
        per_sequence: whether `advantage` has a number per sequence, not per token.
    """
    valid, advantage, sequence = tokens.valid, tokens.advantage, tokens.sequence
    if tokens.sequence_id is not None:
        known = advantage.numel() if per_sequence else tokens.sequences
        valid = valid & (tokens.sequence_id == sequence) & (sequence < known)
    if per_sequence:
        advantage = advantage[sequence.clamp(max=max(advantage.numel() - 1, 0))]
    return replace(tokens.with_valid(valid), unmasked=valid, advantage=advantage)


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
