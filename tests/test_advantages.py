"""Group-normalised advantages of both backends against the paper's formula in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import RECIPES, Estimator, GroupNorm, fused_loss, group_advantages
from grpo_core.objective.advantage import relative_advantages
from tests import oracles

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("G", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_advantages_are_the_papers(
    backend: str, device: str, G: int, scale: bool, ddof: int, dtype: torch.dtype
) -> None:
    rewards = (torch.randn(5 * G) * 3).to(dtype)
    ours = group_advantages(
        rewards.to(device), G, scale=scale, ddof=ddof, epsilon=1e-4, backend=backend
    )
    truth = oracles.group_advantage(rewards.tolist(), G, scale=scale, ddof=ddof, eps=1e-4)
    assert torch.allclose(ours.double().cpu(), truth, rtol=1e-5, atol=1e-5)
    sums = ours.view(5, G).sum(1)
    assert torch.allclose(sums, torch.zeros_like(sums), atol=1e-4)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.2, -1e6])
@pytest.mark.parametrize("G", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(backend: str, device: str, reward: float, G: int) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3, and must not become a gradient all the same."""
    rewards = torch.full((4 * G,), reward, device=device)
    for scale in (True, False):
        advantage = group_advantages(rewards, G, scale=scale, backend=backend)
        assert torch.equal(advantage, torch.zeros_like(advantage))


@given(
    rewards=st.lists(st.integers(-8, 8), min_size=4, max_size=4),
    shift=st.integers(-100, 100),
    factor=st.sampled_from([0.5, 2.0, 8.0]),
)
def test_shift_and_scale_of_rewards(rewards: list[int], shift: int, factor: float) -> None:
    """A constant added changes nothing; a factor multiplies the unscaled form exactly."""
    r = torch.tensor(rewards, dtype=torch.float32)
    plain = group_advantages(r, 4, scale=False)
    assert torch.equal(group_advantages(r + shift, 4, scale=False), plain)
    assert torch.equal(group_advantages(r * factor, 4, scale=False), plain * factor)
    scaled = group_advantages(r, 4, epsilon=0.0) if len(set(rewards)) > 1 else plain
    again = group_advantages(r * factor, 4, epsilon=0.0) if len(set(rewards)) > 1 else plain
    assert torch.allclose(again, scaled, rtol=1e-6)


def test_no_rewards_no_advantages(backend: str, device: str) -> None:
    assert group_advantages(torch.zeros(0, device=device), 4, backend=backend).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "G", "message"),
    [
        (torch.zeros(6), 4, r"group_size: expected an int that divides B = 6, or group_id, got 4"),
        (torch.zeros(6), 0, r"group_size: expected an int that divides B = 6, or group_id, got 0"),
        (torch.zeros(2, 3), 3, r"rewards: expected a floating-point tensor \[B\], got \[2, 3\]"),
        (torch.zeros(6, dtype=torch.int64), 3, r"rewards: expected a floating-point .*int64"),
        ([1.0, 2.0], 2, r"rewards: expected a tensor, got list"),
        (
            torch.tensor([0.0, torch.nan]),
            2,
            r"rewards: expected finite numbers, got nan at index 1",
        ),
        (
            torch.tensor([torch.inf, 0.0]),
            2,
            r"rewards: expected finite numbers, got inf at index 0",
        ),
    ],
)
def test_bad_input_is_named(rewards: torch.Tensor, G: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, G)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="ddof: expected 0 or 1, got 2"):
        group_advantages(torch.zeros(4), 2, ddof=2)
    with pytest.raises(ValueError, match="epsilon: expected a finite number >= 0, got -1"):
        group_advantages(torch.zeros(4), 2, epsilon=-1)


def test_without_epsilon_equal_rewards_still_give_zero(backend: str, device: str) -> None:
    """0/0 is 0: the group has nothing to say; its neighbour is ±1/√2, by n − 1."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 2.0], device=device)
    ours = group_advantages(rewards, 2, epsilon=0.0, backend=backend)
    assert ours.tolist() == pytest.approx([0.0, 0.0, -math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)
    assert ours[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", [GroupNorm(epsilon=0.0), Estimator("batch", "batch", 1, 0.0)])
def test_without_epsilon_equal_rewards_keep_their_kl(
    backend: str, device: str, estimator: Estimator
) -> None:
    """The rows stay in the loss, whose KL is k3(log ½ − log ⅓) = 2/3 − 1 − log 2/3 there."""
    logits = torch.zeros(2, 1, 2, device=device, requires_grad=True)
    out = fused_loss(
        logits,
        torch.zeros(2, 1, dtype=torch.int64, device=device),
        objective=RECIPES["grpo"].replace(advantage=estimator, beta=1.0),
        rewards=torch.ones(2, device=device),
        group_size=2,
        ref_logp=torch.full((2, 1), math.log(1 / 3), device=device),
        backend=backend,
    )
    assert out.metrics["nonfinite_rows"] == 0
    assert out.loss.item() == pytest.approx(2 / 3 - 1 - math.log(2 / 3), abs=1e-6)


@pytest.mark.parametrize(
    ("unit", "dtype"),
    [
        (1e19, torch.float32),
        (1.5e38, torch.float32),
        (1e-30, torch.float32),
        (1e38, torch.bfloat16),
        (1e200, torch.float64),
        (1e-200, torch.float64),
    ],
)
def test_the_scale_of_rewards_does_not_matter(
    backend: str, device: str, unit: float, dtype: torch.dtype
) -> None:
    """The squares of such rewards are beyond the range of their type, or vanish."""
    rewards = torch.tensor([-unit, unit, unit, 2 * unit], dtype=torch.float64).to(dtype).to(device)
    given = [-1.0, 1, 1, 2] if dtype != torch.bfloat16 else (rewards.double() / unit).tolist()
    truth = oracles.group_advantage(given, 4, scale=True, ddof=1, eps=0.0)
    ours = group_advantages(rewards, 4, epsilon=0.0, backend=backend)
    assert torch.allclose(ours.double().cpu(), truth, rtol=1e-5)
    ids = torch.zeros(4, dtype=torch.int64, device=device)
    for baseline in ("group", "batch"):
        by_id = relative_advantages(rewards, ids, Estimator(baseline, baseline, 1, 0.0))
        assert torch.allclose(by_id.double().cpu(), truth, rtol=1e-5)
    with_epsilon = group_advantages(rewards, 4, epsilon=unit, backend=backend)
    truth = oracles.group_advantage(given, 4, scale=True, ddof=1, eps=1.0)
    assert torch.allclose(with_epsilon.double().cpu(), truth, rtol=1e-5)
