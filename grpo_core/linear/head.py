"""The head, which turns hidden states into logits, and the checks of both.

logits = cap(scale · (hidden @ weightᵀ + bias + lora_scaling · (hidden @ lora_Aᵀ) @ lora_Bᵀ))
cap(x) = softcap · tanh(x / softcap)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from grpo_core.loss.compile import register_record
from grpo_core.loss.row_inputs import LOGIT_DTYPES
from grpo_core.objective.validation import (
    check_concrete,
    check_floats,
    check_integers,
    check_number,
    check_tensor,
    is_int,
)


@register_record
@dataclass(frozen=True)
class LinearHead:
    """An output matrix, and the operations between its product and the logits.

    Args:
        weight: `lm_head`, [rows, D]; it and the others float32, bfloat16 or float16.
        bias: [rows], or None.
        softcap: c > 0 of c·tanh(x/c) (Gemma), or None.
        scale: the logits are multiplied by it (Cohere; Granite divides: give the inverse).
        vocabulary: V, the true size of the vocabulary if the matrix is padded; the remaining rows
            are not part of the softmax and get a zero gradient. None means all rows.
        lora_A, lora_B: [r, D] and [rows, r], an adapter of the matrix itself, or None.
        lora_scaling: the product of the two is multiplied by it.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocabulary: int | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    lora_scaling: float = 1.0

    def __post_init__(self) -> None:
        weight, lora_A = self.weight, self.lora_A
        if check_floats("weight", weight).ndim != 2 or not weight.numel():
            raise ValueError(f"weight: expected a matrix [V, D], got {list(weight.shape)}")
        rows, D = weight.shape
        if (lora_A is None) != (self.lora_B is None):
            raise ValueError("lora_A: expected both or neither of lora_A and lora_B")
        r = 0 if lora_A is None else check_floats("lora_A", lora_A).numel() // D
        for name, shape in (("bias", (rows,)), ("lora_A", (r, D)), ("lora_B", (rows, r))):
            if getattr(self, name) is not None:
                check_floats(name, getattr(self, name), shape, device=weight.device)
        scales = {"scale": self.scale, "lora_scaling": self.lora_scaling}
        check_number("a finite number", **scales)
        if self.softcap is not None:
            check_number("a finite number > 0", softcap=self.softcap)
        if self.vocabulary is not None and not (
            is_int(self.vocabulary) and 1 <= self.vocabulary <= rows
        ):
            raise ValueError(f"vocabulary: expected 1 to {rows}, got {self.vocabulary!r}")

    @property
    def V(self) -> int:
        """Size of the vocabulary."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary

    @property
    def D(self) -> int:
        """Hidden size."""
        return self.weight.shape[1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient: weight, bias, lora_A, lora_B."""
        return self.weight, self.bias, self.lora_A, self.lora_B

    def of(self, weight: Tensor, *others: Tensor | None) -> LinearHead:
        """The same head with other `tensors`, detached."""
        bias, lora_A, lora_B = (None if x is None else x.detach() for x in others)
        return replace(self, weight=weight.detach(), bias=bias, lora_A=lora_A, lora_B=lora_B)

    def without_tensors(self) -> LinearHead:
        """A copy with numbers only: `save_for_backward` keeps the tensors."""
        return self.of(torch.empty(self.weight.shape, device="meta"), None, None, None)


