"""The contenders: ways to compute the same policy-gradient loss from logits.

All minimise DAPO's objective (clip 0.2 below, 0.28 above, mean over tokens), or GSPO's (the ratio
of whole sequences), over packed rows. Ours return each token's log-probability and entropy as well;
the entropy costs plain PyTorch three further passes: `naive` is the loss people have,
`naive+entropy` what they log beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from bench import peers
from bench.batch import Batch, Direction, Loss, Outcome, Recipe, Terms
from grpo_core import fused_loss
from grpo_core.backends import Backend

# where contenders run: "interpreter" counts what "cuda" would launch
Machine = Literal["cpu", "cuda", "interpreter"]


def naive(logits: Tensor, batch: Batch, recipe: Recipe, *, with_entropy: bool = False) -> Terms:
    """The loss by float32 upcast, log_softmax and gather; autograd finds the gradient."""
    log_softmax = torch.log_softmax(logits.float(), dim=-1)
    logp = log_softmax.gather(1, batch.word[:, None]).squeeze(1)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(1)
    return peers.policy_loss(logp, batch, recipe), logp, entropy


def ours(
    logits: Tensor,
    batch: Batch,
    recipe: Recipe,
    *,
    backend: Backend,
    inplace: bool = False,
    validate: bool | None = None,
) -> Terms:
    """The loss by `fused_loss`."""
    out = fused_loss(
        logits,
        batch.target,
        objective=recipe,
        advantage=batch.advantage,
        old_logp=batch.old_logp,
        sequence_id=batch.sequence_id,
        inplace=inplace,
        backend=backend,
        validate=validate,
    )
    return out.loss, out.logp, out.entropy


@dataclass(frozen=True)
class Contender:
    """A named way to the loss.

    Args:
        name: as in the table.
        loss: (logits, batch, recipe) -> (loss, logp or None, entropy or None).
        compiled: goes through torch.compile, once per shape.
        inplace: overwrites the logits; differs from its twin only when there is a gradient.
        kernels: runs Triton kernels, whose traffic PyTorch does not see.
    """

    name: str
    loss: Loss
    compiled: bool = False
    inplace: bool = False
    kernels: bool = False

    def call(
        self, batch: Batch, direction: Direction, recipe: Recipe = "dapo"
    ) -> Callable[[], Outcome]:
        """The function to be timed."""
        loss = self.loss
        if self.compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)
        run = _forward if direction == "forward" else _forward_backward
        return partial(run, loss, batch, recipe)


def _forward(loss: Loss, batch: Batch, recipe: Recipe) -> Outcome:
    """Loss without a gradient."""
    with torch.no_grad():
        return Outcome(*loss(batch.logits, batch, recipe), None)


def _forward_backward(loss: Loss, batch: Batch, recipe: Recipe) -> Outcome:
    """Loss and gradient of the logits."""
    logits = batch.logits.detach().requires_grad_()
    value, logp, entropy = loss(logits, batch, recipe)
    (dlogits,) = torch.autograd.grad(value, logits)
    return Outcome(value.detach(), None if logp is None else logp.detach(), entropy, dlogits)


def contenders(machine: Machine, direction: Direction) -> list[Contender]:
    """Everything this machine can run; interpreted Triton can be counted and not timed."""
    found = [
        Contender("naive", naive),
        Contender("naive+entropy", partial(naive, with_entropy=True)),
        Contender("compiled", naive, compiled=True),
    ]
    kernels = machine != "cpu" and find_spec("triton") is not None
    if kernels and find_spec("liger_kernel"):
        for inplace in (False, True):
            loss = partial(peers.liger, inplace=inplace)
            name = "liger" + "-inplace" * inplace
            found.append(Contender(name, loss, inplace=inplace, kernels=True))
    if kernels and find_spec("trl"):
        found.append(Contender("trl", peers.trl, kernels=True))
    # on a GPU no values are looked at, so neither are they where one is imitated
    validate = False if machine == "interpreter" else None
    backends: list[Backend] = ["torch", "triton"] if kernels else ["torch"]
    for backend in backends:
        for inplace in (False, True):
            name = f"ours-{backend}" + "-inplace" * inplace
            loss = partial(ours, backend=backend, inplace=inplace, validate=validate)
            found.append(Contender(name, loss, inplace=inplace, kernels=backend == "triton"))
    return [one for one in found if direction != "forward" or not one.inplace]
