"""The row functions of both backends: accuracy over margins and offsets, bits, hard rows."""

from __future__ import annotations

import math
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import fused_loss, token_logp
from grpo_core.backends import choose_backend
from grpo_core.kernels import kl, surrogates
from grpo_core.kernels.records import RowGradients, RowLoss, Rows, Terms, TokenVectors
from tests import oracles
from tests.accuracy import FLOOR, assert_no_worse
from tests.combinations import paired
from tests.compiled import uninterpreted
from tests.conftest import BACKENDS, CPU_BACKEND, HAS_TRITON, is_interpreted

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one word, below, at and around one tile of loads, a multiple, an odd size of several tiles
VOCABULARIES = [1, 2, 7, 257, 512, 1024, 4096, 5003]


@pytest.fixture
def kernels(backend: str, device: str) -> ModuleType:
    return choose_backend(backend, torch.empty(0, device=device))  # type: ignore[arg-type]


VECTORS = {field.name for field in fields(TokenVectors)}


def one_pass(kernels: ModuleType, logits: Tensor, target: Tensor, **changes: Any) -> RowLoss:
    """`row_loss` of packed rows with unremarkable arguments, on the logits' device."""
    N = target.numel()
    ones = torch.ones(N, device=logits.device)
    terms = Terms(surrogates.clip, (0.2, 0.2, math.inf), None, False, 0.0)
    arguments = {"terms": terms, "dlogits": None}
    vectors = {"target": target, "weight": ones, "advantage": ones}
    vectors |= {name: changes.pop(name) for name in VECTORS & changes.keys()}
    tokens = TokenVectors(**vectors)
    rows = Rows(logits, changes.pop("temperature", 1.0), changes.pop("ref_logits", None))
    return kernels.row_loss(rows, tokens, **(arguments | changes))


