"""Counts what a call would launch on a GPU: kernels of ours, and operations of torch that compute.

A view, an allocation or a change of metadata launches nothing. What the interpreter does inside of
a kernel is not counted. Reading a value on the host counts as "synchronisation".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# its kernels are imported by the first call otherwise
import grpo_core.backends.triton  # noqa: F401

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = {*ALLOCATIONS, "detach", "_unsafe_view", "lift_fresh"}
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class _Operations(TorchDispatchMode):
    """Writes down every operation that computes."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.inside_a_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        result = func(*args, **(kwargs or {}))
        if not self.inside_a_kernel and not views and name not in FREE:
            moved = [x for x in (args[:1] or [None]) if isinstance(x, torch.Tensor)]
            if name in READS:
                self.names.append(f"synchronisation: {name}")
            elif not (moved and moved[0].numel() == 0):
                self.names.append(name)
        return result


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of everything launched inside, in order."""
    names: list[str] = []
    mode = _Operations(names)
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("grpo_core.kernels.") and hasattr(module, "launch")
    ]
    homes = [(module, module.launch) for module in modules]

    def counted(real: Any) -> Any:
        def launch(kernel: Any, programs: int, **arguments: Any) -> None:
            if programs:
                names.append(kernel.__name__)
            mode.inside_a_kernel = True
            try:
                real(kernel, programs, **arguments)
            finally:
                mode.inside_a_kernel = False

        return launch

    try:
        for module, real in homes:
            module.launch = counted(real)
        with mode:
            yield names
    finally:
        for module, real in homes:
            module.launch = real
