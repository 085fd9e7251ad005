"""When arguments may be looked into."""

from __future__ import annotations

from torch import Tensor


def must_validate(validate: bool | None, tensor: Tensor) -> bool:
    """Whether the values of `tensor` are to be checked; None means on the CPU only.

    On a GPU the host would have to wait for the answer.
    """
    return tensor.device.type == "cpu" if validate is None else validate
