"""A causal language model whose own forward computes the loss.

    with_fused_head(model)
    out = model(input_ids=ids, attention_mask=mask, request=LossRequest(target, rewards=rewards))

`with_fused_head` replaces the classes of the model and of its output embedding by subclasses, as
FSDP2 does. The model's forward stores the request per thread; the output embedding computes its
result instead of logits. Hooks run as usual, so that DistributedDataParallel, FSDP, ZeRO and PEFT
work. A copy of the model, pickled or not, has a fused head. A call without a request is unchanged.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from grpo_core.linear.head import LinearHead, is_distributed, local_hidden, replicate
from grpo_core.linear.logp import linear_token_logp
from grpo_core.linear.loss import fused_linear_loss
from grpo_core.linear.model_head import HeadOptions, probe_options, read_head
from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.validation import check_tensor

Model = TypeVar("Model", bound=nn.Module)
# `call`: the pending request of this thread's forward; torch.compile can trace this, but no
# ContextVar
_PENDING = threading.local()


class Sealed:
    """Hides its content from wrappers: mixed precision rounds all floats in tuples and records."""

    def __init__(self, content: Any) -> None:
        self.content = content


class HeadOutput(NamedTuple):
    """The answer to a request: `LossOutput`, `TokenLogp` or arguments; wrappers see the loss alone.

    Attributes:
        loss: 0-dim float32, differentiable; None for a `LogpRequest`.
    """

    loss: Tensor | None
    sealed: Sealed

    # properties, because torch.compile does not trace __getattr__ of a tuple

    @property
    def logp(self) -> Tensor:
        """log π(target), nats, shaped like target, float32, detached like all that follow."""
        return self.sealed.content.logp

    @property
    def entropy(self) -> Tensor:
        """Of the distribution at the request's temperature, nats."""
        return self.sealed.content.entropy

    @property
    def ratio(self) -> Tensor:
        """π / π_old."""
        return self._of_loss.ratio

    @property
    def kl(self) -> Tensor:
        """The objective's estimate of KL(π ‖ π_ref), nats."""
        return self._of_loss.kl

    @property
    def factor(self) -> Tensor:
        """The factor of the surrogate."""
        return self._of_loss.factor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Figures of this call, see `metrics.METRICS`."""
        return self._of_loss.metrics

    @property
    def reference(self) -> dict[str, Any]:
        """Arguments of a `LossRequest`, the answer to a `ReferenceRequest`."""
        return dict(self.sealed.content)

    @property
    def _of_loss(self) -> LossOutput:
        if not isinstance(self.sealed.content, LossOutput):
            raise AttributeError(
                "expected the answer to a LossRequest, got a LogpRequest's or a ReferenceRequest's"
            )
        return self.sealed.content


class Request:
    """A target, and the other arguments of a function of hidden states, head and target.

    Args:
        target: [B, T], the tokens that the hidden states predict: `input_ids` shifted by one and
            padded with -100; or [N] with `rows`.
        rows: [B, T] bool, N of them true: these hidden states become packed rows [N, D], in order;
            the arguments are then those of packed rows.
        arguments: of the function.

    Raises:
        TypeError: an argument that the function does not have.
    """

    def __init__(self, target: Tensor, *, rows: Tensor | None = None, **arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            inspect.signature(self._function).bind(None, None, target, **arguments)
        self.target, self.rows, self.arguments = target, rows, arguments

    @staticmethod
    def _function(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def of(self, hidden: Tensor, module: nn.Module, options: HeadOptions) -> Any:
        """The function's result for hidden states [B, T, D] and the module's head."""
        sharded = is_distributed(hidden)
        hidden = local_hidden(hidden, self.arguments.get("reduce_dhidden", True))
        if self.rows is not None:
            check_tensor("rows", self.rows)
            if self.rows.dtype != torch.bool or self.rows.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"rows: expected bool of shape {list(hidden.shape[:-1])}, got "
                    f"{self.rows.dtype} of shape {list(self.rows.shape)}"
                )
            hidden = hidden[self.rows]
        head = read_head(module, options, sharded=sharded)
        return self._function(hidden, head, self.target, **self.arguments)


class LossRequest(Request):
    """Asks a model with a fused head for its loss; arguments of `fused_linear_loss`."""

    _function = staticmethod(fused_linear_loss)


class LogpRequest(Request):
    """Asks for log-probabilities and entropies alone; arguments of `linear_token_logp`."""

    _function = staticmethod(linear_token_logp)


class ReferenceRequest(Request):
    """Asks a reference model, such as a teacher, for hidden states and head for a `LossRequest`.

    `output.reference` is {"ref_hidden": hidden states, "ref_lm_head": head}; no logits are made.
    The head's tensors are the model's: those of a sharded one must stay gathered for the loss.
    """

    def __init__(self, *, rows: Tensor | None = None) -> None:
        super().__init__(torch.empty(0), rows=rows)

    @staticmethod
    def _function(hidden: Tensor, lm_head: LinearHead, no_target: Tensor) -> dict[str, Any]:
        return {"ref_hidden": hidden.detach(), "ref_lm_head": lm_head}


class PendingRequest:
    """A request during a model's forward, to be answered by `module`, the output embedding."""

    def __init__(self, request: Request, module: nn.Module, options: HeadOptions) -> None:
        self.request, self.module, self.options = request, module, options
        self.output: HeadOutput | None = None

    def answer(self, hidden: Tensor) -> Tensor:
        """Computes `output`; returns a small tensor in place of logits."""
        content = self.request.of(hidden, self.module, self.options)
        if not isinstance(content, LossOutput):
            self.output = HeadOutput(None, Sealed(content))
            return replicate(torch.zeros(1, 1, 1, device=hidden.device), hidden)
        # part of the graph, so that hooks on the output run in the backward
        seen = content.loss.reshape(1, 1, 1).clone()
        content = replace(content, loss=seen.sum())
        self.output = HeadOutput(content.loss, Sealed(content))
        return replicate(seen, hidden)


