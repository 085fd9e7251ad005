"""DPO against its paper; the closed gradient against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo_core.loss.dpo_loss import dpo_loss, sequence_logp
from tests import oracles_estimators as oracles


def pairs(B: int = 64, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Sums of log-probabilities: hundreds of nats, the policy some nats from its reference."""
    ref_chosen, ref_rejected = -200 * torch.rand(2, B, dtype=torch.float64)
    drift = 8 * torch.randn(2, B, dtype=torch.float64)
    return [
        x.to(dtype)
        for x in (ref_chosen + drift[0], ref_rejected + drift[1], ref_chosen, ref_rejected)
    ]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradient_are_the_papers(beta: float) -> None:
    given_logp = pairs()
    chosen, rejected = (x.requires_grad_() for x in given_logp[:2])
    weight = torch.rand(64)
    out = dpo_loss(*given_logp, beta=beta, weight=weight)
    h = (given_logp[0] - given_logp[2] - given_logp[1] + given_logp[3]).tolist()
    each = [oracles.dpo(x, beta) for x in h]
    truth = math.fsum(w * x for w, x in zip(weight.tolist(), each, strict=True))
    assert math.isclose(out.loss.item(), truth, rel_tol=1e-9)

    out.loss.backward()
    for leaf, closed in ((chosen, out.dlogp_chosen), (rejected, out.dlogp_rejected)):
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, closed, rtol=1e-12, atol=1e-300)
        assert not closed.requires_grad
    slope = [(oracles.dpo(x + 1e-5, beta) - oracles.dpo(x - 1e-5, beta)) / 2e-5 for x in h]
    expected = weight.double() * torch.tensor(slope, dtype=torch.float64)
    assert torch.allclose(out.dlogp_chosen, expected, rtol=1e-5, atol=1e-7)


