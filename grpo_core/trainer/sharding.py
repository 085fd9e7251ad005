"""The model on several ranks: replicas by DDP, or shards by FSDP2.

Both average gradients over the ranks by hooks on the forward of the module that `wrap_policy`
returns. The loss must therefore be computed inside that forward, by a fused head.
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


def unwrap_peft(model: PreTrainedModel) -> Any:
    """The transformers model inside peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def wrap_policy(model: PreTrainedModel, shard: Shard) -> nn.Module:
    """The module to call for the loss: DDP around the model, or the model sharded in place."""
    if not in_group():
        return model
    if shard == "fsdp":
        return shard_model(model)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_model(model: PreTrainedModel, *, keep_root: bool = True) -> PreTrainedModel:
    """Shards a model in place by FSDP2: each block of `_no_split_modules`, then the rest.

    Args:
        model: of a peft model the transformers model inside is sharded.
        keep_root: keep embedding and head gathered between forward and backward.
    """
    root = unwrap_peft(model)
    names = set(root._no_split_modules or ())
    for module in list(root.modules()):
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=True)
    fully_shard(root, reshard_after_forward=not keep_root)
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether FSDP2 has sharded the model."""
    return isinstance(unwrap_peft(model), FSDPModule)


def gradient_sync(policy: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Context for a microbatch: DDP averages gradients over ranks after the last one only.

    FSDP2 does so at every backward; to wait would hold unsharded gradients.
    """
    if isinstance(policy, DistributedDataParallel) and not last:
        return policy.no_sync()
    return nullcontext()


@contextmanager
def unsharded_params(model: PreTrainedModel) -> Iterator[None]:
    """Context in which parameters, once gathered, stay gathered (for token-wise generation)."""
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [block for block in blocks if block is not unwrap_peft(model)]
    for block in inner:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in inner:
            block.set_reshard_after_forward(True, recurse=False)
        for block in blocks:
            block.reshard()


def full_tensor(value: Tensor) -> Tensor:
    """A tensor gathered from its shards."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's shards of the trained weights and of the optimizer's state."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_sharded_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Loads what `torch.distributed.checkpoint` saved from `sharded_state`."""
    state = sharded_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def export(model: PreTrainedModel, folder: Path) -> None:
    """Saves unsharded weights in the transformers format (an adapter in peft's) on rank 0."""
    weights: dict[str, Any] = {}
    if is_sharded(model):
        adapter = hasattr(model, "peft_config")
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter
        )
        weights = {"state_dict": get_model_state_dict(model, options=options)}
    if is_main():
        model.save_pretrained(folder, **weights)
    barrier()
