"""The loss as custom operators of torch, which `torch.compile` takes into its graph as they are.

Inside, an operator runs the very code of the eager path, so every figure keeps its bits. What it
may be given are tensors and strings: a name stands for the objective's structure (`Objective.key`),
and its numbers (beta, parameters of the surrogate), the temperature and the normalizer are a small
tensor in host memory. So another value of theirs compiles nothing, once torch has taken the Python
number for a dynamic one, which it does when it first changes.

The forward reads the logits once and keeps them; the backward reads them again and writes the
gradient. That is one reading more than eager mode needs, in exchange for a gradient that is not
copied: a graph's backward may not write over what its forward has saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import Rows, RowStats, Slopes
from grpo_core.loss.autograd import Call, evaluate, logp_of_rows
from grpo_core.loss.inputs import check_loss_arguments
from grpo_core.loss.layout import readable, reference_rows
from grpo_core.objective.objective import objective_of

# operators read numbers from host memory, which a recorded CUDA graph would not do again
TAGS = (torch.Tag.cudagraph_unsafe,)


class Outcome(NamedTuple):
    """What the operator returns: `[N]` each but for `loss` and `state`; float32 or as said."""

    loss: Tensor  # 0-dim
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    factor: Tensor
    dropped: Tensor  # bool
    valid: Tensor  # bool
    given: Tensor  # bool
    bad_target: Tensor  # bool
    target: Tensor  # int64
    advantage: Tensor
    dlogp: Tensor
    dentropy: Tensor  # [0] without an entropy bonus
    dkl: Tensor  # [0] without an exact KL
    state: Tensor  # [k, N]


# of the operator, with their types; those after `objective` as in `fused_loss`
ARGUMENTS = {
    "logits": "Tensor",
    "target": "Tensor",
    "numbers": "Tensor",
    "objective": "str",
    "advantage": "Tensor?",
    "rewards": "Tensor?",
    "group_size": "SymInt?",
    "group_id": "Tensor?",
    "old_logp": "Tensor?",
    "ref_logp": "Tensor?",
    "ref_logits": "Tensor?",
    "sampler_logp": "Tensor?",
    "mask": "Tensor?",
    "sequence_id": "Tensor?",
    "normalizer": "Tensor?",
    "divides": "bool",
    "backend": "str?",
    "validate": "bool?",
}


def schema(arguments: Mapping[str, str], results: int) -> str:
    """Of an operator with these arguments and so many tensors for a result, as torch writes it."""
    given = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
    return f"({given}) -> ({', '.join(['Tensor'] * results)})"


@torch.library.custom_op(
    "grpo_core::fused_loss",
    mutates_args=(),
    tags=TAGS,
    schema=schema(ARGUMENTS, len(Outcome._fields)),
)
def fused_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The forward, without a gradient; `numbers` = (T, the divisor, *those of the objective)."""
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    temperature, divisor, *others = given.pop("numbers").tolist()
    if given.pop("divides"):
        given["normalizer"] = divisor
    given["objective"] = objective_of(given["objective"], others)
    logits = given["logits"]
    kernels = choose_backend(given["backend"], logits)
    tokens = check_loss_arguments(**given)
    ref_logits = reference_rows(given["ref_logits"], logits, False)
    call = Call(tokens, ref_logits, temperature, False, False, kernels)
    result, tokens = evaluate(Rows.of(readable(logits).detach()), call, None)
    none = result.logp.new_empty(0)
    slopes = tokens.slopes(result.dlogp, result.dropped, call.exact_beta)
    outcome = Outcome(
        loss=result.loss.sum(),
        logp=result.logp,
        entropy=result.entropy,
        ratio=result.ratio,
        kl=result.kl,
        factor=torch.ones_like(result.logp) if tokens.factor is None else tokens.factor,
        dropped=result.dropped,
        valid=tokens.valid,
        given=tokens.given,
        bad_target=tokens.bad_target,
        target=tokens.target,
        advantage=tokens.advantage,
        dlogp=slopes.dlogp,
        dentropy=none if slopes.dentropy is None else slopes.dentropy,
        dkl=none if slopes.dkl is None else slopes.dkl,
        # the torch backend, which finds it again, may have found it for once
        state=result.state[: _states(logits, given["ref_logits"], given["backend"])],
    )
    # an operator's results share memory neither with its arguments nor with each other
    return tuple(vector.clone() for vector in outcome)


