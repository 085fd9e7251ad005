"""A model whose own forward ends in the loss: logits are made in the head, chunk by chunk.

    with_fused_head(model)
    out = model(input_ids=ids, attention_mask=mask, request=LossRequest(target, rewards=rewards))

The request waits beside the model while its forward runs; where that calls its output matrix, the
loss is made there. So hooks fire as ever: DistributedDataParallel, FSDP, ZeRO and PEFT need
nothing. Without a request, nothing is different. What goes in and out past those hooks is opaque to
them, for mixed precision rounds every float that it finds in a tuple, a dict or a dataclass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from grpo_core.fused_loss import LossOutput, TokenLogp
from grpo_core.head_reading import Around, Probe, read_head
from grpo_core.linear_loss import fused_linear_loss, linear_token_logp

Model = TypeVar("Model", bound=nn.Module)
# tokens of the probe
PROBED = 4


class Sealed:
    """Keeps what it holds from being looked through."""

    __slots__ = ("content",)

    def __init__(self, content: LossOutput | TokenLogp) -> None:
        self.content = content


class HeadOutput(NamedTuple):
    """What a request gives: `LossOutput`, or `TokenLogp`, behind a loss that wrappers can see.

    Attributes:
        loss: 0-dim float32, differentiable; None where only log-probabilities were asked for.
    """

    loss: Tensor | None
    sealed: Sealed

    @property
    def logp(self) -> Tensor:
        """log π(target), nats, shaped like target, float32, detached; so are the others."""
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
        """What the surrogate was multiplied by."""
        return self._of_loss.factor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Figures of this call, see `metrics.METRICS`."""
        return self._of_loss.metrics

    @property
    def _of_loss(self) -> LossOutput:
        if isinstance(self.sealed.content, TokenLogp):
            raise AttributeError("expected the answer to a LossRequest, got a LogpRequest's")
        return self.sealed.content


class _Request:
    """A target, and the arguments of a function that is to be called where the head is.

    Args:
        target: [B, T], the words that the hidden states predict: `input_ids` shifted by one and
            padded with -100; or [N] with `rows`.
        rows: [B, T] bool, N of them true: the hidden states that become packed rows [N, D], in
            their order; the arguments are then those of packed rows.
        arguments: of the function.

    Raises:
        TypeError: an argument that the function does not have.
    """

    __slots__ = ("arguments", "rows", "target")

    def __init__(self, target: Tensor, *, rows: Tensor | None = None, **arguments: Any) -> None:
        inspect.signature(self._function).bind(None, None, target, **arguments)
        self.target, self.rows, self.arguments = target, rows, arguments

    @staticmethod
    def _function(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def of(self, hidden: Tensor, module: nn.Module, around: Around) -> Any:
        """What the function makes of the hidden states [B, T, D] and the module's head."""
        if self.rows is not None:
            if self.rows.dtype != torch.bool or self.rows.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"rows: expected bool of shape {list(hidden.shape[:-1])}, got "
                    f"{self.rows.dtype} of shape {list(self.rows.shape)}"
                )
            hidden = hidden[self.rows]
        return self._function(hidden, read_head(module, around), self.target, **self.arguments)


class LossRequest(_Request):
    """Asks a model with a fused head for its loss; arguments of `fused_linear_loss`."""

    __slots__ = ()
    _function = staticmethod(fused_linear_loss)


class LogpRequest(_Request):
    """Asks for log-probabilities and entropies alone; arguments of `linear_token_logp`."""

    __slots__ = ()
    _function = staticmethod(linear_token_logp)


