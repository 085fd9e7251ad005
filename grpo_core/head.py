"""A model whose own forward ends in the loss: logits are made in the head, chunk by chunk.

    with_fused_head(model)
    out = model(input_ids=ids, attention_mask=mask, request=LossRequest(target, rewards=rewards))

The request waits beside the model while its forward runs; where that calls its output matrix, the
loss is made there. So hooks fire as ever: DistributedDataParallel, FSDP, ZeRO and PEFT need
nothing. Without a request, nothing is different.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo_core.fused_loss import TokenLogp
from grpo_core.head_reading import Around, Probe
from grpo_core.head_requests import HeadOutput, Request, Sealed

Model = TypeVar("Model", bound=nn.Module)
# tokens of the probe
PROBED = 4


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
        self.waiting: Request | Probe | None = None
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
    with ExitStack() as undo:
        undo.callback(without_fused_head, model)
        head.around = _probed(model)
        undo.pop_all()
    if vocabulary is not None:
        head.around = head.around._replace(vocabulary=vocabulary)
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
