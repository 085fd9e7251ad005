"""Errors of every contender against float64: by dtype, offset of the logits and margin.

All minimise DAPO's objective with advantage 1, each as its library gives it. What starts from
hidden states gets the logits as hidden states and the identity as output matrix: that product adds
no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.batch import MASKED, Batch
from bench.contenders import arguments, hidden_liger, hidden_trl, liger, naive, trl
from grpo_core import fused_loss
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
Answer = tuple[Tensor | None, ...]  # loss, logp, entropy and perhaps ratio; None if not returned


def _with_head(loss: Callable[..., Answer], logits: Tensor, batch: Batch, recipe: str) -> Answer:
    """A loss from hidden states, on logits."""
    return loss(logits, torch.eye(logits.shape[1], dtype=logits.dtype), batch, recipe)


def _liger(logits: Tensor, batch: Batch, recipe: Any) -> Answer:
    """Its log-probabilities come from a kernel of their own."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    logp = fused_selective_log_softmax(logits.detach()[None], batch.padded[0], 1.0)[0]
    return liger(logits, batch, recipe)[0], pad(logp, (0, 1)), None


def _ours(logits: Tensor, batch: Batch, recipe: Any, *, backend: Any) -> Answer:
    """With its ratio."""
    out = fused_loss(logits, batch.target, **arguments(batch, recipe), backend=backend)
    return out.loss, out.logp, out.entropy, out.ratio


# in the order of the tables; (logits [N, V], batch, recipe) -> answer
CONTENDERS: dict[str, Callable[..., Answer]] = {
    "PyTorch, logits' dtype": partial(naive, with_entropy=True, upcast=False),
    "PyTorch, float32": partial(naive, with_entropy=True),
    "Liger, Triton": _liger,
    "Liger, chunked": partial(_with_head, hidden_liger),
    "TRL, Triton": trl,
    "TRL, chunked": partial(_with_head, partial(hidden_trl, chunk=V // 3)),
    "ours, PyTorch": partial(_ours, backend="torch"),
    "ours, CPU": partial(_ours, backend="cpu"),
    "ours, Triton": partial(_ours, backend="triton"),
}
OURS = ("ours, PyTorch", "ours, CPU", "ours, Triton")
# what a contender does not return
UNSAID = {"Liger, Triton": ("entropy",), "Liger, chunked": ("logp", "entropy", "ratio")}


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
                quantity: relative(value, truth[quantity]) for quantity, value in answer.items()
            }
            yield Measured(name, dtype, offset, margin, found, errors)


def _answer(
    loss: Callable[..., Answer], logits: Tensor, target: Tensor, old_logp: Tensor
) -> dict[str, Tensor]:
    """All that a contender computes, its gradient included; a masked row ends the sequence."""
    leaf = torch.cat((logits, logits[-1:])).requires_grad_()
    target, old_logp = pad(target, (0, 1), value=MASKED)[None], pad(old_logp, (0, 1))[None]
    batch = Batch((leaf.detach(),), target, old_logp, torch.ones(1))
    value, *rest = loss(leaf, batch, "dapo")
    (loss_scale(logits.dtype) * value).backward()
    assert leaf.grad is not None
    found = dict(zip(("logp", "entropy", "ratio"), rest, strict=False))
    if len(rest) < 3 and found["logp"] is not None:
        found["ratio"] = (found["logp"].float() - batch.old_logp).exp()
    if found["entropy"] is not None:
        other = Batch(batch.inputs, (target + 1) % V, old_logp, torch.ones(1))
        found[OF_ANOTHER] = loss(leaf, other, "dapo")[2]
    found = {name: one.detach()[:-1] for name, one in found.items() if one is not None}
    return found | {"dlogits": leaf.grad[:-1], "loss": value.detach()[None]}


def relative(value: Tensor, truth: Tensor) -> Tensor:
    """|error| over |truth|; of a gradient each row's largest over its largest."""
    error, size = (value.double() - truth).abs(), truth.abs()
    return error.amax(1) / size.amax(1) if truth.ndim == 2 else error / size
