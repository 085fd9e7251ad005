"""Ranks of a process group: collectives, and what ranks agree on so that they train as one process.

Without a process group there is one rank, and every function here returns at once. Only small
values are exchanged: counts, rewards, metrics. Gradients and weights go through DDP or FSDP2, see
`sharding`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.loss.metrics import merge_metrics

if TYPE_CHECKING:
    from grpo_core.objective.objective import Objective
    from grpo_core.trainer.batch import Batch
    from grpo_core.trainer.config import TrainerConfig

T = TypeVar("T")

# environment variables that torchrun and other launchers set
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group() -> Iterator[None]:
    """Opens the process group that a launcher's environment describes, and closes it at the end.

    NCCL between GPUs, gloo between CPUs. After an error the group stays open, since closing it may
    wait for ranks that are still in a step.
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
    """Whether there is a process group, even of one rank."""
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if in_group() else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if world() > 1:
        dist.barrier()


def all_gather_object(value: T) -> list[T]:
    """The value of every rank, in rank order; tensors must be on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def all_gather_cat(vector: Tensor) -> Tensor:
    """The vectors of all ranks concatenated, on this rank's device; lengths may differ."""
    if world() == 1:
        return vector
    return torch.cat(all_gather_object(vector.detach().cpu())).to(vector.device)


def check_ranks(config: TrainerConfig) -> None:
    """Raises ValueError unless the ranks together can make the updates of one process."""
    if config.shard == "fsdp" and not in_group():
        raise ValueError(
            "shard: expected a process group for 'fsdp': start with torchrun, or call "
            "torch.distributed.init_process_group before"
        )
    ranks, prompts, objective = world(), config.prompts_per_step, config.objective
    if objective.aggregation == "prompt_mean" and config.minibatches > prompts // ranks:
        expected = f"at most {prompts // ranks}, the prompts of a step on each rank"
        got = f"{config.minibatches}, which would split groups of prompt_mean"
        raise ValueError(f"minibatches: expected {expected}, got {got}")
    if ranks == 1:
        return
    completions = prompts * config.group_size // ranks
    if prompts % ranks:
        expected = f"a multiple of {ranks}, the number of ranks"
        raise ValueError(f"prompts_per_step: expected {expected}, got {prompts}")
    if config.minibatches > completions:
        expected = f"at most {completions}, the completions of a step on each of {ranks} ranks"
        raise ValueError(f"minibatches: expected {expected}, got {config.minibatches}")
    inside = "gradients are averaged only for a loss inside the model's forward"
    divisor, quantile = "its divisor counts one rank only", "its threshold is of one rank only"
    for name, value, allowed, reason in (
        ("loss", config.loss, "fused", inside),
        ("objective.entropy_aggregation", objective.entropy_aggregation, None, divisor),
        ("objective.factor.top_entropy", objective.factor.top_entropy, 1, quantile),
        ("objective.factor.second_moment", objective.factor.second_moment, math.inf, quantile),
    ):
        if value != allowed:
            raise ValueError(
                f"{name}: expected {allowed!r} on {ranks} ranks, since {reason}, got {value!r}"
            )


def rank_slice(count: int) -> slice:
    """This rank's part of `count` items: equal parts in rank order."""
    each = count // world()
    return slice(rank() * each, (rank() + 1) * each)


def pad_microbatches(minibatches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
    """Adds fillers until every rank has equally many microbatches in a minibatch."""
    if world() == 1:
        return [list(parts) for parts in minibatches]
    counts = all_gather_object([len(parts) for parts in minibatches])
    return [
        [*parts, *[parts[0].filler()] * (max(of_ranks) - len(parts))]
        for parts, *of_ranks in zip(minibatches, *counts, strict=True)
    ]


def loss_divisor(parts: Sequence[Batch], objective: Objective, longest: int) -> float | None:
    """The divisor of the losses of a minibatch's parts, counted over the whole minibatch.

    Over several ranks it is the global count divided by the number of ranks, since gradients are
    averaged over ranks.

    Args:
        parts: microbatches of this rank.
        objective: defines the aggregation.
        longest: tokens of the longest possible completion.

    Returns:
        None where the divisor of a single loss is already right.
    """
    aggregation = objective.aggregation
    if aggregation == "token_sum":
        return None if world() == 1 else 1 / world()
    if aggregation == "constant_length":
        count = sum(len(part.rows.ids) for part in parts if not part.is_filler) * longest
    elif aggregation == "prompt_mean":
        # the shares of a group's rows, in whichever parts, add up to 1
        group_rows = torch.cat([p.group_rows for p in parts if p.group_rows is not None])
        count = round(float(group_rows.double().reciprocal().sum()))
    elif len(parts) == 1 and world() == 1:
        return None
    elif aggregation == "token_mean":
        count = sum(len(part.rows.sequence) for part in parts)
    else:
        count = sum(part.rows.sequence.unique().numel() for part in parts)
    return max(1, sum(all_gather_object(count))) / world()


def reduce_metrics(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of a minibatch over all ranks; the losses were divided by `loss_divisor`."""
    if world() == 1:
        return dict(metrics)
    local = torch.stack([metric.float() for metric in metrics.values()])
    of_ranks = all_gather_cat(local).view(world(), -1)
    merged = merge_metrics([dict(zip(metrics, row, strict=True)) for row in of_ranks])
    return merged | {"loss": merged["loss"] / world()}
