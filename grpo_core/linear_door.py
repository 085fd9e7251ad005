"""The door from hidden states: checks, the other policies' log-probabilities, then the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.arguments import (
    COLDEST,
    Tokens,
    check_logits,
    check_loss_arguments,
    check_target,
    present,
)
from grpo_core.backends import Backend, choose_backend
from grpo_core.fused_loss import LossOutput, TokenLogp
from grpo_core.linear_call import Other
from grpo_core.linear_head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear_memory import Plan
from grpo_core.linear_reading import ScoreCall, score_rows
from grpo_core.linear_rows import Run, loss_of_rows
from grpo_core.objective import Objective
from grpo_core.recipes import find_objective
from grpo_core.validation import must_validate


def loss_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    objective: str | Objective,
    advantage: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    group_id: Tensor | None,
    old_logp: Tensor | None,
    old_hidden: Tensor | None,
    old_lm_head: Tensor | LinearHead | None,
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
    sampler_logp: Tensor | None,
    mask: Tensor | None,
    sequence_id: Tensor | None,
    normalizer: Tensor | float | None,
    temperature: float | Tensor,
    plan: Plan | None,
    memory_budget: int | None,
    logits_dtype: torch.dtype | None,
    all_logp: bool,
    accumulate_into: Tensor | None,
    backend: Backend | None,
    validate: bool | None,
    run: Run | None = None,
) -> LossOutput:
    """`fused_linear_loss`, whose arguments these are; `run` as in `loss_of_rows`."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    check_target_shape(target, hidden)
    kernels = choose_backend(backend, hidden)
    spec = find_objective(objective)
    logits = stand_in(hidden, head.V)
    heat, temperature = temperature_of_rows(temperature, target, validate)
    check_logits(logits, temperature, HEAD_DTYPES)
    dtype = dtype_of_logits(logits_dtype)
    autocast = autocast_dtype(hidden)

    def door(old_logp: Tensor | None, ref_logp: Tensor | None) -> Tokens:
        exact = spec.kl == "exact" and ref_hidden is not None
        return check_loss_arguments(
            logits,
            target,
            objective=spec,
            advantage=advantage,
            rewards=rewards,
            group_size=group_size,
            group_id=group_id,
            old_logp=old_logp,
            ref_logp=ref_logp,
            ref_logits=logits if exact else None,
            sampler_logp=sampler_logp,
            mask=mask,
            sequence_id=sequence_id,
            normalizer=normalizer,
            backend=backend,
            validate=validate,
        )

    check_policy("old", old_logp, old_hidden, old_lm_head, hidden)
    check_policy("ref", ref_logp, ref_hidden, ref_lm_head, hidden)
    vectors = {"old_logp": old_logp, "ref_logp": ref_logp}
    others, reference = [], None
    if old_hidden is not None:
        others.append(_other("old", old_hidden, old_lm_head, head))
    if ref_hidden is not None:
        others.append(_other("ref", ref_hidden, ref_lm_head, head))
    if spec.kl == "exact":
        if ref_hidden is None and spec.beta:
            raise ValueError(
                f"ref_hidden: expected a tensor for kl = 'exact' and beta = {spec.beta}, got None"
            )
        if ref_hidden is not None:
            _, states, matrix = others.pop()
            if matrix.V != head.V:
                raise ValueError(
                    f"ref_lm_head: expected V = {head.V} words as in lm_head, got {matrix.V}"
                )
            reference = (states, matrix)
    if accumulate_into is not None:
        check_accumulation(accumulate_into, head, hidden, autocast, plan)
        plan = "fast"
    for other in others:
        # what is still to be found cannot be told from 0 by any check
        vectors[other.name] = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
    tokens = door(**vectors)
    early = [other for other in others if must_be_early(other, head, tokens)]
    for name, states, matrix in early:
        every = spec.factor.needs_sampler or all_logp
        call = ScoreCall(
            target=target.reshape(-1).long(),
            valid=tokens.given if every else tokens.given & ~tokens.still(),
            temperature=float(temperature),
            heat=heat,
            plan=plan,
            memory_budget=memory_budget,
            logits_dtype=dtype,
            autocast=autocast,
            kernels=kernels,
        )
        vectors[name] = score_rows(states, matrix, call).over(target.numel())[0].view(target.shape)
    if early:
        tokens = door(**vectors)
        others = [other for other in others if other not in early]
    return loss_of_rows(
        hidden,
        head,
        tokens,
        target.shape,
        plan=plan,
        memory_budget=memory_budget,
        all_logp=all_logp,
        accumulate_into=accumulate_into,
        run=run,
        logits_dtype=dtype,
        autocast=autocast,
        temperature=float(temperature),
        heat=heat,
        kernels=kernels,
        reference=reference,
        others=tuple(others),
    )