def with_fused_head(model: Model, *, vocabulary: int | None = None) -> Model:
    """Gives a causal language model's forward the argument `request`; returns the same model.

    Runs a few tokens through the model once, to check that its logits are those of `LinearHead`.
    Call it before or after `fully_shard`, `DistributedDataParallel` (of the module inside) and a
    PEFT adapter of the backbone, but after an adapter of the head itself.

    Args:
        model: of transformers, or PEFT's around one; on every rank alike.
        vocabulary: V, if the matrix has more rows; None means the size of the model's logits.

    Raises:
        ValueError: a model whose logits are not cap(scale · lm_head(hidden)), or that has a fused
            head already.
    """
    inner: Any = _inner(model)
    module = _output_embedding(model)
    if has_fused_head(model):
        raise ValueError("model: expected one without a fused head; see without_fused_head")
    options = probe_options(model, module)
    if vocabulary is not None:
        options = options._replace(vocabulary=vocabulary)
    _fuse(module, _head_forward)
    _fuse(inner, _model_forward)
    inner.__dict__["fused_head"] = options
    return model


def without_fused_head(model: Model) -> Model:
    """Undoes `with_fused_head`; returns the same model."""
    inner = _inner(model)
    if "fused_head" not in inner.__dict__:
        raise ValueError("model: expected one with a fused head")
    del inner.__dict__["fused_head"]
    for module in (inner, _output_embedding(model)):
        _restore(module)
    return model


def has_fused_head(model: nn.Module) -> bool:
    """Whether the model accepts requests."""
    module = _output_embedding(model)
    return "fused_head" in _inner(model).__dict__ and isinstance(module, _Fused)


