"""A teacher's likeliest tokens, as servers return them: formulas, gradients, shapes, bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import RECIPES, LinearHead, Objective, fused_linear_loss, fused_loss, token_logp
from grpo_core.loss.reference import reference_loss
from tests import oracles
from tests import test_linear_loss as linear
from tests.combinations import paired
from tests.conftest import BACKENDS, CPU_BACKEND, HAS_GPU

pytestmark = pytest.mark.usefixtures("poison")

B, T, V, D = 4, 5, 37, 16
HEAT = 0.8
DAPO = RECIPES["dapo"].replace(kl="topk", beta=0.5, entropy_coef=0.1)
REVERSE, FORWARD, HALF = 1.0, 0.0, 0.5
FORMS = [(kl, t) for kl in ("topk", "topk_tail") for t in (REVERSE, FORWARD, HALF)]


def topk_kl(log_p: Tensor, ids: Tensor, log_q: Tensor, t: float, tail: bool) -> Tensor:
    """KL over the K tokens of each row, float64, by a loop over the outcomes.

    Forward: verl's `kl_divergence` over the teacher's top-k, Σ_k q_k·(log q_k − log p_k). Between:
    GKD (arXiv 2306.13649), eq. 1: β·KL(q ‖ m) + (1 − β)·KL(p ‖ m) with m = β·q + (1 − β)·p. The
    tail is one more outcome: all other tokens, 1 − Σ_k q_k of the teacher.
    """
    rows = []
    for x, words, known in zip(log_p, ids.tolist(), log_q.double().tolist(), strict=True):
        pairs = {w: q for w, q in zip(words, known, strict=True) if w >= 0 and q > -math.inf}
        p, q = [x[w] for w in pairs], list(pairs.values())
        if tail and len(pairs) < len(x):
            others = [x[w] for w in range(len(x)) if w not in pairs]
            p.append(torch.stack(others).logsumexp(0))
            # servers round: TRL's bound
            q.append(math.log(max(1 - math.fsum(map(math.exp, q)), 1e-7)))
        total = x.sum() * 0
        for a, b in zip(p, torch.tensor(q, dtype=torch.float64), strict=True):
            if t == REVERSE:
                total = total + a.exp() * (a - b)
            elif t == FORWARD:
                total = total + b.exp() * (b - a)
            else:
                m = (t * b.exp() + (1 - t) * a.exp()).log()
                total = total + t * b.exp() * (b - m) + (1 - t) * a.exp() * (a - m)
        rows.append(total)
    return torch.stack(rows)


def teacher(logits: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The K likeliest tokens of another policy, in any order; some rows have fewer."""
    log_q = torch.log_softmax(logits + 1.5 * torch.randn(logits.shape, device=logits.device), -1)
    log_q, ids = log_q.float().topk(K)
    order = torch.randperm(K)
    ids, log_q = ids[..., order], log_q[..., order].contiguous()
    if K > 1:
        ids[0, 1, 0], log_q[-1, 0, -1] = -1, -math.inf
    return ids, log_q


