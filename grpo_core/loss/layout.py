"""Whether logits can be read, and written over, where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.loss.inputs import LOGIT_DTYPES


def readable_in_place(logits: Tensor) -> bool:
    """Whether logits can be read and written over where they lie: no row overlaps another."""
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


def readable(logits: Tensor) -> Tensor:
    """The logits themselves, or a copy that can be read."""
    if readable_in_place(logits):
        return logits
    return logits.clone(memory_format=torch.contiguous_format)


def reference_rows(ref_logits: Tensor | None, logits: Tensor, inplace: bool) -> Tensor | None:
    """The reference's logits as they can be read.

    Raises:
        ValueError: a gradient that is written over the logits would overwrite them.
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
    alike = ref_logits.dtype == logits.dtype and readable_in_place(ref_logits)
    return ref_logits if alike else ref_logits.contiguous()