@torch.no_grad()
def logp_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    memory_budget: int | None,
    logits_dtype: torch.dtype | None,
    backend: Backend | None,
    validate: bool | None,
) -> TokenLogp:
    """`linear_token_logp`, whose arguments these are."""
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    check_target_shape(target, hidden)
    kernels = choose_backend(backend, hidden)
    logits = stand_in(hidden, head.V)
    heat, temperature = temperature_of_rows(temperature, target, validate)
    check_logits(logits, temperature, HEAD_DTYPES)
    check_target(logits, target, mask, validate)
    valid = present(target, mask) & ((target >= 0) & (target < head.V)).reshape(-1)
    call = ScoreCall(
        target=target.reshape(-1).long(),
        valid=valid,
        temperature=float(temperature),
        heat=heat,
        plan=None,
        memory_budget=memory_budget,
        logits_dtype=dtype_of_logits(logits_dtype),
        autocast=autocast_dtype(hidden),
        kernels=kernels,
    )
    logp, entropy = score_rows(hidden, head, call).over(target.numel())
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


def temperature_of_rows(
    temperature: float | Tensor, target: Tensor, validate: bool | None
) -> tuple[Tensor | None, float]:
    """(temperatures `[N]` float32, 1), or (None, the one temperature).

    Raises:
        ValueError: temperatures of another shape than target's, or too low for a token.
    """
    if not isinstance(temperature, Tensor):
        return None, temperature
    if temperature.shape != target.shape or not temperature.is_floating_point():
        raise ValueError(
            f"temperature: expected a number, or floats of target's shape {list(target.shape)}, "
            f"got {temperature.dtype} of shape {list(temperature.shape)}"
        )
    heat = temperature.detach().reshape(-1).float()
    if must_validate(validate, target):
        low = present(target, None) & ~((heat >= COLDEST) & (heat < torch.inf))
        if low.any():
            n = int(low.nonzero()[0])
            raise ValueError(
                f"temperature: expected finite numbers >= {COLDEST}, got {float(heat[n])} at token "
                f"{n}"
            )
    return heat, 1.0


def stand_in(hidden: Tensor, V: int) -> Tensor:
    """Something of the logits' shape without their memory, for the door to look at."""
    return hidden.detach().new_zeros(()).expand(*hidden.shape[:-1], V)


def check_target_shape(target: Tensor, hidden: Tensor) -> None:
    """Raises ValueError unless there is a target for every hidden state."""
    shape = hidden.shape[:-1]
    if not isinstance(target, Tensor) or target.shape != shape:
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"target: expected shape {list(shape)} for hidden {list(hidden.shape)}, got {got}; "
            "position t predicts token t + 1: give hidden[:, :-1], or pad the shifted target "
            "with -100"
        )


def check_accumulation(
    into: Tensor,
    head: LinearHead,
    hidden: Tensor,
    autocast: torch.dtype | None,
    plan: Plan | None,
) -> None:
    """Raises ValueError unless the matrix's gradient can be added to `into` in the forward."""
    matrix = head.weight
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


def _other(
    name: str, states: Tensor, matrix: Tensor | LinearHead | None, head: LinearHead
) -> Other:
    """Another policy, without a graph; its head is the policy's own unless one is given."""
    found = check_head(f"{name}_lm_head", head if matrix is None else matrix, states)
    return Other(
        f"{name}_logp",
        states.detach(),
        found.of(found.weight, found.bias, found.lora_A, found.lora_B),
    )


def must_be_early(other: Other, head: LinearHead, tokens: Tokens) -> bool:
    """Whether another policy's log-probabilities need a walk of their own before the loss's.

    That is where weights of other rows follow from them, and where the head's buffer is too small.
    """
    factor = tokens.objective.factor
    weighs = factor.needs_sampler and not factor.waits_for_logp(tokens.old_logp)
    return (weighs and other.name == "old_logp") or other.head.V > head.V


def dtype_of_logits(dtype: torch.dtype | None) -> torch.dtype:
    """float32 unless another is asked for."""
    if dtype is not None and dtype not in HEAD_DTYPES:
        raise ValueError(f"logits_dtype: expected one of {HEAD_DTYPES} or None, got {dtype!r}")
    return dtype or torch.float32


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast wants products, or None."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
