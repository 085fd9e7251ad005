"""The losses in `torch.compile`: two custom operators, which run a loss by its eager code.

Why whole losses and not kernels: a value check or a choice of rows branches on data, which
`fullgraph=True` refuses; a number that is given to an operator directly compiles anew with every
value; and Inductor sums in another order, which would change the bits of a loss.

An operator takes tensors and strings. So the arguments of a call are flattened, whatever records
they are in: tensors into a list, numbers into a float64 tensor in host memory, everything else into
a string. A new value of a number compiles nothing once torch treats the number as dynamic, which it
does when the number first changes. The objective is named by its `key`.

From logits the backward runs the loss again, with its gradient: one more read of the logits than
in eager mode, and no gradient to keep. From hidden states a product costs more, so the forward
returns the gradients and the backward multiplies them. In float16 they would underflow before the
loss scale, which is grad_output, is known: there the backward runs that loss again as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_core.loss.inputs import LossInputs, Tokens, make_readable
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.objective import Objective, objective_of

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
}
# those that are there if the argument is
OPTIONAL = ("old_logp", "sampler_logp", "sequence_id")
# dimensions of a tensor that stands for None
ABSENT = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONSTANTS: dict[str, Any] = {str(x): x for x in (None, True, False, *DTYPES)}
# the functions and records that a key can name
FUNCTIONS: dict[str, Callable[..., Any]] = {}
RECORDS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}


Named = TypeVar("Named", bound=Callable[..., Any])
Record = TypeVar("Record", bound=type)


def register_function(function: Named) -> Named:
    """Lets a graph call the function by its name."""
    FUNCTIONS[function.__name__] = function
    return function


def register_record(record: Record) -> Record:
    """Lets a graph pass a dataclass of tensors, numbers and constants."""
    RECORDS[record.__name__] = record, tuple(field.name for field in fields(record))
    return record


register_record(LossInputs)


def logp_in_graph(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Tensor]:
    """The two results of a function that reads logp and entropy of its first argument's rows."""
    call = _flatten(function, [False], False, arguments, options)
    return [tensor.detach() for tensor in _run(*call)]


def loss_in_graph(
    function: Callable[..., Any],
    leaves: tuple[Any, ...],
    inputs: LossInputs,
    *,
    ahead: bool,
    **options: Any,
) -> LossOutput:
    """The loss of a function, differentiated with respect to the tensors in `leaves`.

    Args:
        options: further arguments of the function.
        ahead: whether the forward makes the gradients.

    Raises:
        ValueError: an objective that was made inside of the graph.
    """
    tensors: list[Tensor] = []
    for leaf in leaves:
        _flatten_value(leaf, [], tensors, [])
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    ahead = ahead and all(tensor.dtype != torch.float16 for tensor in tensors)
    loss, *results = _run(*_flatten(function, wanted, ahead, (*leaves, inputs), options))
    found: list[Any] = [None if tensor.ndim == ABSENT else tensor.detach() for tensor in results]
    logp, entropy, ratio, kl, factor, valid, dropped, skipped, *vectors = found
    tokens = Tokens(
        objective=inputs.objective,
        sequences=inputs.target.shape[0],
        width=None if inputs.target.ndim == 1 else inputs.target.shape[1],
        normalizer=inputs.normalizer,
        groups=inputs.groups,
        # gradients follow them
        **dict(zip(VECTORS, vectors, strict=False)),
    )
    return LossOutput(loss, logp, entropy, ratio, kl, factor, tokens, valid, dropped, skipped)


