"""Several processes that train as one: which of them this is, and what they tell one another.

Without a process group there is one process, and nothing here does anything. What is exchanged is
small: counts, rewards, a step's figures. Gradients and weights go through DDP or FSDP2, see
`parallel`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# what torchrun, and other launchers, tell every process
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group() -> Iterator[None]:
    """The group that a launcher's environment asks for, closed at the end; else nothing.

    NCCL between GPUs, gloo between CPUs. After an error it stays open: to close it might wait for
    processes that are still in the middle of a step.
    """
    if dist.is_initialized() or not all(name in os.environ for name in LAUNCHED):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def in_group() -> bool:
    """Whether there is a process group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if in_group() else 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if world() > 1:
        dist.barrier()


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their ranks; tensors have to be on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def joined(vector: Tensor) -> Tensor:
    """Every process's vector, end to end, on this one's device; their lengths may differ."""
    if world() == 1:
        return vector
    return torch.cat(gathered(vector.detach().cpu())).to(vector.device)


def stacked(vector: Tensor) -> Tensor:
    """Every process's vector [n] as [processes, n], without a wait for the device."""
    if world() == 1:
        return vector[None]
    vectors = [torch.empty_like(vector) for _ in range(world())]
    dist.all_gather(vectors, vector.contiguous())
    return torch.stack(vectors)
