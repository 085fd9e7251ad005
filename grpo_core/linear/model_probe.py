"""The head of a transformers model as a `LinearHead`.

The matrix, its bias and an adapter of it are read from the module at every call, when wrappers have
gathered them. What follows is in the model's forward: the config names the numbers, and a probe
finds out which of them are applied, and how (Granite divides by `logits_scaling`, HyperCLOVA
multiplies). For a model that cannot be probed, `stated` takes from the config what is certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from grpo_core.linear.head import LinearHead

CAPS = ("final_logit_softcapping",)
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
# largest logit of the probe: without a soft cap, and as a multiple of one
REACH, REACH_CAPS = 60.0, 2.0
# tolerance, in roundings of the largest number that is compared
ROUNDINGS = 16


class Around(NamedTuple):
    """The model's operations on its logits; see `LinearHead`."""

    softcap: float | None = None
    scale: float = 1.0
    vocabulary: int | None = None


def text_config(config: Any) -> Any:
    """The config of the language model, if a config has several parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def stated(config: Any) -> Around:
    """What is certain from a config, for a model that cannot be probed.

    Raises:
        NotImplementedError: a scale that may multiply or divide.
    """
    text, scale = text_config(config), 1.0
    for name in SCALES:
        number = getattr(text, name, None)
        if not number or number == 1:
            continue
        if name == "logit_scale":
            scale = float(number)
        elif name == "logits_scaling" and text.model_type.startswith("granite"):
            scale = 1 / float(number)
        else:
            raise NotImplementedError(f"{name}: not known for model_type {text.model_type!r}")
    caps = (float(cap) for name in CAPS if (cap := getattr(text, name, None)))
    return Around(next(caps, None), scale)


def candidates(config: Any) -> Iterator[Around]:
    """All operations that a config may mean."""
    text = text_config(config)
    caps = [None, *(float(cap) for name in CAPS if (cap := getattr(text, name, None)))]
    scales = [1.0]
    for name in SCALES:
        if scale := getattr(text, name, None):
            scales += [float(scale), 1 / float(scale)]
    return (Around(cap, scale) for cap in caps for scale in scales)


def read_head(module: Any, around: Around, *, adapters: bool = True) -> LinearHead:
    """The head as it is now.

    Raises:
        ValueError: a module without a matrix, a sharded matrix that is not gathered, or an
            adapter that is more than two matrices.
        NotImplementedError: any adapter, without `adapters`.
    """
    if not adapters and hasattr(module, "base_layer"):
        raise NotImplementedError("lm_head: an adapter on the head is not supported; leave it out")
    base, adapter = module, {}
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        base, adapter = module.get_base_layer(), _adapter(module)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            "lm_head: expected a whole matrix, got a sharded one: call the module that fully_shard "
            "was applied to, and not a part of it"
        )
    if not isinstance(weight, Tensor):
        raise ValueError(f"lm_head: expected a module with a weight, got {type(module).__name__}")
    return LinearHead(weight, bias, **around._asdict(), **adapter)


def _adapter(module: Any) -> dict[str, Any]:
    """The active low-rank matrices of PEFT's `lora.Linear`."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not names:
        return {}
    if len(names) > 1:
        raise ValueError(f"lm_head: expected at most one active adapter, got {names}")
    (name,) = names
    dropout = module.lora_dropout[name]
    drops = module.training and getattr(dropout, "p", 0.0) > 0
    biased = module.lora_B[name].bias is not None
    if drops or biased or name in getattr(module, "lora_variant", ()):
        what = "dropout" if drops else "a bias" if biased else "a variant such as DoRA"
        raise ValueError(f"lm_head: expected a plain LoRA adapter, got one with {what}")
    return {
        "lora_A": module.lora_A[name].weight,
        "lora_B": module.lora_B[name].weight,
        "lora_scaling": float(module.scaling[name]),
    }


class Probe:
    """A request that replaces the head's logits by known ones, and sees what the model makes of
    them. The head's own logits are compared with those of `read_head`."""

    def __init__(self, config: Any) -> None:
        self.candidates = list(candidates(config))
        caps = [one.softcap for one in self.candidates if one.softcap]
        self.reach = REACH_CAPS * max(caps) if caps else REACH
        self.ramp: Tensor | None = None

    @torch.no_grad()
    def answer(self, hidden: Tensor, module: nn.Module, logits: Tensor) -> Tensor:
        """Known logits in place of the head's `logits` of `hidden`.

        Raises:
            ValueError: `logits` are not those of `read_head`.
        """
        head = read_head(module, Around())
        dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
        ours = linear(hidden.to(dtype), head.weight.to(dtype))
        ours = ours if head.bias is None else ours + head.bias
        if head.lora_A is not None and head.lora_B is not None:
            low_rank = linear(hidden.to(head.lora_A.dtype), head.lora_A)
            ours = ours + head.lora_scaling * linear(low_rank, head.lora_B).to(dtype)
        if logits.shape != ours.shape or distance(logits, ours) > ROUNDINGS:
            raise ValueError(
                "lm_head: expected a matrix, a bias and LoRA at most, got "
                f"{type(module).__name__}, whose outputs differ"
            )
        ramp = torch.linspace(-self.reach, self.reach, ours.shape[-1], device=ours.device)
        self.ramp = ramp.to(logits.dtype).float()
        return self.ramp.to(logits.dtype).expand_as(logits).clone()

    def around(self, logits: Tensor) -> Around:
        """The model's operations, from the logits that it returned.

        Raises:
            ValueError: they are none that the config names.
        """
        if self.ramp is None:
            raise ValueError("model: expected a forward that calls its get_output_embeddings()")
        V = logits.shape[-1]
        ramp = self.ramp[:V]
        expected = [(one, around(ramp, one)) for one in self.candidates]
        errors = [distance(logits[0, 0], value) for _, value in expected]
        best = min(range(len(errors)), key=errors.__getitem__)
        if not errors[best] <= ROUNDINGS:
            raise ValueError(
                "model: expected logits = cap(scale · lm_head(hidden)) with the config's "
                f"{', '.join((*CAPS, *SCALES))}; got something else done to them"
            )
        return expected[best][0]._replace(vocabulary=V if len(self.ramp) > V else None)


def around(logits: Tensor, what: Around) -> Tensor:
    """cap(scale · logits)."""
    logits = what.scale * logits
    return logits if what.softcap is None else what.softcap * torch.tanh(logits / what.softcap)


def distance(value: Tensor, like: Tensor) -> float:
    """Largest difference, in roundings of the coarser dtype at the largest number; inf for NaN."""
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(like.dtype).eps)
    value, like = value.double(), like.double()
    error = float((value - like).abs().amax() / (eps * like.abs().amax().clamp(min=1e-30)))
    return math.inf if math.isnan(error) else error