def _model_forward(plain: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward; with a request, the result of its head."""
    request = kwargs.pop("request", None)
    if request is None:
        return plain(*args, **kwargs)
    if not isinstance(request, Request):
        got = type(request).__name__
        raise TypeError(f"request: expected a LossRequest or a LogpRequest, got {got}")
    options, module = self.__dict__.get("fused_head"), _output_embedding(self)
    if options is None:
        raise ValueError("model: expected one with a fused head, see with_fused_head")
    if not isinstance(module, _Fused):
        raise ValueError(
            "model: expected the head that with_fused_head has seen, got another one; use it after "
            "adapters of the head"
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels: expected None with a request, whose target they are")
    before = getattr(_PENDING, "call", None)
    call = _PENDING.call = PendingRequest(request, module, options)
    try:
        outputs = plain(*args, **kwargs)
    finally:
        _PENDING.call = before
    if call.output is None:
        raise ValueError("model: expected a forward that calls its get_output_embeddings()")
    if getattr(outputs, "aux_loss", None) is not None:
        raise ValueError("model: expected no loss of its own (output_router_logits), got aux_loss")
    return call.output


def _head_forward(plain: Callable, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The head's logits, or a small tensor in their place while a request waits."""
    call = getattr(_PENDING, "call", None)
    if call is None or call.module is not self or call.output is not None:
        return plain(hidden, *args, **kwargs)
    return call.answer(hidden)


def _inner(model: Any) -> nn.Module:
    """The transformers model inside an adapter or a compiled model."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _output_embedding(model: Any) -> nn.Module:
    """The module that computes logits."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"model: expected get_output_embeddings() of {type(model).__name__}")
    return module


class _Fused(nn.Module):
    """Base of the classes that `_fused_class` makes.

    Attributes:
        plain_class: the original class of the module.
        intercept: the new forward, a function of the original one, the module and its arguments.
        outer: the same around a forward that was set on the instance, `forward_before`.
    """

    plain_class: type[nn.Module]
    intercept: Callable
    outer: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().__call__(*args, **kwargs)
        if kwargs.get("request") is None or isinstance(outputs, HeadOutput):
            return outputs
        raise ValueError(
            "model: expected the forward of with_fused_head, which answers requests, got one "
            "replaced since"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced, kind = super().__reduce_ex__(protocol), type(self)
        # fully_shard makes another subclass, with its own rules
        if "plain_class" not in vars(kind):
            return reduced
        return _blank, (kind.plain_class, kind.intercept), *reduced[2:]


def _blank(plain_class: Any, intercept: Callable) -> nn.Module:
    """An empty module of the fused class, for a copy."""
    kind = _fused_class(plain_class, intercept)
    return kind.__new__(kind)


@functools.lru_cache
def _fused_class(plain_class: Any, intercept: Callable) -> type[_Fused]:
    """A subclass of the same name whose forward is `intercept(plain, module, ...)`."""
    plain = plain_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return intercept(functools.partial(plain, self), self, *args, **kwargs)

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return intercept(self.__dict__["forward_before"], self, *args, **kwargs)

    for function in (forward, outer):
        functools.update_wrapper(function, plain)
        # generation reads the signature
        function.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        # a method is pickled by its name
        function.__name__ = "forward"
    # accelerate unwraps a forward as long as there is a __wrapped__
    outer.__wrapped__ = forward  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    members = {name: getattr(plain_class, name) for name in ("__module__", "__qualname__")}
    members |= {"plain_class": plain_class, "intercept": staticmethod(intercept)}
    members |= {"forward": forward, "outer": outer}
    return type(plain_class.__name__, (_Fused, plain_class), members)


def _fuse(module: Any, intercept: Callable) -> None:
    """Changes the class of a module; wraps a forward that was set on the instance."""
    kind: Any = type(module)
    if not issubclass(kind, _Fused):
        module.__class__ = kind = _fused_class(kind, intercept)
    own = module.__dict__.get("forward")
    if own is not None and not _is_ours(own, module):
        module.__dict__["forward_before"] = own
        module.__dict__["forward"] = MethodType(kind.outer, module)


def _restore(module: Any) -> None:
    """Undoes `_fuse`; a class or forward that was wrapped in the meantime stays, without effect."""
    own = module.__dict__.get("forward")
    if _is_ours(own, module):
        del module.__dict__["forward"]
        before = module.__dict__.pop("forward_before", None)
        if own.__func__ is type(module).outer:
            module.__dict__["forward"] = before
    if "plain_class" in vars(type(module)):
        module.__class__ = type(module).plain_class


def _is_ours(own: Any, module: Any) -> bool:
    """Whether the forward set on a module is that of its fused class."""
    kind, function = type(module), getattr(own, "__func__", None)
    return isinstance(module, _Fused) and function in (kind.forward, kind.outer)
