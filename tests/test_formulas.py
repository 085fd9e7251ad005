"""Surrogates and KL estimators: derivatives against autograd, values at the hard places."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_core import clip
from grpo_core.backends import sequence_ratio
from grpo_core.backends.formula import as_torch
from grpo_core.backends.sequence_ratio import RatioLevel
from grpo_core.kernels import kl as kl_estimators
from grpo_core.kernels import surrogates
from grpo_core.kernels.records import RowStats, SequenceTokens, Terms
from tests import oracles

CLIPS = [(0.2, 0.2, math.inf), (0.2, 0.28, math.inf), (0.1, 0.3, 3.0), (0.0, 0.0, 1.0)]
SURROGATES: list[tuple[str, tuple[float, ...]]] = [
    *(("clip", args) for args in CLIPS[:3]),
    ("importance", ()),
    ("reinforce", ()),
    ("cispo", (0.0, 5.0)),
    ("cispo", (0.8, 1.28)),
    ("sapo", (1.0, 1.05)),
    ("dro", (0.3,)),
    ("dppo_tv", (0.1, 0.15, 2.0)),
    ("ipo", (0.1,)),
    ("dppo_kl", (0.05, 0.08, 2.0)),
    ("topr", ()),
    ("zero", ()),
]
KLS = ["k1", "absolute", "k2", "k3", "k1_plus", "absolute_plus", "k3_plus", "gated"]


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """(logp, log_ratio, advantage) in float64 over both signs, the kinks and far beyond them."""
    bounds = [math.log(b) for b in (0.7, 0.8, 0.9, 1.0, 1.2, 1.28, 1.3, 3.0)]
    around = [b + step for b in bounds for step in (-1e-6, 1e-6)]
    log_ratio = torch.tensor([-15.0, -1.0, *around, 0.0, 1e-4, 0.5, 5.0], dtype=torch.float64)
    advantage = torch.tensor([-2.5, -1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    ratios, advantages = torch.meshgrid(log_ratio, advantage, indexing="ij")
    logp = -0.1 - torch.rand(ratios.shape, dtype=torch.float64) * 5
    return logp.flatten(), ratios.flatten(), advantages.flatten()


@pytest.mark.parametrize("args", CLIPS)
def test_clip_is_dual_clip_ppo(args: tuple[float, float, float]) -> None:
    """clip(ε_low, ε_high, δ) is the negative of dual-clip PPO with c = δ, and its derivative."""
    logp, log_ratio, advantage = grid()
    low, high, delta = args
    logp.requires_grad_()
    old_logp = logp.detach() - log_ratio
    ratio = (logp - old_logp).exp()
    oracle = (
        oracles.ppo_clip(ratio, advantage, low, high)
        if math.isinf(delta)
        else oracles.dual_clip(ratio, advantage, low, high, delta)
    )
    oracle.sum().backward()
    loss, _, dlogp = as_torch(surrogates.clip)(logp.detach(), log_ratio, advantage, *args)
    assert torch.allclose(loss, -oracle.detach(), rtol=1e-12, atol=1e-12)
    # at ratio 1 with bounds of 0 every point is a kink: any subgradient is right there
    smooth = log_ratio.abs() > 0 if low == 0 else torch.ones_like(log_ratio, dtype=torch.bool)
    assert torch.allclose(dlogp[smooth], -logp.grad[smooth], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("advantage", [-1.5, 0.5])
def test_ties_at_the_bounds_keep_the_gradient(advantage: float) -> None:
    """At ratio exactly 1 ± ε both branches are equal and the gradient is the full −A·r."""
    one = torch.ones(1, dtype=torch.float64)
    for eps_low, eps_high, ratio in ((0.5, 0.25, 0.5), (0.5, 0.25, 1.25)):
        *_, dlogp = as_torch(surrogates.clip)(
            -one, (one * ratio).log(), one * advantage, eps_low, eps_high, math.inf
        )
        kept = torch.isclose(dlogp, -advantage * ratio * one)
        assert kept or (one * ratio).log().exp() != ratio


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    """At ratio 1 dℓ/dlogp = −A, exactly, in float32."""
    advantage = torch.tensor([-2.0, -0.3, 0.0, 0.7, 5.0])
    zero = torch.zeros(5)
    for args in CLIPS[:3]:
        loss, _, dlogp = as_torch(surrogates.clip)(zero - 1, zero, advantage, *args)
        assert torch.equal(dlogp, -advantage)
        assert torch.equal(loss, -advantage)


@pytest.mark.parametrize("delta", [0.01, 0.1])
def test_binary_trust_region_is_the_papers(delta: float) -> None:
    """−ℓ is the oracle's objective and its gradient, on both sides of δ, p = q and the cap."""
    p, q, A = torch.meshgrid(
        torch.linspace(0.01, 0.99, 40, dtype=torch.float64),
        torch.linspace(0.02, 0.98, 33, dtype=torch.float64),
        torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64),
        indexing="ij",
    )
    logp = p.log().requires_grad_()
    oracle = oracles.dppo_kl(logp, q.log(), A, delta, 3.0)
    oracle.sum().backward()
    surrogate = as_torch(surrogates.dppo_kl)
    loss, dlogp, _ = surrogate(logp.detach(), (p / q).log(), A, delta, delta, 3.0)
    assert 0.1 < (oracle == 0).double().mean() - 1 / 3 < 0.5
    assert torch.allclose(loss, -oracle.detach(), rtol=1e-12, atol=1e-14)
    assert torch.allclose(dlogp, -logp.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "args"), SURROGATES)
