"""The losses in `torch.compile`: two custom operators, which run a loss by its eager code.

Why whole losses and not kernels: a value check or a choice of rows branches on data, which
`fullgraph=True` refuses; a number that is given to an operator directly compiles anew with every
value; and Inductor sums in another order, which would change the bits of a loss.

An operator takes tensors and strings. So a call becomes a list of its tensors, a float64 tensor of
its numbers in host memory, and a key: the call as a Python expression over `tensors` and `numbers`.
A new value of a number compiles nothing once torch treats the number as dynamic, which it does when
the number first changes. The function of a surrogate is named.

From logits the backward runs the loss again, with its gradient: one more read of the logits than
in eager mode, but no gradient is stored. From hidden states that would cost matrix products, so the
forward returns the gradients and the backward multiplies them. Float16 gradients would underflow
before the loss scale, which is grad_output, is known, so there the backward runs the loss again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from grpo_core.backends.kept import Kept
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.outputs import LossOutput
from grpo_core.loss.row_inputs import RowInputs
from grpo_core.loss.tokens import Tokens
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.objective import Objective, Surrogate, function_of
from grpo_core.objective.off_policy import Rejection, SamplerCorrection
from grpo_core.objective.policy_factor import FutureKL, PolicyFactor, SequenceWeight

# an operator reads numbers from host memory, which a replayed CUDA graph would not do again
TAGS = (torch.Tag.cudagraph_unsafe,)
# a call as an operator takes it, see `_flatten`
CALL = "str key, Tensor[] tensors, Tensor numbers"
# what an operator returns of a `LossOutput`: shaped like the target, `[N]`, and of its tokens `[N]`
SHAPED = ("logp", "entropy", "ratio", "kl", "factor")
MARKS = ("_valid", "_dropped")
VECTORS = {
    "target": torch.int64,
    "valid": torch.bool,
    "unmasked": torch.bool,
    "bad_target": torch.bool,
    "weight": torch.float32,
    "advantage": torch.float32,
    "entropy_weight": torch.float32,
    "old_logp": torch.float32,
    "sampler_logp": torch.float32,
    "sequence_id": torch.int64,
    "unkept": torch.bool,
}
# all names that the expression of a call may use, and the fields of the records among them
NAMES: dict[str, Any] = {
    "__builtins__": {"int": int, "float": float},
    "torch": torch,
    "Surrogate": Surrogate,
    "function_of": function_of,
    "group_named": _resolve_process_group,
}
FIELDS: dict[str, tuple[str, ...]] = {}


Named = TypeVar("Named", bound=Callable[..., Any])
Record = TypeVar("Record", bound=type)


def register_function(function: Named) -> Named:
    """Lets a graph call the function by its name."""
    NAMES[function.__name__] = function
    return function


def register_record(record: Record) -> Record:
    """Lets a graph pass a dataclass of tensors, numbers and constants."""
    NAMES[record.__name__] = record
    FIELDS[record.__name__] = tuple(field.name for field in fields(record) if field.init)
    return record


RULES = (Estimator, PolicyFactor, SamplerCorrection, Rejection, SequenceWeight, FutureKL)
for record in (RowInputs, LossInputs, Objective, Kept, *RULES):
    register_record(record)


def logp_in_graph(function: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """The two results of a function that reads logp and entropy of its first argument's rows."""
    return [tensor.detach() for tensor in _run(*_flatten(function, (), arguments))]


