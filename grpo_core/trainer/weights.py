"""A model's weights one by one, unsharded, under the names of its checkpoint, as engines load them.

| difference from the checkpoint         | handled by                                           |
|----------------------------------------|------------------------------------------------------|
| shards (FSDP2)                         | all ranks gather one weight at a time                |
| an adapter (LoRA on linear layers)     | merged, W + s·B·A, in a copy of that weight          |
| weights that transformers >= 5 renames | `revert_weight_conversion`, as in `save_pretrained`  |
| or stacks while loading                |                                                      |
| tied weights                           | appear once                                          |

The model is not modified: merging an adapter in place and back would leave rounding errors.
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


@dataclass(frozen=True)
class _Source:
    """A parameter without peft's prefixes in its name, and its adapter."""

    name: str
    weight: Tensor
    adapter: Any = None

    def tensor(self) -> Tensor:
        """The full weight with its adapter merged, detached."""
        weight = full_tensor(self.weight.detach())
        return weight if self.adapter is None else weight + _delta(self.adapter).to(weight.dtype)


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
        self._pairs = self._converted(lambda source: source.tensor())

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._pairs)

    def to(self, dtype: torch.dtype) -> ModelWeights:
        """Sets the dtype."""
        self.dtype = dtype
        return self

    def describe(self) -> list[WeightSpec]:
        """The specs of all weights in order; gathers none."""

        def empty(source: _Source) -> Tensor:
            weight = source.weight
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

        return [WeightSpec(n, t.dtype, tuple(t.shape)) for n, t in self._converted(empty)]

    def _converted(self, read: Callable[[_Source], Tensor]) -> Iterator[tuple[str, Tensor]]:
        base = unwrap_peft(self.model)
        _check_conversions(base)
        for source in _sources(self.model):
            saved = revert_weight_conversion(base, {source.name: read(source)})
            for name, tensor in saved.items():
                casts = self.dtype is not None and tensor.is_floating_point()
                yield name, tensor.to(self.dtype) if casts else tensor


def _sources(model: PreTrainedModel) -> list[_Source]:
    """The parameters of a model without those of its adapter."""
    base = unwrap_peft(model)
    if not hasattr(model, "peft_config"):
        return [_Source(name, weight) for name, weight in base.named_parameters()]
    adapters = _adapters(base)
    sources = []
    for name, weight in base.named_parameters():
        if ORIGINAL in name or ".lora_" in name:
            continue
        owner = name.rpartition(BASE)[0] if name.endswith(f"{BASE}weight") else ""
        plain = name.replace(BASE, ".")
        if SAVED in plain:
            before, _, after = plain.partition(SAVED)
            # followed by the adapter's name
            plain = f"{before}.{after.partition('.')[2]}"
        sources.append(_Source(plain, weight, adapters.get(owner)))
    return sources


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


def _delta(layer: Any) -> Tensor:
    """s·B·A of the active adapter."""
    name = layer.active_adapters[0]
    up, down = (full_tensor(part[name].weight.detach()) for part in (layer.lora_B, layer.lora_A))
    delta: Tensor = (up @ down) * layer.scaling[name]
    return delta.T if layer.fan_in_fan_out else delta


def _check_conversions(model: PreTrainedModel) -> None:
    """Raises ValueError if one tensor of the checkpoint holds several weights of the model."""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(
                f"model: expected one tensor of the checkpoint per weight, got "
                f"{conversion.target_patterns} in one tensor"
            )