def _flatten(
    function: Callable[..., Any],
    wanted: list[bool],
    ahead: bool,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[str, list[Tensor], Tensor]:
    """(key, tensors, numbers) of a call.

    The first line of a key are the function and, of the first tensors, which want a gradient.
    """
    words: list[str] = []
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for value in arguments:
        _flatten_value(value, words, tensors, numbers)
    for name, value in options.items():
        words.extend(("option", name))
        _flatten_value(value, words, tensors, numbers)
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    head = [function.__name__, str(ahead), str(autocast), *(str(want) for want in wanted)]
    # torch keeps a number dynamic in a product
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return "\n".join([" ".join(head), *words]), tensors, torch.stack([one * x for x in numbers])


def _flatten_value(
    value: Any, words: list[str], tensors: list[Tensor], numbers: list[float]
) -> None:
    """Adds an argument; its words are what `_Reader` reads it from."""
    if isinstance(value, Tensor):
        words.append("tensor")
        tensors.append(value)
    elif isinstance(value, Objective):
        if not value.key:
            raise ValueError("objective: expected one made outside of the compiled function")
        words.extend(("objective", value.key))
        numbers.extend(value.numbers)
    elif value is None or isinstance(value, (bool, torch.dtype)):
        words.append(str(value))
    elif isinstance(value, str):
        words.extend(("string", value))
    elif isinstance(value, (int, float)):
        words.append("int" if isinstance(value, int) else "float")
        numbers.append(value)
    else:
        name = type(value).__name__
        words.append(name)
        for field in RECORDS[name][1]:
            _flatten_value(getattr(value, field), words, tensors, numbers)


class _Reader:
    """Reads arguments from their flat form; without `numbers` they are those at hand."""

    def __init__(
        self, words: list[str], tensors: Sequence[Tensor], numbers: list[float] | None
    ) -> None:
        self.words, self.tensors = iter(words), iter(tensors)
        self.numbers = None if numbers is None else iter(numbers)

    def read(self) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, options) of the call."""
        arguments, options = [], {}
        for word in self.words:
            if word == "option":
                name = next(self.words)
                options[name] = self._value(next(self.words))
            else:
                arguments.append(self._value(word))
        return arguments, options

    def _value(self, word: str) -> Any:
        if word == "tensor":
            return next(self.tensors)
        if word == "string":
            return next(self.words)
        if word in ("int", "float"):
            number = 1.0 if self.numbers is None else next(self.numbers)
            return int(number) if word == "int" else number
        if word == "objective":
            key = next(self.words)
            if self.numbers is None:
                return objective_of(key)
            return objective_of(key, [next(self.numbers) for _ in objective_of(key).numbers])
        if word in CONSTANTS:
            return CONSTANTS[word]
        record, names = RECORDS[word]
        return record(**{name: self._value(next(self.words)) for name in names})


class _Call(NamedTuple):
    """A call read from its flat form."""

    function: Callable[..., Any]
    ahead: bool
    autocast: torch.dtype | None
    wanted: list[bool]
    leaves: list[Tensor]
    arguments: list[Any]
    options: dict[str, Any]

    def run(self) -> Any:
        """The function's result."""
        device = self.leaves[0].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.function(*self.arguments, **self.options)

    def differentiate(self, loss: Tensor, grad_output: Tensor) -> list[Tensor | None]:
        """The gradient of every leaf that wants one."""
        leaves = [leaf for leaf, want in zip(self.leaves, self.wanted, strict=True) if want]
        gradients = iter(torch.autograd.grad(loss, leaves, grad_output) if leaves else ())
        return [next(gradients) if want else None for want in self.wanted]

    def empty_gradients(self) -> list[Tensor | None]:
        """What `differentiate` returns, without values."""
        return [
            torch.empty_like(leaf, memory_format=torch.contiguous_format) if want else None
            for leaf, want in zip(self.leaves, self.wanted, strict=True)
        ]


def _read(
    key: str, tensors: Sequence[Tensor], numbers: Tensor | None, differentiated: bool
) -> _Call:
    """The call of a key; `numbers` are None where there are only fake tensors."""
    head, *words = key.split("\n")
    name, ahead, autocast, *wanted = head.split()
    wants = [want == "True" for want in wanted]
    leaves = [
        make_readable(tensor).detach().requires_grad_(want and differentiated)
        for tensor, want in zip(tensors, wants, strict=False)
    ]
    every = (*leaves, *tensors[len(leaves) :])
    reader = _Reader(words, every, None if numbers is None else numbers.tolist())
    return _Call(
        FUNCTIONS[name], ahead == "True", CONSTANTS[autocast], wants, leaves, *reader.read()
    )


