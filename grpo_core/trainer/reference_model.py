"""The policy as it was when learning began, which a KL is measured to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from grpo_core.trainer.config import Shard
from grpo_core.trainer.distributed import in_group
from grpo_core.trainer.rollout import evaluation_mode
from grpo_core.trainer.sharding import sharded


def reference_of(model: PreTrainedModel, shard: Shard = "ddp") -> PreTrainedModel:
    """The policy as it is now: a copy, or under an adapter the model itself, see `adapter_off`.

    To be called before the policy is sharded; with "fsdp" the copy is sharded as well.
    """
    if hasattr(model, "peft_config"):
        return model
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    return sharded(reference, keep_root=False) if in_group() and shard == "fsdp" else reference


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapter, if it has one: then it needs no copy to be the reference."""
    if not hasattr(model, "peft_config"):
        yield
        return
    with model.disable_adapter(), evaluation_mode(model):  # type: ignore[operator]
        yield
