"""What arguments are checked for: dense tensors, ids, numbers; and when values are looked at."""

from __future__ import annotations

from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad


def must_validate(validate: bool | None, tensor: Tensor) -> bool:
    """Whether the values of `tensor` are to be checked; None means on the CPU only.

    On a GPU the host would have to wait for the answer; inside a transform of torch.func there is
    none.
    """
    if validate is None:
        return tensor.device.type == "cpu" and not _is_transformed(tensor)
    return validate


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """The tensor itself, once it is dense and on the device, if one is given.

    Raises:
        ValueError: it is no tensor, or elsewhere.
        NotImplementedError: it is sparse or nested.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise NotImplementedError(f"{name}: expected a dense tensor, got {kind}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def check_concrete(**tensors: object) -> None:
    """Raises NotImplementedError for tensors whose memory a kernel cannot read.

    Those are on the meta device, inside a transform of torch.func (vmap, grad, jvp), or dual ones
    of forward-mode differentiation.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if _is_transformed(value):
            raise NotImplementedError(
                f"{name}: expected a tensor outside of torch.func's transforms (vmap, grad, jvp), "
                "got one inside; use backward() or torch.autograd.grad"
            )
        if value.is_meta:
            raise NotImplementedError(f"{name}: expected a tensor with values, got one on meta")
        # outside of a dual level nothing has a tangent
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name}: expected a tensor without a forward-mode derivative, got a dual one"
            )


def check_floats(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """The tensor itself, once it is floating point and has one of the shapes, if there are any.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    tensor = check_tensor(name, value, device)
    check_shape(name, tensor, *shapes)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    return tensor


def check_mask(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """The tensor itself, once it is real and has one of the shapes.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    tensor = check_tensor(name, value, device)
    check_shape(name, tensor, *shapes)
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers or bool, got {tensor.dtype}")
    return tensor


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has one of the shapes, if there are any."""
    if shapes and tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")


def check_integers(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """As int64, once it is an integer tensor and has one of the shapes, if there are any.

    A narrower type would compare wrongly with -100, or with a number that it cannot hold.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    tensor = check_tensor(name, value, device)
    check_shape(name, tensor, *shapes)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer tensor, got {tensor.dtype}")
    wide = tensor.long()
    # the upper half of uint64 wraps around, to -100 among others
    return wide.clamp(min=-1) if tensor.dtype == torch.uint64 else wide


def check_ids(
    name: str, ids: object, bound: str, count: int, like: Tensor, validate: bool | None
) -> tuple[Tensor, Tensor]:
    """(ids brought into [0, count), whether they were there): int64 and bool, one for each number.

    Args:
        bound: the name of `count` in a message.
        like: [N], whose ids they are.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    given = check_integers(name, ids, tuple(like.shape[:1]), device=like.device)
    inside = (given >= 0) & (given < count)
    if must_validate(validate, given) and not inside.all():
        raise_first(name, f"integers in [0, {bound} = {count})", given, ~inside)
    return given.clamp(0, max(count - 1, 0)), inside


def raise_first(name: str, expected: str, vector: Tensor, bad: Tensor) -> None:
    """Raises ValueError showing the first bad element."""
    at = int(bad.nonzero()[0, 0])
    raise ValueError(f"{name}: expected {expected}, got {vector[at].item()} at row {at}")


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it is inside a transform of torch.func."""
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
