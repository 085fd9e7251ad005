"""What a model with a fused head is asked, and what it answers.

Both pass the hooks of wrappers, whose mixed precision rounds every float that it finds in a tuple,
a dict or a dataclass. So requests, and all of an answer but its loss, are opaque to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_core.linear.loss import fused_linear_loss, linear_token_logp
from grpo_core.linear.model_probe import Around, Probe, read_head
from grpo_core.loss.fused_loss import LossOutput, TokenLogp
from grpo_core.objective.validation import check_tensor


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


class Request:
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
        if not torch.compiler.is_compiling():
            inspect.signature(self._function).bind(None, None, target, **arguments)
        self.target, self.rows, self.arguments = target, rows, arguments

    @staticmethod
    def _function(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def of(self, hidden: Tensor, module: nn.Module, around: Around) -> Any:
        """What the function makes of the hidden states [B, T, D] and the module's head."""
        if self.rows is not None:
            check_tensor("rows", self.rows)
            if self.rows.dtype != torch.bool or self.rows.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"rows: expected bool of shape {list(hidden.shape[:-1])}, got "
                    f"{self.rows.dtype} of shape {list(self.rows.shape)}"
                )
            hidden = hidden[self.rows]
        return self._function(hidden, read_head(module, around), self.target, **self.arguments)


class LossRequest(Request):
    """Asks a model with a fused head for its loss; arguments of `fused_linear_loss`."""

    __slots__ = ()
    _function = staticmethod(fused_linear_loss)


class LogpRequest(Request):
    """Asks for log-probabilities and entropies alone; arguments of `linear_token_logp`."""

    __slots__ = ()
    _function = staticmethod(linear_token_logp)


class Call:
    """A request during a model's forward, and its answer.

    Args:
        request: what the head is to do instead of logits.
        module: the output embedding.
        around: what the model does to its logits.
    """

    def __init__(self, request: Request | Probe, module: nn.Module, around: Around) -> None:
        self.request, self.module, self.around = request, module, around
        self.waits = True
        self.found: HeadOutput | None = None

    def answer(self, hidden: Tensor, plain: Callable[..., Tensor]) -> Tensor:
        """What the head's forward returns; its wrappers see no more than a number."""
        self.waits = False
        if isinstance(self.request, Probe):
            return self.request.answer(hidden, self.module, plain(hidden))
        content = self.request.of(hidden, self.module, self.around)
        if isinstance(content, TokenLogp):
            self.found = HeadOutput(None, Sealed(content))
            return content.logp.new_zeros(1, 1, 1)
        # hooks on what is returned are to fire when the loss is differentiated
        seen = content.loss.reshape(1, 1, 1).clone()
        content = replace(content, loss=seen.sum())
        self.found = HeadOutput(content.loss, Sealed(content))
        return seen
