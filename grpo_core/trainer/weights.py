"""A model's weights one by one, whole, under the names of its checkpoint.

That is what an inference engine loads. Between a model in training and its checkpoint lie:

| what                                  | here                                                  |
|---------------------------------------|-------------------------------------------------------|
| shards (FSDP2)                        | put together one weight at a time, by all processes   |
| an adapter (LoRA on linear layers)    | merged, W + s·B·A, into a copy of that weight         |
| renamed or stacked weights, which     | as `save_pretrained` writes them, by transformers' own|
| transformers >= 5 makes while loading | `revert_weight_conversion`                            |
| tied weights                          | once                                                  |

The model itself is not touched: to merge an adapter in place and take it out again would leave a
rounding error in weights that do not train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from grpo_core.trainer.sharding import beneath, whole

# where peft keeps what it replaces, and what it trains in the place of a module
BASE, SAVED, ORIGINAL = ".base_layer.", ".modules_to_save.", ".original_module."


@dataclass(frozen=True)
class Described:
    """A weight that is still to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Source:
    """A parameter under its checkpoint-like name, and the adapter that belongs on top of it."""

    name: str
    weight: Tensor
    adapter: Any = None

    def tensor(self) -> Tensor:
        """The whole weight, detached."""
        weight = whole(self.weight.detach())
        return weight if self.adapter is None else weight + _delta(self.adapter).to(weight.dtype)


class ModelWeights(Iterator[tuple[str, Tensor]]):
    """Pairs of name and tensor, once; of a sharded model all processes take them together.

    Args:
        model: any causal language model of `transformers`, or one beneath a LoRA adapter.
        dtype: floating-point weights are handed out in; None leaves them as they are.

    Raises:
        ValueError: once they are asked for; an adapter that cannot be merged weight by weight, or a
            model whose checkpoint holds several of its weights in one.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self._pairs = self._converted(lambda source: source.tensor())

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._pairs)

    def to(self, dtype: torch.dtype) -> ModelWeights:
        """These, from now on in another dtype."""
        self.dtype = dtype
        return self

    def described(self) -> list[Described]:
        """All of them in order, without putting any together."""

        def empty(source: _Source) -> Tensor:
            weight = source.weight
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

        return [Described(n, t.dtype, tuple(t.shape)) for n, t in self._converted(empty)]

    def _converted(self, read: Callable[[_Source], Tensor]) -> Iterator[tuple[str, Tensor]]:
        base = beneath(self.model)
        _check_conversions(base)
        for source in _sources(self.model):
            found = revert_weight_conversion(base, {source.name: read(source)})
            for name, tensor in found.items():
                casts = self.dtype is not None and tensor.is_floating_point()
                yield name, tensor.to(self.dtype) if casts else tensor


def _sources(model: PreTrainedModel) -> list[_Source]:
    """The parameters of a model, those of its adapter taken out."""
    base = beneath(model)
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
            # the adapter's name stands between
            plain = f"{before}.{after.partition('.')[2]}"
        sources.append(_Source(plain, weight, adapters.get(owner)))
    return sources


def _adapters(base: nn.Module) -> dict[str, Any]:
    """The adapted layers by name.

    Raises:
        ValueError: one of them is no plain LoRA of a linear layer, or its weight is tied.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    found, uses = {}, [id(w) for _, w in base.named_parameters(remove_duplicate=False)]
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        plain = type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear
        if not plain or layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
            raise ValueError(
                "model: expected LoRA adapters of linear layers, not merged yet and without DoRA "
                f"or a bias, to merge for the engine, got {type(layer).__name__} at {name}"
            )
        if len(layer.active_adapters) != 1:
            raise ValueError(f"model: expected one active adapter, got {layer.active_adapters}")
        if uses.count(id(layer.get_base_layer().weight)) > 1:
            raise ValueError(
                f"model: expected no adapter on a tied weight, whose twin has none, got {name}"
            )
        found[name] = layer
    return found


def _delta(layer: Any) -> Tensor:
    """s·B·A of the active adapter, whole."""
    name = layer.active_adapters[0]
    up, down = (whole(part[name].weight.detach()) for part in (layer.lora_B, layer.lora_A))
    delta: Tensor = (up @ down) * layer.scaling[name]
    return delta.T if layer.fan_in_fan_out else delta


def _check_conversions(model: PreTrainedModel) -> None:
    """Raises ValueError if a tensor of the checkpoint is made of several weights of the model."""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(
                f"model: expected weights that the checkpoint holds one by one, got "
                f"{conversion.target_patterns}, which it holds together"
            )