def batch(dtype: torch.dtype, K: int = 5, spread: float = 2.0) -> dict[str, Tensor | Any]:
    """Arguments of a loss over [B, T, V]; half of the targets are among the K tokens."""
    logits = (spread * torch.randn(B, T + 1, V)).to(dtype)[:, :-1]
    ids, log_q = teacher(logits.float() / HEAT, K)
    target = torch.where(torch.rand(B, T) < 0.5, ids[..., K // 2], torch.randint(V, (B, T)))
    mask = torch.arange(T)[None] < torch.tensor([5, 3, 0, 4])[:, None]
    # masked rows are ignored, whatever is in them
    ids[~mask], log_q[~mask] = V + 5, math.nan
    target = target.clamp(min=0)
    logp, _ = oracles.logp_and_entropy(logits, target, HEAT)
    return {
        "logits": logits,
        "target": target,
        "advantage": torch.randn(B),
        "old_logp": (logp + 0.3 * torch.randn(B, T)).float(),
        "mask": mask,
        "ref_topk": (ids, log_q),
        "temperature": HEAT,
    }


def oracle(logits: Tensor, given: dict[str, Any], spec: Objective) -> tuple[Tensor, Tensor]:
    """(loss, KL [B, T]) in float64: clipped policy term, KL, entropy bonus, mean over tokens."""
    mask, target, (ids, log_q) = given["mask"], given["target"], given["ref_topk"]
    x = logits.double() / HEAT
    logp, entropy = oracles.logp_and_entropy(logits, target, HEAT)
    old_logp, A = given["old_logp"].double(), given["advantage"].double()[:, None].expand(B, T)
    ratio = (logp - old_logp).exp()
    low, high = spec.surrogate.args[:2]
    if spec.ratio_level == "sequence":
        ratio = oracles.sequence_ratio(logp, old_logp, mask)
    policy = oracles.ppo_clip(ratio, A, low, high)
    kl = torch.zeros(B, T, dtype=torch.float64)
    log_p = x[mask] - x[mask].logsumexp(-1, keepdim=True)
    tail = spec.kl == "topk_tail"
    kl[mask] = topk_kl(log_p, ids[mask], log_q[mask], spec.interpolation, tail)
    mean = oracles.grpo if spec.aggregation == "sequence_mean" else oracles.dapo
    return mean(policy + spec.entropy_coef * entropy, kl, spec.beta, mask), kl


def moved(given: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on another device."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in given.items()}


def run(loss: Any, given: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
    """(output, gradient by the logits) of one forward and backward."""
    leaf = given["logits"].clone().requires_grad_()
    out = loss(**given | {"logits": leaf * 1.0 if options.get("inplace") else leaf}, **options)
    out.loss.backward()
    return out, leaf.grad


def near(ours: Tensor, honest: Tensor, truth: Tensor, name: str) -> None:
    """No further from float64 than the honest PyTorch of the same dtype, and a few roundings."""
    truth = truth.detach()
    errors = [(x.detach().cpu().double() - truth).abs() for x in (ours, honest)]
    error, theirs = (float(x.amax()) for x in errors)
    size = max(1.0, float(truth.abs().amax()))
    assert error <= theirs + 2e-6 * size, (name, error, theirs)


@paired(
    form=FORMS,
    level=["dapo", "gspo"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    backend=BACKENDS,
)
def test_the_formula(
    backend: str, device: str, form: tuple[Any, float], level: str, dtype: torch.dtype
) -> None:
    """Loss, KL and whole gradient, with a clipped policy term and an entropy bonus."""
    kl, t = form
    spec = RECIPES[level].replace(kl=kl, interpolation=t, beta=0.5, entropy_coef=0.1)
    given = batch(dtype)
    exact = given["logits"].double().requires_grad_()
    loss, kl_of_rows = oracle(exact, given, spec)
    loss.backward()
    _, honest = run(reference_loss, given, objective=spec)
    theirs = reference_loss(**given, objective=spec)
    for inplace in (False, True):
        if inplace and dtype == torch.float16:
            continue
        on_device = moved(given, device)
        out, dlogits = run(fused_loss, on_device, objective=spec, backend=backend, inplace=inplace)
        near(out.loss, theirs.loss, loss, "loss")
        near(out.kl, theirs.kl, kl_of_rows, "kl")
        largest = exact.grad.abs().amax()
        near(dlogits / largest, honest / largest, exact.grad / largest, "dlogits")
        assert dlogits.dtype == dtype and not dlogits[2].any(), "a masked sequence"
        assert torch.equal(out.logp, token_logp(
            on_device["logits"], on_device["target"], temperature=HEAT, mask=on_device["mask"],
            backend=backend,
        ).logp)  # fmt: skip


@paired(form=FORMS, K=[1, 2, 20, V], backend=BACKENDS)
def test_any_number_of_tokens(backend: str, device: str, form: tuple[Any, float], K: int) -> None:
    kl, t = form
    spec = DAPO.replace(kl=kl, interpolation=t)
    given = batch(torch.float32, K)
    exact = given["logits"].double().requires_grad_()
    loss, _ = oracle(exact, given, spec)
    loss.backward()
    out, dlogits = run(fused_loss, moved(given, device), objective=spec, backend=backend)
    torch.testing.assert_close(out.loss.cpu().double(), loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(dlogits.cpu().double(), exact.grad, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize(("kl", "t"), FORMS)
def test_all_tokens_are_the_exact_kl(backend: str, device: str, kl: Any, t: float) -> None:
    """With K = V there is no tail, and nothing is cut off."""
    given = moved(batch(torch.float32), device)
    ref_logits = 2 * torch.randn(B, T, V, device=device)
    ids = torch.argsort(torch.rand(B, T, V), -1).to(device)
    log_q = torch.log_softmax(ref_logits / HEAT, -1).gather(-1, ids)
    del given["ref_topk"]
    spec = DAPO.replace(kl=kl, interpolation=t)
    out, dlogits = run(
        fused_loss, given, objective=spec, backend=backend, ref_topk=(ids.int(), log_q)
    )
    exact, by_exact = run(
        fused_loss,
        given,
        objective=spec.replace(kl="exact"),
        backend=backend,
        ref_logits=ref_logits,
    )
    torch.testing.assert_close(out.kl, exact.kl, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(dlogits, by_exact, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("certain", ["target", "another"])
@pytest.mark.parametrize(("kl", "t"), FORMS)
def test_confident_tokens(backend: str, device: str, kl: Any, t: float, certain: str) -> None:
    """1 − p down to 1e-13; gradients relative to each row."""
    N, gap = 7, torch.tensor([2.0, 5.0, 8.0, 12.0, 16.0, 22.0, 30.0])
    logits, target = torch.randn(N, V), torch.arange(N)
    peak = target if certain == "target" else target + 8
    logits[range(N), peak] = logits.amax(1) + gap
    ids = torch.stack([peak, *((peak + k) % V for k in (1, 3, 29))], 1)
    log_q = torch.log_softmax(logits + torch.randn(N, V), -1).gather(1, ids)
    spec = RECIPES["opd"].replace(kl=kl, interpolation=t, aggregation="token_sum")
    given = {"logits": logits, "target": target, "ref_topk": (ids, log_q)}
    given["sequence_id"] = torch.zeros(N, dtype=torch.int64)
    out, dlogits = run(fused_loss, moved(given, device), objective=spec, backend=backend)
    exact = logits.double().requires_grad_()
    log_p = exact - exact.logsumexp(-1, keepdim=True)
    truth = topk_kl(log_p, ids, log_q, t, kl == "topk_tail")
    truth.sum().backward()
    torch.testing.assert_close(out.kl.cpu().double(), truth, rtol=3e-6, atol=1e-6)
    error = (dlogits.cpu().double() - exact.grad).abs().amax(1)
    size = exact.grad.abs().amax(1)
    assert (error <= 1e-4 * size + 1e-13).all(), (error, size)


@pytest.mark.parametrize("margin", [1.0, 8.0, 14.0, 20.0, 40.0])
def test_digits_of_the_tail_beside_another_certain_token(
    backend: str, device: str, margin: float
) -> None:
    """Each token's gradient of the forward KL, relative to itself, also of those in the tail."""
    logits, target = torch.randn(6, V), torch.arange(6)
    leader = target + 8
    logits[range(6), leader] = logits.logsumexp(1) + margin
    # the target is among the K tokens in half of the rows
    second = torch.where(target < 3, target, target + 20)
    ids = torch.stack([second, leader, torch.full_like(leader, -1)], 1)
    log_q = torch.tensor([0.2, 0.6, 1.0]).log().expand(6, 3).contiguous()
    spec = RECIPES["opd"].replace(kl="topk_tail", interpolation=FORWARD, aggregation="token_sum")
    given = {"logits": logits, "target": target, "ref_topk": (ids, log_q)}
    given["sequence_id"] = torch.zeros(6, dtype=torch.int64)
    out, dlogits = run(fused_loss, moved(given, device), objective=spec, backend=backend)
    exact = logits.double().requires_grad_()
    truth = topk_kl(exact - exact.logsumexp(-1, keepdim=True), ids, log_q, FORWARD, True)
    truth.sum().backward()
    torch.testing.assert_close(out.kl.cpu().double(), truth.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(dlogits.cpu().double(), exact.grad, rtol=1e-5, atol=1e-12)


def test_no_rows(backend: str, device: str) -> None:
    """Packed and padded, from logits and from hidden states: a loss of 0."""
    head = torch.randn(V, D, device=device)
    for shape in ((0,), (2, 0), (0, 3)):
        target = torch.zeros(shape, dtype=torch.int64, device=device)
        pair = (target[..., None].expand(*shape, 2), torch.zeros(*shape, 2, device=device))
        given = {"objective": RECIPES["opd"].replace(kl="topk_tail"), "backend": backend}
        if len(shape) == 1:
            given["sequence_id"] = target
        for loss, *tensors in (
            (fused_loss, torch.zeros(*shape, V, device=device)),
            (fused_linear_loss, torch.zeros(*shape, D, device=device), head),
        ):
            leaf = tensors[0].requires_grad_()
            out = loss(leaf, *tensors[1:], target, ref_topk=pair, **given)
            out.loss.backward()
            assert out.loss.item() == 0 and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize(("kl", "t"), FORMS)
def test_a_token_that_the_student_forbids(backend: str, device: str, kl: Any, t: float) -> None:
    """It has no gradient, and the row is dropped where the divergence is infinite."""
    given = batch(torch.float32)
    ids, target = given["ref_topk"][0], given["target"]
    forbidden = ids[..., 0].clamp(0, V - 1)
    forbidden = torch.where(forbidden == target, (target + 1) % V, forbidden)
    given["logits"] = given["logits"].scatter(-1, forbidden[..., None], -math.inf)
    given["objective"] = DAPO.replace(kl=kl, interpolation=t)
    out, gradient = run(fused_loss, moved(given, device), backend=backend)
    exact, truth = run(reference_loss, given | {"logits": given["logits"].double()})
    assert torch.equal(out._dropped.cpu(), exact._dropped)
    assert bool(exact._dropped.any()) == (t == FORWARD)
    assert torch.allclose(gradient.cpu().double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kl", "t"), FORMS)
def test_packed_rows_and_a_second_backward(backend: str, device: str, kl: Any, t: float) -> None:
    spec = DAPO.replace(kl=kl, interpolation=t)
    given = moved(batch(torch.float32), device)
    _, dlogits = run(fused_loss, given, objective=spec, backend=backend)
    rows = {
        k: v.flatten(0, 1) if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in given.items()
    }
    rows["ref_topk"] = tuple(x.flatten(0, 1) for x in given["ref_topk"])
    rows["advantage"] = given["advantage"].repeat_interleave(T)
    rows["sequence_id"] = torch.arange(B, device=device).repeat_interleave(T)
    leaf = rows.pop("logits").clone().requires_grad_()
    out = fused_loss(leaf, objective=spec, backend=backend, **rows)
    out.loss.backward(retain_graph=True)
    first, leaf.grad = leaf.grad, None
    (3 * out.loss).backward()
    torch.testing.assert_close(first.view_as(dlogits), dlogits, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(leaf.grad, 3 * first, rtol=1e-6, atol=1e-8)


def test_a_kl_that_is_only_measured(backend: str, device: str) -> None:
    """An infinite one does not change loss and gradient."""
    given = moved(batch(torch.float32), device)
    given["logits"][0, 0, given["ref_topk"][0][0, 0, 0]] = -math.inf
    spec = DAPO.replace(kl="topk", interpolation=FORWARD)
    out, dlogits = run(fused_loss, given, objective=spec.replace(beta=0.0), backend=backend)
    pair = given.pop("ref_topk")
    without, expected = run(fused_loss, given, objective=DAPO.replace(beta=0.0), backend=backend)
    assert out.kl[0, 0] == math.inf and out.kl[0, 1].isfinite()
    torch.testing.assert_close(out.loss, without.loss)
    torch.testing.assert_close(dlogits, expected)
    # in the loss it drops the row
    out, dlogits = run(fused_loss, given, objective=spec, backend=backend, ref_topk=pair)
    assert out.metrics["nonfinite_rows"] == 1 and not dlogits[0, 0].any() and dlogits[0, 1].any()


@pytest.mark.parametrize("level", ["dapo", "gspo"])
@pytest.mark.parametrize("kl", ["topk", "topk_tail"])
def test_hidden_states(backend: str, device: str, kl: Any, level: str) -> None:
    """The gradient of a loss from logits, in chunks of a few rows; masked rows are left out."""
    spec = RECIPES[level].replace(kl=kl, interpolation=FORWARD, beta=0.5)
    given = moved(batch(torch.float32), device)
    hidden = torch.randn(B, T, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    cap = 4.0
    del given["logits"]
    logits = cap * torch.tanh(hidden @ weight.T / cap)
    out = fused_loss(logits, objective=spec, backend=backend, **given)
    expected = torch.autograd.grad(out.loss, (hidden, weight))
    found = fused_linear_loss(
        hidden,
        LinearHead(weight, softcap=cap),
        objective=spec,
        backend=backend,
        memory_budget=2 * V * 4 * 3,
        **given,
    )
    torch.testing.assert_close(found.kl, out.kl, rtol=1e-5, atol=2e-6)
    for _ in range(2):
        got = torch.autograd.grad(found.loss, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


def test_a_teacher_needs_no_product() -> None:
    N, weight = 32, torch.randn(V, D, requires_grad=True)
    hidden = torch.randn(N, D, requires_grad=True)
    ids, log_q = teacher(torch.randn(4, 8, V), 3)
    arguments: dict[str, Any] = {
        "target": torch.zeros(N, dtype=torch.int64),
        "sequence_id": torch.zeros(N, dtype=torch.int64),
        "objective": RECIPES["opd"].replace(kl="topk_tail"),
        "ref_topk": (ids.flatten(0, 1), log_q.flatten(0, 1)),
        "backend": CPU_BACKEND,
    }

    def step() -> None:
        fused_linear_loss(hidden, weight, **arguments).loss.backward()

    assert linear.products(step, N) * linear.V * linear.D == 3 * V * D
    with pytest.raises(NotImplementedError, match="plan: expected"):
        fused_linear_loss(hidden, weight, plan="lean", **arguments)
    with pytest.raises(ValueError, match="plan: expected one of"):
        fused_linear_loss(hidden, weight, plan="quick", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("interpolation", [REVERSE, HALF, FORWARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trl(interpolation: float, dtype: torch.dtype) -> None:
    """TRL's function over its own choice of tokens: loss and gradient."""
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    K, logits = 6, (2 * torch.randn(B, T, V)).to(dtype)
    ref_logits = logits.float() + torch.randn(B, T, V)
    ids = logits.topk(K).indices
    log_q = torch.log_softmax(ref_logits, -1).gather(-1, ids)
    theirs = logits.float().clone().requires_grad_()
    kl = utils.compute_topk_self_distillation_loss(
        theirs,
        ref_logits,
        distillation_topk=K,
        distillation_alpha=interpolation,
        distillation_add_tail=True,
    )
    kl.mean().backward()
    spec = RECIPES["opd"].replace(kl="topk_tail", interpolation=interpolation)
    given = {"logits": logits, "target": torch.randint(V, (B, T)), "ref_topk": (ids, log_q)}
    out, dlogits = run(fused_loss, given, objective=spec)
    torch.testing.assert_close(out.kl, kl, rtol=1e-5, atol=2e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dlogits.float(), theirs.grad, rtol=2 * rounding, atol=1e-7)


def test_a_truncated_kl_may_be_negative() -> None:
    """Of probabilities that do not add up to 1 it is no distance; with a tail they do."""
    logits, ids = torch.zeros(1, 4), torch.tensor([[0, 1]])
    given = {
        "logits": logits,
        "target": torch.zeros(1).long(),
        "sequence_id": torch.zeros(1).long(),
    }
    pair = (ids, torch.tensor([[0.45, 0.45]]).log())
    kls = {}
    for kl in ("topk", "topk_tail"):
        spec = RECIPES["opd"].replace(kl=kl)
        kls[kl] = float(fused_loss(**given, ref_topk=pair, objective=spec).kl)
    assert math.isclose(kls["topk"], 0.5 * math.log(0.25 / 0.45), rel_tol=1e-6)
    assert math.isclose(
        kls["topk_tail"], 0.5 * math.log(0.25 / 0.45) + 0.5 * math.log(0.5 / 0.1), rel_tol=1e-5
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"] if HAS_GPU else ["aot_eager"])
def test_compiled(compiler: str) -> None:
    """From logits and from hidden states, the same bits."""
    given = batch(torch.float32)
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D)
    rest = {k: v for k, v in given.items() if k != "logits"}
    spec = DAPO.replace(kl="topk_tail", interpolation=FORWARD)
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (
            lambda x, pair: fused_loss(x, objective=spec, **rest | {"ref_topk": pair}),
            (given["logits"],),
        ),
        (
            lambda x, w, pair: fused_linear_loss(x, w, objective=spec, **rest | {"ref_topk": pair}),
            (hidden, weight),
        ),
    ]
    for call, tensors in calls:
        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out = function(*leaves, given["ref_topk"])
            out.loss.backward()
            results.append([out.loss.detach(), out.kl, *(x.grad for x in leaves)])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def changed_pair(**changes: Any) -> tuple[Tensor, Tensor]:
    """Three tokens for each of two rows, with something changed."""
    ids = torch.tensor([[0, 1, 2], [2, 3, 4]])
    logp = torch.full((2, 3), -1.5)
    for place, value in changes.get("ids", {}).items():
        ids[place] = value
    for place, value in changes.get("logp", {}).items():
        logp[place] = value
    return ids, logp


BAD: list[tuple[Any, str]] = [
    (None, "ref_topk: expected (ids, logp) for beta = 1.0, got None"),
    (torch.zeros(2, 3), "ref_topk: expected a tuple (ids, logp), got Tensor"),
    ((torch.zeros(2, 3),), "ref_topk: expected a tuple (ids, logp), got tuple"),
    ((torch.zeros(2, 3), torch.zeros(2, 3)), "ref_topk: expected an integer tensor"),
    ((torch.zeros(2).long(), torch.zeros(2)), "ref_topk: expected ids [2, 'K'], got [2]"),
    ((torch.zeros(2, 0).long(), torch.zeros(2, 0)), "ref_topk: expected ids [2, 'K'], got [2, 0]"),
    ((torch.zeros(3, 2).long(), torch.zeros(3, 2)), "ref_topk: expected ids [2, 'K'], got [3, 2]"),
    ((torch.zeros(2, 3).long(), torch.zeros(2, 2)), "ref_topk: expected shape [2, 3], got [2, 2]"),
    ((torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), "ref_topk: expected a floating-point"),
    (
        changed_pair(ids={(1, 2): V}),
        "ref_topk: expected ids in [0, V = 37), or -1, got 37 at row 1",
    ),
    (changed_pair(ids={(0, 0): -2}), "ref_topk: expected ids in [0, V = 37), or -1, got -2"),
    (changed_pair(ids={(1, 0): 4}), "ref_topk: expected different ids in a row, got 4 at row 1"),
    (changed_pair(logp={(1, 0): 0.01}), "ref_topk: expected log-probabilities, or -inf, got 0.0"),
    (
        changed_pair(logp={(1, 0): math.nan}),
        "ref_topk: expected log-probabilities, or -inf, got nan",
    ),
]


@pytest.mark.parametrize(("pair", "message"), BAD)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_input(pair: Any, message: str, inplace: bool) -> None:
    logits, sequence_id = torch.randn(2, V), torch.zeros(2, dtype=torch.int64)
    before = logits.clone()
    spec = RECIPES["opd"].replace(kl="topk_tail")
    leaf = logits.requires_grad_()
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_loss(
            leaf,
            torch.zeros(2).long(),
            objective=spec,
            ref_topk=pair,
            sequence_id=sequence_id,
            inplace=inplace,
        )
    assert torch.equal(leaf, before)


def test_unchecked_ids_are_absent() -> None:
    """What `validate` would refuse reads no memory outside of a row."""
    spec = RECIPES["opd"].replace(kl="topk_tail")
    given = {"target": torch.zeros(2).long(), "sequence_id": torch.zeros(2).long()}
    logits = torch.randn(2, V)
    pairs = changed_pair(ids={(1, 2): V + 10**9}), changed_pair(ids={(1, 2): -1})
    results = [
        fused_loss(logits, **given, objective=spec, ref_topk=pair, validate=False).kl
        for pair in pairs
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"kl": None}, {}, "ref_topk: expected None for kl = None, got one (use kl='topk_tail'"),
        ({"kl": "exact"}, {}, "ref_topk: expected None for kl = 'exact'"),
        (
            {"kl": "topk"},
            {"ref_logp": (2,)},
            "ref_logp: expected None for kl = 'topk', got one (it takes",
        ),
        ({"kl": "topk"}, {"ref_logits": (2, V)}, "ref_logits: expected None for kl = 'topk'"),
        ({"kl": "topk"}, {"ref_hidden": (2, D)}, "ref_hidden: expected None for kl = 'topk'"),
    ],
)
def test_other_references(changes: Any, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {k: torch.zeros(shape) for k, shape in arguments.items()}
    given |= {"target": torch.zeros(2).long(), "sequence_id": torch.zeros(2).long()}
    given |= {"ref_topk": changed_pair(), "advantage": torch.zeros(2)}
    given["objective"] = RECIPES["dapo"].replace(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        if "ref_hidden" in arguments:
            fused_linear_loss(torch.zeros(2, D), torch.zeros(V, D), **given)
        else:
            fused_loss(torch.zeros(2, V), **given)
    if changes["kl"] == "topk":
        with pytest.raises(ValueError, match="kl_times_ratio: expected False for kl = 'topk'"):
            RECIPES["dapo"].replace(kl="topk", kl_times_ratio=True)


@pytest.mark.parametrize("name", ["dapo", "dual_clip", "rloo", "cispo"])
@pytest.mark.parametrize("mixed", [False, True])
def test_one_row_for_a_prefix_that_sequences_share(name: str, mixed: bool) -> None:
    """The sum of weight times advantage stands for the rows, unless a clip depends on its sign."""
    branches, shared, own = 3, 4, 2
    logits = torch.randn(shared + branches * own, V)
    target = torch.randint(V, (len(logits),))
    old_logp = token_logp(logits, target).logp + 0.5 * torch.randn(len(logits))
    A = torch.tensor([1.0, -0.4, 0.7] if mixed else [1.0, 0.4, 0.7])
    rest = shared + torch.arange(branches * own).view(branches, own)
    repeated = torch.cat([torch.arange(shared).expand(branches, shared), rest], 1).flatten()
    advantage = A.repeat_interleave(shared + own)
    summed = torch.zeros(len(logits)).index_add(0, repeated, advantage)
    results = []
    for rows, given in ((repeated, advantage), (torch.arange(len(logits)), summed)):
        leaf = logits.clone().requires_grad_()
        out = fused_loss(
            leaf[rows],
            target[rows],
            objective=RECIPES[name].replace(aggregation="token_sum"),
            advantage=given,
            old_logp=old_logp[rows],
            sequence_id=torch.zeros_like(rows),
            normalizer=len(repeated),
        )
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad))
    linear_in_advantage = name in ("rloo", "cispo")
    same = [torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results, strict=True)]
    assert all(same) == (linear_in_advantage or not mixed)


@pytest.mark.parametrize(("kl", "t"), FORMS)
def test_rows_that_are_not_finite_and_certain_targets(
    backend: str, device: str, kl: Any, t: float
) -> None:
    """NaN in masked and in counted rows is left out; a target of probability 1 leaves no NaN."""
    given = moved(batch(torch.float32), device)
    given["logits"][2] = given["logits"][0, 0] = math.nan
    given["logits"][0, 2].zero_()[int(given["target"][0, 2])] = 500.0
    spec = DAPO.replace(kl=kl, interpolation=t)
    out, dlogits = run(fused_loss, given, objective=spec, backend=backend)
    assert out.metrics["nonfinite_rows"] == 1 and out.loss.isfinite()
    assert not dlogits[2].any() and not dlogits[0, 0].any() and dlogits.isfinite().all()
    if t == FORWARD:
        words, log_q = given["ref_topk"][0][0, 2], given["ref_topk"][1][0, 2]
        asked = words != given["target"][0, 2]
        share = spec.beta / float(given["mask"].sum()) / HEAT
        expected = -share * log_q.exp()[asked]
        torch.testing.assert_close(dlogits[0, 2, words[asked]], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("other", [-math.inf, -200.0, -90.0, -60.0])
@pytest.mark.parametrize("backend", ["torch", CPU_BACKEND])
def test_gradient_of_a_row_adds_up_to_zero_where_its_tail_is_bounded(
    backend: str, other: float
) -> None:
    logits = torch.tensor([[[0.0, other]]], requires_grad=True)
    objective = RECIPES["opd"].replace(kl="topk_tail", interpolation=0.0)
    teacher = torch.tensor([[[0]]]), torch.tensor([[[math.log(0.9)]]])
    target = torch.tensor([[0]])
    fused_loss(
        logits, target, objective=objective, ref_topk=teacher, backend=backend
    ).loss.backward()
    # below its bound of 1e-30 the student's tail is a constant
    expected = 0.1 if other > -69 else 0.0
    torch.testing.assert_close(logits.grad, torch.tensor([[[expected, -expected]]]))
