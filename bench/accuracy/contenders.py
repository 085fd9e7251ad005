"""The contenders: the same loss of the same tokens, each as its library gives it.

All minimise DAPO's objective with advantage 1. What starts from hidden states is given the logits
as hidden states and the identity as head: that product adds no rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core import RECIPES, fused_loss
from grpo_core.backends import Backend

EPS_LOW, EPS_HIGH, _ = RECIPES["dapo"].surrogate.args


class Answer(NamedTuple):
    """What a library computes of N tokens; None where it does not say."""

    loss: Tensor  # 0-dim, with a graph to the logits
    logp: Tensor | None  # [N] nats
    entropy: Tensor | None  # [N] nats
    ratio: Tensor | None  # [N]


Loss = Callable[[Tensor, Tensor, Tensor], Answer]  # logits [N, V], target [N], old_logp [N]


def _policy(logp: Tensor, entropy: Tensor | None, old_logp: Tensor) -> Answer:
    """The loss a trainer makes of log-probabilities, in float32."""
    ratio = (logp.float() - old_logp).exp()
    loss = -torch.minimum(ratio, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)).mean()
    return Answer(loss, logp, entropy, ratio)


def eager(logits: Tensor, target: Tensor, old_logp: Tensor, *, upcast: bool) -> Answer:
    """log_softmax and gather."""
    log_softmax = torch.log_softmax(logits.float() if upcast else logits, -1)
    logp = log_softmax.gather(1, target[:, None]).squeeze(1)
    entropy = -(log_softmax.exp() * log_softmax).sum(1)
    return _policy(logp, entropy.detach(), old_logp)


def liger_triton(logits: Tensor, target: Tensor, old_logp: Tensor) -> Answer:
    """Liger's Triton GRPO loss; its log-probabilities come from a kernel of their own."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax, triton_grpo_loss

    # it wants a row more than there are tokens
    padded = torch.cat((logits, logits[-1:]))[None]
    loss, _ = triton_grpo_loss(
        padded,
        old_logp[None],
        None,
        target[None],
        torch.ones(1),
        temperature=1.0,
        beta=0.0,
        eps_low=EPS_LOW,
        eps_high=EPS_HIGH,
        inplace=False,
        loss_type="dapo",
        reduce=True,
    )
    logp = fused_selective_log_softmax(padded.detach(), target[None], 1.0)[0]
    return Answer(loss, logp, None, (logp - old_logp).exp())


def liger_chunked(logits: Tensor, target: Tensor, old_logp: Tensor) -> Answer:
    """Liger's chunked loss from hidden states, in PyTorch operations; says nothing but the loss."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=EPS_LOW,
        epsilon_high=EPS_HIGH,
        loss_type="dapo",
        temperature=1.0,
    )
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    mask = torch.ones(1, len(target))
    loss, _ = module(
        logits[None],
        head,
        target[None],
        mask,
        torch.ones(1),
        old_per_token_logps=old_logp[None],
    )
    return Answer(loss, None, None, None)


def trl_triton(logits: Tensor, target: Tensor, old_logp: Tensor) -> Answer:
    """TRL's Triton log-probability and entropy, and the loss a trainer makes of them."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logp, entropy = selective_log_softmax_and_entropy(logits, target)
    return _policy(logp, entropy.detach(), old_logp)


def trl_chunked(logits: Tensor, target: Tensor, old_logp: Tensor) -> Answer:
    """TRL's chunked log-probability from hidden states; PyTorch operations on a CPU."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    V = logits.shape[1]
    head = torch.eye(V, dtype=logits.dtype)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        logits, head, None, target, 1.0, V // 3, None, 1.0, ("entropy",)
    )
    return _policy(logp, entropy.detach(), old_logp)


def ours(logits: Tensor, target: Tensor, old_logp: Tensor, *, backend: Backend) -> Answer:
    """`fused_loss`."""
    out = fused_loss(
        logits,
        target,
        objective="dapo",
        advantage=torch.ones_like(old_logp),
        old_logp=old_logp,
        sequence_id=torch.zeros_like(target),
        backend=backend,
    )
    return Answer(out.loss, out.logp, out.entropy, out.ratio)


# in the order of the tables
CONTENDERS: dict[str, Loss] = {
    "PyTorch, logits' dtype": partial(eager, upcast=False),
    "PyTorch, float32": partial(eager, upcast=True),
    "Liger, Triton": liger_triton,
    "Liger, chunked": liger_chunked,
    "TRL, Triton": trl_triton,
    "TRL, chunked": trl_chunked,
    "ours, PyTorch": partial(ours, backend="torch"),
    "ours, Triton": partial(ours, backend="triton"),
}
OURS = ("ours, PyTorch", "ours, Triton")
# what a contender does not say
UNSAID = {"Liger, Triton": ("entropy",), "Liger, chunked": ("logp", "entropy", "ratio")}
