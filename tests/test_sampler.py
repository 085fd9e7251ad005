"""Corrections for tokens that another program sampled, against plain loops over sequences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_core.objective.sampler import Correction, off_policy_mask, sampler_correction
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


def same(one: Correction, other: Correction, places: Tensor) -> bool:
    """Whether two corrections agree at the given places of one, in order, and in their counts."""
    counts = ("nonfinite", "truncated", "rejected")
    return (
        torch.allclose(one.factor[places], other.factor.reshape(-1), rtol=1e-6)
        and torch.equal(one.mask[places], other.mask.reshape(-1))
        and all(getattr(one, name) == getattr(other, name) for name in counts)
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.5, 1.3), (0.9, math.inf)])
def test_weights_are_the_papers(level: str, action: str, low: float, high: float) -> None:
    old, sampler = OLD.double(), (OLD - GAP).double()
    sampler[4, 1] = torch.nan
    sampler[1, 2] = -torch.inf
    sampler[0, 3] = torch.nan
    ours = sampler_correction(
        old,
        sampler,
        MASK,
        level=level,  # type: ignore[arg-type]
        action=action,  # type: ignore[arg-type]
        low=low,
        high=high,
    )
    factor, left = oracles.sampler_weights(
        old.numpy(), sampler.numpy(), MASK.numpy(), level, action, low, high
    )
    assert torch.allclose(ours.factor.double(), torch.tensor(factor), rtol=1e-6, atol=0)
    assert torch.equal(ours.mask, torch.tensor(left))
    assert ours.nonfinite == 2, "the NaN under the mask is nobody's business"
    raw, kept = oracles.sampler_weights(
        old.numpy(), sampler.numpy(), MASK.numpy(), level, "truncate", 0, math.inf
    )
    outside = int((kept & ((raw < low) | (raw > high))).sum())
    assert outside > 0 or (low, high) != (0.5, 1.3)
    cut = (outside, 0) if action == "truncate" else (0, outside)
    assert (int(ours.truncated), int(ours.rejected)) == cut


@pytest.mark.parametrize("level", LEVELS)
def test_a_sampler_that_agrees_needs_no_correction(level: str) -> None:
    bound = {"low": 1.0, "high": 1.0, "action": "reject"}
    ours = sampler_correction(OLD, OLD.clone(), MASK, level=level, **bound)  # type: ignore[arg-type]
    assert torch.equal(ours.factor, MASK.float())
    assert torch.equal(ours.mask, MASK.bool())
    assert ours.nonfinite == ours.truncated == ours.rejected == 0


@given(
    level=st.sampled_from(LEVELS),
    action=st.sampled_from(ACTIONS),
    bits=st.lists(st.booleans(), min_size=20, max_size=20),
    padding=st.integers(0, 3),
)
def test_packed_padded_and_removed_are_one(
    level: str, action: str, bits: list[bool], padding: int
) -> None:
    """Width does not matter; nor do packing, order, and names of sequences, or what is masked."""
    mask = torch.tensor(bits).view(5, 4)
    options = {"level": level, "action": action, "low": 0.6, "high": 1.5}
    narrow = sampler_correction(OLD, OLD - GAP, mask, **options)  # type: ignore[arg-type]
    sequence = torch.arange(5)[:, None].expand(5, 4)

    more = torch.full((5, padding), torch.nan)
    wide = sampler_correction(
        torch.cat([OLD, more], 1),
        torch.cat([OLD - GAP, more], 1),
        torch.cat([mask, more.isfinite()], 1),
        **options,  # type: ignore[arg-type]
    )
    everywhere = torch.cat([torch.ones_like(mask), more.isfinite()], 1)
    assert same(wide, narrow, everywhere)

    order = torch.arange(19, -1, -1)
    packed = sampler_correction(
        OLD.reshape(-1)[order],
        (OLD - GAP).reshape(-1)[order],
        mask.reshape(-1)[order],
        sequence_id=17 - sequence.reshape(-1)[order],
        **options,  # type: ignore[arg-type]
    )
    assert same(packed, narrow, order)

    removed = sampler_correction(
        OLD[mask],
        (OLD - GAP)[mask],
        mask[mask],
        sequence_id=sequence[mask].unique(return_inverse=True)[1],
        **options,  # type: ignore[arg-type]
    )
    assert same(narrow, removed, mask)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_hopeless_ratios_stay_finite(level: str, sign: int) -> None:
    """A difference of 3,000 nats, and of 60 a token in a product of 50."""
    old = torch.zeros(2, 50)
    sampler = torch.stack([torch.full((50,), -60.0), torch.zeros(50)]) * sign
    sampler[1, 7] = -3000.0 * sign
    ours = sampler_correction(old, sampler, torch.ones(2, 50), level=level, high=math.inf)  # type: ignore[arg-type]
    assert ours.factor.isfinite().all()
    assert ours.nonfinite == 0
    rejected = sampler_correction(
        old, sampler, torch.ones(2, 50), level=level, action="reject", low=1e-3
    )  # type: ignore[arg-type]
    assert not rejected.mask[0].any()


def test_nothing_carries_a_gradient() -> None:
    old = OLD.clone().requires_grad_()
    assert not sampler_correction(old, OLD - GAP, MASK).factor.requires_grad
    assert not off_policy_mask(old, OLD, torch.ones(5), MASK, delta=0.1).factor.requires_grad


@pytest.mark.parametrize("delta", [-1.0, 0.0, 0.3, 1.0, math.inf])
def test_off_policy_mask_is_the_papers(delta: float) -> None:
    new, A = (OLD + GAP).double(), torch.tensor([-1.0, -2.0, -1.0, 1.0, -0.5])
    new[4] -= 1.0
    ours = off_policy_mask(new, OLD.double(), A, MASK, delta=delta)
    truth = oracles.off_policy(new.numpy(), OLD.double().numpy(), A.numpy(), MASK.numpy(), delta)
    assert torch.equal(ours.factor.double(), torch.tensor(truth))
    assert torch.equal(ours.mask, MASK.bool())
    assert int(ours.rejected) == int(MASK.sum() - truth.sum())
    per_token = A[:, None].expand(5, 4)
    assert torch.equal(off_policy_mask(new, OLD, per_token, MASK, delta=delta).factor, ours.factor)
    packed = off_policy_mask(
        new.reshape(-1),
        OLD.reshape(-1),
        per_token.reshape(-1),
        MASK.reshape(-1),
        delta=delta,
        sequence_id=torch.arange(5).repeat_interleave(4),
    )
    assert torch.equal(packed.factor.view(5, 4), ours.factor)


def test_off_policy_mask_at_the_edge() -> None:
    """Exactly δ is kept, so is A = 0; a token that nobody can score leaves the mean."""
    old, new = torch.tensor([[-1.0, -1.0, torch.nan]] * 3), torch.tensor([[-1.5, -1.5, -9.0]] * 3)
    A, mask = torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3, 3)
    kept = off_policy_mask(new, old, A, mask, delta=0.5)
    assert torch.equal(kept.factor, torch.tensor([[1.0, 1.0, 0.0]] * 3))
    assert (kept.nonfinite, kept.rejected) == (3, 0)
    tighter = off_policy_mask(new, old, A, mask, delta=0.49)
    assert torch.equal(tighter.factor[0], torch.zeros(3))
    assert torch.equal(tighter.factor[1:], kept.factor[1:])
    assert tighter.rejected == 2


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_there(level: str) -> None:
    none = torch.zeros(2, 3)
    for shape in ((0, 4), (4, 0)):
        empty = torch.zeros(shape)
        assert sampler_correction(empty, empty, empty, level=level).factor.shape == shape  # type: ignore[arg-type]
    packed = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    assert sampler_correction(packed, packed, packed, level=level, sequence_id=ids).mask.shape == (
        0,
    )  # type: ignore[arg-type]
    masked = sampler_correction(none / 0, none / 0, none, level=level)  # type: ignore[arg-type]
    assert torch.equal(masked.factor, none) and not masked.mask.any() and masked.nonfinite == 0


def test_nothing_waits_for_the_device() -> None:
    """A tensor without values refuses every question about them."""
    x = torch.zeros(2, 3, device="meta")
    flat, ids = x.reshape(-1), torch.zeros(6, dtype=torch.int64, device="meta")
    for level in LEVELS:
        for action in ACTIONS:
            options = {"level": level, "action": action}
            assert sampler_correction(x, x, x, **options).factor.shape == (2, 3)  # type: ignore[arg-type]
            packed = sampler_correction(flat, flat, flat, sequence_id=ids, **options)  # type: ignore[arg-type]
            assert packed.rejected.shape == ()
    assert off_policy_mask(x, x, x[:, 0], x, delta=0.1).factor.shape == (2, 3)


def test_unseen_wrong_ids_are_masked() -> None:
    old = torch.tensor([0.3, 0.0, 0.4])
    ids = torch.tensor([-1, 0, 3])
    ours = sampler_correction(
        old, torch.zeros(3), torch.ones(3), level="sequence", sequence_id=ids, validate=False
    )
    assert torch.equal(ours.factor, torch.tensor([0.0, 1.0, 0.0]))


def test_bad_input_is_named() -> None:
    x, ones = torch.zeros(2, 3), torch.ones(2, 3)
    flat, ids = x.reshape(-1), torch.arange(6)
    calls = [
        (lambda: sampler_correction(x, x, ones, level="word"), r"level: expected one of .*'word'"),  # type: ignore[arg-type]
        (
            lambda: sampler_correction(x, x, ones, action="clip"),
            r"action: expected one of .*'clip'",
        ),  # type: ignore[arg-type]
        (
            lambda: sampler_correction(x, x, ones, low=3),
            r"low: expected 0 <= low <= high, got 3 and",
        ),
        (
            lambda: sampler_correction(x.long(), x, ones),
            r"old_logp: expected a floating-point .*int64",
        ),
        (lambda: sampler_correction(x, x[:1], ones), r"sampler_logp: expected shape \[2, 3\]"),
        (lambda: sampler_correction(x, x, ones[0]), r"mask: expected shape \[2, 3\], got \[3\]"),
        (
            lambda: sampler_correction(flat, flat, flat, level="sequence"),
            r"sequence_id: expected \[N\] for packed tokens, got None",
        ),
        (
            lambda: sampler_correction(x, x, ones, level="sequence", sequence_id=ids),
            r"sequence_id: expected None for \[B, T\], got a tensor",
        ),
        (
            lambda: sampler_correction(flat, flat, flat, level="sequence", sequence_id=ids + 1),
            r"sequence_id: expected integers in \[0, N = 6\), got 6 at row 5",
        ),
        (
            lambda: sampler_correction(flat, flat, flat, level="sequence", sequence_id=flat),
            r"sequence_id: expected an integer tensor, got .*float32",
        ),
        (
            lambda: off_policy_mask(x, x, torch.zeros(3), ones, delta=0.1),
            r"advantage: expected shape \[2, 3\] or \[2\], got \[3\]",
        ),
        (
            lambda: off_policy_mask(x, x, x, ones, delta=math.nan),
            r"delta: expected a number, got nan",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
