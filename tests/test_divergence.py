"""The divergences of `Objective.interpolation`: forward and reverse KL, Jensen-Shannon."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from grpo_core import RECIPES, LossOutput, fused_loss
from grpo_core.backends import choose_backend
from grpo_core.kernels import surrogates
from grpo_core.kernels.records import RowGradients, RowLoss, Rows, Terms, TokenVectors
from grpo_core.loss.reference import reference_loss
from tests import oracles
from tests.combinations import paired
from tests.conftest import BACKENDS

pytestmark = pytest.mark.usefixtures("poison")

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of float32
UNIT = 2.0**-23


@pytest.fixture
def kernels(backend: str, device: str) -> ModuleType:
    return choose_backend(backend, torch.empty(0, device=device))  # type: ignore[arg-type]


def one_pass(
    kernels: ModuleType,
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor,
    beta: float,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> tuple[RowLoss, Tensor]:
    """`row_loss` of the divergence alone, and its gradient."""
    dlogits = torch.full_like(logits, torch.nan)
    ones = torch.ones(len(target), device=logits.device)
    result = kernels.row_loss(
        Rows(logits, temperature, ref_logits, beta),
        TokenVectors(target, ones, ones),
        Terms(surrogates.zero, (), None, False, weight),
        dlogits,
    )
    return result, dlogits


def two_phases(
    kernels: ModuleType,
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor,
    beta: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The divergence by `row_stats`, its gradient by `row_dlogits`."""
    rows = Rows(logits, temperature, ref_logits, beta)
    stats = kernels.row_stats(rows, target)
    ones = torch.ones(len(target), device=logits.device)
    dlogits = torch.full_like(logits, torch.nan)
    row_gradients = RowGradients(0 * ones, None, ones)
    kernels.row_dlogits(rows, target, row_gradients, stats, dlogits)
    return stats.kl, dlogits