@torch.library.custom_op(
    "grpo_core::run", mutates_args=(), tags=TAGS, schema=f"({CALL}) -> Tensor[]"
)
def _run(key: str, tensors: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    """The tensors of a function's result, then its gradients if they are made ahead."""
    ahead = key.split()[1] == "True"
    call = _read(key, tensors, numbers, ahead)
    with torch.set_grad_enabled(ahead):
        out = call.run()
        if not isinstance(out, LossOutput):
            return [tensor.clone() for tensor in out]
        gradients = call.differentiate(out.loss, torch.ones_like(out.loss)) if ahead else []
    return _mark_absent([*_tensors_of(out), *gradients], out.loss)


@_run.register_fake
def _(key: str, tensors: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
    call = _read(key, tensors, None, False)
    source = call.leaves[0]
    shape, N = source.shape[:-1], math.prod(source.shape[:-1])
    shaped = [source.new_empty(shape, dtype=torch.float32) for _ in SHAPED]
    given = [value for value in call.arguments if isinstance(value, LossInputs)]
    if not given:
        return shaped[:2]
    present = {name: getattr(given[0], name) is not None for name in OPTIONAL}
    present["entropy_weight"] = given[0].objective.entropy_coef != 0
    vectors = [
        source.new_empty(N, dtype=dtype) if present.get(name, True) else None
        for name, dtype in VECTORS.items()
    ]
    marks = [source.new_empty(N, dtype=torch.bool) for _ in MARKS]
    loss = source.new_empty((), dtype=torch.float32)
    # a loss skips rows where there is a head
    skipped = source.new_empty((), dtype=torch.int64) if len(call.leaves) > 1 else None
    gradients = call.empty_gradients() if call.ahead else []
    return _mark_absent([loss, *shaped, *marks, skipped, *vectors, *gradients], loss)


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
    call = _read(key, tensors, numbers, True)
    with torch.enable_grad():
        gradients = call.differentiate(call.run().loss, grad_output)
    return _mark_absent(gradients, grad_output)


@_differentiate.register_fake
def _(key: str, tensors: Sequence[Tensor], numbers: Tensor, grad_output: Tensor) -> list[Tensor]:
    call = _read(key, tensors, None, False)
    return _mark_absent(call.empty_gradients(), grad_output)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """The gradients, or what the loss is run again with."""
    ctx.key, tensors, numbers = inputs
    _, ahead, _, *wanted = ctx.key.split("\n")[0].split()
    ctx.ahead, ctx.leaves, ctx.count = ahead == "True", len(wanted), len(tensors)
    ctx.save_for_backward(*(output[-len(wanted) :] if ctx.ahead else (*tensors, numbers)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    """Of the first tensors; all else is constant."""
    grad_output = gradients[0]
    if ctx.ahead:
        found = ctx.saved_tensors
    else:
        *tensors, numbers = ctx.saved_tensors
        found = _differentiate(ctx.key, tensors, numbers, grad_output)
    results: list[Tensor | None] = [None] * ctx.count
    for k in range(ctx.leaves):
        if found[k].ndim != ABSENT:
            results[k] = found[k] * grad_output if ctx.ahead else found[k]
    return None, results, None


_run.register_autograd(_backward, setup_context=_save_for_backward)


def _tensors_of(out: LossOutput) -> list[Tensor | None]:
    """Everything that an operator returns of a loss, copied: results share no memory."""
    skipped = out._skipped
    if isinstance(skipped, int):
        skipped = torch.full((), skipped, dtype=torch.int64, device=out.loss.device)
    values = [out.loss, *(getattr(out, name) for name in (*SHAPED, *MARKS)), skipped]
    values += [getattr(out._tokens, name) for name in VECTORS]
    return [None if value is None else value.detach().clone() for value in values]


def _mark_absent(tensors: list[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors, with an empty one of `ABSENT` dimensions for None."""
    return [like.new_empty((0,) * ABSENT) if tensor is None else tensor for tensor in tensors]
