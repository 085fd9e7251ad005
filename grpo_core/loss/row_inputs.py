"""The arguments of a read of logits: one record, checked once, before any kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.backends.kept import Kept, keep_rows
from grpo_core.backends.sharded import (
    Shards,
    announce_failure,
    check_unsharded,
    find_shards,
    over_shards,
    whole_logits,
)
from grpo_core.backends.wrapper import Kernels
from grpo_core.loss.tokens import IGNORE
from grpo_core.objective.validation import (
    check_concrete,
    check_integers,
    check_mask,
    check_tensor,
    check_type,
    is_number,
    must_validate,
    raise_first,
)

# below it float32 cannot distinguish neighbouring logits / temperature
LOWEST_TEMPERATURE = 1e-4
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The arguments of a read of logits beside these, as the caller gave them; see `token_logp`."""

    target: Tensor
    temperature: float = 1.0
    mask: Tensor | None = None
    kept: Kept | Tensor | None = None
    group: Any = None
    vocabulary_start: int | None = None
    backend: Backend | None = None
    validate: bool | None = None

    @property
    def same(self) -> dict[str, Any]:
        """What all ranks of a group must have alike, by name; of large arguments whether given."""
        own, large = {"group", "vocabulary_start"}, {"kept", "ref_logits", "ref_topk"}
        given = {name: value for name, value in vars(self).items() if name not in own}
        return {k: value is not None if k in large else value for k, value in given.items()}

    def check_logits(self, logits: Tensor, dtypes: tuple[torch.dtype, ...] = LOGIT_DTYPES) -> None:
        """Checks the logits, or a tensor of their shape, and the temperature."""
        check_concrete(logits=logits)
        shape = list(check_tensor("logits", logits).shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"logits: expected a tensor [B, T, V] or [N, V], got {shape}")
        if logits.dtype not in dtypes:
            raise ValueError(f"logits: expected one of {dtypes}, got {logits.dtype}")
        if shape[-1] == 0:
            raise ValueError(f"logits: expected V >= 1, got shape {shape}")
        T = self.temperature
        if not is_number(T) or not LOWEST_TEMPERATURE <= T < math.inf:
            raise ValueError(
                f"temperature: expected a finite Python number >= {LOWEST_TEMPERATURE}, got {T!r}"
            )

    def shards(self, logits: Tensor, **same: object) -> Shards | None:
        """The shards of the vocabulary, once all ranks agree on these arguments and on `same`."""
        with announce_failure(self.group, logits):
            self.check_logits(logits)
        return find_shards(self.group, self.vocabulary_start, logits, same | self.same)

    def flat_target(self, logits: Tensor, shards: Shards | None) -> Tensor:
        """[N] int64 with a stride of 1, checked; of the logits only shape and device are used."""
        check_concrete(target=self.target, mask=self.mask, kept=self.kept)
        check_unsharded(shards, kept=self.kept)
        target = check_target(whole_logits(logits, shards), self.target, self.mask, self.validate)
        # `reshape` would keep a column of a matrix as a view
        return target.reshape(-1).contiguous()

    def read(
        self, logits: Tensor, shards: Shards | None
    ) -> tuple[Tensor, Tensor, Tensor, Kept | None]:
        """(`flat_target`, whether unmasked, whether also in [0, V): [N] each; the kept ids)."""
        target = self.flat_target(logits, shards)
        V = logits.shape[-1] if shards is None else shards.V
        unmasked = find_unmasked(target, self.mask)
        present = unmasked & (target >= 0) & (target < V)
        return target, unmasked, present, check_kept(self.kept, logits, present, self.validate)

    def kernels(
        self,
        like: Tensor,
        target: Tensor,
        kept: Kept | None,
        shards: Shards | None,
        reduce_dhidden: bool = True,
    ) -> Kernels:
        """The row functions of the backend, for kept ids and shards.

        Args:
            like: a tensor on the device of the logits.
            target: [N] int64, negative where masked.
        """
        kernels = keep_rows(choose_backend(self.backend, like), kept, target)
        return over_shards(kernels, shards, reduce_dhidden)


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


def find_unmasked(target: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool: tokens that are not masked; `target` is int64."""
    unmasked = target.reshape(-1) != IGNORE
    return unmasked if mask is None else unmasked & (mask.reshape(-1) != 0)


def check_kept(kept: object, logits: Tensor, valid: Tensor, validate: bool | None) -> Kept | None:
    """The ids as a record, from a record or a bool mask; None of None.

    Args:
        logits: [B, T, V] or [N, V]; only its shape and device are used.
        valid: [N] bool, tokens that need ids.

    Raises:
        ValueError: a wrong kind, shape, dtype or device; with `validate` (None: on the CPU) also
            an empty set of a valid token, offsets that are not those of CSR, ids outside [0, V),
            or ids of a token that do not ascend.
    """
    if kept is None:
        return None
    device = logits.device
    if isinstance(kept, Tensor):
        check_concrete(kept=kept)
        check_tensor("kept", kept, tuple(logits.shape), device=device)
        if kept.dtype != torch.bool:
            raise ValueError(f"kept: expected a Kept or a bool mask, got {kept.dtype}")
        kept = Kept.from_mask(kept)
    check_type("kept", kept, Kept)
    assert isinstance(kept, Kept)
    check_concrete(**{"kept.ids": kept.ids, "kept.offsets": kept.offsets})
    ids = check_tensor("kept.ids", kept.ids, device=device)
    offsets = check_tensor("kept.offsets", kept.offsets, (len(valid) + 1,), device=device)
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        got = f"{list(ids.shape)} {ids.dtype}"
        raise ValueError(f"kept.ids: expected int32 or int64 of shape [M], got {got}")
    if offsets.dtype != torch.int64:
        raise ValueError(f"kept.offsets: expected int64, got {offsets.dtype}")
    if must_validate(validate, logits):
        _check_values(kept, valid, logits.shape[-1])
    return kept


def _check_values(kept: Kept, valid: Tensor, V: int) -> None:
    ids, offsets, M = kept.ids, kept.offsets, len(kept.ids)
    first, last, sizes = int(offsets[0]), int(offsets[-1]), offsets.diff()
    if (first, last) != (0, M):
        raise ValueError(f"kept.offsets: expected 0 to M = {M}, got {first} to {last}")
    if (sizes < 0).any():
        raise_first("kept.offsets", "numbers that do not decrease", sizes, sizes < 0)
    if (valid & (sizes == 0)).any():
        raise_first("kept", "ids for every unmasked token", sizes, valid & (sizes == 0))
    outside = (ids < 0) | (ids >= V)
    if outside.any():
        raise_first("kept.ids", f"ids in [0, V = {V})", ids, outside)
    rows = kept.rows(torch.arange(M, device=ids.device))
    repeats = (ids[1:] <= ids[:-1]) & (rows[1:] == rows[:-1])
    if repeats.any():
        at = int(repeats.nonzero()[0, 0])
        raise ValueError(
            f"kept.ids: expected ascending ids within a token, got {ids[at + 1].item()} after "
            f"{ids[at].item()} at row {rows[at].item()}; Kept.from_sets sorts"
        )
