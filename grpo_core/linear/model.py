"""A model whose own forward ends in the loss: logits are made in the head, chunk by chunk.

    with_fused_head(model)
    out = model(input_ids=ids, attention_mask=mask, request=LossRequest(target, rewards=rewards))

The model and its head change their class for a subclass, as under FSDP2: the model's forward keeps
the request for its thread while it runs, and the head's answers it. So hooks fire as usual,
DistributedDataParallel, FSDP, ZeRO and PEFT need nothing, and a copy of the model, pickled or not,
has a fused head as well. Without a request, nothing is different.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo_core.linear.model_probe import Around, Probe
from grpo_core.linear.requests import Call, HeadOutput, Request

Model = TypeVar("Model", bound=nn.Module)
# tokens of the probe
PROBED = 4
# `call`: the request that the forward of this thread is to answer; torch.compile can trace this,
# but no ContextVar
_PENDING = threading.local()


def with_fused_head(model: Model, *, vocabulary: int | None = None) -> Model:
    """Gives a causal language model's forward the argument `request`; returns the same model.

    Puts a few tokens through the model once, to see that its logits are what will be computed here.
    Before or after `fully_shard`, `DistributedDataParallel` (of the module inside), a PEFT adapter
    of the backbone; after an adapter of the head itself.

    Args:
        model: of transformers, or PEFT's around one; on every rank alike.
        vocabulary: V, the true number of words where the matrix has more rows; None means what the
            model's logits show.

    Raises:
        ValueError: a model whose logits are more than cap(scale · lm_head(hidden)), or that has a
            fused head already.
    """
    inner: Any = _inner(model)
    module = _output_embedding(model)
    if has_fused_head(model):
        raise ValueError("model: expected one without a fused head; see without_fused_head")
    with ExitStack() as undo:
        undo.callback(_restore, inner, module)
        _fuse(module, _head_forward)
        _fuse(inner, _model_forward)
        inner.__dict__["fused_head"] = Around()
        around = _probed(model)
        undo.pop_all()
    if vocabulary is not None:
        around = around._replace(vocabulary=vocabulary)
    inner.__dict__["fused_head"] = around
    return model


def without_fused_head(model: Model) -> Model:
    """Undoes `with_fused_head`; returns the same model."""
    inner = _inner(model)
    if "fused_head" not in inner.__dict__:
        raise ValueError("model: expected one with a fused head")
    _restore(inner, _output_embedding(model))
    return model


def has_fused_head(model: nn.Module) -> bool:
    """Whether a request may be made of the model."""
    module = _output_embedding(model)
    return "fused_head" in _inner(model).__dict__ and isinstance(module, _Fused)


def _model_forward(plain: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, or what comes of its head's answer to a request."""
    request = kwargs.pop("request", None)
    if request is None:
        return plain(*args, **kwargs)
    if not isinstance(request, (Request, Probe)):
        got = type(request).__name__
        raise TypeError(f"request: expected a LossRequest or a LogpRequest, got {got}")
    around, module = self.__dict__.get("fused_head"), _output_embedding(self)
    if around is None:
        raise ValueError("model: expected one with a fused head, see with_fused_head")
    if not isinstance(module, _Fused):
        raise ValueError(
            "model: expected the head that with_fused_head has seen, got another one; use it after "
            "adapters of the head"
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels: expected None with a request, whose target they are")
    before = getattr(_PENDING, "call", None)
    call = _PENDING.call = Call(request, module, around)
    try:
        outputs = plain(*args, **kwargs)
    finally:
        _PENDING.call = before
    if isinstance(request, Probe):
        return outputs
    if call.found is None:
        raise ValueError("model: expected a forward that calls its get_output_embeddings()")
    if getattr(outputs, "aux_loss", None) is not None:
        raise ValueError("model: expected no loss of its own (output_router_logits), got aux_loss")
    return call.found


def _head_forward(plain: Callable, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The head's logits, or a stand-in for them while a request for it waits."""
    call = getattr(_PENDING, "call", None)
    if call is None or call.module is not self or not call.waits:
        return plain(hidden, *args, **kwargs)
    return call.answer(hidden, plain)


def _probed(model: Any) -> Around:
    """What the model does to a few tokens' logits; leaves random generators as they were."""
    probe, device = Probe(model.config), next(model.parameters()).device
    ids = torch.arange(PROBED, device=device)[None]
    devices = [device] if device.type == "cuda" else []
    # what a probe finds are numbers, which no graph has
    with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        outputs = model(input_ids=ids, use_cache=False, request=probe)
    return probe.around(outputs.logits)


def _inner(model: Any) -> nn.Module:
    """The model of transformers itself, which an adapter's or a compiled one calls."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _output_embedding(model: Any) -> nn.Module:
    """The module that makes logits."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"model: expected get_output_embeddings() of {type(model).__name__}")
    return module


class _Fused(nn.Module):
    """Base of the classes that `_fused_class` makes.

    Attributes:
        plain_class: what the module was of.
        intercept: what its forward has become.
        outer: the same around a forward of the module's own, `forward_before`.
    """

    plain_class: type[nn.Module]
    intercept: Callable
    outer: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs, request = super().__call__(*args, **kwargs), kwargs.get("request")
        if request is None or isinstance(outputs, HeadOutput) or isinstance(request, Probe):
            return outputs
        raise ValueError(
            "model: expected the forward of with_fused_head, which answers requests, got one "
            "replaced since"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced, kind = super().__reduce_ex__(protocol), type(self)
        # where fully_shard has made another class of it, its rules hold
        if "plain_class" not in vars(kind):
            return reduced
        return _blank, (kind.plain_class, kind.intercept), *reduced[2:]


def _blank(plain_class: Any, intercept: Callable) -> nn.Module:
    """What a copy's state is put into."""
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
    # accelerate unwraps a forward down to where there is no __wrapped__
    outer.__wrapped__ = forward  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    members = {name: getattr(plain_class, name) for name in ("__module__", "__qualname__")}
    members |= {"plain_class": plain_class, "intercept": staticmethod(intercept)}
    members |= {"forward": forward, "outer": outer}
    return type(plain_class.__name__, (_Fused, plain_class), members)


def _fuse(module: Any, intercept: Callable) -> None:
    """Changes the class of a module, whose own forward, if it has one, is wrapped."""
    kind: Any = type(module)
    if not issubclass(kind, _Fused):
        module.__class__ = kind = _fused_class(kind, intercept)
    own = module.__dict__.get("forward")
    if own is not None and not _is_ours(own, module):
        module.__dict__["forward_before"] = own
        module.__dict__["forward"] = MethodType(kind.outer, module)


def _restore(*modules: Any) -> None:
    """Undoes `_fuse`; a class or a forward that has been wrapped since passes everything on."""
    for module in modules:
        module.__dict__.pop("fused_head", None)
        own = module.__dict__.get("forward")
        if _is_ours(own, module):
            del module.__dict__["forward"]
            before = module.__dict__.pop("forward_before", None)
            if own.__func__ is type(module).outer:
                module.__dict__["forward"] = before
        if "plain_class" in vars(type(module)):
            module.__class__ = type(module).plain_class


def _is_ours(own: Any, module: Any) -> bool:
    """Whether a module's own forward is that of its fused class."""
    kind, function = type(module), getattr(own, "__func__", None)
    return isinstance(module, _Fused) and function in (kind.forward, kind.outer)