@fused_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    spec, logits, ref_logits = (given[name] for name in ("objective", "logits", "ref_logits"))
    spec = objective_of(spec)
    N = math.prod(logits.shape[:-1])
    floats, flags = logits.new_empty(N, dtype=torch.float32), logits.new_empty(N, dtype=torch.bool)
    none = floats.new_empty(0)
    return Outcome(
        loss=floats.new_empty(()),
        logp=floats,
        entropy=torch.empty_like(floats),
        ratio=torch.empty_like(floats),
        kl=torch.empty_like(floats),
        factor=torch.empty_like(floats),
        dropped=flags,
        valid=torch.empty_like(flags),
        given=torch.empty_like(flags),
        bad_target=torch.empty_like(flags),
        target=logits.new_empty(N, dtype=torch.int64),
        advantage=torch.empty_like(floats),
        dlogp=torch.empty_like(floats),
        dentropy=torch.empty_like(floats) if spec.entropy_coef else none,
        dkl=torch.empty_like(floats) if spec.beta and ref_logits is not None else none.clone(),
        state=floats.new_empty(_states(logits, ref_logits, given["backend"]), N),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """What the gradient is made of."""
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    spec, outcome = objective_of(given["objective"]), Outcome._make(output)
    compares = given["ref_logits"] is not None and spec.beta != 0
    ctx.backend = given["backend"]
    ctx.save_for_backward(
        given["logits"],
        given["ref_logits"] if compares else None,
        given["numbers"],
        outcome.target,
        outcome.dlogp,
        outcome.dentropy if spec.entropy_coef else None,
        outcome.dkl if compares else None,
        outcome.entropy,
        outcome.kl,
        outcome.state,
    )
    ctx.mark_non_differentiable(*outcome[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """The gradient of the logits; all else is constant."""
    gradient = scaled_dlogits(grad_output, *ctx.saved_tensors, ctx.backend)
    return gradient, *[None] * (len(ARGUMENTS) - 1)


fused_loss.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(
    "grpo_core::scaled_dlogits",
    mutates_args=(),
    tags=TAGS,
    schema="(Tensor grad_output, Tensor logits, Tensor? ref_logits, Tensor numbers, "
    "Tensor target, Tensor dlogp, Tensor? dentropy, Tensor? dkl, Tensor entropy, Tensor kl, "
    "Tensor state, str? backend) -> Tensor",
)
def scaled_dlogits(
    grad_output: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    numbers: Tensor,
    target: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    dkl: Tensor | None,
    entropy: Tensor,
    kl: Tensor,
    state: Tensor,
    backend: Backend | None,
) -> Tensor:
    """grad_output times dL/dlogits."""
    kernels = choose_backend(backend, logits)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    reference = reference_rows(ref_logits, logits, False)
    return kernels.row_dlogits(
        Rows.of(readable(logits).detach()),
        target,
        float(numbers[0]),
        Slopes(dlogp, dentropy, dkl).times(grad_output),
        RowStats(dlogp, entropy, kl, state),
        dlogits,
        None if reference is None else Rows.of(reference),
    )


@scaled_dlogits.register_fake
def _(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "grpo_core::token_logp",
    mutates_args=(),
    tags=TAGS,
    schema="(Tensor logits, Tensor target, Tensor numbers, Tensor? mask, str? backend, "
    "bool? validate) -> (Tensor, Tensor)",
)
def token_logp(
    logits: Tensor,
    target: Tensor,
    numbers: Tensor,
    mask: Tensor | None,
    backend: Backend | None,
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    """logp and entropy of every target; `numbers` = (T,)."""
    logp, entropy = logp_of_rows(logits, target, float(numbers[0]), mask, backend, validate)
    return logp.clone(), entropy.clone()


@token_logp.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logp = logits.new_empty(math.prod(logits.shape[:-1]), dtype=torch.float32)
    return logp, torch.empty_like(logp)


def _states(logits: Tensor, ref_logits: Tensor | None, backend: Backend | None) -> int:
    """Vectors of softmax state that a backend's second reading takes from the first."""
    backend = backend or ("triton" if logits.is_cuda else "torch")
    return 0 if backend == "torch" else 2 if ref_logits is None else 4