class FusedLinearLossHead:
    """The place where a model's forward and its head meet during a call.

    Attributes:
        module: the output embedding.
        around: what the model does to its logits.
        waiting: what the head is to do instead of logits.
        found: what came of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.around = Around()
        self.waiting: _Request | Probe | None = None
        self.found: HeadOutput | None = None

    def __call__(self, hidden: Tensor, plain: Callable[..., Tensor]) -> Tensor:
        """What the head's forward returns; its wrappers see no more than a number."""
        waiting, self.waiting = self.waiting, None
        if isinstance(waiting, Probe):
            return waiting.answer(hidden, self.module, plain(hidden))
        assert waiting is not None
        content = waiting.of(hidden, self.module, self.around)
        if isinstance(content, TokenLogp):
            self.found = HeadOutput(None, Sealed(content))
            return content.logp.new_zeros(1, 1, 1)
        # hooks on what is returned are to fire when the loss is differentiated
        seen = content.loss.reshape(1, 1, 1).clone()
        content = replace(content, loss=seen.sum())
        self.found = HeadOutput(content.loss, Sealed(content))
        return seen


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
    module: Any = _output_embedding(model)
    if hasattr(module, "fused_head"):
        raise ValueError("model: expected one without a fused head; see without_fused_head")
    head = FusedLinearLossHead(module)
    module.__dict__["fused_head"] = head
    _replace_forward(module, _head_forward)
    _replace_forward(model, _model_forward)
    try:
        head.around = _probed(model)
        if vocabulary is not None:
            head.around = head.around._replace(vocabulary=vocabulary)
    except BaseException:
        without_fused_head(model)
        raise
    return model


def without_fused_head(model: Model) -> Model:
    """Undoes `with_fused_head`; returns the same model."""
    module: Any = _output_embedding(model)
    if not hasattr(module, "fused_head"):
        raise ValueError("model: expected one with a fused head")
    _restore_forward(model, _model_forward)
    _restore_forward(module, _head_forward)
    del module.__dict__["fused_head"]
    return model


def has_fused_head(model: nn.Module) -> bool:
    """Whether a request may be made of the model."""
    return hasattr(_output_embedding(model), "fused_head")


def _model_forward(plain: Callable, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, or what comes of its head's answer to a request."""
    request = kwargs.pop("request", None)
    if request is None:
        return plain(*args, **kwargs)
    head: FusedLinearLossHead | None = getattr(_output_embedding(self), "fused_head", None)
    if head is None:
        raise ValueError(
            "model: expected the head that with_fused_head has seen, got another one; use it after "
            "adapters of the head"
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels: expected None with a request, whose target they are")
    head.waiting, head.found = request, None
    try:
        outputs, found = plain(*args, **kwargs), head.found
    finally:
        head.waiting = head.found = None
    if isinstance(request, Probe):
        return outputs
    if found is None:
        raise ValueError("model: expected a forward that calls its get_output_embeddings()")
    if getattr(outputs, "aux_loss", None) is not None:
        raise ValueError("model: expected no loss of its own (output_router_logits), got aux_loss")
    return found


def _head_forward(plain: Callable, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The head's logits, or a stand-in for them while a request waits."""
    if self.fused_head.waiting is None:
        return plain(hidden, *args, **kwargs)
    return self.fused_head(hidden, plain)


def _probed(model: Any) -> Around:
    """What the model does to a few tokens' logits; leaves random generators as they were."""
    probe, device = Probe(model.config), next(model.parameters()).device
    ids = torch.arange(PROBED, device=device)[None]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        outputs = model(input_ids=ids, use_cache=False, request=probe)
    return probe.around(outputs.logits)


def _output_embedding(model: Any) -> nn.Module:
    """The module that makes logits."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"model: expected get_output_embeddings() of {type(model).__name__}")
    return module


def _replace_forward(module: nn.Module, forward: Callable) -> None:
    """Makes `forward(plain, module, ...)` the forward of one module, whose copies get their own."""
    before = module.__dict__.get("forward")

    @functools.wraps(type(module).forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        earlier = self.__dict__["forward_before"]
        plain = earlier or MethodType(type(self).forward, self)
        return forward(plain, self, *args, **kwargs)

    replaced.replaces = forward  # type: ignore[attr-defined]
    module.__dict__["forward_before"] = before
    module.__dict__["forward"] = MethodType(replaced, module)


def _restore_forward(module: nn.Module, forward: Callable) -> None:
    """Undoes `_replace_forward`.

    Raises:
        ValueError: something else has replaced it since.
    """
    if getattr(module.__dict__["forward"], "replaces", None) is not forward:
        raise ValueError("model: expected the forward of with_fused_head, got one replaced since")
    before = module.__dict__.pop("forward_before")
    del module.__dict__["forward"]
    if before is not None:
        module.__dict__["forward"] = before
