"""Checks of `kept`, the ids that a sampler kept."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.backends.kept import Kept
from grpo_core.objective.validation import (
    check_concrete,
    check_tensor,
    check_type,
    must_validate,
    raise_first,
)


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