def test_derivatives_are_those_of_autograd(name: str, args: tuple[float, ...]) -> None:
    """Both of them, over the whole grid, for every surrogate of the table."""
    logp, log_ratio, advantage = grid()
    logp.requires_grad_()
    log_ratio.requires_grad_()
    surrogate = as_torch(getattr(surrogates, name))
    loss, dlogp, dlog_ratio = surrogate(logp, log_ratio, advantage, *args)
    if name == "zero":
        assert not (loss.any() or dlogp.any() or dlog_ratio.any())
        return
    derivatives = torch.autograd.grad(loss.sum(), (logp, log_ratio), allow_unused=True)
    for ours, theirs in zip((dlogp, dlog_ratio), derivatives, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert torch.allclose(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "args"), [case for case in SURROGATES if case[0] != "zero"])
def test_on_policy_every_surrogate_is_reinforce(name: str, args: tuple[float, ...]) -> None:
    """At ratio 1 the total derivative is −A."""
    advantage = torch.tensor([-2.0, -0.3, 0.0, 0.7, 5.0])
    zero = torch.zeros(5)
    _, dlogp, dlog_ratio = as_torch(getattr(surrogates, name))(zero - 1, zero, advantage, *args)
    assert torch.allclose(dlogp + dlog_ratio, -advantage, rtol=1e-6)


@pytest.mark.parametrize(("name", "args"), [case for case in SURROGATES if case[0] != "dro"])
@given(scale=st.floats(0.01, 100), log_ratio=st.floats(-10, 10), advantage=st.floats(-10, 10))
def test_surrogates_are_homogeneous_in_the_advantage(
    name: str, args: tuple[float, ...], scale: float, log_ratio: float, advantage: float
) -> None:
    """ℓ(c·A) = c·ℓ(A) for c > 0, so a detached correction may multiply the advantage."""
    one = torch.ones(1, dtype=torch.float64)
    values = [
        as_torch(getattr(surrogates, name))(-one, one * log_ratio, one * a, *args)
        for a in (advantage, scale * advantage)
    ]
    for plain, scaled in zip(*values, strict=True):
        assert torch.allclose(scaled, scale * plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KLS)
def test_kl_value_and_derivative(name: str) -> None:
    """Values are the papers', derivatives those of autograd; what they are at logp = ref_logp."""
    logp = torch.linspace(-12, -0.01, 101, dtype=torch.float64, requires_grad=True)
    ref_logp = logp.detach() + torch.linspace(-3, 3, 101, dtype=torch.float64).roll(17)
    oracle = oracles.kl_estimate(name, logp, ref_logp)
    oracle.sum().backward()
    estimator = as_torch(getattr(kl_estimators, name))
    value, derivative = estimator(logp.detach(), ref_logp)
    assert torch.allclose(value, oracle.detach(), rtol=1e-9, atol=1e-13)
    assert torch.allclose(derivative, logp.grad, rtol=1e-9, atol=1e-12)
    same = torch.tensor([-3.0, -1e-3])
    at_reference, slope = estimator(same, same)
    assert torch.equal(at_reference, torch.zeros(2))
    # at the reference the gate is half open
    expected = {"k1": 1.0, "gated": -0.5}.get(name, 0.0)
    assert torch.equal(slope, torch.full((2,), expected))


