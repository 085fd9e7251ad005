"""What is checked of hidden states and heads before anything is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.linear.head import HEAD_DTYPES, LinearHead, check_hidden
from grpo_core.linear.memory import Plan
from grpo_core.loss.inputs import LOWEST_TEMPERATURE, find_unmasked
from grpo_core.objective.validation import check_integers, check_tensor, must_validate


def temperature_of_rows(
    temperature: float | Tensor, target: Tensor, validate: bool | None
) -> tuple[Tensor | None, float]:
    """(temperatures `[N]` float32, 1), or (None, the one temperature).

    Raises:
        ValueError: temperatures of another shape than target's, or too low for a token.
    """
    if not isinstance(temperature, Tensor):
        return None, temperature
    check_tensor("temperature", temperature)
    if temperature.shape != target.shape or not temperature.is_floating_point():
        raise ValueError(
            f"temperature: expected a number, or floats of target's shape {list(target.shape)}, "
            f"got {temperature.dtype} of shape {list(temperature.shape)}"
        )
    heat = temperature.detach().reshape(-1).float()
    if must_validate(validate, target):
        low = find_unmasked(target, None) & ~((heat >= LOWEST_TEMPERATURE) & (heat < torch.inf))
        if low.any():
            n = int(low.nonzero()[0])
            raise ValueError(
                f"temperature: expected finite numbers >= {LOWEST_TEMPERATURE}, "
                f"got {float(heat[n])} at token {n}"
            )
    return heat, 1.0


def stand_in(hidden: Tensor, V: int) -> Tensor:
    """Something of the logits' shape without their memory, for the door to look at."""
    return hidden.detach().new_zeros(()).expand(*hidden.shape[:-1], V)


def check_target_shape(target: Tensor, hidden: Tensor) -> Tensor:
    """The target as int64, once there is one for every hidden state.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was expected and what came.
    """
    shape, target = hidden.shape[:-1], check_integers("target", target)
    if target.shape != shape:
        raise ValueError(
            f"target: expected shape {list(shape)} for hidden {list(hidden.shape)}, got "
            f"{list(target.shape)}; position t predicts token t + 1: give hidden[:, :-1], or pad "
            "the shifted target with -100"
        )
    return target


def check_accumulation(
    into: Tensor,
    head: LinearHead,
    hidden: Tensor,
    autocast: torch.dtype | None,
    plan: Plan | None,
) -> None:
    """Raises ValueError unless the matrix's gradient can be added to `into` in the forward."""
    matrix = head.weight
    check_tensor("accumulate_into", into)
    if into.shape != matrix.shape or into.dtype != torch.float32 or into.device != matrix.device:
        raise ValueError(
            f"accumulate_into: expected float32 {list(matrix.shape)} on {matrix.device}, got "
            f"{into.dtype} {list(into.shape)} on {into.device}"
        )
    if not matrix.requires_grad or plan == "lean" or head.lora_A is not None:
        raise ValueError(
            "accumulate_into: expected None for a frozen lm_head, one with an adapter, or the lean "
            "plan"
        )
    if (autocast or torch.promote_types(hidden.dtype, matrix.dtype)) == torch.float16:
        raise ValueError("accumulate_into: expected None in float16, whose loss scale comes later")


def check_policy(
    name: str,
    logp: Tensor | None,
    states: Tensor | None,
    matrix: Tensor | LinearHead | None,
    hidden: Tensor,
) -> None:
    """Raises ValueError unless another policy is given in one way at most."""
    if states is None and matrix is not None:
        raise ValueError(f"{name}_lm_head: expected None without {name}_hidden")
    if states is not None and logp is not None:
        raise ValueError(f"{name}_hidden: expected None with {name}_logp, got both")
    if states is not None:
        check_hidden(f"{name}_hidden", states, hidden)


def dtype_of_logits(dtype: torch.dtype | None) -> torch.dtype:
    """float32 unless another is asked for."""
    if dtype is not None and dtype not in HEAD_DTYPES:
        raise ValueError(f"logits_dtype: expected one of {HEAD_DTYPES} or None, got {dtype!r}")
    return dtype or torch.float32


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast wants products, or None."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
