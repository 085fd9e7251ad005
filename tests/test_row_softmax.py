"""The torch backend's softmax where a target outweighs all others, and where chunks end."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    fused_linear_loss,
    fused_loss,
    linear_logp,
    linear_token_logp,
    token_logp,
)
from grpo_core.backends.pytorch_softmax import _Others
from grpo_core.loss.reference import reference_loss
from tests.conftest import CPU_BACKEND

BONUS = RECIPES["dapo"].replace(entropy_coef=0.1)


def dominated(margin: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(logits [4, 300], target): the target lies `margin` nats above words of all kinds."""
    torch.manual_seed(0)
    logits, target = torch.randn(4, 300, dtype=torch.float64) * 3, torch.arange(4) * 50
    logits[3, 7] = -math.inf
    logits.scatter_(1, target[:, None], logits.amax(1, keepdim=True) + margin)
    return logits.to(dtype), target


@pytest.mark.parametrize("margin", [40.0, 50.0, 80.0, 110.0, 700.0])
def test_a_target_far_above_all_others(margin: float) -> None:
    """Its log-probability, −Σ of the others' odds, has all its digits; the gradient likewise."""
    logits, target = dominated(margin)
    exact = logits.double()
    mine = exact.gather(1, target[:, None])
    others = exact.scatter(1, target[:, None], -math.inf) - mine
    logp = -torch.log1p(others.exp().sum(1))
    torch.testing.assert_close(
        token_logp(logits, target, backend=CPU_BACKEND).logp.double(),
        # below the least float32 number there is only 0
        torch.where(logp > -1e-45, 0.0, logp),
        rtol=5e-6,
        atol=2e-45,
    )
    leaf = logits.clone().requires_grad_()
    given = {"objective": BONUS, "advantage": torch.ones(4), "sequence_id": torch.arange(4)}
    fused_loss(leaf, target, backend=CPU_BACKEND, **given).loss.backward()
    double = exact.requires_grad_()
    reference_loss(double, target, **given).loss.backward()
    # the target's own, 1 − p, is beyond float64; a row's gradients sum to 0
    others = double.grad.scatter(1, target[:, None], 0.0)
    expected = others.scatter(1, target[:, None], -others.sum(1, keepdim=True))
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-5, atol=1e-38)


def test_nothing_but_the_target_is_allowed() -> None:
    """All others −inf: probability 1, no entropy, no gradient, nothing dropped."""
    logits, target = torch.full((2, 70), -math.inf), torch.tensor([3, 69])
    logits.scatter_(1, target[:, None], 5.0).requires_grad_()
    out = fused_loss(
        logits, target, objective=BONUS, advantage=torch.ones(2), sequence_id=torch.arange(2)
    )
    out.loss.backward()
    assert out.logp.tolist() == out.entropy.tolist() == [0.0, 0.0]
    assert out.metrics["nonfinite_rows"] == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("V", [1, 63, 64, 65, 300])
def test_powers_do_not_depend_on_where_a_row_ends(V: int) -> None:
    """Torch may treat the end of an array differently; no word of a vocabulary lies there."""
    torch.manual_seed(1)
    rows, hole, others = torch.randn(9, V), torch.zeros(9, 1, dtype=torch.int64), _Others(0.7)
    homes = torch.empty(9, V)
    for home in (None, homes):
        others.begin()
        others.read(rows, hole, 0, 0, home)
        assert all(array.shape[1] % 64 == 0 for array in others.arrays.values())
        for row, powers in zip(rows, others.powers[0], strict=True):
            alone = _Others(0.7)
            alone.read(row[None], hole[:1], 0, 0, None)
            assert torch.equal(alone.powers[0][0], powers)


