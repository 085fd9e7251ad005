"""Which code computes: the Triton kernels, or PyTorch operations over the same plans.

A backend is a module with the functions of `triton_backend`. None means triton for tensors
on a GPU and torch for all others; a backend asked for by name is never replaced by another.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["triton", "torch"]


def choose_backend(backend: Backend | None, tensor: Tensor) -> ModuleType:
    """The module that computes for `tensor`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the triton backend where Triton is missing or cannot run.
    """
    if backend is None:
        backend = "triton" if tensor.is_cuda else "torch"
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)} or None, got {backend!r}")
    if backend == "torch":
        return import_module("grpo_core.backends.pytorch")
    try:
        import triton
    except ImportError as missing:
        raise NotImplementedError(
            'backend: "triton" needs the package triton (Linux: pip install triton); '
            'backend="torch" computes the same'
        ) from missing
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise NotImplementedError(
            f'backend: "triton" needs tensors on a GPU, got {tensor.device}; set '
            'TRITON_INTERPRET=1 before the import to interpret the kernels, or use backend="torch"'
        )
    return import_module("grpo_core.backends.triton")