def is_distributed(tensor: object) -> TypeGuard[Any]:
    """Whether it is a DTensor, which this module does not import."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local_hidden(hidden: Any, reduce_dhidden: bool = True) -> Tensor:
    """The rows that a replicated DTensor holds, with a whole gradient or a partial one."""
    if not is_distributed(hidden):
        return hidden
    from torch.distributed.tensor import Partial, Replicate

    hidden = hidden.redistribute(placements=[Replicate()] * hidden.device_mesh.ndim)
    placement = Replicate() if reduce_dhidden else Partial()
    return hidden.to_local(grad_placements=[placement] * hidden.device_mesh.ndim)


def replicate(tensor: Tensor, like: Any) -> Tensor:
    """The tensor, as a DTensor if `like` is one and it is none yet."""
    if not is_distributed(like) or is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def local_shard(
    lm_head: Tensor | LinearHead, group: Any, start: int | None
) -> tuple[Tensor | LinearHead, Any, int | None]:
    """(this rank's rows of a DTensor head, their group, the first of them); else as given.

    Raises:
        ValueError: a head that is not `Shard(0)` over one axis, or whose last ranks hold nothing.
    """
    head = lm_head if isinstance(lm_head, LinearHead) else None
    weight: Any = lm_head if head is None else head.weight
    if not is_distributed(weight):
        return lm_head, group, start
    mesh, (rows, _) = weight.device_mesh, weight.shape
    if mesh.ndim > 1 or not weight.placements[0].is_shard(0):
        raise ValueError(f"lm_head: expected Shard(0) of one mesh axis, got {weight.placements}")
    head, R, each = head or LinearHead(weight), mesh.size(), -(-rows // mesh.size())
    if (R - 1) * each >= head.V:
        raise ValueError(f"lm_head: expected columns for each of {R} ranks, got V = {head.V}")
    start = mesh.get_local_rank() * each
    given: Any = head.tensors
    local = (x.to_local() if is_distributed(x) else x for x in given)
    parts = dict(zip(("weight", "bias", "lora_A", "lora_B"), local, strict=True))
    vocabulary = min(head.V - start, len(parts["weight"]))
    return replace(head, **parts, vocabulary=vocabulary), mesh.get_group(), start


def check_head(name: str, lm_head: Tensor | LinearHead, hidden: Tensor) -> LinearHead:
    """The head as a record, checked against the hidden states."""
    if not isinstance(lm_head, LinearHead):
        if check_floats(name, lm_head).ndim != 2 or not lm_head.numel():
            raise ValueError(f"{name}: expected a matrix [V, D], got {list(lm_head.shape)}")
        lm_head = LinearHead(lm_head)
    head, D = lm_head, hidden.shape[-1]
    if D != head.D:
        raise ValueError(
            f"{name}: expected [V, D = {D}] for hidden {list(hidden.shape)}, got "
            f"{list(head.weight.shape)}"
        )
    for tensor in head.tensors:
        check_concrete(**{name: tensor})
        if tensor is None:
            continue
        if check_tensor(name, tensor, device=hidden.device).dtype not in LOGIT_DTYPES:
            raise ValueError(f"{name}: expected one of {LOGIT_DTYPES}, got {tensor.dtype}")
    return head


def check_hidden(name: str, hidden: object, like: Tensor | None = None) -> Tensor:
    """The hidden states, checked to be a batch or packed rows, shaped as `like`."""
    hidden = check_tensor(name, hidden, device=None if like is None else like.device)
    if hidden.ndim not in (2, 3) or not hidden.shape[-1]:
        got = list(hidden.shape)
        raise ValueError(f"{name}: expected a tensor [B, T, D] or [N, D], got {got}")
    if hidden.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name}: expected one of {LOGIT_DTYPES}, got {hidden.dtype}")
    if like is not None and hidden.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {[*like.shape[:-1], 'D']}, got {list(hidden.shape)}"
        )
    return hidden


def check_rows(
    hidden: Tensor, lm_head: Tensor | LinearHead, target: Tensor
) -> tuple[LinearHead, Tensor]:
    """(head, a tensor of the logits' shape that takes no memory), checked."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    shape, target = hidden.shape[:-1], check_integers("target", target)
    if target.shape != shape:
        raise ValueError(
            f"target: expected shape {list(shape)} for hidden {list(hidden.shape)}, got "
            f"{list(target.shape)}; position t predicts token t + 1: give hidden[:, :-1], or pad "
            "the shifted target with -100"
        )
    return head, hidden.detach().new_zeros(()).expand(*shape, head.V)
