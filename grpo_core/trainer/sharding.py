"""The model on several processes: replicas by DDP, or shards by FSDP2.

Both average gradients over the ranks, and both hang their hooks on the forward of the module that
`policy_of` returns: the loss has to be made inside of it, by a fused head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import barrier, in_group, is_main

if TYPE_CHECKING:
    from grpo_core.trainer.config import Shard

# an adapter's modules as peft names them, around those of the model beneath
PEFT_PREFIX = "base_model.model."


def beneath(model: PreTrainedModel) -> Any:
    """The model that has a backbone and a head: peft puts its own around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def policy_of(model: PreTrainedModel, shard: Shard) -> nn.Module:
    """What is called for the loss; with "fsdp" the model itself, sharded in place."""
    if not in_group():
        return model
    if shard == "fsdp":
        return sharded(model)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def sharded(model: PreTrainedModel, *, keep_root: bool = True) -> PreTrainedModel:
    """FSDP2: every block that transformers says is not to be split, and the rest, in shards.

    Args:
        model: an adapter's is sharded beneath it.
        keep_root: hold embedding and head whole between forward and backward.
    """
    root = beneath(model)
    names = set(root._no_split_modules or ())
    for module in list(root.modules()):
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=True)
    fully_shard(root, reshard_after_forward=not keep_root)
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether FSDP2 holds its weights."""
    return isinstance(beneath(model), FSDPModule)


def accumulating(policy: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a microbatch: replicas exchange gradients after the last.

    Shards exchange theirs at every backward; to wait would hold whole gradients.
    """
    if isinstance(policy, DistributedDataParallel) and not last:
        return policy.no_sync()
    return nullcontext()


@contextmanager
def whole_weights(model: PreTrainedModel) -> Iterator[None]:
    """Within it a sharded model is put together once, and not anew for every token it writes."""
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [block for block in blocks if block is not beneath(model)]
    for block in inner:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in inner:
            block.set_reshard_after_forward(True, recurse=False)
        for block in blocks:
            block.reshard()


def whole(value: Tensor) -> Tensor:
    """A number that shards have computed together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shards_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This process's part of a sharded model's trained weights and of its optimizer's state."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(beneath(model), optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_shards(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `shards_of` gave and `torch.distributed.checkpoint` has saved."""
    state = shards_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        beneath(model),
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def export(model: PreTrainedModel, folder: Path) -> None:
    """Whole weights in the transformers format (peft's, for an adapter), by the main process."""
    weights: dict[str, Any] = {}
    if is_sharded(model):
        adapter = hasattr(model, "peft_config")
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter
        )
        found = get_model_state_dict(beneath(model), options=options)
        prefix = PEFT_PREFIX if adapter else ""
        weights = {"state_dict": {prefix + name: value for name, value in found.items()}}
    if is_main():
        model.save_pretrained(folder, **weights)
    barrier()


def not_finite(model: nn.Module) -> str | None:
    """The name of a parameter that is not finite in this process's part of it, if there is one."""
    for name, weight in model.named_parameters():
        mine = weight.to_local() if isinstance(weight, DTensor) else weight
        if not torch.isfinite(mine.detach()).all():
            return name
    return None
