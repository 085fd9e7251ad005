"""What processes agree on so that the updates from their shares are that of the whole batch.

Each answers its share of a step's prompts. An update divides by a count over all of them, runs as
many microbatches on each, and reports figures of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_core.loss.metrics import merge_metrics
from grpo_core.objective.objective import Objective
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.distributed import gathered, in_group, rank, stacked, world


def check_shares(config: TrainerConfig) -> None:
    """Raises ValueError unless these options suit the processes, and make the updates of one."""
    if config.shard == "fsdp" and not in_group():
        raise ValueError(
            "shard: expected a process group for 'fsdp': start with torchrun, or call "
            "torch.distributed.init_process_group before"
        )
    if world() == 1:
        return
    if config.prompts_per_step % world():
        raise ValueError(
            f"prompts_per_step: expected a multiple of {world()}, the processes, got "
            f"{config.prompts_per_step}"
        )
    completions = config.prompts_per_step * config.group_size // world()
    if config.minibatches > completions:
        raise ValueError(
            f"minibatches: expected at most {completions}, the completions of a step on each of "
            f"{world()} processes, got {config.minibatches}"
        )
    if config.loss != "fused":
        raise ValueError(
            f"loss: expected 'fused' on {world()} processes, whose gradients meet where the loss "
            f"is made inside the model's forward, got {config.loss!r}"
        )
    if config.objective.entropy_aggregation is not None:
        raise ValueError(
            f"objective.entropy_aggregation: expected None on {world()} processes, since its "
            f"divisor is of one of them, got {config.objective.entropy_aggregation!r}"
        )
    if config.objective.factor.top_entropy < 1:
        raise ValueError(
            f"objective.factor.top_entropy: expected 1 on {world()} processes, since its quantile "
            f"is of one of them, got {config.objective.factor.top_entropy}"
        )


def own_share(count: int) -> slice:
    """Which of `count` things are this process's: equal shares, in the order of the ranks."""
    each = count // world()
    return slice(rank() * each, (rank() + 1) * each)


def alike(minibatches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
    """Fills every minibatch up to the number of parts that the process with the most has."""
    if world() == 1:
        return [list(parts) for parts in minibatches]
    most = map(max, zip(*gathered([len(parts) for parts in minibatches]), strict=True))
    return [
        [*parts, *[parts[0].filler()] * (count - len(parts))]
        for parts, count in zip(minibatches, most, strict=True)
    ]


def divisor(parts: Sequence[Batch], objective: Objective, longest: int) -> float | None:
    """What the losses of a minibatch's parts are divided by: that of the whole minibatch.

    Over several processes it is a process's share of the global one, since their gradients are
    averaged. None is the loss's own divisor, where a part is the whole.

    Args:
        parts: of this process.
        objective: how tokens are averaged.
        longest: tokens a completion may have, which packed rows no longer show.
    """
    aggregation = objective.aggregation
    if aggregation == "token_sum":
        return None if world() == 1 else 1 / world()
    if aggregation == "constant_length":
        count = sum(len(part.rows.ids) for part in parts if not part.is_filler) * longest
    elif len(parts) == 1 and world() == 1:
        return None
    elif aggregation == "token_mean":
        count = sum(len(part.rows.sequence) for part in parts)
    else:
        count = sum(part.rows.sequence.unique().numel() for part in parts)
    return max(1, sum(gathered(count))) / world()


def figures_of_all(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A minibatch's figures over all processes, from this one's; `divisor` made the losses."""
    if world() == 1:
        return dict(figures)
    mine = torch.stack([figure.float() for figure in figures.values()])
    parts = [dict(zip(figures, row, strict=True)) for row in stacked(mine)]
    merged = merge_metrics(parts)
    return merged | {"loss": merged["loss"] / world()}
