"""A model's weights one by one, under the names of its checkpoint, as engines load them.

Shards are gathered for one weight at a time, by all ranks together. A LoRA adapter is merged,
W + s·B·A, into a copy: in place and back would leave rounding errors. Weights that transformers
renames or stacks while loading get their old names, as in `save_pretrained`. Tied weights appear
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from grpo_core.trainer.sharding import full_tensor, unwrap_peft

# in peft's names: a replaced layer, a module trained as a whole, and its original
BASE, SAVED, ORIGINAL = ".base_layer.", ".modules_to_save.", ".original_module."


@dataclass(frozen=True)
class WeightSpec:
    """Name, dtype and shape of a weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ModelWeights(Iterator[tuple[str, Tensor]]):
    """Iterator over names and tensors; all ranks iterate together over a sharded model.

    Args:
        model: any causal language model of `transformers`, with a LoRA adapter or without.
        dtype: of floating-point weights; None leaves it.

    Raises:
        ValueError: during iteration; an adapter cannot be merged weight by weight, or one tensor of
            the checkpoint holds several weights of the model.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self._pairs = self._converted(_merged)

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._pairs)

    def to(self, dtype: torch.dtype) -> ModelWeights:
        """Sets the dtype."""
        self.dtype = dtype
        return self

    def describe(self) -> list[WeightSpec]:
        """The specs of all weights in order; gathers none."""

        def empty(weight: Tensor, adapter: Any) -> Tensor:
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

        return [WeightSpec(n, t.dtype, tuple(t.shape)) for n, t in self._converted(empty)]

    def _converted(self, read: Callable[[Tensor, Any], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What `read` makes of each parameter and its adapter, under the checkpoint's names."""
        base = unwrap_peft(self.model)
        _check_conversions(base)
        for name, weight, adapter in _parameters(self.model):
            saved = revert_weight_conversion(base, {name: read(weight, adapter)})
            for saved_name, tensor in saved.items():
                casts = self.dtype is not None and tensor.is_floating_point()
                yield saved_name, tensor.to(self.dtype) if casts else tensor


def _merged(weight: Tensor, adapter: Any) -> Tensor:
    """The full weight with its adapter merged; detached."""
    weight = full_tensor(weight.detach())
    if adapter is None:
        return weight
    delta = full_tensor(adapter.get_delta_weight(adapter.active_adapters[0]).detach())
    return weight + delta.to(weight.dtype)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Any]]:
    """The parameters without those of adapters: name without peft's prefixes, weight, adapter."""
    base = unwrap_peft(model)
    adapters = _adapters(base) if hasattr(model, "peft_config") else {}
    for name, weight in base.named_parameters():
        if ORIGINAL in name or ".lora_" in name:
            continue
        layer, _, own_name = name.rpartition(BASE)
        plain, saved, after = name.replace(BASE, ".").partition(SAVED)
        if saved:
            # followed by the adapter's name
            plain = f"{plain}.{after.partition('.')[2]}"
        yield plain, weight, adapters.get(layer) if own_name == "weight" else None


def _adapters(base: nn.Module) -> dict[str, Any]:
    """The adapted layers by name.

    Raises:
        ValueError: an adapter is not plain LoRA of a linear layer, or its weight is tied.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters, uses = {}, [id(w) for _, w in base.named_parameters(remove_duplicate=False)]
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        plain = type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear
        if not plain or layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
            raise ValueError(
                "model: expected LoRA of linear layers, not merged, without DoRA or bias, for an "
                f"engine with its own weights, got {type(layer).__name__} at {name}"
            )
        if len(layer.active_adapters) != 1:
            raise ValueError(f"model: expected one active adapter, got {layer.active_adapters}")
        if uses.count(id(layer.get_base_layer().weight)) > 1:
            raise ValueError(f"model: LoRA on a tied weight cannot be merged: {name}")
        adapters[name] = layer
    return adapters


def _check_conversions(model: PreTrainedModel) -> None:
    """Raises ValueError if one tensor of the checkpoint holds several weights of the model."""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(
                f"model: expected one tensor of the checkpoint per weight, got "
                f"{conversion.target_patterns} in one tensor"
            )
