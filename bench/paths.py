"""The contenders: ways to compute the same policy-gradient loss from logits, and their input.

All minimise DAPO's objective (clip 0.2 below, 0.28 above, mean over tokens) over packed rows and
return the loss and each token's log-probability. Ours return the entropy as well, which costs
plain PyTorch three further passes: `naive` is the loss people have, `naive+entropy` what they log
beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core import RECIPES, fused_loss, token_logp
from grpo_core.backends import Backend

Direction = Literal["forward", "forward + backward"]
# one row of the batch in a hundred is clipped
RATIO_SPREAD = 0.1
SEQUENCE_LENGTH = 64


def dtype_name(dtype: torch.dtype) -> str:
    """float32 rather than torch.float32."""
    return str(dtype).removeprefix("torch.")


class Batch(NamedTuple):
    """N packed tokens over V words, and what a policy update knows of each."""

    logits: Tensor  # [N, V]
    pristine: Tensor  # [N, V], the logits again, for contenders that overwrite them
    target: Tensor  # [N] int64
    old_logp: Tensor  # [N] float32, nats
    advantage: Tensor  # [N] float32
    sequence_id: Tensor  # [N] int64

    @classmethod
    def draw(cls, N: int, V: int, dtype: torch.dtype, device: str) -> Batch:
        """A batch of random logits and advantages, off policy by `RATIO_SPREAD` nats."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        logits = torch.empty(N, V, dtype=dtype, device=device)
        for row in logits:
            row.copy_(normal(V) * 2)
        target = torch.randint(V, (N,), generator=generator, device=device)
        old_logp = token_logp(logits, target).logp + RATIO_SPREAD * normal(N)
        sequence_id = torch.arange(N, device=device) // SEQUENCE_LENGTH
        return cls(logits, logits.clone(), target, old_logp, normal(N), sequence_id)


class Outcome(NamedTuple):
    """What a contender computed."""

    loss: Tensor  # 0-dim
    logp: Tensor  # [N] nats
    entropy: Tensor | None  # [N] nats; None where it is not computed
    dlogits: Tensor | None  # [N, V]; None in the forward direction


Terms = tuple[Tensor, Tensor, Tensor | None]  # loss, logp, entropy
Loss = Callable[[Tensor, Batch], Terms]


def naive(logits: Tensor, batch: Batch, *, with_entropy: bool = False) -> Terms:
    """The loss by float32 upcast, log_softmax and gather; autograd finds the gradient."""
    eps_low, eps_high, _ = RECIPES["dapo"].surrogate.args
    log_softmax = torch.log_softmax(logits.float(), dim=-1)
    logp = log_softmax.gather(1, batch.target[:, None]).squeeze(1)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(1)
    ratio = (logp - batch.old_logp).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    return loss, logp, entropy


def ours(logits: Tensor, batch: Batch, *, backend: Backend, inplace: bool = False) -> Terms:
    """The loss by `fused_loss`."""
    out = fused_loss(
        logits,
        batch.target,
        objective="dapo",
        advantage=batch.advantage,
        old_logp=batch.old_logp,
        sequence_id=batch.sequence_id,
        inplace=inplace,
        backend=backend,
    )
    return out.loss, out.logp, out.entropy


@dataclass(frozen=True)
class Contender:
    """A named way to the loss.

    Args:
        name: as in the table.
        loss: (logits, batch) -> (loss, logp, entropy or None).
        compiled: goes through torch.compile, once per shape.
        inplace: overwrites the logits; differs from its twin only when there is a gradient.
        kernels: runs our Triton kernels, whose traffic PyTorch does not see.
    """

    name: str
    loss: Loss
    compiled: bool = False
    inplace: bool = False
    kernels: bool = False

    def call(self, batch: Batch, direction: Direction) -> Callable[[], Outcome]:
        """The function to be timed."""
        loss = self.loss
        if self.compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)
        return partial(_forward if direction == "forward" else _forward_backward, loss, batch)


def _forward(loss: Loss, batch: Batch) -> Outcome:
    """Loss without a gradient."""
    with torch.no_grad():
        return Outcome(*loss(batch.logits, batch), None)


def _forward_backward(loss: Loss, batch: Batch) -> Outcome:
    """Loss and gradient of the logits."""
    logits = batch.logits.detach().requires_grad_()
    value, logp, entropy = loss(logits, batch)
    (dlogits,) = torch.autograd.grad(value, logits)
    return Outcome(value.detach(), logp.detach(), entropy, dlogits)


def contenders(device: str, direction: Direction) -> list[Contender]:
    """Everything this machine can time; interpreted Triton is no timing."""
    found = [
        Contender("naive", naive),
        Contender("naive+entropy", partial(naive, with_entropy=True)),
        Contender("compiled", naive, compiled=True),
    ]
    backends: list[Backend] = (
        ["torch", "triton"] if device == "cuda" and find_spec("triton") else ["torch"]
    )
    for backend in backends:
        for inplace in (False, True):
            name = f"ours-{backend}" + "-inplace" * inplace
            loss = partial(ours, backend=backend, inplace=inplace)
            found.append(Contender(name, loss, inplace=inplace, kernels=backend == "triton"))
    return [one for one in found if direction != "forward" or not one.inplace]
