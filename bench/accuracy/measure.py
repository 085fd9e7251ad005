"""Errors of every contender against float64: by dtype, offset of the logits and margin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench.accuracy.contenders import CONTENDERS, Loss
from grpo_core.verify.accuracy import exact_tokens
from grpo_core.verify.checks import loss_scale
from grpo_core.verify.inputs import set_margins

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# nats that the target's logit lies above the log-sum-exp of all others
MARGINS = tuple(range(31))
OFFSETS = (0, 1000, -1000)
QUANTITIES = ("logp", "entropy", "dlogits", "ratio", "loss")
# the entropy of the same logits where the target is another word than the leading one
OF_ANOTHER = "entropy of another"
ROWS = 8
# odd, and several tiles of loads in every kernel here
V = 2501
# nats of the old policy below the policy, at most: no token is clipped
SPREAD = 0.1


class Measured(NamedTuple):
    """Errors relative to the numbers themselves, of one contender on tokens of one margin."""

    contender: str
    dtype: torch.dtype
    offset: int
    margin: int
    margins: Tensor  # [ROWS], what the dtype has made of it
    errors: Mapping[str, Tensor]  # per quantity [ROWS], a loss only [1]; absent if it has none


def measure(
    names: Iterable[str] = tuple(CONTENDERS),
    dtypes: Iterable[torch.dtype] = DTYPES,
    offsets: Iterable[int] = OFFSETS,
    margins: Iterable[int] = MARGINS,
) -> Iterator[Measured]:
    """One after the other, each on the same tokens."""
    for dtype, offset, margin in product(dtypes, offsets, margins):
        generator = torch.Generator().manual_seed(margin)
        target = torch.randint(V, (ROWS,), generator=generator)
        logits = 2 * torch.randn(ROWS, V, generator=generator)
        logits = set_margins(logits, target, torch.full((ROWS,), float(margin)))
        logits = (logits + offset).to(dtype)
        exact = exact_tokens(logits, target)
        nearness = torch.rand(ROWS, generator=generator)
        old_logp = (exact.logp - SPREAD * nearness).float()
        ratio = (exact.logp - old_logp.double()).exp()
        unit = loss_scale(dtype) / ROWS
        truth = {
            "logp": exact.logp,
            "entropy": exact.entropy,
            OF_ANOTHER: exact.entropy,
            "dlogits": -exact.slope * ratio[:, None] * unit,
            "ratio": ratio,
            "loss": -ratio.mean()[None],
        }
        # log p/(1 − p)
        found = torch.log(exact.logp.exp() / -torch.expm1(exact.logp))
        for name in names:
            answer = _answer(CONTENDERS[name], logits, target, old_logp)
            errors = {
                quantity: _relative(value, truth[quantity]) for quantity, value in answer.items()
            }
            yield Measured(name, dtype, offset, margin, found, errors)


def _answer(loss: Loss, logits: Tensor, target: Tensor, old_logp: Tensor) -> dict[str, Tensor]:
    """All that a contender computes, its gradient included."""
    leaf = logits.clone().requires_grad_()
    answer = loss(leaf, target, old_logp)
    (loss_scale(logits.dtype) * answer.loss).backward()
    assert leaf.grad is not None
    found = {"dlogits": leaf.grad, "loss": answer.loss.detach()[None]}
    for quantity in ("logp", "entropy", "ratio"):
        value = getattr(answer, quantity)
        if value is not None:
            found[quantity] = value.detach()
    if answer.entropy is not None:
        other = loss(logits, (target + 1) % V, old_logp).entropy
        assert other is not None
        found[OF_ANOTHER] = other.detach()
    return found


def _relative(value: Tensor, truth: Tensor) -> Tensor:
    """|error| over |truth|; of a gradient each row's largest over its largest."""
    error, size = (value.double() - truth).abs(), truth.abs()
    return error.amax(1) / size.amax(1) if truth.ndim == 2 else error / size
