"""The loss from hidden states as custom operators, for `torch.compile`; see `operators`.

Inside runs the eager code, rows left out included: which they are depends on data, and so shapes of
what is returned do not. The gradients are made in the forward, as ever, and are results of it; the
backward multiplies them by grad_output, out of place, where the compiler may fuse it with its
neighbours.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.linear.autograd import evaluate_call, loss_from_hidden
from grpo_core.linear.chunks import LinearCall
from grpo_core.linear.head import LinearHead
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.operators import TAGS, schema
from grpo_core.objective.objective import objective_of

# tensors and numbers of a head, as the operators take them
TENSORS = ("weight", "bias", "lora_A", "lora_B")
HEAD_NUMBERS = 3
POLICIES = ("", "ref_")


class LinearOutcome(NamedTuple):
    """What the operator returns: `[N]` each unless said; float32 or as said."""

    loss: Tensor  # 0-dim
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    factor: Tensor
    dropped: Tensor  # bool
    valid: Tensor  # bool
    unmasked: Tensor  # bool
    bad_target: Tensor  # bool
    advantage: Tensor
    old_logp: Tensor  # [0] where there is none
    skipped: Tensor  # 0-dim int64
    dhidden: Tensor  # shaped as what it is the gradient of; [0] where none is wanted; and so on:
    dweight: Tensor
    dbias: Tensor
    dlora_A: Tensor
    dlora_B: Tensor


# of the operator, with their types; `wanted` as in LinearCall
ARGUMENTS = {
    "hidden": "Tensor",
    **{
        f"{policy}{name}": "Tensor" if policy + name == "weight" else "Tensor?"
        for policy in POLICIES
        for name in TENSORS
    },
    "ref_hidden": "Tensor?",
    **{f"{policy}vocabulary": "SymInt?" for policy in POLICIES},
    "target": "Tensor",
    "numbers": "Tensor",
    "wanted": "bool[]",
    "objective": "str",
    "advantage": "Tensor?",
    "rewards": "Tensor?",
    "group_size": "SymInt?",
    "group_id": "Tensor?",
    "old_logp": "Tensor?",
    "ref_logp": "Tensor?",
    "sampler_logp": "Tensor?",
    "mask": "Tensor?",
    "sequence_id": "Tensor?",
    "normalizer": "Tensor?",
    "divides": "bool",
    "plan": "str?",
    "memory_budget": "SymInt?",
    "logits_dtype": "ScalarType?",
    "all_logp": "bool",
    "autocast": "ScalarType?",
    "backend": "str?",
    "validate": "bool?",
}


def head_numbers(head: LinearHead | None) -> tuple[float, float, float]:
    """Soft cap (NaN for none), scale, lora_scaling."""
    if head is None:
        return math.nan, 1.0, 1.0
    return math.nan if head.softcap is None else head.softcap, head.scale, head.lora_scaling


def take_head(given: dict[str, Any], policy: str, numbers: list[float]) -> LinearHead | None:
    """A head out of the operator's arguments and the first of its numbers, which are used up."""
    tensors = {name: given.pop(policy + name) for name in TENSORS}
    vocabulary = given.pop(f"{policy}vocabulary")
    softcap, scale, lora_scaling = (numbers.pop(0) for _ in range(HEAD_NUMBERS))
    if tensors["weight"] is None:
        return None
    return LinearHead(
        **tensors,
        softcap=None if math.isnan(softcap) else softcap,
        scale=scale,
        vocabulary=vocabulary,
        lora_scaling=lora_scaling,
    )


