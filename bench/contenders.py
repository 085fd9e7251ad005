"""The contenders: ways to the same policy-gradient loss from logits or from hidden states.

All minimise DAPO's objective (clip 0.2 below, 0.28 above, mean over tokens) or GSPO's (the ratio of
whole sequences). Each library is called as its users call it, in the layout that it asks for, at
temperature 1. Ours returns each token's log-probability and entropy as well; the entropy costs
plain PyTorch three further passes: `naive` is the loss alone, `naive+entropy` adds the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.batch import LOGP, MASKED, TRAINED, Batch, Case, Outcome, Recipe, Terms
from grpo_core import RECIPES, fused_linear_loss, fused_loss, linear_token_logp

# where contenders run: "interpreter" counts what "cuda" would launch
Machine = Literal["cpu", "cuda", "interpreter"]
# package -> the contender that needs it
PACKAGES = {"liger_kernel": "liger", "trl": "trl"}
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing_peers() -> list[str]:
    """Contenders that are absent, with the package that would bring them."""
    return [f"{name} (no {of})" for of, name in PACKAGES.items() if not find_spec(of)]


def policy_loss(logp: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The loss from log-probabilities, in the operations of TRL's GRPOTrainer._compute_loss."""
    eps_low, eps_high, _ = RECIPES[recipe].surrogate.args
    shape = (batch.B, batch.T)
    mask, advantage = batch.mask.view(shape), batch.advantage.view(shape)[:, :1]
    log_ratio = (logp.float() - batch.old_logp).view(shape)
    if recipe == "gspo":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -(ratio * advantage).minimum(clipped * advantage)
    if recipe == "gspo":
        return ((loss * mask).sum(-1) / mask.sum(-1)).mean()
    return (loss * mask).sum() / batch.scored


def naive(
    logits: Tensor, batch: Batch, recipe: Recipe, *, with_entropy: bool = False, upcast: bool = True
) -> Terms:
    """The loss by log_softmax (in float32) and gather; autograd finds the gradient."""
    log_softmax = torch.log_softmax(logits.float() if upcast else logits, dim=-1)
    logp = log_softmax.gather(1, batch.token[:, None]).squeeze(1)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(1)
    return policy_loss(logp, batch, recipe), logp, entropy


def liger(logits: Tensor, batch: Batch, recipe: Recipe, *, inplace: bool = False) -> Terms:
    """Liger's Triton GRPO loss; it returns neither logp nor entropy."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    eps_low, eps_high, _ = RECIPES[recipe].surrogate.args
    target, old_logp, mask, advantage = batch.padded
    loss, _ = triton_grpo_loss(
        logits.view(batch.B, batch.T, -1),
        old_logp,
        None,
        target,
        advantage,
        completion_mask=mask,
        temperature=1.0,
        beta=0.0,
        eps_low=eps_low,
        eps_high=eps_high,
        inplace=inplace,
        loss_type="dapo" if recipe == "dapo" else "grpo",
        importance_sampling_level="token" if recipe == "dapo" else "sequence",
        reduce=True,
    )
    return loss, None, None


def trl(logits: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """TRL's kernel for log-probability and entropy, then its loss in PyTorch."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logp, entropy = selective_log_softmax_and_entropy(logits, batch.target, 1.0, batch.valid)
    return policy_loss(logp, batch, recipe), logp, entropy.detach()


def arguments(batch: Batch, recipe: Recipe) -> dict[str, Any]:
    """Those of both of our losses but the rows and the target."""
    return {
        "objective": recipe,
        "advantage": batch.advantage,
        "old_logp": batch.old_logp,
        "sequence_id": batch.sequence_id,
    }


def ours(logits: Tensor, batch: Batch, recipe: Recipe, **options: Any) -> Terms:
    """The loss by `fused_loss`."""
    out = fused_loss(logits, batch.target, **arguments(batch, recipe), **options)
    return out.loss, out.logp, out.entropy


