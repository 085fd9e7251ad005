"""The head of a transformers model as a `LinearHead`.

The matrix, its bias and an adapter are read from the module at every call, when wrappers have
gathered them. Soft cap and scale are applied by code in the model's forward. The config has their
values; `probe_options` runs a few tokens to find out which of them are applied, and how (Granite
divides by `logits_scaling`, HyperCLOVA multiplies). For a model that cannot be run,
`options_of_config` uses the fields whose meaning is certain.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from grpo_core.linear.head import LinearHead, is_distributed, local_hidden, local_shard, replicate

# fields of a config: of a soft cap, and of scales that multiply or divide
CAP = "final_logit_softcapping"
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
PROBE_TOKENS = 4
# largest logit of the probe: without a soft cap, and as a multiple of one
REACH, REACH_CAPS = 60.0, 2.0
# tolerance, in roundings of the largest number that is compared
ROUNDINGS = 16


class HeadOptions(NamedTuple):
    """What a model does to its logits after the product; see `LinearHead`."""

    softcap: float | None = None
    scale: float = 1.0
    vocabulary: int | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """cap(scale · logits)."""
        logits = self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# nothing is applied to the product
NOTHING = HeadOptions()


def options_of_config(config: Any) -> HeadOptions:
    """The options that a config states without ambiguity, for a model that cannot be run.

    Raises:
        NotImplementedError: a scale that may multiply or divide.
    """
    cap, scales = _numbers(config)
    scale, model_type = 1.0, _text_config(config).model_type
    for name, number in scales.items():
        if name == "logit_scale":
            scale = number
        elif name == "logits_scaling" and model_type.startswith("granite"):
            scale = 1 / number
        elif number != 1:
            raise NotImplementedError(f"{name}: not known for model_type {model_type!r}")
    return HeadOptions(cap, scale)


def _text_config(config: Any) -> Any:
    """The config of the language model, if a config has several parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _numbers(config: Any) -> tuple[float | None, dict[str, float]]:
    """The soft cap of a config, and its scales by name."""
    text = _text_config(config)
    scales = {name: float(getattr(text, name, None) or 0) for name in SCALES}
    cap = float(getattr(text, CAP, None) or 0)
    return cap or None, {name: scale for name, scale in scales.items() if scale}


def read_head(
    module: Any,
    options: HeadOptions = NOTHING,
    *,
    adapters: bool = True,
    sharded: bool = False,
) -> LinearHead:
    """The head as it is now.

    Args:
        sharded: whether its matrix may be a DTensor, as in a module that gets hidden states as one.

    Raises:
        ValueError: a module without a matrix, a sharded matrix that is not gathered, or an
            adapter that is more than two matrices.
        NotImplementedError: any adapter, without `adapters`.
    """
    if not adapters and hasattr(module, "base_layer"):
        raise NotImplementedError("lm_head: an adapter on the head is not supported; leave it out")
    base, adapter = module, {}
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        base, adapter = module.get_base_layer(), _read_adapter(module)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if is_distributed(weight) and not sharded:
        raise ValueError(
            "lm_head: expected a whole matrix, got a sharded one: call the module that fully_shard "
            "was applied to, and not a part of it"
        )
    if not isinstance(weight, Tensor):
        raise ValueError(f"lm_head: expected a module with a weight, got {type(module).__name__}")
    return LinearHead(weight, bias, **options._asdict(), **adapter)


def _read_adapter(module: Any) -> dict[str, Any]:
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


@torch.no_grad()
def probe_options(model: Any, module: nn.Module) -> HeadOptions:
    """What the model does to its logits, from a few tokens; keeps the generators' states.

    The logits of `module`, its output embedding, are replaced by a ramp; what the model returns is
    compared with all that its config may mean.

    Raises:
        ValueError: the module's own logits are not those of `read_head`, or the model does
            something to them that its config does not state.
    """
    cap, scales = _numbers(model.config)
    factors = [1.0, *(f for scale in scales.values() for f in (scale, 1 / scale))]
    candidates = [HeadOptions(c, f) for c in dict.fromkeys((None, cap)) for f in factors]
    reach = REACH if cap is None else REACH_CAPS * cap
    ramps: list[Tensor] = []

    def replace_logits(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        _check_product(module, inputs[0], logits)
        ramp = torch.linspace(-reach, reach, logits.shape[-1], device=logits.device)
        ramps.append(ramp.to(logits.dtype))
        made: Any = replicate(ramps[0].expand(logits.shape).clone(), logits)
        if is_distributed(logits):
            made = made.redistribute(placements=logits.placements)
            ramps.append(made.to_local()[0, 0])
        return made

    device = next(model.parameters()).device
    ids = torch.arange(PROBE_TOKENS, device=device)[None]
    devices = [device] if device.type == "cuda" else []
    # before the hook that shards the matrix again
    hook = module.register_forward_hook(replace_logits, prepend=True)
    try:
        # a probe reads values, which a traced graph does not have
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if not ramps:
        raise ValueError("model: expected a forward that calls its get_output_embeddings()")
    logits = logits.full_tensor() if is_distributed(logits) else logits
    # the last is of this rank alone, which the model may return
    V = logits.shape[-1]
    ramp = ramps[-1 if len(ramps[-1]) == V else 0].float()
    errors = [_distance(logits[0, 0], options.apply(ramp[:V])) for options in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    if not errors[best] <= ROUNDINGS:
        raise ValueError(
            "model: expected logits = cap(scale · lm_head(hidden)) with the config's "
            f"{', '.join((CAP, *SCALES))}; got something else done to them"
        )
    return candidates[best]._replace(vocabulary=V if len(ramp) > V else None)


def _check_product(module: nn.Module, hidden: Tensor, logits: Any) -> None:
    """Raises ValueError if the module's logits are not those of `read_head`."""
    sharded = is_distributed(hidden)
    head = local_shard(read_head(module, sharded=sharded), None, None)[0]
    assert isinstance(head, LinearHead)
    hidden, logits = local_hidden(hidden), logits.to_local() if sharded else logits
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    ours = linear(hidden.to(dtype), head.weight.to(dtype))
    ours = ours if head.bias is None else ours + head.bias
    if head.lora_A is not None and head.lora_B is not None:
        low_rank = linear(hidden.to(head.lora_A.dtype), head.lora_A)
        ours = ours + head.lora_scaling * linear(low_rank, head.lora_B).to(dtype)
    if logits.shape != ours.shape or _distance(logits, ours) > ROUNDINGS:
        raise ValueError(
            "lm_head: expected a matrix, a bias and LoRA at most, got "
            f"{type(module).__name__}, whose outputs differ"
        )


def _distance(value: Tensor, like: Tensor) -> float:
    """Largest difference, in roundings of the coarser dtype at the largest number; inf for NaN."""
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(like.dtype).eps)
    value, like = value.double(), like.double()
    error = float((value - like).abs().amax() / (eps * like.abs().amax().clamp(min=1e-30)))
    return math.inf if math.isnan(error) else error