def test_far_from_the_reference() -> None:
    """Margins of thousands of nats, either way: finite, and the right limit of the gradient."""
    chosen = torch.tensor([4000.0, -4000.0], requires_grad=True)
    zeros = torch.zeros(2)
    out = dpo_loss(chosen, zeros, zeros, zeros, beta=1.0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert chosen.grad is not None
    assert torch.equal(chosen.grad, out.dlogp_chosen)
    assert torch.allclose(chosen.grad, torch.tensor([0.0, -0.5]))


def test_metrics() -> None:
    chosen, rejected = torch.tensor([-3.0, -5.0, -4.0]), torch.tensor([-6.0, -4.0, -4.0])
    zeros = torch.zeros(3)
    out = dpo_loss(chosen, rejected, zeros - 4, zeros - 4, beta=0.5)
    assert torch.equal(out.reward_chosen, torch.tensor([0.5, -0.5, 0.0]))
    assert torch.equal(out.reward_rejected, torch.tensor([-1.0, 0.0, 0.0]))
    assert torch.equal(out.margin, torch.tensor([1.5, -0.5, 0.0]))
    assert math.isclose(out.accuracy.item(), 1 / 3, rel_tol=1e-6)


def test_on_the_reference_every_pair_costs_log_2() -> None:
    x, y = pairs(dtype=torch.float32)[:2]
    out = dpo_loss(x, y, x, y, beta=0.3)
    assert math.isclose(out.loss.item(), math.log(2), rel_tol=1e-6)
    assert torch.allclose(out.dlogp_chosen, torch.full((64,), -0.15 / 64))


@given(order=st.permutations(range(6)), shift=st.floats(-50, 50), cut=st.integers(1, 5))
def test_order_shift_and_split_of_the_batch(order: list[int], shift: float, cut: int) -> None:
    """A constant on a policy and on its reference cancels; micro-batches with 1/6 add up."""
    torch.manual_seed(0)
    all_pairs = pairs(6)
    whole = dpo_loss(*all_pairs, beta=0.2)
    sign = (1, -1, 1, -1)
    moved = [(x + k * shift)[list(order)] for x, k in zip(all_pairs, sign, strict=True)]
    mixed = dpo_loss(*moved, beta=0.2)
    assert torch.allclose(mixed.loss, whole.loss, rtol=1e-9)
    assert torch.allclose(mixed.dlogp_chosen, whole.dlogp_chosen[list(order)], rtol=1e-6, atol=1e-9)
    sixth = torch.full((6,), 1 / 6, dtype=torch.float64)
    parts = [
        dpo_loss(*(x[part] for x in all_pairs), weight=sixth[part], beta=0.2)
        for part in (slice(0, cut), slice(cut, 6))
    ]
    assert torch.allclose(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-12)


def test_no_pairs() -> None:
    none = torch.zeros(0, requires_grad=True)
    out = dpo_loss(none, none, none, none, beta=0.1)
    out.loss.backward()
    assert out.loss == 0 and out.accuracy == 0


@given(
    bits=st.lists(st.booleans(), min_size=12, max_size=12),
    mean=st.booleans(),
    order=st.permutations(range(12)),
)
def test_sums_over_packed_and_padded_tokens(bits: list[bool], mean: bool, order: list[int]) -> None:
    mask = torch.tensor(bits).view(3, 4)
    logp = torch.where(mask, -torch.arange(12.0).view(3, 4) / 7, torch.nan)
    rows = [[x for x in row if not math.isnan(x)] for row in logp.tolist()]
    truth = torch.tensor([math.fsum(r) / (max(len(r), 1) if mean else 1) for r in rows])
    padded = sequence_logp(logp, mask, mean=mean)
    ids = torch.arange(3).repeat_interleave(4)[list(order)]
    packed = sequence_logp(
        logp.reshape(-1)[list(order)], mask.reshape(-1)[list(order)], ids, sequences=4, mean=mean
    )
    assert torch.allclose(padded, truth, rtol=1e-6)
    assert torch.equal(packed[:3], padded)
    assert packed[3] == 0


def test_gradient_reaches_the_tokens() -> None:
    """dL/dlogp_t is the pair's scalar for every valid token, 0 for the others."""
    logp = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    sums = sequence_logp(logp, mask)
    zeros = torch.zeros(2, dtype=torch.float64)
    out = dpo_loss(sums[:2], sums[2:], zeros, zeros, beta=0.4)
    out.loss.backward()
    both = torch.cat([out.dlogp_chosen, out.dlogp_rejected])
    assert logp.grad is not None
    assert torch.allclose(logp.grad, both[:, None] * mask, rtol=1e-12)


def test_nothing_waits_for_the_device() -> None:
    """A tensor without values refuses every question about them."""
    x, ids = torch.zeros(6, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    sums = sequence_logp(x, x, ids, sequences=2)
    out = dpo_loss(sums, sums, sums, sums, beta=0.1)
    assert out.loss.shape == out.accuracy.shape == ()


def test_bad_input_is_named() -> None:
    x, ids = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    calls = [
        (lambda: dpo_loss(x, x, x, x, beta=0.0), r"beta: expected a finite number > 0, got 0.0"),
        (lambda: dpo_loss(x[None], x, x, x, beta=1), r"logp_chosen: .* got \[1, 4\]"),
        (
            lambda: dpo_loss(x, x[:3], x, x, beta=1),
            r"logp_rejected: expected shape \[4\], got \[3\]",
        ),
        (
            lambda: dpo_loss(x, x, x, x[:1], beta=1),
            r"ref_rejected: expected shape \[4\], got \[1\]",
        ),
        (lambda: dpo_loss(x, x, x, x, beta=1, weight=x[:2]), r"weight: .* got \[2\]"),
        (lambda: sequence_logp(x, x[:2]), r"mask: expected shape \[4\], got \[2\]"),
        (lambda: sequence_logp(x, x), r"sequence_id: expected ids and their number .* got None"),
        (lambda: sequence_logp(x, x, ids[:2], sequences=1), r"sequence_id: expected shape \[4\]"),
        (lambda: sequence_logp(x[None], x[None], ids), r"sequence_id: expected None for \[B, T\]"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