def series(d: float) -> float:
    """eᵈ − 1 − d in float64, term by term: nothing cancels for small d."""
    return math.fsum(d**k / math.factorial(k) for k in range(2, 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_does_not_cancel(dtype: torch.dtype) -> None:
    """Relative error stays at rounding where eᵈ − 1 − d in float32 has lost every digit."""
    steps = [s * 10.0**-k for k in range(7) for s in (1, 0.6, 0.4, -1, -0.3)]
    d = torch.tensor(steps, dtype=dtype)
    value, derivative = as_torch(kl_estimators.k3)(torch.zeros_like(d), d)
    exact = torch.tensor([series(float(x)) for x in d], dtype=torch.float64)
    slope = torch.tensor([-math.expm1(float(x)) for x in d], dtype=torch.float64)
    limit = 8 * torch.finfo(dtype).eps
    assert ((value.double() - exact).abs() / exact).max() < limit
    assert ((derivative.double() - slope).abs() / slope.abs()).max() < limit
    naive = d.exp() - d - 1
    if dtype == torch.float32:
        assert ((naive.double() - exact).abs() / exact).max() > 0.1


def tokens_of(
    logp: Tensor, log_ratio: Tensor, advantage: Tensor, weight: Tensor, **changes: Any
) -> SequenceTokens:
    """Valid tokens of one padded sequence."""
    given = {
        "target": logp.long(),
        "weight": weight.float(),
        "advantage": advantage.float(),
        "old_logp": logp.float() - log_ratio.float(),
        "valid": torch.ones_like(logp, dtype=torch.bool),
        "sequence_id": None,
        "sequences": 1,
        "width": logp.numel(),
    }
    return SequenceTokens(**given | changes)


def test_kernels_and_torch_read_the_same_formula(backend: str, device: str) -> None:
    """`sequence_loss` of either backend is the float64 formula times weight on a whole grid."""
    from grpo_core.backends import choose_backend

    logp, log_ratio, advantage = (v.to(device) for v in grid())
    # as the kernels see them: old_logp is a float32
    logp = logp.float().double()
    log_ratio = (logp.float() - (logp.float() - log_ratio.float())).double()
    ref_logp = logp + 0.5 * log_ratio.clamp(-2, 2)
    weight = torch.rand(logp.shape, dtype=torch.float64, device=device)
    weight[::7] = 0
    kernels = choose_backend(backend, logp.float())  # type: ignore[arg-type]
    stats = RowStats(logp.float(), logp.float(), None, logp.new_empty(0, logp.numel()))
    for name, args in SURROGATES:
        surrogate = getattr(surrogates, name)
        for kl_name in (None, *KLS):
            kl: Callable | None = getattr(kl_estimators, kl_name) if kl_name else None
            reference = ref_logp.float() if kl else None
            tokens = tokens_of(logp, log_ratio, advantage, weight, ref_logp=reference)
            for times_ratio in (False, True):
                terms = Terms(surrogate, args, kl, times_ratio, 0.3)
                ours = kernels.sequence_loss(stats, tokens, terms)
                loss, dlogp, slope = as_torch(surrogate)(logp, log_ratio, advantage, *args)
                if kl is not None:
                    value, dkl = as_torch(kl)(logp, ref_logp)
                    factor = log_ratio.exp() if times_ratio else 1.0
                    loss, dlogp = loss + 0.3 * factor * value, dlogp + 0.3 * factor * dkl
                    slope = slope + (0.3 * factor * value if times_ratio else 0.0)
                for got, truth in ((ours.loss, loss), (ours.dlogp, dlogp + slope)):
                    # terms of the size of the ratio cancel
                    allowed = 4e-6 * (1 + log_ratio.exp()) * (1 + truth.abs())
                    assert ((got.double() - weight * truth).abs() <= allowed).all(), terms
                assert not ours.dropped.any()


def test_sequence_ratio_is_transposed_right() -> None:
    """⟨u, J v⟩ by autograd of `forward` is ⟨`backward` u, v⟩, for every level and clip."""
    valid = torch.rand(40) < 0.8
    sequence = torch.randint(0, 7, (40,))
    advantage = torch.randn(40, dtype=torch.float64)
    log_ratio = torch.randn(40, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(40)
    tokens = tokens_of(
        ones, ones, advantage, ones, valid=valid, sequence_id=sequence, sequences=9, width=None
    )
    for level in get_args(RatioLevel):
        for token_clip in (None, (0.4, 0.3)):
            terms = Terms(surrogates.clip, (), None, False, 0.0, level, token_clip)
            u = torch.randn(40, dtype=torch.float64) * valid
            image = sequence_ratio.forward(log_ratio, tokens, terms)
            (theirs,) = torch.autograd.grad((u * image).sum(), log_ratio)
            ours = sequence_ratio.backward(log_ratio.detach(), u, tokens, terms)
            assert torch.allclose(ours * valid, theirs * valid)
    spoilt = torch.where(valid, log_ratio.detach(), torch.nan)
    mean = sequence_ratio.forward(
        spoilt, tokens, replace(terms, ratio_level="sequence", token_clip=None)
    )
    assert torch.isfinite(mean[valid]).all()
    first = sequence == sequence[0]
    assert torch.isclose(mean[first & valid], spoilt[first & valid].mean()).all()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"eps_low": -0.1}, "eps_low: expected a finite number >= 0, got -0.1"),
        ({"eps_low": 0.2, "eps_high": math.nan}, "eps_high: expected a finite number >= 0"),
        ({"eps_low": 0.2, "delta": 1.1}, "delta: expected >= 1 [+] eps_high = 1.2, got 1.1"),
    ],
)
def test_clip_refuses_bounds_without_meaning(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip(**bounds)