@torch.library.custom_op(
    "grpo_core::fused_linear_loss",
    mutates_args=(),
    tags=TAGS,
    schema=schema(ARGUMENTS, len(LinearOutcome._fields)),
)
def fused_linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss and gradients; `numbers` = (T, the divisor, *those of the heads, *the objective's)."""
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    temperature, divisor, *others = given.pop("numbers").tolist()
    head, ref_head = (take_head(given, policy, others) for policy in POLICIES)
    assert head is not None
    if given.pop("divides"):
        given["normalizer"] = divisor
    given["objective"] = objective_of(given["objective"], others)
    names = [field.name for field in fields(LossInputs) if field.name in given]
    inputs = LossInputs(**{name: given.pop(name) for name in names}, temperature=temperature)
    hidden, wanted = given.pop("hidden"), given.pop("wanted")
    autocast, tensors = given.pop("autocast"), (hidden, *head.tensors)
    gradients: list[Tensor | None] = []

    def now(call: LinearCall) -> tuple[Tensor, ...]:
        values, made = evaluate_call(replace(call, wanted=tuple(wanted)), head, tensors)
        gradients.extend(made)
        return values

    with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
        out = loss_from_hidden(
            hidden,
            head,
            inputs,
            ref_lm_head=ref_head,
            evaluate=now,
            **given,
        )
    none, tokens = out.logp.new_empty(0), out._tokens
    assert isinstance(out._skipped, int)
    vectors = (
        out.loss,
        *(vector.reshape(-1) for vector in (out.logp, out.entropy, out.ratio, out.kl, out.factor)),
        out._dropped,
        out._valid,
        tokens.unmasked,
        tokens.bad_target,
        tokens.advantage,
        none if tokens.old_logp is None else tokens.old_logp,
        torch.full((), out._skipped, dtype=torch.int64, device=hidden.device),
    )
    # an operator's results share memory neither with its arguments nor with each other
    return *(vector.clone() for vector in vectors), *(
        none.clone() if x is None else x.contiguous() for x in gradients[: len(tensors)]
    )


@fused_linear_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    hidden = given["hidden"]
    N = math.prod(hidden.shape[:-1])
    floats, flags = hidden.new_empty(N, dtype=torch.float32), hidden.new_empty(N, dtype=torch.bool)
    none = floats.new_empty(0)
    leaves = (hidden, *(given[name] for name in TENSORS))
    has_old = given["old_logp"] is not None
    return (
        floats.new_empty(()),
        *(torch.empty_like(floats) for _ in range(5)),
        *(torch.empty_like(flags) for _ in range(4)),
        torch.empty_like(floats),
        torch.empty_like(floats if has_old else none),
        hidden.new_empty((), dtype=torch.int64),
        *(
            leaf.new_empty(leaf.shape, dtype=_gradient_dtype(leaf)) if want else none.clone()
            for leaf, want in zip(leaves, given["wanted"], strict=True)
        ),
    )


def _gradient_dtype(leaf: Tensor) -> torch.dtype:
    """Of a gradient before grad_output, a loss scale in float16, has come."""
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """The gradients."""
    given, outcome = dict(zip(ARGUMENTS, inputs, strict=True)), LinearOutcome._make(output)
    ctx.wanted = given["wanted"]
    ctx.dtypes = [getattr(given[name], "dtype", None) for name in ("hidden", *TENSORS)]
    ctx.save_for_backward(*outcome[-len(ctx.wanted) :])
    ctx.mark_non_differentiable(*outcome[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """Multiplied by grad_output; everything but hidden states and head is constant."""
    found = [
        (gradient * grad_output).to(dtype) if want else None
        for gradient, want, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    ]
    return *found, *[None] * (len(ARGUMENTS) - len(found))


fused_linear_loss.register_autograd(_backward, setup_context=_save_for_backward)


LOGP_ARGUMENTS = {
    "hidden": "Tensor",
    "weight": "Tensor",
    "bias": "Tensor?",
    "lora_A": "Tensor?",
    "lora_B": "Tensor?",
    "vocabulary": "SymInt?",
    "target": "Tensor",
    "numbers": "Tensor",
    "mask": "Tensor?",
    "memory_budget": "SymInt?",
    "logits_dtype": "ScalarType?",
    "autocast": "ScalarType?",
    "backend": "str?",
    "validate": "bool?",
}


@torch.library.custom_op(
    "grpo_core::linear_token_logp",
    mutates_args=(),
    tags=TAGS,
    schema=schema(LOGP_ARGUMENTS, 2),
)
def linear_token_logp(*arguments: Any) -> tuple[Tensor, Tensor]:
    """logp and entropy of every target; `numbers` = (T, *those of the head)."""
    given = dict(zip(LOGP_ARGUMENTS, arguments, strict=True))
    temperature, *others = given.pop("numbers").tolist()
    head = take_head(given, "", others)
    assert head is not None
    hidden, target, autocast = (given.pop(name) for name in ("hidden", "target", "autocast"))
    with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
        logp, entropy = logp_from_hidden(
            hidden, head, target, temperature=temperature, plan="fast", **given
        )
    return logp.reshape(-1).clone(), entropy.reshape(-1).clone()


@linear_token_logp.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logp = hidden.new_empty(math.prod(hidden.shape[:-1]), dtype=torch.float32)
    return logp, torch.empty_like(logp)
