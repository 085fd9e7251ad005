"""Which code computes the rows: Triton kernels, kernels compiled by Numba, or plain PyTorch.

A backend is a module with the functions of `backends.triton`. None means triton for tensors on a
GPU, cpu for others where Numba is installed, and else torch. A backend asked for by name is never
replaced by another.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["triton", "cpu", "torch"]


def choose_backend(backend: Backend | None, tensor: Tensor) -> ModuleType:
    """The module that computes for `tensor`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a backend that is not installed or cannot compute on this device.
    """
    if backend is None:
        backend = "triton" if tensor.is_cuda else default_backend(tensor.device.type)
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)} or None, got {backend!r}")
    if backend == "triton":
        _check_triton(tensor)
    elif backend == "cpu":
        _check_numba(tensor)
    return import_module(f"grpo_core.backends.{MODULES[backend]}")


# a module named torch would hide the package from a reader
MODULES = {"triton": "triton", "cpu": "cpu", "torch": "pytorch"}


@lru_cache
def default_backend(device_type: str) -> Backend:
    """The backend for tensors on a kind of device where none is asked for."""
    if device_type == "cuda":
        return "triton"
    return "cpu" if device_type == "cpu" and find_spec("numba") and _compiles() else "torch"


def _check_triton(tensor: Tensor) -> None:
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
            'TRITON_INTERPRET=1 before the import to interpret the kernels, or use backend="cpu"'
        )


def _compiles() -> bool:
    """Whether Numba compiles; with NUMBA_DISABLE_JIT its functions are interpreted."""
    return not import_module("numba").config.DISABLE_JIT


def _check_numba(tensor: Tensor) -> None:
    if not find_spec("numba"):
        raise NotImplementedError(
            'backend: "cpu" needs the package numba (pip install numba); backend="torch" computes '
            "the same"
        )
    if not _compiles():
        raise NotImplementedError(
            'backend: "cpu" needs the compiler of numba, which NUMBA_DISABLE_JIT switches off; '
            'backend="torch" computes the same'
        )
    if tensor.device.type != "cpu":
        raise NotImplementedError(f'backend: "cpu" needs tensors on a CPU, got {tensor.device}')