def loss_in_graph(
    function: Callable[..., Any],
    leaves: tuple[Any, ...],
    inputs: LossInputs,
    *options: Any,
    gradients_in_forward: bool,
) -> LossOutput:
    """The loss of a function, differentiated with respect to the tensors in `leaves`.

    Args:
        function: of the leaves, `inputs` and `options`.
        gradients_in_forward: whether the forward computes the gradients, unless one is float16.
    """
    loss, *results = _run(*_flatten(function, leaves, (inputs, *options), gradients_in_forward))
    results = [tensor.detach() for tensor in results]
    logp, entropy, ratio, kl, factor, valid, dropped, skipped, *vectors = results
    # gradients follow the vectors
    given: dict[str, Any] = dict.fromkeys(VECTORS)
    given.update(zip(_vectors_of(inputs), vectors, strict=False))
    tokens = Tokens(
        objective=inputs.objective,
        sequences=inputs.target.shape[0],
        width=None if inputs.target.ndim == 1 else inputs.target.shape[1],
        normalizer=inputs.normalizer,
        groups=inputs.groups,
        **given,
    )
    # rows are left out where there is a head
    skipped = skipped if len(leaves) > 1 else None
    return LossOutput(loss, logp, entropy, ratio, kl, factor, tokens, valid, dropped, skipped)


def _vectors_of(inputs: LossInputs) -> tuple[str, ...]:
    """The vectors of `VECTORS` that the tokens of a loss have."""
    absent = [n for n in ("old_logp", "sampler_logp", "sequence_id") if getattr(inputs, n) is None]
    if not inputs.objective.entropy_coef:
        absent.append("entropy_weight")
    if inputs.kept is None:
        absent.append("unkept")
    return tuple([name for name in VECTORS if name not in absent])


def _flatten(
    function: Callable[..., Any],
    leaves: tuple[Any, ...],
    arguments: tuple[Any, ...],
    gradients_in_forward: bool = False,
) -> tuple[str, list[Tensor], Tensor]:
    """(key, tensors, numbers) of a call; the key is the expression of a `_Call`.

    Args:
        leaves: the first arguments, whose tensors may need a gradient.
        arguments: the others.
    """
    tensors: list[Tensor] = []
    numbers: list[float] = []
    written = [_write(leaf, tensors, numbers) for leaf in leaves]
    wanted = tuple([torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors])
    if any([tensor.dtype == torch.float16 for tensor in tensors]):
        gradients_in_forward = False
    written += [_write(value, tensors, numbers) for value in arguments]
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    given = [value for value in arguments if isinstance(value, LossInputs)]
    facts = (gradients_in_forward, autocast, wanted, _vectors_of(given[0]) if given else ())
    call = f"lambda tensors, numbers: {function.__name__}({', '.join(written)})"
    # torch keeps a number dynamic in a product
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return (
        f"Call(*{_write(facts, [], [])}, {call})",
        tensors,
        torch.stack([one * x for x in numbers]),
    )