@paired(V=VOCABULARIES, dtype=DTYPES, temperature=[1.0, 0.7], backend=BACKENDS)
def test_statistics_of_ordinary_rows(
    kernels: ModuleType, device: str, V: int, dtype: torch.dtype, temperature: float
) -> None:
    """logp and entropy are no worse than float32 log_softmax, for targets at both ends too."""
    logits = (3 * torch.randn(5, V)).to(dtype)
    target = torch.tensor([0, V - 1, V // 2, V // 3, -100])
    logp, entropy, *_ = kernels.row_stats(Rows(logits.to(device), temperature), target.to(device))
    assert logp[4] == entropy[4] == 0
    readable = target[:4], logits[:4]
    truth = oracles.logp_and_entropy(readable[1], readable[0], temperature)
    log_softmax = torch.log_softmax(readable[1].float() / temperature, -1)
    baseline = (
        log_softmax.gather(1, readable[0][:, None]).squeeze(1),
        -(log_softmax.exp() * log_softmax).sum(1),
    )
    for ours, honest, exact in zip((logp, entropy), baseline, truth, strict=True):
        assert_no_worse(ours[:4].cpu(), honest, exact)


@paired(offset=[0.0, 1000.0, -1000.0], V=[70, 5003], backend=BACKENDS)
def test_confident_tokens_keep_their_digits(
    kernels: ModuleType, device: str, V: int, offset: float
) -> None:
    """Margins of 0 to 30 nats: logp, entropy and gradient to rounding, *relative* to their size.

    float32 log_softmax returns logp = 0 and no gradient from 17 nats on.
    """
    margins = torch.tensor([0.0, 1, 5, 10, 14, 17, 20, 25, 30, -5, -30])
    logits = torch.randn(len(margins), V)
    target = torch.randint(0, V, (len(margins),))
    others = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
    logits = logits.scatter(1, target[:, None], (others + margins)[:, None]) + offset
    logp_true, entropy_true = oracles.logp_and_entropy(logits, target, 1.0)
    logits, target = logits.to(device), target.to(device)
    dlogits = torch.empty_like(logits)
    result = one_pass(kernels, logits, target, dlogits=dlogits)
    for ours, truth in ((result.logp, logp_true), (result.entropy, entropy_true)):
        assert ((ours.cpu().double() - truth) / truth).abs().max() < 64 * FLOOR
    exact = torch.softmax(logits.cpu().double(), 1)
    exact = exact.scatter(1, target.cpu()[:, None], torch.expm1(logp_true)[:, None])
    error = (dlogits.cpu().double() - exact).abs() / exact.abs()
    assert error.max() < 64 * FLOOR


@paired(V=VOCABULARIES, dtype=DTYPES, backend=BACKENDS)
def test_a_row_has_the_same_bits_in_every_plan(
    kernels: ModuleType, backend: str, device: str, V: int, dtype: torch.dtype
) -> None:
    """stats, one pass, two phases, in place, alone or in a batch, packed or as a view: one row."""
    B, T = (2, 2) if is_interpreted(backend) else (3, 4)
    logits = (2 * torch.randn(B, T + 1, V)).to(dtype).to(device)
    view = logits[:, :-1]
    target = torch.randint(0, V, (B * T,), device=device)
    target[3] = -100
    stats = kernels.row_stats(Rows(view), target)
    logp, entropy, *_ = stats
    weight = (target >= 0).float()

    copy = logits.clone()
    result = one_pass(kernels, copy[:, :-1], target, weight=weight, dlogits=copy[:, :-1])
    assert torch.equal(result.logp, logp)
    assert torch.equal(result.entropy, entropy)
    assert torch.equal(copy[:, -1], logits[:, -1]), "wrote outside the view"
    dlogits = torch.empty_like(view, memory_format=torch.contiguous_format)
    assert torch.equal(one_pass(kernels, view, target, weight=weight, dlogits=dlogits).logp, logp)
    assert torch.equal(dlogits, copy[:, :-1])

    packed = view.reshape(B * T, V).clone()
    for n in range(B * T):
        row = slice(n, n + 1)
        alone = one_pass(kernels, packed[row], target[row], weight=weight[row])
        assert torch.equal(alone.logp, logp[row])
        assert torch.equal(alone.entropy, entropy[row])

    second = torch.empty_like(packed)
    row_gradients = RowGradients(result.dlogp, None, None)
    kernels.row_dlogits(Rows(packed), target, row_gradients, stats, second)
    assert torch.equal(second.view(B, T, V), dlogits)
    one_pass(kernels, packed, target, weight=weight, dlogits=packed)
    assert torch.equal(packed, second)


CONTRACTIONS = r"""
import re

import torch
from grpo_core import RECIPES, fused_loss
from grpo_core.inspect.compile_ahead import as_if_on

vector, index = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
objective = RECIPES["grpo"].replace(entropy_coef=0.1, kl="exact", beta=0.1)
with as_if_on("sm_90") as launches:
    logits = torch.zeros(4, 300).requires_grad_()
    given = {"advantage": vector, "old_logp": vector, "sequence_id": index}
    out = fused_loss(logits, index, objective=objective, ref_logits=logits.detach(), **given)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
for launch in launches:
    asm = launch.compiled.asm
    named = re.findall(r" call .*@llvm\.fma\.v?(\d*)f32\(", asm["llir"])
    # products and sums without a rounding of their own are the assembler's to contract
    loose = re.findall(r"(?:mul|add|sub)\.f32", asm["ptx"])
    made = asm["ptx"].count("fma.rn.f32") + len(loose)
    print(launch.kernel.__name__, sum(int(lanes or 1) for lanes in named), made)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_nothing_is_contracted_but_what_kernels_name() -> None:
    """What the compiler chooses differs between one pass and second phase, and so would bits."""
    done = uninterpreted("-c", CONTRACTIONS)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert {"_row_loss_kernel", "_row_dlogits_kernel"} <= {kernel for kernel, *_ in found}
    assert all(named == contracted for _, named, contracted in found), found
    assert any(int(named) for _, named, _ in found)


def test_threads_do_not_change_a_bit_of_the_torch_backend() -> None:
    """One row or many, one thread or more: the same logp and entropy, at a real vocabulary."""
    kernels = choose_backend(CPU_BACKEND, torch.empty(0))
    logits = 3 * torch.randn(5, 151_669)
    target = torch.randint(0, 151_669, (5,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernels.row_stats(Rows(logits), target)[:2])
            rows = [
                kernels.row_stats(Rows(logits[n : n + 1]), target[n : n + 1])[:2] for n in range(5)
            ]
            results.append(tuple(torch.cat(vectors) for vectors in zip(*rows, strict=True)))
    finally:
        torch.set_num_threads(threads)
    for logp, entropy in results[1:]:
        assert torch.equal(logp, results[0][0])
        assert torch.equal(entropy, results[0][1])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_threads_of_the_torch_backend_take_over_the_callers_mode(mode: type) -> None:
    """Inference mode belongs to a thread: workers must be able to write what the caller made."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with mode():
            logits = torch.randn(16, 151_936) * 1.0
            target = torch.arange(16)
            logp = token_logp(logits, target).logp
            out = fused_loss(
                logits, target, objective="dapo", advantage=torch.ones(16), sequence_id=target
            )
        assert torch.equal(out.logp, logp)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("V", [7, 5003])
def test_hard_rows(kernels: ModuleType, device: str, V: int) -> None:
    """−inf words are harmless; NaN, +inf, or no word possible at all drop the row."""
    hard = {
        "some words forbidden": (lambda row: row[1:4].fill_(-math.inf), False),
        "all others forbidden": (lambda row: row[1:].fill_(-math.inf), False),
        "a NaN": (lambda row: row[2:3].fill_(math.nan), True),
        "a NaN at the target": (lambda row: row[0:1].fill_(math.nan), True),
        "an infinite word": (lambda row: row[5:6].fill_(math.inf), True),
        "an infinite target": (lambda row: row[0:1].fill_(math.inf), True),
        "a forbidden target": (lambda row: row[0:1].fill_(-math.inf), True),
        "nothing possible": (lambda row: row.fill_(-math.inf), True),
    }
    logits = torch.randn(len(hard), V)
    for row, (spoil, _) in zip(logits, hard.values(), strict=True):
        spoil(row)
    dropped = torch.tensor([drop for _, drop in hard.values()])
    target = torch.zeros(len(hard), dtype=torch.int64)
    dlogits = torch.empty(logits.shape, device=device)
    result = one_pass(kernels, logits.to(device), target.to(device), dlogits=dlogits)
    assert torch.equal(result.dropped.cpu(), dropped), dict(zip(hard, result.dropped, strict=True))
    assert torch.isfinite(result.loss).all()
    assert torch.isfinite(dlogits).all()
    assert (dlogits.cpu()[dropped] == 0).all()
    logp, entropy = oracles.logp_and_entropy(logits[:2], target[:2], 1.0)
    assert torch.allclose(result.logp[:2].cpu().double(), logp, rtol=1e-6, atol=1e-6)
    assert torch.allclose(result.entropy[:2].cpu().double(), entropy, rtol=1e-5, atol=1e-6)
    gradient = torch.softmax(logits[:1].double(), 1)
    gradient[0, 0] -= 1
    assert torch.allclose(dlogits[:1].cpu().double(), gradient, atol=1e-6)
    assert (dlogits[1] == 0).all()


def test_an_overflowing_ratio_drops_the_row(kernels: ModuleType, device: str) -> None:
    """exp(200) is no float32: such a token has no part in loss and gradient, and is counted."""
    logits = torch.randn(3, 11, device=device)
    target = torch.arange(3, device=device)
    old_logp = torch.tensor([-200.0, -1.0, -200.0], device=device)
    advantage = torch.tensor([-1.0, 1.0, 1.0], device=device)
    dlogits = torch.empty_like(logits)
    result = one_pass(
        kernels, logits, target, old_logp=old_logp, advantage=advantage, dlogits=dlogits
    )
    assert result.dropped.tolist() == [True, False, True]
    assert result.loss.tolist()[0] == result.loss.tolist()[2] == 0
    assert (dlogits[0] == 0).all()
    assert dlogits[1].abs().sum() > 0
    assert (dlogits[2] == 0).all()


@paired(factor=[1.0, -0.25, 3.0], dtype=DTYPES, backend=BACKENDS)
def test_row_scale(kernels: ModuleType, device: str, factor: float, dtype: torch.dtype) -> None:
    """Every logit of a strided view, and nothing between its rows."""
    gradient = torch.randn(2, 4, 1001).to(dtype).to(device)
    before = gradient.clone()
    kernels.row_scale(gradient[:, 1:], torch.tensor(factor, device=device))
    assert torch.equal(gradient[:, 1:], (before[:, 1:].float() * factor).to(dtype))
    assert torch.equal(gradient[:, :1], before[:, :1])


def test_one_pass_takes_every_term(kernels: ModuleType, device: str) -> None:
    """Weights, advantages, an old and a reference policy, a temperature: against autograd."""
    N, V = 6, 333
    logits = torch.randn(N, V, dtype=torch.float64)
    target = torch.randint(0, V, (N,))
    x = logits.clone().requires_grad_()
    logp, _ = oracles.logp_and_entropy(x, target, 0.8)
    old_logp, ref_logp = (logp.detach() + 0.2 * torch.randn(N) for _ in range(2))
    weight, advantage = torch.rand(N), torch.randn(N)
    policy = oracles.ppo_clip((logp - old_logp).exp(), advantage, 0.1, 0.3)
    loss = weight * (0.05 * oracles.kl_estimate("k3", logp, ref_logp) - policy)
    loss.sum().backward()
    dlogits = torch.empty(N, V, device=device)
    result = one_pass(
        kernels,
        logits.float().to(device),
        target.to(device),
        temperature=0.8,
        weight=weight.to(device),
        advantage=advantage.to(device),
        old_logp=old_logp.float().to(device),
        ref_logp=ref_logp.float().to(device),
        terms=Terms(surrogates.clip, (0.1, 0.3, math.inf), kl.k3, False, 0.05),
        dlogits=dlogits,
    )
    assert torch.allclose(result.loss.cpu().double(), loss.detach(), atol=2e-6)
    assert torch.allclose(dlogits.cpu().double(), x.grad, atol=2e-6)


def with_reference(
    kernels: ModuleType, logits: Tensor, ref_logits: Tensor, target: Tensor, beta: float
) -> tuple[RowLoss, Tensor]:
    """(`row_loss` with the exact KL alone, its gradient)."""
    terms = Terms(surrogates.clip, (0.2, 0.2, math.inf), None, False, beta)
    dlogits = torch.empty_like(logits)
    result = one_pass(
        kernels,
        logits,
        target,
        advantage=torch.zeros(target.numel(), device=logits.device),
        terms=terms,
        dlogits=dlogits,
        ref_logits=ref_logits,
    )
    return result, dlogits


@paired(V=VOCABULARIES, dtype=DTYPES, backend=BACKENDS)
def test_the_exact_kl_leaves_every_other_bit_alone(
    kernels: ModuleType, device: str, V: int, dtype: torch.dtype
) -> None:
    """logp and entropy are those without a reference; the KL of equal rows, and its gradient, 0."""
    logits = (3 * torch.randn(4, V)).to(dtype).to(device)
    target = torch.randint(0, V, (4,), device=device)
    plain = kernels.row_stats(Rows(logits, 0.9), target)
    stats = kernels.row_stats(Rows(logits, 0.9, logits.clone()), target)
    assert plain.kl is None
    assert torch.equal(stats.logp, plain.logp)
    assert torch.equal(stats.entropy, plain.entropy)
    assert torch.equal(stats.kl, torch.zeros_like(stats.kl))
    result, dlogits = with_reference(kernels, logits, logits.clone(), target, 0.5)
    assert torch.equal(result.kl, torch.zeros_like(result.kl))
    assert torch.equal(dlogits, torch.zeros_like(dlogits))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_exact_kl_of_confident_rows(
    kernels: ModuleType, backend: str, device: str, offset: float
) -> None:
    """Margins of 0 to 30 nats in either policy: to rounding, whatever is added to a row."""
    margins = torch.tensor([0.0, 1, 5, 10, 17, 25, 30, -5, -30])
    if is_interpreted(backend):
        margins = margins[::2]
    pairs = torch.cartesian_prod(margins, margins)
    logits, ref_logits = torch.randn(2, len(pairs), 70)
    target = torch.randint(0, 70, (len(pairs),))
    for rows, margin in zip((logits, ref_logits), pairs.T, strict=True):
        others = rows.scatter(1, target[:, None], -math.inf).logsumexp(1)
        rows.scatter_(1, target[:, None], (others + margin)[:, None])
    logits += offset
    exact = logits.double().requires_grad_()
    kl = oracles.exact_kl(exact, ref_logits, 1.0)
    kl.sum().backward()
    result, dlogits = with_reference(
        kernels, logits.to(device), ref_logits.to(device), target.to(device), 1.0
    )
    error = (result.kl.cpu().double() - kl.detach()).abs()
    assert (error <= 1e-6 + 64 * FLOOR * kl.detach().abs()).all(), error.max()
    assert ((dlogits.cpu().double() - exact.grad).abs() <= 4e-6 * (1 + kl.detach()[:, None])).all()


@pytest.mark.parametrize("V", [7, 5003])
def test_words_that_one_policy_forbids(kernels: ModuleType, device: str, V: int) -> None:
    """Forbidden by both or by π alone: harmless; by π_ref alone: an infinite KL, a row left out."""
    logits = torch.randn(5, V)
    ref_logits = torch.randn(5, V)
    logits[0, 1:4], ref_logits[0, 1:4] = -math.inf, -math.inf
    logits[1, 1:4] = -math.inf
    ref_logits[2, 1:4] = -math.inf
    ref_logits[3, 2] = math.nan
    ref_logits[4, 0] = -math.inf
    target = torch.zeros(5, dtype=torch.int64)
    moved = (v.to(device) for v in (logits, ref_logits, target))
    result, dlogits = with_reference(kernels, *moved, 1.0)
    assert result.dropped.tolist() == [False, False, True, True, True]
    assert torch.isfinite(dlogits).all()
    assert (dlogits[2:] == 0).all()
    kl = oracles.exact_kl(logits[:2], ref_logits[:2], 1.0)
    assert torch.allclose(result.kl[:2].cpu().double(), kl, atol=1e-6)
    assert torch.isposinf(result.kl[[2, 4]]).all()
    # only looked at, it spoils nothing
    looked, gradient = with_reference(
        kernels, logits.to(device), ref_logits.to(device), target.to(device), 0.0
    )
    assert not looked.dropped.any()
    assert torch.equal(gradient, torch.zeros_like(gradient))


def entropy_and_slope(logits: Tensor, sure: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(H, dH/dlogits·T) in float64 of rows with a word that is nearly certain, at `sure`.

    With e_j = exp(x_j − x_w): H = log(1 + Σ e) − Σ e·log e / (1 + Σ e), both terms positive.
    """
    at = sure[:, None]
    log_e = (logits.double() - logits.double().gather(1, at)) / temperature
    e = log_e.exp().scatter(1, at, 0.0)
    log_p = log_e - torch.log1p(e.sum(1, keepdim=True))
    spread = -torch.where(e > 0, e * log_e, 0.0).sum(1, keepdim=True) / (1 + e.sum(1, keepdim=True))
    entropy = torch.log1p(e.sum(1)) + spread[:, 0]
    slope = -(log_p.exp() * (log_p + entropy[:, None])).scatter(1, at, 0.0)
    return entropy, slope.scatter(1, at, -slope.sum(1, keepdim=True))


@paired(
    dtype=[torch.float32, torch.bfloat16], V=[70, 1100], offset=[0.0, -1000.0], backend=BACKENDS
)
def test_rows_that_are_sure_of_another_word(
    kernels: ModuleType, device: str, V: int, offset: float, dtype: torch.dtype
) -> None:
    """Entropy and its gradient to rounding, with the same bits in every plan, batch and place."""
    margins = torch.tensor([6.0, 10, 17, 30, 60])
    N, T = len(margins), 0.9
    word = torch.arange(N) * (V // N)
    target = (word + V // 2 + 1) % V
    logits = torch.randn(N, V).scatter(1, word[:, None], -math.inf)
    peak = T * (logits / T).logsumexp(1) + T * margins
    logits = logits.scatter(1, word[:, None], peak[:, None]) + offset
    logits = logits.to(dtype)
    entropy, slope = entropy_and_slope(logits, word, T)

    wide = torch.full((N, V + 3), 77.0).to(dtype)
    wide[:, 3:] = logits
    logits, target = logits.to(device), target.to(device)
    stats = kernels.row_stats(Rows(logits, T), target)
    error = (stats.entropy.cpu().double() - entropy) / entropy
    digits = FLOOR * margins.clamp(min=1)
    assert (error.abs() < digits).all()
    logp = torch.log_softmax(logits.cpu().double() / T, 1).gather(1, target.cpu()[:, None])
    torch.testing.assert_close(stats.logp.cpu().double(), logp[:, 0], rtol=1e-6, atol=0.0)

    # a loss of −H alone
    given = {"temperature": T, "advantage": torch.zeros(N, device=device)}
    given["entropy_weight"] = torch.ones(N, device=device)
    dlogits = torch.empty_like(logits)
    result = one_pass(kernels, logits, target, dlogits=dlogits, **given)
    truth = -slope / T
    error = (dlogits.cpu().double() - truth).abs() / truth.abs().clamp(min=1e-30)
    assert (error < digits[:, None] + torch.finfo(dtype).eps).all()

    assert torch.equal(result.entropy, stats.entropy)
    row_gradients = RowGradients(result.dlogp, -given["entropy_weight"], None)
    second = torch.empty_like(logits)
    kernels.row_dlogits(Rows(logits, T), target, row_gradients, result, second)
    assert torch.equal(second, dlogits)
    view = wide.to(device)[:, 3:]
    shifted = one_pass(kernels, view, target, dlogits=view, **given)
    assert torch.equal(shifted.entropy, stats.entropy)
    assert torch.equal(view, dlogits)
    alone = kernels.row_stats(Rows(logits[2:3], T), target[2:3])
    assert torch.equal(alone.entropy, stats.entropy[2:3])


def test_an_unlikely_target_has_its_gradient_of_the_entropy(
    kernels: ModuleType, device: str
) -> None:
    """Also where 1 − p rounds to 1: dH/dx_y = −p·(log p + H)."""
    logits, target = torch.zeros(1, 70), torch.tensor([3])
    logits[0, 3] = -40.0
    dlogits = torch.empty_like(logits, device=device)
    one = torch.ones(1, device=device)
    given = {"advantage": 0 * one, "entropy_weight": one, "dlogits": dlogits}
    one_pass(kernels, logits.to(device), target.to(device), **given)
    p = math.exp(-40) / 69
    assert dlogits[0, 3].item() == pytest.approx(p * (math.log(p) + math.log(69)), rel=1e-5)


def test_likely_words_far_above_the_start_of_the_row(kernels: ModuleType, device: str) -> None:
    """Forty at the end share the probability: their entropy keeps its digits at any offset."""
    offset = torch.tensor([30.0, 1e3, 2e4, 3e5])
    logits = torch.randn(len(offset), 5003)
    logits[:, -40:] += offset[:, None]
    target = torch.tensor([7, 4990, 4980, 3])
    truth = oracles.logp_and_entropy(logits, target, 1.0)
    logp, entropy, *_ = kernels.row_stats(Rows(logits.to(device)), target.to(device))
    for ours, exact in zip((logp, entropy), truth, strict=True):
        assert ((ours.cpu().double() - exact) / exact).abs().max() < 64 * FLOOR


@paired(dtype=DTYPES[:2], temperature=[1.0, 0.3], backend=BACKENDS)
def test_rows_of_huge_logits(
    kernels: ModuleType, device: str, dtype: torch.dtype, temperature: float
) -> None:
    """Equal logits of any size have −log V, and differences so large decide alone."""
    V = 300
    sizes = [-1e30, torch.finfo(dtype).min, 1e10, 3e38]
    N = 2 * len(sizes)
    logits = torch.tensor(sizes).repeat(2)[:, None].expand(N, V).clone()
    target = torch.arange(N) % len(sizes) * 90
    # the second half has a word that is half as far down, or as far up
    logits[N // 2 :, 200] *= torch.where(logits[N // 2 :, 200] < 0, 0.5, 1.1)
    logits = logits.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    tie = logits[:, 200] == logits[:, 0]
    advantage = torch.ones(N)
    weight = torch.full((N,), 0.5)
    dlogits = torch.empty_like(logits, device=device)
    there = {"advantage": advantage.to(device), "entropy_weight": weight.to(device)}
    found = one_pass(
        kernels,
        logits.to(device),
        target.to(device),
        dlogits=dlogits,
        temperature=temperature,
        **there,
    )
    logp, entropy, dlogits = found.logp.cpu(), found.entropy.cpu(), dlogits.cpu()
    assert tie.sum() >= N // 2
    log_V = torch.tensor(math.log(V))
    torch.testing.assert_close(logp[tie], -log_V.expand(int(tie.sum())))
    torch.testing.assert_close(entropy[tie], log_V.expand(int(tie.sum())), rtol=1e-6, atol=0.0)
    assert not found.dropped.cpu()[tie].any()
    uniform = torch.full((N, V), 1 / V).scatter_add(1, target[:, None], -torch.ones(N, 1))
    near = {"rtol": 1e-5 + torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(dlogits[tie].float() * temperature, uniform[tie], **near)
    gap = (logits.double().gather(1, target[:, None])[:, 0] - logits[:, 200].double()) / temperature
    kept = ~tie & (gap > torch.finfo(torch.float32).min)
    torch.testing.assert_close(logp[kept].double(), gap[kept], rtol=1e-6, atol=0.0)
    assert not entropy[~tie].any()
    decided = torch.zeros(N, V).scatter(1, target[:, None], -1.0)
    decided[:, 200] = 1.0
    torch.testing.assert_close(dlogits[kept].float() * temperature, decided[kept], **near)
    again = kernels.row_stats(Rows(logits.to(device), temperature), target.to(device))
    assert torch.equal(again.logp.cpu(), logp)
    second = torch.empty_like(logits, device=device)
    row_gradients = RowGradients(found.dlogp, -there["entropy_weight"], None)
    kernels.row_dlogits(
        Rows(logits.to(device), temperature), target.to(device), row_gradients, found, second
    )
    usable = ~found.dropped.cpu()
    assert torch.equal(second.cpu()[usable], dlogits[usable])


def test_the_exact_kl_of_huge_logits(kernels: ModuleType, device: str) -> None:
    """Two policies of equal, huge logits agree; one against ordinary logits has its KL."""
    V = 300
    logits = torch.tensor([-1e32, 0.0, -3e38, 5e9])[:, None].expand(4, V).contiguous()
    ref = torch.tensor([-3e38, -1e32, 1.0, 5e9])[:, None].expand(4, V).contiguous()
    target = torch.arange(4)
    dlogits = torch.empty_like(logits, device=device)
    terms = Terms(surrogates.clip, (0.2, 0.2, math.inf), None, False, 0.1)
    found = one_pass(
        kernels,
        logits.to(device),
        target.to(device),
        terms=terms,
        dlogits=dlogits,
        ref_logits=ref.to(device),
    )
    torch.testing.assert_close(found.logp.cpu(), torch.full((4,), -math.log(V)))
    torch.testing.assert_close(found.kl.cpu(), torch.zeros(4), rtol=0.0, atol=2e-6)
    expected = torch.full((4, V), 1 / V).scatter_add(1, target[:, None], -torch.ones(4, 1))
    torch.testing.assert_close(dlogits.cpu(), expected, rtol=1e-4, atol=1e-6)
