"""Prompt mean, gates, second moment and future KL: every backend, packed rows, hidden states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    FutureKL,
    Objective,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    clip,
    fused_linear_loss,
    fused_loss,
    logp_loss,
)
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.advantage import Estimator, relative_advantages
from grpo_core.objective.policy_factor import within_second_moment
from grpo_core.objective.recipes import importance
from grpo_core.objective.value import gae, rewards_with_kl
from tests import oracles, oracles_estimators
from tests.combinations import paired
from tests.conftest import BACKENDS

B, T, V, D = 6, 7, 23, 11
NEW = ("scalerl", "maxrl", "ipo", "m2po", "fipo", "sdar", "gspo_token", "gdpo")
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.5])
GATES = RECIPES["dapo"].replace(
    factor=PolicyFactor(
        SamplerCorrection("token", "truncate", 0.0, math.inf),
        rejections=(Rejection("binary_kl", "mean", high=0.01, action="zero"),),
    )
)
OBJECTIVES: dict[str, Objective] = {name: RECIPES[name] for name in NEW} | {
    "gates": GATES,
    "all at once": RECIPES["scalerl"].replace(
        factor=PolicyFactor(second_moment=0.02, future_kl=FutureKL(2.0, 0.5, 1.5)),
        kl="gated",
        beta=0.1,
        entropy_coef=0.1,
        entropy_aggregation="prompt_mean",
    ),
}


def batch(spread: float = 0.3) -> dict[str, Any]:
    """Hidden states and a head in float64; masked tokens at the ends and in the middle."""
    hidden, head = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    target = torch.randint(0, V, (B, T))
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5, 0, 6])[:, None]
    mask[0, 2:4] = mask[3, 1] = False
    target[5, 2] = -100
    logp, _ = oracles.logp_and_entropy(hidden @ head.T, target.clamp(min=0), 1.0)
    vectors = {n: (logp + spread * torch.randn(B, T)).clamp(max=0) for n in ("old_logp", "ref_logp")}
    sampler_logp = (vectors["old_logp"] + 0.1 * torch.randn(B, T)).clamp(max=0)
    vectors = {k: v.float() for k, v in (vectors | {"sampler_logp": sampler_logp}).items()}
    given = {"hidden": hidden, "head": head, "target": target, "mask": mask}
    return given | vectors | {"rewards": REWARDS, "group_size": 3}


def needed(objective: Objective, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments beside the logits."""
    unused = ["hidden", "head"] + ["sampler_logp"] * (not objective.factor.needs_sampler)
    return {name: value for name, value in given.items() if name not in unused}


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """Its rows, neighbours of different sequences, masked ones left out."""
    kept = given["mask"] & (given["target"] >= 0)
    rows = kept.T.nonzero(as_tuple=True)[::-1]
    same = {k: v[rows] if getattr(v, "shape", ())[:2] == (B, T) else v for k, v in given.items()}
    return same | {"sequence_id": rows[0]}


def close(found: Tensor, expected: Tensor, rtol: float = 2e-5) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol, 1e-6 * float(expected.abs().max()))


@paired(
    name=OBJECTIVES,
    form=["padded", "packed", "hidden", "hidden, packed", "logp"],
    backend=BACKENDS,
)
def test_every_way_is_the_reference(backend: str, device: str, name: str, form: str) -> None:
    """Loss, factor and gradient, in float32, against the reference in float64 on a padded batch."""
    objective, given = OBJECTIVES[name], batch()
    hidden = given["hidden"].clone().requires_grad_()
    exact = reference_loss(
        hidden @ given["head"].T, objective=objective, **needed(objective, given)
    )
    exact.loss.backward()
    given = packed(given) if "packed" in form else given
    arguments = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in needed(objective, given).items()
    }
    leaf = given["hidden"].float().to(device).requires_grad_()
    head = given["head"].float().to(device)
    if "hidden" in form:
        out = fused_linear_loss(
            leaf, head, objective=objective, backend=backend, memory_budget=2**10, **arguments
        )
    elif form == "logp":
        target = arguments.pop("target")
        arguments["mask"] = arguments["mask"] & (target >= 0)
        rows = (leaf @ head.T).log_softmax(-1)
        logp = rows.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        entropy = -(rows.exp() * rows).sum(-1)
        out = logp_loss(logp, entropy=entropy, objective=objective, backend=backend, **arguments)
    else:
        out = fused_loss(leaf @ head.T, objective=objective, backend=backend, **arguments)
    out.loss.backward()
    assert leaf.grad is not None and hidden.grad is not None
    expected, factor = hidden.grad, exact.factor
    if "packed" in form:
        rows = packed({"g": expected, "f": factor, **{k: batch_part for k, batch_part in {}.items()}}) if False else None
        kept = (exact._valid.view(B, T)).T.nonzero(as_tuple=True)[::-1]
        expected, factor = expected[kept], factor[kept]
    assert close(out.loss.cpu(), exact.loss.detach())
    assert close(leaf.grad.cpu(), expected, rtol=2e-4)
    counts = out._valid.view(out.factor.shape).cpu() & (out.ratio.cpu() != 0)
    assert close(out.factor.cpu()[counts], factor[counts])