def _write(value: Any, tensors: list[Tensor], numbers: list[float]) -> str:
    """The expression of an argument; adds its tensors and numbers to the lists."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"tensors[{len(tensors) - 1}]"
    if isinstance(value, Surrogate):
        args = _write(value.args, tensors, numbers)
        return f'Surrogate(function_of("{value.name}"), {args}, {value.homogeneous})'
    if isinstance(value, ProcessGroup):
        return f"group_named({value.group_name!r})"
    if isinstance(value, tuple):
        written = [_write(each, tensors, numbers) + ", " for each in value]
        return f"({''.join(written)})"
    if value is None or isinstance(value, (bool, torch.dtype)):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, (int, float)):
        numbers.append(value)
        return f"{'int' if isinstance(value, int) else 'float'}(numbers[{len(numbers) - 1}])"
    name = type(value).__name__
    written = [f"{f}={_write(getattr(value, f), tensors, numbers)}" for f in FIELDS[name]]
    return f"{name}({', '.join(written)})"


class _Call(NamedTuple):
    """A call as its key describes it."""

    gradients_in_forward: bool
    autocast: torch.dtype | None
    wanted: tuple[bool, ...]
    vectors: tuple[str, ...]
    function: Callable[[Sequence[Tensor], list[float]], Any]

    @classmethod
    def of(cls, key: str) -> _Call:
        return eval(key, NAMES | {"Call": cls})

    def run(
        self, tensors: Sequence[Tensor], numbers: Tensor, *, differentiable: bool
    ) -> tuple[Any, list[Tensor]]:
        """(the function's result, the tensors that want a gradient)."""
        leaves = [
            tensor.detach().requires_grad_(want and differentiable)
            for tensor, want in zip(tensors, self.wanted, strict=False)
        ]
        device, dtype = tensors[0].device.type, self.autocast
        with (
            torch.set_grad_enabled(differentiable),
            torch.autocast(device, dtype, enabled=dtype is not None),
        ):
            result = self.function([*leaves, *tensors[len(leaves) :]], numbers.tolist())
        return result, [leaf for leaf in leaves if leaf.requires_grad]

    def empty_gradients(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the tensors that want one, without values."""
        return [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor, want in zip(tensors, self.wanted, strict=False)
            if want
        ]


def _gradients(loss: Tensor, leaves: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, grad_output)) if leaves else []


@torch.library.custom_op(
    "grpo_core::run", mutates_args=(), tags=TAGS, schema=f"({CALL}) -> Tensor[]"
)
def _run(key: str, tensors: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    """The tensors of a function's result, then its gradients with `gradients_in_forward`."""
    call = _Call.of(key)
    out, leaves = call.run(tensors, numbers, differentiable=call.gradients_in_forward)
    if not isinstance(out, LossOutput):
        return [tensor.clone() for tensor in out]
    skipped = torch.full((), int(out._skipped or 0), dtype=torch.int64, device=out.loss.device)
    values = [out.loss, *(getattr(out, name) for name in (*SHAPED, *MARKS)), skipped]
    values += [getattr(out._tokens, name) for name in call.vectors]
    # results share no memory
    values = [value.detach().clone() for value in values]
    return values + _gradients(out.loss, leaves, torch.ones_like(out.loss))


@_run.register_fake
def _(key: str, tensors: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    call, source = _Call.of(key), tensors[0]
    shape, N = source.shape[:-1], math.prod(source.shape[:-1])
    shaped = [source.new_empty(shape, dtype=torch.float32) for _ in SHAPED]
    if not call.vectors:
        return shaped[:2]
    loss = source.new_empty((), dtype=torch.float32)
    marks = [source.new_empty(N, dtype=torch.bool) for _ in MARKS]
    skipped = source.new_empty((), dtype=torch.int64)
    vectors = [source.new_empty(N, dtype=VECTORS[name]) for name in call.vectors]
    gradients = call.empty_gradients(tensors) if call.gradients_in_forward else []
    return [loss, *shaped, *marks, skipped, *vectors, *gradients]


@torch.library.custom_op(
    "grpo_core::differentiate",
    mutates_args=(),
    tags=TAGS,
    schema=f"({CALL}, Tensor grad_output) -> Tensor[]",
)
def _differentiate(
    key: str, tensors: Sequence[Tensor], numbers: Tensor, grad_output: Tensor
) -> list[Tensor]:
    """Runs the loss of a call and its backward."""
    out, leaves = _Call.of(key).run(tensors, numbers, differentiable=True)
    return _gradients(out.loss, leaves, grad_output)


@_differentiate.register_fake
def _(key: str, tensors: Sequence[Tensor], numbers: Tensor, grad_output: Tensor) -> list[Tensor]:
    return _Call.of(key).empty_gradients(tensors)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """The gradients, or what the loss is run again with."""
    ctx.key, tensors, numbers = inputs
    ctx.call, ctx.count = _Call.of(ctx.key), len(tensors)
    made = output[len(output) - sum(ctx.call.wanted) :]
    ctx.save_for_backward(*(made if ctx.call.gradients_in_forward else (*tensors, numbers)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    """Of the first tensors; all else is constant."""
    grad_output = gradients[0]
    if ctx.call.gradients_in_forward:
        found = iter([gradient * grad_output for gradient in ctx.saved_tensors])
    else:
        *tensors, numbers = ctx.saved_tensors
        found = iter(_differentiate(ctx.key, tensors, numbers, grad_output))
    results = [next(found) if want else None for want in ctx.call.wanted]
    return None, results + [None] * (ctx.count - len(results)), None


_run.register_autograd(_backward, setup_context=_save_for_backward)
