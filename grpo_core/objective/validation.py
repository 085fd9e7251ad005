"""Checks of arguments: dense tensors, shapes, ids and numbers, and when values are read.

Every `check_` function raises ValueError "name: expected ..., got ..." for what it refuses, and
NotImplementedError for a tensor that no function here can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

# above 0 by the rounding of a server, in nats
LARGEST_LOGP = 1e-3
RANGES: dict[str, Callable[[float], bool]] = {
    "a finite number": math.isfinite,
    "a finite number > 0": lambda number: 0 < number < math.inf,
    "a finite number >= 0": lambda number: 0 <= number < math.inf,
    "a number > 0": lambda number: number > 0,
    "a number in [0, 1]": lambda number: 0 <= number <= 1,
}


def must_validate(validate: bool | None, tensor: Tensor) -> bool:
    """Whether the values of `tensor` are checked; None means on the CPU only.

    On a GPU that would synchronise. Inside a transform of torch.func there are no values.
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


def check_type(name: str, value: object, kind: type) -> None:
    """Refuses what is not an instance of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected an instance of {kind.__name__}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuses what is neither a string nor None, or not among the choices."""
    # `in` compares by ==, which a tensor answers with a tensor
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_number(expected: str, **numbers: object) -> None:
    """Refuses what is not a real number, or outside of the range, a key of `RANGES`."""
    for name, number in numbers.items():
        if not is_number(number) or not RANGES[expected](number):
            raise ValueError(f"{name}: expected {expected}, got {number!r}")


def check_bounds(low: object, high: object, least: float = -math.inf) -> None:
    """Refuses anything but two numbers with `least` <= `low` <= `high`."""
    if not (is_number(low) and is_number(high) and least <= low <= high):
        expected = "low <= high" if least == -math.inf else f"{least} <= low <= high"
        raise ValueError(f"low: expected {expected}, got {low!r} and {high!r}")


def check_tensor(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """The value itself, a dense tensor, of one of the shapes and on the device if given."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise NotImplementedError(f"{name}: expected a dense tensor, got {kind}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    if shapes and tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    return value


def check_concrete(**tensors: object) -> None:
    """Refuses tensors whose memory a kernel cannot read; what is no tensor passes.

    Those are on the meta device, inside a transform of torch.func (vmap, grad, jvp), or dual
    tensors of forward-mode differentiation.
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
        # outside of a dual level no tensor has a tangent
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name}: expected a tensor without a forward-mode derivative, got a dual one"
            )


def check_floats(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """The value itself, a floating-point tensor of one of the shapes."""
    tensor = check_tensor(name, value, *shapes, device=device)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    return tensor


def check_vector(name: str, value: object) -> Tensor:
    """The value itself, a floating-point tensor [B]."""
    tensor = check_floats(name, value)
    if tensor.ndim != 1:
        got = f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name}: expected a floating-point tensor [B], got {got}")
    return tensor


def check_mask(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """The value itself, a real tensor of one of the shapes."""
    tensor = check_tensor(name, value, *shapes, device=device)
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers or bool, got {tensor.dtype}")
    return tensor


def check_integers(
    name: str, value: object, *shapes: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """An integer tensor of one of the shapes, as int64.

    A narrower type would compare wrongly with -100, or with a number that it cannot hold.
    """
    tensor = check_tensor(name, value, *shapes, device=device)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer tensor, got {tensor.dtype}")
    wide = tensor.long()
    # the upper half of uint64 wraps around, to -100 among others
    return wide.clamp(min=-1) if tensor.dtype == torch.uint64 else wide


def check_ids(
    name: str, ids: object, bound: str, count: int, like: Tensor, validate: bool | None
) -> tuple[Tensor, Tensor]:
    """(ids clamped into [0, count) as int64, whether they were inside as bool).

    Args:
        bound: the name of `count` in a message.
        like: [N, ...], a tensor with one row per id.
    """
    given = check_integers(name, ids, tuple(like.shape[:1]), device=like.device)
    inside = (given >= 0) & (given < count)
    if must_validate(validate, given) and not inside.all():
        raise_first(name, f"integers in [0, {bound} = {count})", given, ~inside)
    return given.clamp(0, max(count - 1, 0)), inside


def check_topk(pair: object, logits: Tensor, unmasked: Tensor, validate: bool | None) -> None:
    """Refuses a `ref_topk` that is not (ids, logp) of distinct tokens for the rows of `logits`."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(f"ref_topk: expected a tuple (ids, logp), got {type(pair).__name__}")
    check_concrete(ref_topk=pair[0])
    check_concrete(ref_topk=pair[1])
    rows, V = tuple(logits.shape[:-1]), logits.shape[-1]
    ids = check_integers("ref_topk", pair[0], device=logits.device)
    if ids.shape[:-1] != rows or ids.ndim <= len(rows) or not ids.shape[-1]:
        raise ValueError(f"ref_topk: expected ids {[*rows, 'K']}, got {list(ids.shape)}")
    logp = check_floats("ref_topk", pair[1], tuple(ids.shape), device=logits.device)
    if not must_validate(validate, logits):
        return
    ids, logp = (x.reshape(-1, ids.shape[-1]) for x in (ids, logp))
    order = ids.sort(1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    for expected, values, bad in (
        (f"ids in [0, V = {V}), or -1", ids, (ids < -1) | (ids >= V)),
        ("different ids in a row", order, repeated),
        ("log-probabilities, or -inf", logp, ~(logp <= LARGEST_LOGP) & (ids >= 0)),
    ):
        bad = bad & unmasked[:, None]
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"ref_topk: expected {expected}, got {values[row, column].item()} at row {row}"
            )


def check_finite(name: str, tensor: Tensor, present: Tensor, validate: bool | None) -> None:
    """Refuses NaN and infinity where `present`, if values are checked."""
    if not must_validate(validate, tensor):
        return
    bad = present & ~tensor.isfinite()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        index = at[0] if len(at) == 1 else at
        raise ValueError(
            f"{name}: expected finite numbers, got {tensor[tuple(at)]} at index {index}"
        )


def raise_first(name: str, expected: str, vector: Tensor, bad: Tensor) -> None:
    """Raises ValueError with the first bad element of a vector."""
    at = int(bad.nonzero()[0, 0])
    raise ValueError(f"{name}: expected {expected}, got {vector[at].item()} at row {at}")


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it is inside a transform of torch.func."""
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
