"""The arguments of a loss beside its logits: one record, checked once, before any kernel runs.

`LossInputs` holds the arguments as given. `LossInputs.tokens` checks them and returns `Tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.sharded import Shards, announce_failure, check_unsharded, whole_logits
from grpo_core.backends.topk import TopK
from grpo_core.backends.wrapper import Kernels
from grpo_core.loss.row_inputs import LOGIT_DTYPES, RowInputs
from grpo_core.loss.tokens import IGNORE, Tokens
from grpo_core.objective.advantage import estimate_advantages
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective
from grpo_core.objective.validation import (
    check_concrete,
    check_floats,
    check_ids,
    check_integers,
    check_mask,
    check_number,
    check_tensor,
    check_topk,
    is_int,
    must_validate,
    raise_first,
)


@dataclass(frozen=True, kw_only=True)
class LossInputs(RowInputs):
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
    nll_weight: Tensor | None = None
    sequence_id: Tensor | None = None
    normalizer: Tensor | float | None = None

    @property
    def same(self) -> dict[str, Any]:
        # numbers and names; a function has its address in its repr
        objective = {**vars(self.objective), "surrogate": self.objective.surrogate.args}
        return super().same | {"objective": objective}

    def check_logits(self, logits: Tensor, dtypes: tuple[torch.dtype, ...] = LOGIT_DTYPES) -> None:
        super().check_logits(logits, dtypes)
        if self.ref_logits is not None:
            check_floats("ref_logits", self.ref_logits, tuple(logits.shape), device=logits.device)

    def kernels(self, *arguments: Any, **options: Any) -> Kernels:
        """With the KL to the tokens of `ref_topk`, if that is given."""
        kernels = super().kernels(*arguments, **options)
        if self.ref_topk is None:
            return kernels
        ids, logp = (x.detach().reshape(-1, x.shape[-1]) for x in self.ref_topk)
        tail, interpolation = self.objective.kl == "topk_tail", self.objective.interpolation
        return TopK(kernels, ids.long(), logp.float(), tail, interpolation)

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
        """
        # `read` checks the target, which may be made of another argument
        check_concrete(**{k: v for k, v in vars(self).items() if k != "target"})
        self.check_logits(logits, logit_dtypes)
        self._check_policies()
        shape, packed = logits.shape[:-1], logits.ndim == 2
        target, unmasked, present, kept = self.read(logits, shards)

        def flatten(name: str, *shapes: tuple[int, ...]) -> Tensor | None:
            """An optional floating-point argument as a contiguous vector of constants."""
            value = getattr(self, name)
            if value is None:
                return None
            vector = check_floats(name, value, *shapes or (shape,), device=logits.device)
            return vector.detach().to(dtype).reshape(-1).contiguous()

        old_logp, ref_logp = flatten("old_logp"), flatten("ref_logp")
        sampler_logp = flatten("sampler_logp")
        normalizer = self._check_normalizer(logits, unmasked, dtype)
        sequence_id = self._check_sequences(logits, unmasked)
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
            advantage = target.new_zeros(target.shape, dtype=dtype) if given is None else given
        mixed = None if self.objective.interpolation == 1 else self.objective.interpolation
        check_unsharded(shards, ref_topk=self.ref_topk, interpolation=mixed)
        for name in ("ref_topk", "nll_weight"):
            if kept is not None and getattr(self, name) is not None:
                raise ValueError(f"kept: expected None with {name}, got both")
        if self.ref_topk is not None:
            check_topk(self.ref_topk, logits, unmasked, self.validate)
        unkept = None if kept is None else present & (kept.places(target) < 0)
        valid = present if unkept is None else present & ~unkept
        per_sequence = self.rewards is not None or advantage.numel() != target.numel()
        if sequence_id is not None:
            known = min(advantage.numel(), shape[0]) if per_sequence else shape[0]
            valid = valid & (sequence_id >= 0) & (sequence_id < known)
        tokens = Tokens(
            objective=self.objective,
            target=target,
            valid=valid,
            unmasked=valid,
            bad_target=unmasked & ~present,
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
            nll_weight=self._check_nll(target, flatten("nll_weight"), whole_logits(logits, shards)),
        )
        if per_sequence:
            last = max(advantage.numel() - 1, 0)
            tokens = replace(tokens, advantage=advantage[tokens.sequence.clamp(max=last)])
        tokens = self._assign_groups(tokens)
        tokens = tokens.keep(tokens.valid)
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

    def _check_policies(self) -> None:
        """Checks for advantages or rewards, and for the policies that the objective needs."""
        spec, name = self.objective, self.objective.reference
        given = (self.advantage is not None) + (self.rewards is not None)
        # without a policy term advantages have no effect
        if given == 2 or (given == 0 and spec.has_policy_term):
            got = "both" if given else "neither"
            raise ValueError(f"advantage: expected exactly one of advantage and rewards, got {got}")
        groups = {"group_size": self.group_size, "group_id": self.group_id}
        groups = {key: value for key, value in groups.items() if value is not None}
        if groups and self.rewards is None and not spec.averages_prompts:
            key, value = next(iter(groups.items()))
            raise ValueError(f"{key}: expected None without rewards, got {value!r}")
        if spec.averages_prompts and len(groups) != 1:
            got = "both" if groups else "neither"
            raise ValueError(f"group_size: expected it or group_id for prompt_mean, got {got}")
        if spec.beta and getattr(self, name) is None:
            what = "(ids, logp)" if name == "ref_topk" else "a tensor"
            raise ValueError(
                f"{name}: expected {what} for beta = {spec.beta}, got None (or replace beta by 0)"
            )
        policy = "ref_logp=token_logp(ref_logits, target, ...).logp"
        for other, instead in (
            ("ref_logp", f"it takes {name}"),
            ("ref_topk", "use kl='topk_tail' or kl='topk'"),
            ("ref_logits", f"use kl='exact', or give {policy}"),
        ):
            if other != name and getattr(self, other) is not None:
                raise ValueError(
                    f"{other}: expected None for kl = {spec.kl!r}, got one ({instead})"
                )
        if spec.factor.needs_sampler and self.sampler_logp is None:
            part = "sampler" if spec.factor.sampler is not None else "rejections"
            raise ValueError(f"sampler_logp: expected a tensor for factor.{part}, got None")

    def _check_sequences(self, logits: Tensor, unmasked: Tensor) -> Tensor | None:
        """The ids of packed rows as int64; every sequence with a token has a reward."""
        packed, N, ids, rewards = logits.ndim == 2, len(logits), self.sequence_id, self.rewards
        if packed != (ids is not None):
            wanted = "[N] for packed logits [N, V]" if packed else "None for logits [B, T, V]"
            got = "None" if packed else "a tensor"
            raise ValueError(f"sequence_id: expected {wanted}, got {got}")
        if ids is not None:
            ids = check_integers("sequence_id", ids, (N,), device=logits.device).contiguous()
            if must_validate(self.validate, logits):
                check_ids("sequence_id", ids, "N", N, logits, True)
        if rewards is None:
            return ids
        shapes = () if packed else (tuple(logits.shape[:1]),)
        check_floats("rewards", rewards, *shapes, device=logits.device)
        if len(unmasked) and not rewards.numel():
            raise ValueError("rewards: expected one for every sequence, got [0]")
        if ids is None or not must_validate(self.validate, logits):
            return ids
        if N and rewards.numel() == N and int(ids.max()) + 1 < N:
            raise ValueError(
                f"rewards: expected one per sequence, got {N}, one per token, for "
                f"{int(ids.max()) + 1} sequences"
            )
        unknown = unmasked & (ids >= rewards.numel())
        if unknown.any():
            raise_first("sequence_id", f"ids below the {rewards.numel()} rewards", ids, unknown)
        return ids

    def _assign_groups(self, tokens: Tokens) -> Tokens:
        """Gives every token the prompt of its sequence, where the aggregation needs that."""
        if not self.objective.averages_prompts:
            return tokens
        sequence, size, ids = tokens.sequence, self.group_size, self.group_id
        B = tokens.sequences if self.rewards is None else self.rewards.numel()
        if ids is None:
            uneven = is_int(size) and size >= 1 and B % size and tokens.width is not None
            if not is_int(size) or size < 1 or uneven:
                raise ValueError(f"group_size: expected an int that divides B = {B}, got {size!r}")
            return replace(tokens, group=sequence // size, prompts=tokens.sequences)
        if self.rewards is None and tokens.width is None:
            # packed rows of given advantages do not say how many sequences there are
            B = check_tensor("group_id", ids).numel()
        given = check_integers("group_id", ids, (B,), device=sequence.device)
        given, _ = check_ids("group_id", given, "B", B, given, self.validate)
        known = sequence < B
        unknown = tokens.valid & ~known
        if must_validate(self.validate, given) and unknown.any():
            raise_first("sequence_id", f"ids below the {B} of group_id", sequence, unknown)
        group = given[sequence.clamp(max=max(B - 1, 0))] if B else torch.zeros_like(sequence)
        valid = tokens.valid & known
        return replace(tokens, valid=valid, unmasked=valid, group=group, prompts=max(B, 1))

    def _check_nll(self, target: Tensor, weight: Tensor | None, logits: Tensor) -> Tensor | None:
        """The weights of −logp [N], 0 where the target is IGNORE or no id."""
        if weight is None:
            return None
        V, given = logits.shape[-1], (target != IGNORE) & (weight != 0)
        inside = (target >= 0) & (target < V)
        if must_validate(self.validate, logits):
            for name, expected, vector, bad in (
                ("nll_weight", "finite numbers >= 0", weight, ~((weight > 0) & weight.isfinite())),
                ("target", f"an id in [0, V = {V})", target, ~inside),
            ):
                if (given & bad).any():
                    raise_first(name, expected, vector, given & bad)
        return torch.where(given & inside, weight, 0.0)

    def _check_normalizer(
        self, logits: Tensor, unmasked: Tensor, dtype: torch.dtype
    ) -> Tensor | float | None:
        """The divisor as a constant: None, a number > 0, a real 0-dim tensor, or [N] of `dtype`."""
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
            on_host = normalizer.device.type == "cpu" and not normalizer.ndim
            device = None if on_host else logits.device
            check_mask("normalizer", normalizer, (), tuple(logits.shape[:-1]), device=device)
            normalizer = normalizer.detach()
            if normalizer.ndim:
                vector = normalizer.reshape(-1).to(dtype)
                if must_validate(self.validate, vector):
                    bad = unmasked & ~((vector > 0) & vector.isfinite())
                    if bad.any():
                        raise_first("normalizer", "finite numbers > 0", vector, bad)
                # unchecked, a bad row gets weight 0; so does a masked one, whatever it has
                return torch.where(vector > 0, vector, torch.inf)
            if not must_validate(self.validate, normalizer):
                return normalizer
            normalizer = normalizer.item()
        check_number("a finite number > 0", normalizer=normalizer)
        return normalizer


def find_shared_objective(objective: str | Objective, group: Any, like: Tensor) -> Objective:
    """`find_objective`; with a group, an error is raised on all ranks, see `announce_failure`."""
    if torch.compiler.is_compiling():
        return find_objective(objective)
    with announce_failure(group, like):
        return find_objective(objective)
