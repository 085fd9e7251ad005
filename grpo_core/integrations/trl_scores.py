"""Log-probability and entropy from hidden states, and the further outputs of TRL's function."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.linear.head import LinearHead
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.linear.workspace import LinearOptions
from grpo_core.loss.row_inputs import RowInputs

FURTHER = ("log_sum_sq_probs", "mean_logits", "is_top1")
# for the temporaries of the further outputs, so that they stay in cache
BLOCK_BYTES = 2**22


class LinearScores(NamedTuple):
    """Of each of N rows, float32 [N]; None for an output that was not asked for."""

    logp: Tensor  # nats, differentiable
    entropy: Tensor | None  # nats, differentiable
    log_sum_sq_probs: Tensor | None  # log Σ_j p_j²
    mean_logits: Tensor | None  # of logits / T, over the vocabulary
    is_top1: Tensor | None  # bool, whether the target is the first of the largest logits


def linear_scores(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    further: Collection[str] = (),
    memory_budget: int | None = None,
    gathered: Callable[[], AbstractContextManager[object]] = nullcontext,
    backend: Backend | None = None,
) -> LinearScores:
    """`linear_logp`, and the further outputs of TRL's function.

    With a frozen head the forward also computes the gradient of logp, since TRL differentiates the
    entropy only for its bonus.

    Args:
        hidden: [N, D].
        lm_head, target, temperature, memory_budget, backend: as in `linear_logp`.
        further: names in `FURTHER`.
        gathered: a context that the backward enters to use the head, for sharded weights.
    """
    logp, entropy, *others = logp_from_hidden(
        hidden,
        lm_head,
        RowInputs(target=target, temperature=temperature, backend=backend),
        LinearOptions("fast", memory_budget),
        gradients_in_forward=True,
        extra_vectors=partial(_further, further, temperature),
        gathered=gathered,
    )
    values = dict(zip(further, others, strict=True))
    return LinearScores(logp, entropy, *(values.get(name) for name in FURTHER))


def _further(
    names: Collection[str], temperature: float, logits: Tensor, target: Tensor
) -> list[Tensor]:
    """The further outputs of those names, of the logits [n, V] of a chunk."""
    if not names:
        return []
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    blocks = []
    for block, labels in zip(logits.split(rows), target.split(rows), strict=True):
        z = block.float() / temperature
        values = {}
        if "is_top1" in names:
            values["is_top1"] = z.argmax(1) == labels
        if "mean_logits" in names:
            values["mean_logits"] = z.mean(1)
        if "log_sum_sq_probs" in names:
            p = z.sub_(z.amax(1, keepdim=True)).exp_()
            total = p.sum(1)
            values["log_sum_sq_probs"] = p.square_().sum(1).log() - 2 * total.log()
        blocks.append([values[name] for name in names])
    return [torch.cat(pieces) for pieces in zip(*blocks, strict=True)]
