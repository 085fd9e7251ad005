"""`logp_loss`: with the softmax in front of it by float64 autograd, it is `reference_loss`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import PolicyFactor, clip, fused_linear_loss, linear_logp, logp_loss
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.objective import Objective
from tests.test_fused_loss import OBJECTIVES, case, needed

pytestmark = pytest.mark.usefixtures("poison")

# vectors are float32, of log-ratios near 0.2: a few roundings of numbers near 8
SINGLE = 5e-6


def softmax(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of every target, with their graph."""
    log_p = torch.log_softmax(logits / temperature, -1)
    logp = log_p.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.kl != "exact"])
def test_every_objective(backend: str, device: str, name: str) -> None:
    objective = OBJECTIVES[name]
    buffer, arguments = case("odd V", torch.float32)
    arguments = needed(objective, buffer, arguments)
    leaf = buffer.double().requires_grad_()
    exact = reference_loss(leaf, objective=objective, **arguments)
    (theirs,) = torch.autograd.grad(exact.loss, leaf)
    target, temperature = arguments.pop("target"), arguments.pop("temperature")
    logp, entropy = softmax(leaf, target, temperature)
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    there["mask"] = (arguments["mask"] & (target >= 0)).to(device)
    out = logp_loss(
        logp.to(device),
        objective=objective,
        entropy=entropy.to(device),
        backend=backend,  # type: ignore[arg-type]
        **there,
    )
    (ours,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.dtype == torch.float32
    size = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < SINGLE * max(size, 1e-3)
    assert abs(float(out.loss.detach()) - float(exact.loss.detach())) < 2e-6
    for vector in ("logp", "entropy", "ratio", "kl", "factor"):
        found, wanted = getattr(out, vector).cpu().double(), getattr(exact, vector)
        assert torch.allclose(found, wanted, 1e-5, 1e-5), vector
    for metric, value in out.metrics.items():
        assert torch.isclose(value.cpu().double(), exact.metrics[metric].double(), 1e-4, 1e-5)


def vectors() -> tuple[Tensor, dict[str, Any]]:
    """A batch whose second sequence is masked."""
    logp = -torch.rand(3, 4) - 0.1
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
    given = {"old_logp": logp + 0.3 * torch.randn(3, 4), "mask": mask}
    return logp.requires_grad_(), given | {"advantage": torch.tensor([1.0, 2.0, -0.5])}


def test_a_factor_multiplies_the_surrogate_alone() -> None:
    """Of the tokens that count: NaN where masked is of no matter."""
    logp, given = vectors()
    objective = Objective(clip(0.2, 0.2), kl="k3", beta=0.1)
    ref_logp = logp.detach() - 0.2
    factor = 2 * torch.rand(3, 4)
    factor[0, 0] = 0.0
    spoilt = factor.masked_fill(given["mask"] == 0, torch.nan)
    out = logp_loss(logp, objective=objective, ref_logp=ref_logp, factor=spoilt, **given)
    (ours,) = torch.autograd.grad(out.loss, logp)
    x = logp.detach().double().requires_grad_()
    A, w, old = given["advantage"][:, None].double(), given["mask"].double(), given["old_logp"]
    r, gap = (x - old).exp(), ref_logp - x
    policy = torch.minimum(r * A, r.clamp(0.8, 1.2) * A) * factor
    exact = ((0.1 * (gap.exp() - gap - 1) - policy) * w).sum() / w.sum()
    (theirs,) = torch.autograd.grad(exact, x)
    assert torch.allclose(ours.double(), theirs, 1e-5, 1e-7)
    assert abs(float(out.loss.detach()) - float(exact.detach())) < 1e-6
    assert torch.equal(out.factor, torch.where(given["mask"] != 0, factor, 1.0))


def test_dtypes_packed_rows_and_normalizer() -> None:
    logp, given = vectors()
    padded = logp_loss(logp, objective="dapo", normalizer=11.0, **given)
    (wanted,) = torch.autograd.grad(padded.loss, logp)
    keep = given["mask"].bool()
    rows = keep.nonzero()[:, 0]
    packed = logp_loss(
        logp[keep],
        objective="dapo",
        normalizer=11.0,
        advantage=given["advantage"][rows],
        old_logp=given["old_logp"][keep],
        sequence_id=rows,
    )
    (got,) = torch.autograd.grad(packed.loss, logp)
    assert torch.allclose(got, wanted) and torch.isclose(packed.loss, padded.loss)
    for dtype in (torch.float64, torch.bfloat16):
        narrow = logp.detach().to(dtype).requires_grad_()
        logp_loss(narrow, objective="dapo", normalizer=11.0, **given).loss.backward()
        assert narrow.grad is not None and narrow.grad.dtype == dtype
        assert torch.allclose(narrow.grad.float(), wanted, 3e-2, 3e-3)


def test_the_loss_may_be_changed_in_place_and_is_differentiable_once() -> None:
    """As verl does with a policy loss, to which it adds its other terms."""
    logp, given = vectors()
    (plain,) = torch.autograd.grad(logp_loss(logp, objective="dapo", **given).loss, logp)
    loss = logp_loss(logp, objective="dapo", **given).loss
    loss -= 0.5 * logp.sum()
    (slope,) = torch.autograd.grad(loss, logp, retain_graph=True)
    assert torch.allclose(slope, plain - 0.5)
    with pytest.raises(RuntimeError, match=r"logp_loss.*create_graph"):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_without_entropy_it_is_not_known() -> None:
    logp, given = vectors()
    out = logp_loss(logp, objective="dapo", **given)
    assert out.metrics["entropy"].isnan() and out.metrics["ratio_mean"].isfinite()
    assert (out.entropy[given["mask"] == 0] == 0).all()


def test_a_token_that_is_not_finite_is_left_out() -> None:
    logp, given = vectors()
    with torch.no_grad():
        logp[0, 1] = -torch.inf
    out = logp_loss(logp, objective="dapo", **given)
    out.loss.backward()
    assert logp.grad is not None and logp.grad[0, 1] == 0 and out.metrics["nonfinite_rows"] == 1
    assert logp.grad.isfinite().all() and logp.grad.abs().sum() > 0


def test_from_hidden_states_by_way_of_linear_logp() -> None:
    """The two together are a fused loss with one product more."""
    hidden, weight = torch.randn(4, 5, 12).requires_grad_(), torch.randn(31, 12).requires_grad_()
    target = torch.randint(0, 31, (4, 5))
    target[2, 3:] = -100
    objective = OBJECTIVES["entropy of sequences"]
    old_logp = linear_logp(hidden, weight, target).logp.detach() + 0.1
    given = {"objective": objective, "advantage": torch.randn(4), "old_logp": old_logp}
    whole = fused_linear_loss(hidden, weight, target, **given)
    wanted = torch.autograd.grad(whole.loss, [hidden, weight])
    found = linear_logp(hidden, weight, target)
    parts = logp_loss(found.logp, entropy=found.entropy, mask=target != -100, **given)
    assert torch.equal(parts.loss, whole.loss)
    for a, b in zip(torch.autograd.grad(parts.loss, [hidden, weight]), wanted, strict=True):
        assert torch.allclose(a, b, 1e-5, 1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(2, 3, 4)}, r"logp: expected a tensor \[B, T\] or \[N\]"),
        ({"logp": torch.zeros(3, 4, dtype=torch.int64)}, "logp: expected a floating-point"),
        ({"old_logp": torch.zeros(3, 5)}, r"old_logp: expected shape \[3, 4\]"),
        ({"factor": torch.zeros(3, 5)}, r"factor: expected shape \[3, 4\]"),
        ({"factor": torch.zeros(3, 4, dtype=torch.int64)}, "factor: expected a floating-point"),
        ({"entropy": torch.zeros(4, 3)}, r"entropy: expected shape \[3, 4\]"),
        ({"objective": OBJECTIVES["exact KL"]}, "objective: expected any kl but 'exact'"),
        ({"objective": OBJECTIVES["entropy"]}, "entropy: expected a tensor for objective.entropy"),
        (
            {"objective": Objective(clip(0.2, 0.2), factor=PolicyFactor(top_entropy=0.5))},
            "entropy: expected a tensor for objective.factor.top_entropy",
        ),
        ({"objective": "grpo"}, "ref_logp: expected a tensor for beta"),
        ({"rewards": torch.zeros(3)}, "advantage: expected exactly one of"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    logp, given = vectors()
    with pytest.raises(ValueError, match=message):
        logp_loss(**{"logp": logp, "objective": "dapo"} | given | change)
