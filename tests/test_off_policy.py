"""Rules for tokens that another policy sampled, against plain loops over sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_core.objective.off_policy import Rejection, SamplerCorrection, find_off_policy
from tests import oracles_estimators as oracles

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
OLD = torch.tensor(
    [
        [-1.0, -0.5, -2.0, -1.0],
        [-0.1, -0.2, -4.0, -1.0],
        [-1.0, -1.0, -1.0, -1.0],
        [-3.0, -1.5, -9.0, -1.0],
        [-0.5, -1.0, -1.5, -2.0],
    ]
)
GAP = torch.tensor(
    [
        [0.05, -0.9, 1.1, 7.0],
        [0.01, 9.0, -0.02, 0.03],
        [5.0, 5.0, 5.0, 5.0],
        [7.0, 0.4, 7.0, 7.0],
        [-0.3, -0.4, -0.2, -0.5],
    ]
)
LEVELS = ["token", "sequence", "geometric"]
ACTIONS = ["truncate", "zero", "reject"]


SEQUENCE = torch.arange(5)[:, None].expand(5, 4)


def correct(
    old: Tensor, sampler: Tensor, mask: Tensor, sequence: Tensor = SEQUENCE, **rule: Any
) -> tuple[Tensor, Tensor]:
    """(factor, mask) of a `SamplerCorrection`, in the shape of `mask`."""
    vectors = (x.reshape(-1) for x in (old, sampler, mask != 0, sequence))
    factor, kept = SamplerCorrection(**rule).apply(*vectors, sequences=20)
    return factor.view(mask.shape), kept.view(mask.shape)


def select_off_policy(new: Tensor, old: Tensor, A: Tensor, mask: Tensor, delta: float) -> Tensor:
    """`find_off_policy` of padded [B, T]; A is [B]."""
    B, T = mask.shape
    sequence = torch.arange(B).repeat_interleave(T)
    vectors = (new.reshape(-1), old.reshape(-1), A.repeat_interleave(T), mask.reshape(-1) != 0)
    return find_off_policy(*vectors, sequence, B, delta).view(B, T)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.5, 1.3), (0.9, math.inf)])
def test_weights_are_the_papers(level: str, action: str, low: float, high: float) -> None:
    old, sampler = OLD.double(), (OLD - GAP).double()
    sampler[4, 1] = torch.nan
    sampler[1, 2] = -torch.inf
    sampler[0, 3] = torch.nan
    factor, kept = correct(old, sampler, MASK, level=level, action=action, low=low, high=high)
    arrays = (old.numpy(), sampler.numpy(), MASK.numpy(), level)
    expected, left = oracles.sampler_weights(*arrays, action, low, high)
    assert torch.allclose(factor.double(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert torch.equal(kept, torch.tensor(left))
    raw, scored = oracles.sampler_weights(*arrays, "truncate", 0, math.inf)
    assert (scored & ((raw < low) | (raw > high))).any() or (low, high) != (0.5, 1.3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sampler_that_agrees_needs_no_correction(level: str) -> None:
    """Bounds are inclusive."""
    factor, kept = correct(OLD, OLD, MASK, level=level, action="reject", low=1.0, high=1.0)
    assert torch.equal(factor, MASK.float())
    assert torch.equal(kept, MASK.bool())


@given(
    level=st.sampled_from(LEVELS),
    action=st.sampled_from(ACTIONS),
    bits=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_order_ids_and_masked_tokens_change_nothing(
    level: str, action: str, bits: list[bool]
) -> None:
    mask = torch.tensor(bits).view(5, 4)
    rule = {"level": level, "action": action, "low": 0.6, "high": 1.5}
    sampler = torch.where(mask, OLD - GAP, torch.nan)
    factor, kept = correct(OLD, sampler, mask, **rule)
    order = torch.arange(19, -1, -1)
    reversed_ = [x.reshape(-1)[order] for x in (OLD, sampler, mask, 17 - SEQUENCE)]
    removed = (OLD[mask], sampler[mask], mask[mask], SEQUENCE[mask])
    for vectors, places in ((reversed_, order), (removed, mask.reshape(-1))):
        other_factor, other_kept = correct(*vectors, **rule)
        assert torch.allclose(factor.reshape(-1)[places], other_factor, rtol=1e-6)
        assert torch.equal(kept.reshape(-1)[places], other_kept)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_hopeless_ratios_stay_finite(level: str, sign: int) -> None:
    """A difference of 3,000 nats, and of 60 a token in a product of 50."""
    old, ones = torch.zeros(2, 50), torch.ones(2, 50)
    sampler = torch.stack([torch.full((50,), -60.0), torch.zeros(50)]) * sign
    sampler[1, 7] = -3000.0 * sign
    sequence = torch.arange(2).repeat_interleave(50)
    factor, kept = correct(old, sampler, ones, sequence, level=level, high=math.inf)
    assert factor.isfinite().all() and kept.all()
    _, kept = correct(old, sampler, ones, sequence, level=level, action="reject", low=1e-3)
    assert not kept[0].any()


def test_nothing_carries_a_gradient() -> None:
    old = OLD.clone().requires_grad_()
    assert not correct(old, OLD - GAP, MASK)[0].requires_grad


@pytest.mark.parametrize("delta", [-1.0, 0.0, 0.3, 1.0, math.inf])
def test_off_policy_sequences_are_the_papers(delta: float) -> None:
    new, A = (OLD + GAP).double(), torch.tensor([-1.0, -2.0, -1.0, 1.0, -0.5])
    new[4] -= 1.0
    dropped = select_off_policy(new, OLD.double(), A, MASK, delta)
    truth = oracles.off_policy(new.numpy(), OLD.double().numpy(), A.numpy(), MASK.numpy(), delta)
    assert torch.equal((MASK.bool() & ~dropped).double(), torch.tensor(truth))


def test_off_policy_sequences_at_the_edge() -> None:
    """Exactly δ is kept, so is A = 0; a token that nobody can score is not in the mean."""
    old, new = torch.tensor([[-1.0, -1.0, torch.nan]] * 3), torch.tensor([[-1.5, -1.5, -9.0]] * 3)
    A, mask = torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3, 3)
    assert not select_off_policy(new, old, A, mask, 0.5).any()
    dropped = select_off_policy(new, old, A, mask, 0.49)
    assert dropped.tolist() == [[True, True, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("rule", [*map(SamplerCorrection, LEVELS), Rejection("k3", "max")], ids=str)
def test_nothing_there(rule: SamplerCorrection | Rejection) -> None:
    none, ids = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    factor, kept = rule.apply(none[:0], none[:0], none[:0] != 0, ids[:0], 0)
    assert factor.shape == kept.shape == (0,)
    factor, kept = rule.apply(none / 0, none / 0, none != 0, ids, 1)
    assert torch.equal(factor, none) and not kept.any()


def test_nothing_waits_for_the_device() -> None:
    """A tensor without values refuses every question about them."""
    x, ids = torch.zeros(6, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    rules = [SamplerCorrection(level, action) for level in LEVELS for action in ACTIONS]
    for rule in (*rules, *(Rejection("k2", over) for over in ("token", "sum", "mean", "max"))):
        assert rule.apply(x, x, x != 0, ids, 2)[0].shape == (6,)
    assert find_off_policy(x, x, x, x != 0, ids, 2, 0.1).shape == (6,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, r"level: expected one of .*'word'"),
        ({"action": "clip"}, r"action: expected one of .*'clip'"),
        ({"low": 3}, r"low: expected 0 <= low <= high, got 3 and"),
    ],
)
def test_bad_rules_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerCorrection(**options)
