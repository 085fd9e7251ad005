"""Errors of divergences from a teacher, and of log-probabilities over kept ids, by margin.

Logits are float32. The target leads in both policies, by `margin` nats in the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy.measure import MARGINS, ROWS, Measured, V, relative
from grpo_core import RECIPES, Kept, fused_loss
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.verify.inputs import set_margins

# `Objective.interpolation`
BETAS = {"reverse KL": 1.0, "forward KL": 0.0, "JSD 0.5": 0.5}
KEPT = "logp over kept ids"
MEASURED = (*BETAS, KEPT)
# ids that a row keeps, the target among them
KEPT_IDS = 20
Answer = tuple[Tensor, Tensor]  # a value of each row [ROWS], and its gradient [ROWS, V]
Rows = Callable[..., Tensor]  # a value of each row [ROWS], with the graph of its gradient


def exact_log_softmax(logits: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
    """log p in float64, and 1 − p of the leading word; neither cancels."""
    gap = logits.double() - logits.double().gather(1, lead)
    others = gap.exp().scatter(1, lead, 0.0).sum(1, keepdim=True)
    return gap - others.log1p(), others / (1 + others)


def exact_divergence(x: Tensor, y: Tensor, lead: Tensor, beta: float) -> Answer:
    """TRL's generalised Jensen-Shannon divergence of each row, and its gradient by x."""
    (p, p_rest), (q, q_rest) = exact_log_softmax(x, lead), exact_log_softmax(y, lead)
    if beta == 0:
        slope = p.exp() - q.exp()
        return (q.exp() * (q - p)).sum(1), slope.scatter(1, lead, q_rest - p_rest)
    m = q
    if beta < 1:
        m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
        m = m.scatter(1, lead, torch.log1p(-(beta * q_rest + (1 - beta) * p_rest)))
    weight = 1 - beta if beta < 1 else 1.0
    kl = (p.exp() * (p - m)).sum(1, keepdim=True)
    value = weight * kl + (beta * q.exp() * (q - m)).sum(1, keepdim=True) * (beta < 1)
    return value[:, 0], weight * p.exp() * (p - m - kl)


def _plain(x: Tensor, y: Tensor, target: Tensor, beta: float) -> Tensor:
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    kl = partial(F.kl_div, log_target=True, reduction="none")
    if beta in (0, 1):
        return (kl(q, p) if beta else kl(p, q)).sum(1)
    m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
    return (beta * kl(m, q) + (1 - beta) * kl(m, p)).sum(1)


def _trl(x: Tensor, y: Tensor, target: Tensor, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    eye = torch.eye(V)
    return ChunkedDivergenceFunction.apply(x, eye, None, y, eye, None, beta, 1.0)[0]


def _ours(x: Tensor, y: Tensor, target: Tensor, beta: float, *, backend: Any) -> Tensor:
    objective = RECIPES["opd"].replace(interpolation=beta)
    out = _sum(x, target, objective, ref_logits=y[None], backend=backend)
    return out.kl[0] + (out.loss - out.loss.detach()) / ROWS


def _filled(x: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    return x.masked_fill(~mask, -torch.inf).log_softmax(-1).gather(1, target)[:, 0]


def _kept(x: Tensor, mask: Tensor, target: Tensor, *, backend: Any) -> Tensor:
    given = {"advantage": torch.ones(1), "kept": Kept.from_mask(mask), "backend": backend}
    out = _sum(x, target, "gpg", **given)
    return out.logp[0] + (out.loss.detach() - out.loss) / ROWS


def _sum(x: Tensor, target: Tensor, objective: Any, **given: Any) -> LossOutput:
    """The loss of a sequence, summed over its tokens."""
    return fused_loss(x[None], target.T, objective=objective, normalizer=1.0, **given)


BACKENDS = {"ours, PyTorch": "torch", "ours, CPU": "cpu", "ours, Triton": "triton"}
DIVERGENCES: dict[str, Rows] = {
    "PyTorch, float32": _plain,
    "TRL, chunked": _trl,
    **{name: partial(_ours, backend=backend) for name, backend in BACKENDS.items()},
}
OVER_KEPT: dict[str, Rows] = {
    "PyTorch, float32": _filled,
    **{name: partial(_kept, backend=backend) for name, backend in BACKENDS.items()},
}


def measure_divergences(
    names: Iterable[str] = tuple(DIVERGENCES), margins: Iterable[int] = MARGINS
) -> Iterator[Measured]:
    """One contender after the other, each on the same rows."""
    for margin in margins:
        generator = torch.Generator().manual_seed(margin)
        target = torch.randint(V, (ROWS, 1), generator=generator)
        x = 2 * torch.randn(ROWS, V, generator=generator)
        mask = torch.zeros(ROWS, V, dtype=torch.bool)
        mask.scatter_(1, x.topk(KEPT_IDS - 1).indices, True).scatter_(1, target, True)
        full = torch.full((ROWS,), float(margin))
        x = set_margins(x, target[:, 0], full)
        y = x + 0.5 * torch.randn(ROWS, V, generator=generator)
        # of these the target leads by the margin
        few = set_margins(x.masked_fill(~mask, -torch.inf), target[:, 0], full)
        few = torch.where(mask, few, x)
        log_p, rest = exact_log_softmax(few.masked_fill(~mask, -torch.inf), target)
        slope = (-log_p.exp()).scatter(1, target, rest)
        truth = {key: exact_divergence(x, y, target, beta) for key, beta in BETAS.items()}
        truth[KEPT] = log_p.gather(1, target)[:, 0], slope
        for name in names:
            calls = {
                key: partial(DIVERGENCES[name], y=y, target=target, beta=beta)
                for key, beta in BETAS.items()
            }
            inputs = dict.fromkeys(BETAS, x)
            if name in OVER_KEPT:
                calls[KEPT] = partial(OVER_KEPT[name], mask=mask, target=target)
                inputs[KEPT] = few
            errors = {}
            for key, call in calls.items():
                leaf = inputs[key].clone().requires_grad_()
                value = call(leaf)
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
                errors[key] = relative(value.detach(), truth[key][0])
                errors[f"gradient of the {key}"] = relative(gradient, truth[key][1])
            yield Measured(name, torch.float32, 0, margin, full, errors)
