"""Other people's kernels from logits to the loss, where their packages are installed.

Each is called as its own users call it, in the layout it asks for, at temperature 1.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from bench.batch import Batch, Recipe, Terms
from grpo_core import RECIPES

# package -> the contender that needs it
PACKAGES = {"liger_kernel": "liger", "trl": "trl"}


def missing_peers() -> list[str]:
    """Contenders that are absent, with the package that would bring them."""
    return [f"{name} (no {of})" for of, name in PACKAGES.items() if not find_spec(of)]


def policy_loss(logp: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The loss from log-probabilities, in the operations of TRL's GRPOTrainer._compute_loss."""
    eps_low, eps_high, _ = RECIPES[recipe].surrogate.args
    shape = (batch.B, batch.T)
    mask, advantage = batch.mask.view(shape), batch.advantage.view(shape)[:, :1]
    log_ratio = (logp - batch.old_logp).view(shape)
    if recipe == "gspo":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -(ratio * advantage).minimum(clipped * advantage)
    if recipe == "gspo":
        return ((loss * mask).sum(-1) / mask.sum(-1)).mean()
    return (loss * mask).sum() / batch.scored


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
