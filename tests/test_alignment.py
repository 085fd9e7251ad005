"""Rows anywhere between two multiples of 16 bytes: the same bits, and nothing written outside."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from grpo_core import fused_loss, token_logp
from grpo_core.backends import triton as triton_backend
from grpo_core.kernels import kl, surrogates
from grpo_core.kernels.records import RowGradients, Rows, Terms, TokenVectors
from tests.combinations import slow
from tests.conftest import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
# between rows, so that a write outside of one shows
MARK = 77.0
LEADS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}
CLIP = Terms(surrogates.clip, (0.2, 0.2, math.inf), None, False, 0.0)


def at_lead(rows: Tensor, lead: int) -> tuple[Tensor, Tensor]:
    """(the rows in memory of their own, the first `lead` logits behind 16 bytes; that memory)."""
    N, V = rows.shape
    width = 16 // rows.element_size()
    apart = (V // width + 2) * width
    memory = torch.full((N * apart + 2 * width,), MARK, dtype=rows.dtype, device=DEVICE)
    start = (-memory.data_ptr() // rows.element_size()) % width + lead
    view = memory[start:].as_strided((N, V), (apart, 1), start)
    view.copy_(rows)
    assert view.data_ptr() % 16 == lead * rows.element_size()
    return view, memory


def marks(memory: Tensor) -> int:
    """How many elements nobody has written."""
    return int((memory == MARK).sum())


def loss_of(logits: Tensor, target: Tensor, dlogits: Tensor | None) -> list[Tensor]:
    """`row_loss` with an entropy term, in vectors."""
    ones = torch.ones(len(target), device=DEVICE)
    tokens = TokenVectors(target, ones, advantage=ones, entropy_weight=0.1 * ones)
    found = triton_backend.row_loss(Rows(logits, 0.8), tokens, CLIP, dlogits)
    return [found.loss, found.logp, found.entropy, found.dlogp, found.dropped, found.state]


def drawn(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets spread over the vocabulary, its ends among them; one is masked."""
    logits = (3 * torch.randn(N, V)).to(dtype).to(DEVICE)
    target = torch.linspace(0, V - 1, N, device=DEVICE).long()
    target[N // 2] = -100
    return logits, target


# 3 or 6 tiles but for one logit, so that leads of 0 and 1 end before and at the edge of a tile
@pytest.mark.parametrize(
    ("dtype", "V"),
    [
        (torch.float32, 3071),
        (torch.bfloat16, 3),
        *slow(
            (torch.float32, 3), (torch.bfloat16, 3071), (torch.float16, 3), (torch.float16, 3071)
        ),
    ],
)
def test_every_alignment_has_the_same_bits(dtype: torch.dtype, V: int) -> None:
    """Statistics, loss, gradient, in place and beside, at every lead of either; nothing outside."""
    logits, target = drawn(3, V, dtype)
    logits[0, V // 2] = math.nan
    expected = torch.empty_like(logits)
    vectors = loss_of(logits, target, expected)
    stats = triton_backend.row_stats(Rows(logits, 0.8), target)
    factor = torch.tensor(-3.0, device=DEVICE)
    for lead in range(LEADS[dtype]):
        rows, memory = at_lead(logits, lead)
        before = marks(memory)
        out, beside = at_lead(logits, (3 * lead + 1) % LEADS[dtype])
        found = triton_backend.row_stats(Rows(rows, 0.8), target)
        assert torch.equal(found.state.nan_to_num(), stats.state.nan_to_num())
        assert torch.equal(found.entropy.nan_to_num(), stats.entropy.nan_to_num())
        for dlogits in (out, rows):
            again = loss_of(rows, target, dlogits)
            for one, other in zip(again, vectors, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num()), lead
            assert torch.equal(dlogits, expected), lead
        triton_backend.row_scale(rows, factor)
        assert torch.equal(rows, (expected.float() * factor).to(dtype))
        assert marks(memory) == marks(beside) == before


@pytest.mark.slow
def test_small_vocabularies() -> None:
    """V = 1..20, targets at both ends and between: logp, entropy, gradient against float64."""
    for V in range(1, 21):
        lead = 3 * V % 8
        target = torch.tensor(sorted({0, V // 2, V - 1}), device=DEVICE)
        N = len(target)
        logits = torch.randn(1, V, device=DEVICE).expand(N, V).bfloat16()
        rows, _ = at_lead(logits, lead)
        dlogits, memory = at_lead(torch.full_like(logits, MARK), (lead + 2) % 8)
        found = triton_backend.row_stats(Rows(rows), target)
        row_gradients = RowGradients(torch.ones(N, device=DEVICE), None, None)
        triton_backend.row_dlogits(Rows(rows), target, row_gradients, found, dlogits)
        log_p = torch.log_softmax(logits.double(), 1)
        logp = log_p.gather(1, target[:, None])[:, 0]
        assert torch.allclose(found.logp.double(), logp, rtol=1e-6, atol=1e-6)
        entropy = -(log_p.exp() * log_p).sum(1)
        assert torch.allclose(found.entropy.double(), entropy, rtol=1e-6, atol=1e-6)
        gradient = torch.nn.functional.one_hot(target, V) - log_p.exp()
        assert torch.allclose(dlogits.double(), gradient, rtol=2**-8, atol=1e-6)
        assert marks(memory) == memory.numel() - N * V


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_targets_at_the_edges_of_tiles(dtype: torch.dtype) -> None:
    """One row, its target moved over every place where a tile or a step of tiles begins or ends."""
    tile = 128 * 16 // dtype.itemsize
    V = 5 * tile + 3
    row = (2 * torch.randn(1, V)).to(dtype).to(DEVICE)
    edges = {k * tile + near for k in (0, 1, 3, 4, 5) for near in (-1, 0, 2)} & {*range(V)}
    target = torch.tensor(sorted(edges), device=DEVICE)
    logits = row.expand(len(edges), V)
    expected = torch.log_softmax(row.double(), 1)[0, target]
    for lead in (0, 1, LEADS[dtype] - 1):
        rows, _ = at_lead(logits, lead)
        logp = triton_backend.row_stats(Rows(rows), target).logp
        assert torch.allclose(logp.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("near", [True, *slow(False)])
def test_the_exact_kl_of_rows_that_lie_differently(near: bool) -> None:
    """The same bits at every pair of leads; those of logp are the ones without a reference.

    Far from its anchor, a row of either policy is read again: also then.
    """
    logits, target = drawn(4, 1500, torch.bfloat16)
    ref_logits = logits + 0.3 * torch.randn_like(logits)
    if not near:
        # behind the first tile: of π alone, of π_ref alone, of both
        logits[0, 1400] = ref_logits[1, 1400] = logits[3, 1300] = ref_logits[3, 1300] = 90.0
        target[:] = 5
    plain = triton_backend.row_stats(Rows(logits), target)
    ones = torch.ones(4, device=DEVICE)
    tokens = TokenVectors(target, ones, advantage=ones)
    terms = Terms(surrogates.clip, (0.2, 0.2, math.inf), kl.k3, False, 0.5)
    p, q = (torch.log_softmax(x.double(), 1) for x in (logits, ref_logits))
    expected = (p.exp() * (p - q)).sum(1).where(target >= 0, 0.0)
    first: list[Tensor] = []
    for lead, ref_lead in product((0, 5), (0, 3)):
        rows = Rows(at_lead(logits, lead)[0], 1.0, at_lead(ref_logits, ref_lead)[0])
        stats = triton_backend.row_stats(rows, target)
        assert torch.equal(stats.logp, plain.logp)
        assert torch.equal(stats.entropy, plain.entropy)
        assert torch.allclose(stats.kl.double(), expected, rtol=2e-6, atol=2e-6)
        dlogits = torch.empty_like(logits)
        loss = triton_backend.row_loss(rows, tokens, terms, dlogits).loss
        bits = [stats.kl, stats.state, loss, dlogits]
        first = first or bits
        assert all(torch.equal(*pair) for pair in zip(bits, first, strict=True))


@pytest.mark.parametrize("far", [-30.0, 12.0, 13.0, 60.0, 1000.0])
def test_rows_far_from_their_anchor(far: float) -> None:
    """The largest logit behind the first tile, and nats above the target: as exact as any other."""
    V = 3000
    logits = torch.randn(3, V, device=DEVICE)
    logits[:, V - 7] = logits[:, 5] + far
    target = torch.full((3,), 5, device=DEVICE)
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (log_p[:, 5] + 0.1 * entropy).sum().backward()
    stats = triton_backend.row_stats(Rows(logits), target)
    assert torch.allclose(stats.logp.double(), log_p[:, 5], rtol=3e-7, atol=3e-7)
    assert torch.allclose(stats.entropy.double(), entropy, rtol=1e-6, atol=4e-6)
    dlogits = torch.empty_like(logits)
    ones = torch.ones(3, device=DEVICE)
    row_gradients = RowGradients(ones, 0.1 * ones, None)
    triton_backend.row_dlogits(Rows(logits), target, row_gradients, stats, dlogits)
    assert torch.allclose(dlogits.double(), exact.grad, rtol=0, atol=3e-6)


@pytest.mark.slow
def test_a_slice_of_the_vocabulary_is_read_and_written_where_it_lies() -> None:
    """Rows of a multiple of 16 bytes that begin between two: no copy, in place, the same bits."""
    buffer = torch.randn(4, 3, 40, device=DEVICE).bfloat16()
    target = torch.randint(0, 32, (4, 3), device=DEVICE)
    view, copy = buffer[..., 3:35], buffer[..., 3:35].contiguous()
    assert torch.equal(token_logp(view, target).logp, token_logp(copy, target).logp)
    arguments = {
        "target": target,
        "objective": "dapo",
        "advantage": torch.randn(4, device=DEVICE),
        "backend": "triton",
    }
    leaf = copy.clone().requires_grad_()
    fused_loss(leaf, **arguments).loss.backward()
    before = buffer.clone()
    over = buffer.requires_grad_()
    fused_loss(over[..., 3:35], inplace=True, **arguments)
    assert torch.equal(over.detach()[..., 3:35], leaf.grad)
    assert torch.equal(over.detach()[..., :3], before[..., :3])
    assert torch.equal(over.detach()[..., 35:], before[..., 35:])
