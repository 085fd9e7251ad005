"""Per-token rewards, generalised advantages and the clipped value loss, against their papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_core.objective.value import explained_variance, gae, rewards_with_kl, value_loss, whiten
from tests import oracles_estimators as oracles

# padded at the end, a hole in the middle, nothing at all, holes at both ends, everything
MASK = torch.tensor(
    [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]
)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def poisoned(vector: Tensor, mask: Tensor = MASK) -> Tensor:
    """NaN wherever nobody may look."""
    return torch.where(mask != 0, vector, torch.nan)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("cut_off", [False, True])
def test_gae_is_the_papers(gamma: float, lam: float, cut_off: bool) -> None:
    r, V, last = numbers(5, 5), numbers(5, 5), numbers(5)
    given_values = torch.cat([poisoned(V), last[:, None]], 1) if cut_off else poisoned(V)
    ours = gae(poisoned(r), given_values, MASK, gamma=gamma, lam=lam)
    bootstrap = last.numpy() if cut_off else None
    truth = oracles.gae(r.numpy(), V.numpy(), MASK.numpy(), gamma, lam, bootstrap)
    for mine, theirs in zip(ours, truth, strict=True):
        assert torch.allclose(mine, torch.tensor(theirs), rtol=0, atol=1e-12)


@given(width=st.integers(5, 12), gamma=st.sampled_from([1.0, 0.7]))
def test_padding_and_masking_move_nothing(width: int, gamma: float) -> None:
    """Padding is as good as absent, and a hole in the middle as good as cut out."""
    torch.manual_seed(width)
    r, V = numbers(5, width), numbers(5, width)
    mask = torch.zeros(5, width, dtype=torch.bool)
    mask[:, :5] = MASK != 0
    wide = gae(r, V, mask, gamma=gamma, whitened=True)
    narrow = gae(r[:, :5], V[:, :5], MASK, gamma=gamma, whitened=True)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.allclose(a[:, :5], b, rtol=0, atol=1e-12)
        assert not a[~mask].any()
    whole = gae(r, V, mask, gamma=gamma)
    valid = [0, 3, 4]
    cut_out = gae(r[1:2, valid], V[1:2, valid], torch.ones(1, 3), gamma=gamma)
    for a, b in zip(whole, cut_out, strict=True):
        assert torch.allclose(a[1, valid], b[0], rtol=0, atol=1e-12)


def test_whitened_advantages() -> None:
    """Mean 0 and variance 1 with n − 1 by the valid tokens; returns are left alone."""
    r, V = numbers(5, 5), numbers(5, 5)
    advantage, returns = gae(r, V, MASK, whitened=True)
    plain, same = gae(r, V, MASK)
    kept = advantage[MASK != 0]
    assert abs(kept.mean()) < 1e-12
    assert math.isclose(kept.var(), 1, rel_tol=1e-6)
    assert torch.equal(returns, same)
    assert torch.allclose(
        kept * plain[MASK != 0].std(), (plain - plain[MASK != 0].mean())[MASK != 0]
    )
    assert torch.equal(whiten(torch.full((4,), 0.1), torch.ones(4)), torch.zeros(4))
    assert torch.equal(whiten(torch.tensor([3.0, torch.nan]), torch.tensor([1, 0])), torch.zeros(2))


def test_the_discounted_reward_to_come() -> None:
    r = torch.tensor([[0.0, 0.0, 4.0, 9.0]])
    advantage, returns = gae(r, torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]), gamma=0.5, lam=1)
    assert torch.equal(advantage, torch.tensor([[1.0, 2.0, 4.0, 0.0]]))
    assert torch.equal(returns, advantage)


def test_a_long_completion() -> None:
    """The scan takes 14 steps for what the recursion does in 9,000."""
    r, V = numbers(1, 9000), numbers(1, 9000)
    ours, _ = gae(r, V, torch.ones(1, 9000), gamma=0.999, lam=0.98)
    carried, following, truth = 0.0, 0.0, []
    for reward, value in zip(r[0].flip(0).tolist(), V[0].flip(0).tolist(), strict=True):
        carried = reward + 0.999 * following - value + 0.999 * 0.98 * carried
        following = value
        truth.append(carried)
    assert torch.allclose(
        ours[0].flip(0), torch.tensor(truth, dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rewards_with_kl_are_the_papers(kl: str, beta: float) -> None:
    R, logp, ref = numbers(5), numbers(5, 5) - 2, numbers(5, 5) - 2
    alive = torch.where(torch.arange(5) == 2, torch.nan, R)
    ours = rewards_with_kl(alive, poisoned(logp), poisoned(ref), MASK, beta=beta, kl=kl)  # type: ignore[arg-type]
    truth = oracles.rewards_with_kl(
        R.numpy(), logp.numpy(), ref.numpy(), MASK.numpy(), beta=beta, kl=kl
    )
    assert torch.allclose(ours, torch.tensor(truth), rtol=0, atol=1e-12)
    # with k1 the sum is the sequence's reward less beta times its log-ratio
    if kl == "k1":
        kept = torch.where(MASK != 0, logp - ref, 0.0).sum(1)
        total = torch.where(MASK.any(1), R, 0.0) - beta * kept
        assert torch.allclose(ours.sum(1), total)


def test_hopeless_tokens_have_a_finite_price() -> None:
    logp, ref = torch.full((1, 2), -500.0), torch.zeros(1, 2)
    reward = rewards_with_kl(torch.ones(1), logp, ref, torch.ones(1, 2), beta=1.0, kl="k3")
    assert reward.isfinite().all()


@pytest.mark.parametrize("eps", [0.2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_loss_is_the_codes(eps: float, dtype: torch.dtype) -> None:
    V, old, R = (numbers(5, 5).to(dtype) for _ in range(3))
    weight = MASK * torch.rand(5, 5)
    V.requires_grad_()
    ours = value_loss(poisoned(V), poisoned(old), poisoned(R), weight, eps=eps)
    arrays = [x.detach().double().numpy() for x in (V, old, R, weight)]
    truth = oracles.value_loss(*arrays, eps=eps)
    assert math.isclose(ours.loss.item(), truth, rel_tol=1e-6)

    ours.loss.backward()
    assert V.grad is not None
    for index in ((0, 1), (1, 3), (4, 4), (0, 4)):
        up, down = arrays[0].copy(), arrays[0].copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = oracles.value_loss(up, *arrays[1:], eps=eps)
        slope = (slope - oracles.value_loss(down, *arrays[1:], eps=eps)) / 2e-6
        assert math.isclose(V.grad[index].item(), slope, rel_tol=1e-4, abs_tol=1e-7)


def test_value_clipping_stops_the_gradient_and_is_counted() -> None:
    """V moved 1 from V_old, towards a return beyond: the clipped loss is the larger, and flat."""
    V = torch.tensor([1.0, 0.1, 1.0, 1.0], requires_grad=True)
    returns = torch.tensor([5.0, 5.0, -5.0, 5.0])
    weight = torch.tensor([0.5, 0.25, 0.125, 0.0])
    out = value_loss(V, torch.zeros(4), returns, weight, eps=0.2)
    out.loss.backward()
    assert math.isclose(
        out.loss.item(), (0.5 * 4.8**2 + 0.25 * 4.9**2 + 0.125 * 36) / 2, rel_tol=1e-6
    )
    assert V.grad is not None
    assert torch.allclose(V.grad, torch.tensor([0.0, 0.25 * -4.9, 0.125 * 6.0, 0.0]))
    assert math.isclose(out.clip_fraction.item(), 1 / 3, rel_tol=1e-6)


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    mask = torch.tensor([1, 1, 1, 0])
    assert explained_variance(returns + 7, returns, mask) == 1
    assert explained_variance(torch.zeros(4), returns, mask) == 0
    assert math.isclose(explained_variance(returns / 2, returns, mask), 0.75)
    assert explained_variance(returns, torch.ones(4), mask).isnan()


def test_nothing_there() -> None:
    none = torch.zeros(2, 3)
    for vector in gae(poisoned(none, none), poisoned(none, none), none, whitened=True):
        assert torch.equal(vector, none)
    assert gae(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))[0].shape == (0, 3)
    assert gae(torch.zeros(2, 0), torch.zeros(2, 1), torch.zeros(2, 0))[0].shape == (2, 0)
    assert torch.equal(rewards_with_kl(torch.ones(2), none, none, none, beta=1.0), none)
    values = torch.zeros(2, 3, requires_grad=True)
    out = value_loss(values, none, none, none, eps=0.2)
    out.loss.backward()
    assert values.grad is not None and not values.grad.any() and out.clip_fraction == 0


def test_nothing_waits_for_the_device() -> None:
    """A tensor without values refuses every question about them."""
    x, mask = torch.zeros(2, 3, device="meta"), torch.ones(2, 3, device="meta")
    assert rewards_with_kl(x[:, 0], x, x, mask, beta=0.1, kl="k3").shape == (2, 3)
    assert gae(x, x, mask, whitened=True)[0].shape == (2, 3)
    assert value_loss(x, x, x, mask, eps=0.2).loss.shape == ()


def test_bad_input_is_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    bad = torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])
    calls = [
        (lambda: gae(x, x, mask, gamma=1.1), r"gamma: expected a number in \[0, 1\], got 1.1"),
        (lambda: gae(x, x, mask, lam=-1), r"lam: expected a number in \[0, 1\], got -1"),
        (
            lambda: gae(x, x[:, :2], mask),
            r"values: expected shape \[2, 3\] or \[2, 4\], got \[2, 2\]",
        ),
        (lambda: gae(x[0], x, mask), r"rewards: expected a padded batch \[B, T\], got \[3\]"),
        (lambda: gae(x, x, mask[:1]), r"mask: expected shape \[2, 3\], got \[1, 3\]"),
        (lambda: gae(bad, x, mask), r"rewards: expected finite numbers, got nan at index \[1, 1\]"),
        (
            lambda: gae(x, bad.log(), mask),
            r"values: expected finite numbers, got -inf at index \[0, 0\]",
        ),
        (lambda: gae(x.long(), x, mask), r"rewards: expected a floating-point tensor, got .*int64"),
        (lambda: rewards_with_kl(x, x, x, mask, beta=1.0), r"rewards: expected shape \[2\]"),
        (
            lambda: rewards_with_kl(bad[:, 1], x, x, mask, beta=1.0),
            r"rewards: expected finite numbers, got nan at index 1",
        ),
        (lambda: rewards_with_kl(x[:, 0], x, bad, mask, beta=1.0), r"ref_logp: expected finite"),
        (lambda: rewards_with_kl(x[:, 0], x, x, mask, beta=-1.0), r"beta: expected a finite .*-1"),
        (
            lambda: rewards_with_kl(x[:, 0], x, x, mask, beta=1.0, kl="k4"),  # type: ignore[arg-type]
            r"kl: expected one of .*k3.* got 'k4'",
        ),
        (lambda: value_loss(x, x, x, mask, eps=0), r"eps: expected a number > 0, got 0"),
        (lambda: value_loss(x, x, x[:1], mask, eps=1), r"returns: expected shape \[2, 3\]"),
        (
            lambda: value_loss(x, x, x, mask[0], eps=1),
            r"weight: expected shape \[2, 3\], got \[3\]",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
