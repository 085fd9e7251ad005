"""What TRL's hook returns, from hidden states: logp and entropy as `linear_logp`, and more.

With a frozen head the gradient of logp is made in the forward, see there: TRL differentiates the
entropy only where its bonus is asked for.
"""

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
from grpo_core.objective.validation import check_concrete, check_tensor

FURTHER = ("log_sum_sq_probs", "mean_logits", "is_top1")
# of temporaries for the further outputs: a few rows at a time, in cache
BLOCK_BYTES = 2**22


class LinearScores(NamedTuple):
    """Of each of N rows, float32 `[N]`; what was not asked for is None."""

    logp: Tensor  # nats, differentiable
    entropy: Tensor  # nats, differentiable
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
    logits_dtype: torch.dtype | None = None,
    gathered: Callable[[], AbstractContextManager[object]] = nullcontext,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LinearScores:
    """Log-probability and entropy of every target, differentiable, and more if it is asked for.

    Differentiated by `hidden` and the tensors of `lm_head` that require a gradient, through logp
    and entropy. Logits are never all there; they are made again in the backward, for rows whose
    gradient is not 0.

    Args:
        hidden: [N, D]; float32, bfloat16 or float16.
        lm_head: [V, D], or a `LinearHead`.
        target: [N] integers in [0, V).
        temperature: T > 0, the logits are divided by it.
        further: names among log_sum_sq_probs, mean_logits and is_top1.
        memory_budget, logits_dtype, backend, validate: as in `fused_linear_loss`.
        gathered: a context that the backward enters to use the head, for weights that are spread
            over ranks outside of it.

    Returns:
        `LinearScores`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.
    """
    check_concrete(hidden=hidden, lm_head=lm_head, target=target)
    if check_tensor("hidden", hidden).ndim != 2:
        raise ValueError(f"hidden: expected [N, D], got {list(hidden.shape)}")
    unknown = [name for name in further if name not in FURTHER]
    if unknown:
        raise ValueError(f"further: expected names among {FURTHER}, got {unknown[0]!r}")
    names = [name for name in FURTHER if name in further]
    logp, entropy, *others = logp_from_hidden(
        hidden,
        lm_head,
        target,
        temperature=temperature,
        mask=None,
        plan="fast",
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        backend=backend,
        validate=validate,
        ahead=True,
        also=partial(_further, names, temperature),
        gathered=gathered,
    )
    values = dict(zip(names, others, strict=True))
    return LinearScores(logp, entropy, *(values.get(name) for name in FURTHER))


def _further(names: list[str], temperature: float, logits: Tensor, target: Tensor) -> list[Tensor]:
    """The further outputs of those names, of the logits [n, V] of a chunk."""
    if not names:
        return []
    step = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    blocks = []
    for start in range(0, max(len(logits), 1), step):
        z = logits[start : start + step].float() / temperature
        values = {}
        if "is_top1" in names:
            # the first of the largest
            values["is_top1"] = z.argmax(1) == target[start : start + step]
        if "mean_logits" in names:
            values["mean_logits"] = z.mean(1)
        if "log_sum_sq_probs" in names:
            p = z.sub_(z.amax(1, keepdim=True)).exp_()
            total = p.sum(1)
            values["log_sum_sq_probs"] = p.square_().sum(1).log() - 2 * total.log()
        blocks.append([values[name] for name in names])
    return [torch.cat(pieces) for pieces in zip(*blocks, strict=True)]