@pytest.mark.parametrize("N", [1, 21])
@pytest.mark.parametrize(("V", "masked"), [(70_016, False), (70_001, True), (33_000, True)])
def test_threads_do_not_change_a_bit(V: int, masked: bool, N: int) -> None:
    """A row is summed by one thread, even where it is alone; shares end where rows may."""
    torch.manual_seed(2)
    logits, target = torch.randn(N, V) * 3, torch.randint(0, V, (N,))
    if masked and N > 1:
        target[torch.rand(N) < 0.4] = -100
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            out = fused_loss(
                leaf,
                target,
                objective=BONUS,
                advantage=torch.ones(N),
                sequence_id=torch.arange(N) // 4,
                backend=CPU_BACKEND,
            )
            out.loss.backward()
            assert torch.get_num_threads() == threads
            found.append((out.logp, out.entropy, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for one, other in pairwise(found):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_scratch_is_float32_whatever_the_default(default: torch.dtype) -> None:
    """As are its results, to the bit, with runs of three rows between masked ones."""
    logits, target = torch.randn(40, 70), torch.arange(40)
    target[::4] = -100
    found = []
    given = {"advantage": torch.linspace(-1, 1, 40), "sequence_id": torch.arange(40)}
    for dtype in (torch.float32, default):
        leaf = logits.clone().requires_grad_()
        try:
            torch.set_default_dtype(dtype)
            out = fused_loss(leaf, target, objective=BONUS, backend=CPU_BACKEND, **given)
            out.loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((out.loss.detach(), out.logp, out.entropy, leaf.grad))
    assert all(map(torch.equal, *found))


def test_a_certain_target_whose_reference_forbids_other_words() -> None:
    """They have no probability left: the KL is the target's, and the row has no gradient."""
    logits, ref_logits = torch.zeros(2, 70), torch.zeros(2, 70)
    logits[:, 3] = torch.tensor([2000.0, 1.0])
    ref_logits[0, 5:9] = -math.inf
    leaf = logits.requires_grad_()
    out = fused_loss(
        leaf,
        torch.tensor([3, 3]),
        objective=RECIPES["grpo"].replace(kl="exact", beta=0.1),
        ref_logits=ref_logits,
        advantage=torch.ones(2),
        sequence_id=torch.arange(2),
        backend=CPU_BACKEND,
    )
    out.loss.backward()
    assert out.metrics["nonfinite_rows"] == 0
    assert out.kl[0].item() == pytest.approx(math.log(66))
    assert not leaf.grad[0].any()
    assert leaf.grad[1].all()


def test_a_masked_token_of_a_broken_sequence_has_ratio_0() -> None:
    """The ratio of the sequence is NaN, and every token that counts is left out."""
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 1] = math.nan
    out = fused_loss(
        logits,
        torch.zeros(1, 3, dtype=torch.int64),
        objective="gspo",
        advantage=torch.ones(1),
        mask=torch.tensor([[True, False, True]]),
        backend=CPU_BACKEND,
    )
    assert out.ratio[0, 1] == 0
    assert out.ratio[0, [0, 2]].isnan().all()
    assert out.metrics["nonfinite_rows"] == 2


def test_a_masked_token_has_ratio_0_whatever_its_old_logp() -> None:
    """VESPO's loss waits for its sequences: the ratio is made from vectors."""
    out = fused_loss(
        torch.zeros(1, 3, 5),
        torch.zeros(1, 3, dtype=torch.int64),
        objective="vespo",
        advantage=torch.ones(1),
        mask=torch.tensor([[False, True, False]]),
        old_logp=torch.tensor([[-1e4, -1.0, math.nan]]),
        backend=CPU_BACKEND,
    )
    assert out.ratio[0, [0, 2]].tolist() == [0.0, 0.0]
    assert out.ratio[0, 1] == pytest.approx(math.e / 5)


def test_nothing_of_the_process_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that begins meanwhile finds torch as the caller has set it up."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a setting of the whole process is changed")

    for name in (
        "manual_seed",
        "set_default_device",
        "set_default_dtype",
        "set_float32_matmul_precision",
        "set_flush_denormal",
        "set_num_interop_threads",
        "set_num_threads",
        "set_rng_state",
        "use_deterministic_algorithms",
    ):
        monkeypatch.setattr(torch, name, refuse)
    environment, state = dict(os.environ), torch.get_rng_state()
    target, advantage = torch.tensor([3, -100, 7]), torch.ones(3)
    packed = {"advantage": advantage, "sequence_id": torch.arange(3), "objective": BONUS}
    for V in (70, 40_000):
        logits, matrix = torch.zeros(3, V, requires_grad=True), torch.zeros(V, 4)
        hidden = torch.zeros(3, 4, requires_grad=True)
        token_logp(logits, target)
        linear_token_logp(hidden, matrix, target)
        fused_loss(logits, target, **packed).loss.backward()
        fused_linear_loss(hidden, matrix, target, **packed).loss.backward()
        linear_logp(hidden, matrix, target).logp.sum().backward()
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), state)