def hidden_naive(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """All logits, then `naive`."""
    return naive(hidden @ lm_head.t(), batch, recipe)


def hidden_liger(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """Liger's fused head; compiled, as its default is, on a GPU only."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    eps_low, eps_high, _ = RECIPES[recipe].surrogate.args
    target, old_logp, mask, advantage = batch.padded
    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        loss_type="dapo",
    )
    hidden = hidden.view(batch.B, batch.T, -1)[:, :-1]
    loss, _ = module(hidden, lm_head, target, mask, advantage, old_per_token_logps=old_logp)
    return loss, None, None


def hidden_trl(
    hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe, *, chunk: int | None = None
) -> Terms:
    """TRL's head for log-probability and entropy, of the rows that count, then its loss."""
    from trl.trainer import utils

    size, token = chunk or utils._CHUNKED_LOGPROB_CHUNK_SIZE, batch.token[batch.valid]
    rows = hidden if batch.scored == len(hidden) else hidden[batch.valid]
    logp, entropy, *_ = (
        found.new_zeros(len(hidden)).masked_scatter(batch.valid, found)
        for found in utils._ChunkedLogProbFunction.apply(
            rows, lm_head, None, token, 1.0, size, None, 1.0, ("entropy",)
        )[:2]
    )
    return policy_loss(logp, batch, recipe), logp, entropy.detach()


def hidden_torch(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """torch's chunked cross entropy, a value per token, then the loss in PyTorch."""
    options = torch.nn.LinearCrossEntropyOptions()
    target = batch.token.masked_fill(~batch.valid, MASKED)
    found = F.linear_cross_entropy(hidden, lm_head, target, reduction="none", options=options)
    return policy_loss(-found, batch, recipe), -found, None


def hidden_ours(
    hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe, **options: Any
) -> Terms:
    """The loss by `fused_linear_loss`; log-probabilities alone where no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None, linear_token_logp(hidden, lm_head, batch.target).logp, None
    out = fused_linear_loss(hidden, lm_head, batch.target, **arguments(batch, recipe), **options)
    return out.loss, out.logp, None


@dataclass(frozen=True)
class Contender:
    """A named way to the loss.

    Attributes:
        name: as in the table.
        loss: (*inputs, batch, recipe) -> (loss, logp or None, entropy or None).
        compiled: goes through torch.compile, once per shape.
        kernels: runs compiled kernels, whose traffic PyTorch does not see.
        dtypes: those in which it is right.
    """

    name: str
    loss: Callable[..., Terms]
    compiled: bool = False
    kernels: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES

    def call(self, batch: Batch, case: Case) -> Callable[[], Outcome]:
        """The function to be timed: terms, and the gradients that a case asks for."""
        loss = self.loss
        if self.compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)

        def run() -> Outcome:
            inputs = [
                tensor.detach().requires_grad_(nth < case.gradients)
                for nth, tensor in enumerate(batch.inputs)
            ]
            with torch.set_grad_enabled(case.gradients > 0):
                terms = loss(*inputs, batch, case.recipe)
            leaves = inputs[: case.gradients]
            gradients = torch.autograd.grad(terms[0], leaves) if leaves else ()
            return Outcome(*(None if one is None else one.detach() for one in terms), gradients)

        return run


def contenders(machine: Machine, case: Case) -> list[Contender]:
    """Everything this machine can run; interpreted Triton can be counted and not timed."""
    if case.from_hidden:
        return _from_hidden(case)
    found = [
        Contender("naive", naive),
        Contender("naive+entropy", partial(naive, with_entropy=True)),
        Contender("compiled", naive, compiled=True),
    ]
    triton = machine != "cpu" and find_spec("triton") is not None
    options: dict[str, Any] = {}
    if machine == "interpreter":
        # on a GPU no values are checked, and so not where one is imitated
        options = {"validate": False, "backend": "triton"}
    kernels = {"ours-triton" if triton else "ours-cpu": partial(ours, **options)}
    if triton and find_spec("trl"):
        kernels = {"trl": trl, **kernels}
    if triton and find_spec("liger_kernel"):
        kernels = {"liger": liger, **kernels}
    for name, loss in kernels.items():
        found.append(Contender(name, loss, kernels=True))
        # the two differ only where there is a gradient
        if case.gradients and name != "trl":
            inplace = partial(loss, inplace=True)
            found.append(Contender(f"{name}-inplace", inplace, kernels=True))
    return found


def _from_hidden(case: Case) -> list[Contender]:
    found = [Contender("naive", hidden_naive)]
    # since torch 2.13; float32 only: in bfloat16 its gradients are off by 4 to 10 % of their norm
    if hasattr(F, "linear_cross_entropy"):
        found.append(Contender("torch", hidden_torch, dtypes=(torch.float32,)))
    if find_spec("liger_kernel") and case != LOGP:
        found.append(Contender("liger", hidden_liger))
    if find_spec("trl"):
        found.append(Contender("trl", hidden_trl))
    if case != TRAINED:
        return [*found, Contender("ours", hidden_ours)]
    plans = ("fast", "lean")
    return found + [Contender(f"ours-{plan}", partial(hidden_ours, plan=plan)) for plan in plans]
