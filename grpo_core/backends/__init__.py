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


LEAST_NUMBA = (0, 62)
# a module named torch would hide the package from a reader
MODULES = {"triton": "triton", "cpu": "cpu", "torch": "pytorch"}


@lru_cache
def default_backend(device_type: str) -> Backend:
    """The backend for tensors on a kind of device where none is asked for."""
    if device_type == "cuda":
        return "triton"
    return "cpu" if device_type == "cpu" and not _numba_lacks() else "torch"


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


def _numba_lacks() -> str:
    """What the cpu backend needs of Numba and does not get; empty if it can compute."""
    if not find_spec("numba"):
        return "the package numba (pip install numba)"
    numba = import_module("numba")
    if numba.version_info[:2] < LEAST_NUMBA:
        # the LLVM of older ones ends the process at an instruction that it cannot select
        return f"numba >= {'.'.join(map(str, LEAST_NUMBA))}, got {numba.__version__}"
    if numba.config.DISABLE_JIT:
        return "the compiler of numba, which NUMBA_DISABLE_JIT switches off"
    return ""


def _check_numba(tensor: Tensor) -> None:
    if lacks := _numba_lacks():
        raise NotImplementedError(
            f'backend: "cpu" needs {lacks}; backend="torch" computes the same'
        )
    if tensor.device.type != "cpu":
        raise NotImplementedError(f'backend: "cpu" needs tensors on a CPU, got {tensor.device}')