def honest(
    logits: Tensor, ref_logits: Tensor, temperature: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence and gradient by the formulas of TRL's kernel, in float32."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1), (p - q) / temperature
    if beta == 1:
        value = (p * (log_p - log_q)).sum(-1)
        return value, p * (log_p - log_q - value[:, None]) / temperature
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    of_p = (p * (log_p - log_m)).sum(-1)
    value = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * of_p
    return value, (1 - beta) * p * (log_p - log_m - of_p[:, None]) / temperature


@paired(
    V=[1, 2, 3, 300, 1023, 1025],
    beta=BETAS,
    dtype=DTYPES,
    temperature=[0.7, 1.0, 2.0],
    backend=BACKENDS,
)
def test_value_and_gradient(
    kernels: ModuleType, device: str, V: int, beta: float, dtype: torch.dtype, temperature: float
) -> None:
    """Both plans against float64, no worse than float32 PyTorch."""
    N = 4
    logits, ref_logits = ((3 * torch.randn(N, V)).to(dtype) for _ in range(2))
    target = torch.tensor([0, V - 1, V // 2, V // 3])
    student = logits.double().requires_grad_()
    exact = oracles.divergence(student, ref_logits, temperature, beta)
    exact.sum().backward()
    baseline = honest(logits, ref_logits, temperature, beta)
    given = (logits.to(device), ref_logits.to(device), target.to(device), beta, temperature)
    result, dlogits = one_pass(kernels, *given)
    for kl, gradient in ((result.kl, dlogits), two_phases(kernels, *given)):
        error = (kl.cpu().double() - exact.detach()).abs().max()
        limit = (baseline[0].double() - exact.detach()).abs().max()
        limit += UNIT * (16 + 4 * exact.max().detach())
        assert error <= limit, (error, limit)
        # what the dtype of the gradient rounds
        rounding = torch.finfo(dtype).eps * student.grad.abs() + torch.finfo(dtype).tiny
        error = (gradient.cpu().double() - student.grad).abs() - rounding
        limit = (baseline[1].double() - student.grad).abs().max() + 8 * UNIT
        assert error.max() <= limit, (error.max(), limit)
    assert torch.equal(result.loss, result.kl)
    assert torch.equal(result.dlogp, torch.zeros_like(result.dlogp))
    assert not result.dropped.any()


@paired(beta=BETAS, V=[1, 2, 300, 1025], dtype=DTYPES, backend=BACKENDS)
def test_equal_policies_have_no_divergence(
    kernels: ModuleType, device: str, beta: float, V: int, dtype: torch.dtype
) -> None:
    """Exactly 0, and no gradient."""
    logits = (4 * torch.randn(3, V)).to(dtype).to(device)
    logits[0, 0] += 30
    logits[1, V // 2 :] = -torch.inf if V > 1 else 0.0
    target = torch.tensor([0, 0, V - 1], device=device)
    result, dlogits = one_pass(kernels, logits, logits.clone(), target, beta)
    assert torch.equal(result.kl, torch.zeros_like(result.kl))
    assert torch.equal(dlogits, torch.zeros_like(dlogits))


def exactly(
    logits: Tensor, ref_logits: Tensor, beta: float
) -> tuple[list[float], list[list[float]]]:
    """Divergence and gradient of each row with 60 digits, after GKD (arXiv 2306.13649)."""
    mpmath.mp.dps = 60
    values, gradients = [], []
    for row, ref_row in zip(logits.double().tolist(), ref_logits.double().tolist(), strict=True):
        powers, ref_powers = ([mpmath.exp(x) for x in each] for each in (row, ref_row))
        q = [x / mpmath.fsum(powers) for x in powers]
        p = [x / mpmath.fsum(ref_powers) for x in ref_powers]
        pairs = list(zip(p, q, strict=True))
        if beta == 0:
            value = mpmath.fsum(a * mpmath.log(a / b) for a, b in pairs if a)
            gradient = [b - a for a, b in pairs]
        else:
            # of the reverse KL M is P, and its own part is 0
            m = [beta * a + (1 - mpmath.mpf(beta)) * b if beta < 1 else a for a, b in pairs]
            own = 1 if beta == 1 else 1 - mpmath.mpf(beta)
            logs = [
                mpmath.log(b / c) if b else mpmath.mpf(0)
                for (_, b), c in zip(pairs, m, strict=True)
            ]
            mean = mpmath.fsum(b * log for b, log in zip(q, logs, strict=True))
            other = mpmath.fsum(a * mpmath.log(a / c) for a, c in zip(p, m, strict=True) if a)
            value = own * mean + (beta * other if beta < 1 else 0)
            gradient = [own * b * (log - mean) for b, log in zip(q, logs, strict=True)]
        values.append(float(value))
        gradients.append([float(x) for x in gradient])
    return values, gradients


@paired(beta=BETAS, V=[2, 33], backend=BACKENDS)
def test_confident_tokens_keep_their_digits(
    kernels: ModuleType, device: str, beta: float, V: int
) -> None:
    """Gaps of 30 and 80 nats of one policy or both: errors relative to the result's own size."""
    gaps = [(30, 30), (30, 25), (25, 30), (80, 80), (80, 75), (30, 0), (0, 30), (80, 20), (20, 80)]
    logits, ref_logits = torch.randn(2, len(gaps), V)
    target = torch.randint(V, (len(gaps),))
    for n, (gap, ref_gap) in enumerate(gaps):
        logits[n, target[n]], ref_logits[n, target[n]] = float(gap), float(ref_gap)
    values, gradients = (torch.tensor(x).double() for x in exactly(logits, ref_logits, beta))
    given = (logits.to(device), ref_logits.to(device), target.to(device), beta)
    result, dlogits = one_pass(kernels, *given)
    for kl, gradient in ((result.kl, dlogits), two_phases(kernels, *given)):
        kl, gradient = kl.cpu().double(), gradient.cpu().double()
        assert ((kl - values).abs() <= 3e-5 * values).all(), (kl, values)
        # of the reverse KL log p/q and KL cancel at a target of which the teacher is less sure
        size = gradients.abs().amax(1, keepdim=True) + (values[:, None] if beta == 1 else 0)
        assert ((gradient - gradients).abs() <= 3e-5 * size).all(), (gradient, gradients)


@paired(beta=BETAS, backend=BACKENDS)
def test_forbidden_tokens(kernels: ModuleType, device: str, beta: float) -> None:
    """−inf in either policy or both: infinite where the KL is, and always finite between them."""
    V = 300
    logits, ref_logits = torch.randn(2, 5, V)
    target = torch.tensor([5, 6, 7, 8, 9])
    logits[0, 10:20] = ref_logits[1, 10:20] = -torch.inf
    logits[2, 10:20] = ref_logits[2, 10:20] = -torch.inf
    # all others, in one policy and in the other
    logits[3] = logits[3].where(torch.arange(V) == 8, -torch.inf)
    ref_logits[4] = ref_logits[4].where(torch.arange(V) == 9, -torch.inf)
    exact = oracles.divergence(logits, ref_logits, 1.0, beta)
    infinite = {0.0: [0, 3], 1.0: [1, 4]}.get(beta, [])
    assert exact.isinf().nonzero().flatten().tolist() == infinite
    finite = exact.isfinite()
    student = logits.double().requires_grad_()
    oracles.divergence(student, ref_logits, 1.0, beta)[finite].sum().backward()
    given = (logits.to(device), ref_logits.to(device), target.to(device), beta)
    result, dlogits = one_pass(kernels, *given)
    assert torch.equal(result.dropped.cpu(), ~finite)
    assert torch.equal(result.kl.cpu().isinf(), ~finite)
    gradient = student.grad.nan_to_num(0.0)
    assert torch.allclose(result.kl.cpu().double()[finite], exact[finite], rtol=1e-5, atol=1e-6)
    assert torch.allclose(dlogits.cpu().double(), gradient, rtol=1e-5, atol=1e-6)
    # measured only, an infinite KL does not spoil the loss
    result, dlogits = one_pass(kernels, *given, weight=0.0)
    assert not result.dropped.any() and torch.equal(dlogits, torch.zeros_like(dlogits))
    assert torch.equal(result.kl.cpu().isinf(), ~finite)


@paired(beta=BETAS, backend=BACKENDS)
def test_a_nan_of_the_teacher_drops_its_row(kernels: ModuleType, device: str, beta: float) -> None:
    logits, ref_logits = torch.randn(2, 3, 40, device=device)
    ref_logits[1, 7] = torch.nan
    target = torch.tensor([1, 2, 3], device=device)
    result, dlogits = one_pass(kernels, logits, ref_logits, target, beta)
    assert result.dropped.tolist() == [False, True, False]
    assert torch.equal(dlogits[1], torch.zeros_like(dlogits[1]))


def read_beside(
    loss: Any, beta: float, weight: float, ref_logits: Tensor, **options: Any
) -> tuple[LossOutput, Tensor]:
    """Four rows, of which the last two have cross-entropy alone; the loss and its gradient."""
    device = ref_logits.device
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(ref_logits.shape, generator=generator).to(device).requires_grad_()
    objective = RECIPES["grpo"].replace(kl="exact", beta=weight, interpolation=beta)
    given: dict[str, Any] = {"mask": torch.tensor([1, 1, 0, 0], device=device)}
    if weight:
        given["nll_weight"] = torch.tensor([0.0, 0.0, 0.3, 0.2], device=device)
    out = loss(
        leaf,
        torch.tensor([1, 2, 3, 4], device=device),
        objective=objective,
        advantage=torch.tensor([1.0, -1.0, 1.0, 1.0], device=device),
        ref_logits=ref_logits,
        sequence_id=torch.arange(4, device=device),
        **given,
        **options,
    )
    out.loss.backward()
    return out, leaf.grad  # type: ignore[return-value]


@paired(beta=BETAS, bad=[torch.nan, torch.inf, -torch.inf], backend=BACKENDS)
def test_a_kl_without_weight_is_not_in_the_gradient(
    backend: str, device: str, beta: float, bad: float
) -> None:
    """A KL that is measured alone, and that of a masked token with `nll_weight`."""
    clean = torch.randn(4, 40, device=device)
    for weight, row, column in ((0.0, 1, 7), (0.0, 1, 2), (0.5, 2, 7), (0.5, 2, 3)):
        broken = clean.clone()
        broken[row, column] = bad
        for loss, options in ((fused_loss, {"backend": backend}), (reference_loss, {})):
            out, gradient = read_beside(loss, beta, weight, broken, **options)
            expected, exact = read_beside(loss, beta, weight, clean, **options)
            assert torch.equal(gradient, exact) and torch.equal(out.loss, expected.loss)
            assert not out._dropped.any()


@paired(beta=BETAS, backend=BACKENDS)
def test_the_reference_loss_drops_the_same_rows(backend: str, device: str, beta: float) -> None:
    broken = torch.randn(4, 40, device=device)
    broken[1, 7] = torch.nan
    parts = [read_beside(fused_loss, beta, 0.5, broken, backend=backend)]
    parts += [read_beside(reference_loss, beta, 0.5, broken)]
    (ours, gradient), (exact, truth) = parts
    assert ours._dropped.tolist() == exact._dropped.tolist() == [False, True, False, False]
    assert torch.allclose(gradient, truth, rtol=1e-4, atol=1e-6)


@paired(beta=BETAS, level=["token", "sequence"], backend=BACKENDS)
def test_beside_other_terms(backend: str, device: str, beta: float, level: str) -> None:
    """A policy term and an entropy bonus, also where another token than the target is sure."""
    B, T, V = 2, 3, 70
    logits, ref_logits = 2 * torch.randn(2, B, T, V)
    logits[0, 0, 3], ref_logits[0, 0, 3] = 20.0, 16.0
    target = torch.randint(4, V, (B, T))
    objective = RECIPES["grpo"].replace(
        kl="exact", beta=0.7, interpolation=beta, entropy_coef=0.2, ratio_level=level
    )
    given: dict[str, Any] = {"target": target, "advantage": torch.tensor([1.0, -0.5])}
    x = logits.double().requires_grad_()
    logp, entropy = oracles.logp_and_entropy(x, target, 0.9)
    policy = given["advantage"][:, None] * (logp - logp.detach()).exp()
    if level == "sequence":
        policy = given["advantage"][:, None] * oracles.sequence_ratio(
            logp, logp.detach(), torch.ones(B, T, dtype=torch.bool)
        )
    kl = oracles.divergence(x, ref_logits, 0.9, beta)
    exact = -(policy - 0.7 * kl + 0.2 * entropy).mean(1).mean()
    exact.backward()
    leaf = logits.to(device).requires_grad_()
    out = fused_loss(
        leaf,
        objective=objective,
        ref_logits=ref_logits.to(device),
        temperature=0.9,
        backend=backend,
        **{name: value.to(device) for name, value in given.items()},
    )
    out.loss.backward()
    assert abs(float(out.loss) - float(exact)) < 1e-5 * abs(float(exact))
    assert torch.allclose(leaf.grad.cpu().double(), x.grad, rtol=1e-4, atol=3e-7)
