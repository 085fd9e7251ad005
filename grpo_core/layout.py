"""Whether logits can be read, and written over, where they lie."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from grpo_core.arguments import LOGIT_DTYPES


def readable_in_place(logits: Tensor, kernels: ModuleType) -> bool:
    """Whether the kernels can read the logits, and write over them, where they lie."""
    return _rows_lie_apart(logits) and kernels.lies_aligned(logits)


def readable(logits: Tensor, kernels: ModuleType) -> Tensor:
    """The logits themselves, or a copy that the kernels can read."""
    if readable_in_place(logits, kernels):
        return logits
    return logits.clone(memory_format=torch.contiguous_format)


def reference_rows(
    ref_logits: Tensor | None, logits: Tensor, inplace: bool, kernels: ModuleType
) -> Tensor | None:
    """The reference's logits as the kernels can read them.

    Raises:
        ValueError: a gradient that is written over the logits would overwrite them.
    """
    if ref_logits is None:
        return None
    if inplace and ref_logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        raise ValueError("ref_logits: expected memory of its own with inplace=True, got the logits")
    ref_logits = ref_logits.detach()
    if ref_logits.dtype not in LOGIT_DTYPES:
        ref_logits = ref_logits.float()
    alike = ref_logits.dtype == logits.dtype and readable_in_place(ref_logits, kernels)
    return ref_logits if alike else ref_logits.contiguous()


def _rows_lie_apart(logits: Tensor) -> bool:
    """Whether the last axis is contiguous and no row overlaps another."""
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
