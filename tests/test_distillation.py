"""On-policy distillation, the recipe `opd`: teachers of every kind, its cost, and TRL's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.meter import peak_extra_bytes
from grpo_core import RECIPES, LinearHead, fused_linear_loss, fused_loss
from tests import oracles
from tests.accuracy import assert_no_worse
from tests.combinations import paired
from tests.conftest import BACKENDS, CPU_BACKEND, is_interpreted
from tests.test_linear_loss import FEW, changed, leaves, make_head, materialised, products
from tests.test_linear_policies import Products

pytestmark = pytest.mark.usefixtures("poison")

B, T, D, V = 2, 9, 16, 131
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
# hidden states, weight and options of a teacher: any D, dtype, size of the matrix
TEACHERS: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "as the student": (16, torch.float32, {}),
    "wider": (40, torch.float32, {"scale": 0.5}),
    "bfloat16": (24, torch.bfloat16, {}),
    "float16": (24, torch.float16, {}),
    "padded": (24, torch.float32, {"rows": 160, "vocabulary": V}),
    "soft cap": (24, torch.float32, {"softcap": 3.0, "bias": True}),
    "everything": (8, torch.bfloat16, {"rows": 144, "vocabulary": V, "softcap": 5.0}),
}


def make_teacher(name: str) -> tuple[Tensor, LinearHead]:
    """Hidden states and head."""
    size, dtype, options = TEACHERS[name]
    options = dict(options)
    rows = options.pop("rows", V)
    if options.pop("bias", False):
        options["bias"] = torch.randn(rows).to(dtype)
    weight = (0.5 * torch.randn(rows, size)).to(dtype)
    return torch.randn(B, T, size).to(dtype), LinearHead(weight, **options)


def batch() -> tuple[Tensor, dict[str, Any]]:
    """Hidden states of a student, and its targets."""
    target = torch.randint(V, (B, T))
    target[1, 5:] = -100
    mask = torch.ones(B, T)
    mask[0, 2] = 0
    return torch.randn(B, T, D), {"target": target, "mask": mask}


def dense(
    head: LinearHead, hidden: Tensor, teacher: tuple[Tensor, LinearHead], beta: float, **given: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients by hidden states and matrix, from all logits."""
    leaf, states = leaves(head, hidden, lambda x: x, False)
    ref_hidden, ref_head = teacher
    double = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    ref = materialised(changed(ref_head, lambda x: x.to(double)), ref_hidden.to(double))
    logits = materialised(leaf, states)
    counted = (given["target"] >= 0) & (given["mask"] != 0)
    if double == torch.float64:
        loss = oracles.divergence(logits, ref, 0.8, beta)[counted].mean()
    else:
        log_p, log_q = ((x / 0.8).log_softmax(-1) for x in (logits, ref))
        loss = jensen_shannon(log_p, log_q, beta)[counted].mean()
    loss.backward()
    return loss.detach(), [states.grad, leaf.weight.grad]


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The divergence, plainly, in float32."""
    if beta in (0, 1):
        log_a, log_b = (log_p, log_q) if beta == 1 else (log_q, log_p)
        return (log_a.exp() * (log_a - log_b)).sum(-1)
    log_m = ((1 - beta) * log_p.exp() + beta * log_q.exp()).log()
    own, other = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * other + (1 - beta) * own


@paired(teacher=TEACHERS, beta=BETAS, plan=["fast", "lean"], chunks=[FEW, None], backend=BACKENDS)
def test_every_teacher(
    backend: str, device: str, teacher: str, beta: float, plan: str, chunks: int | None
) -> None:
    """No advantage, no rewards: a teacher is all that the recipe needs."""
    hidden, given = batch()
    head, others = LinearHead(0.5 * torch.randn(V, D)), make_teacher(teacher)
    exact = dense(changed(head, Tensor.double), hidden.double(), others, beta, **given)
    honest = dense(head, hidden, others, beta, **given)
    move = lambda x: x.to(device)  # noqa: E731
    leaf, states = leaves(changed(head, move), hidden.to(device), lambda x: x, False)
    out = fused_linear_loss(
        states,
        leaf,
        objective=RECIPES["opd"].replace(interpolation=beta) if beta < 1 else "opd",
        ref_hidden=others[0].to(device),
        ref_lm_head=changed(others[1], move),
        temperature=0.8,
        plan=plan,
        memory_budget=chunks,
        backend=backend,
        **{name: value.to(device) for name, value in given.items()},
    )
    out.loss.backward()
    assert_no_worse(out.loss.detach().cpu(), honest[0], exact[0])
    for ours, plain, truth in zip(
        (states.grad, leaf.weight.grad), honest[1], exact[1], strict=True
    ):
        assert_no_worse(ours.cpu(), plain, truth)
    assert out.metrics["clip_fraction"] == 0 and out.metrics["tokens"] == 13


@paired(beta=BETAS, plan=["fast", "lean"], bad=[torch.nan, torch.inf])
def test_a_teacher_of_masked_tokens_may_hold_anything(beta: float, plan: str, bad: float) -> None:
    hidden, given = batch()
    given["nll_weight"] = 0.1 * (given["mask"] == 0)
    given["target"] = given["target"].clamp(min=0)
    head, (states, teacher) = LinearHead(torch.randn(V, D)), make_teacher("wider")
    broken, found = states.masked_fill((given["mask"] == 0)[..., None], bad), []
    for ref_hidden in (states, broken):
        leaf, own = leaves(head, hidden, lambda x: x, False)
        objective = RECIPES["opd"].replace(interpolation=beta)
        teaching = {"ref_hidden": ref_hidden, "ref_lm_head": teacher, "objective": objective}
        out = fused_linear_loss(own, leaf, plan=plan, backend=CPU_BACKEND, **teaching, **given)
        out.loss.backward()
        found.append((out.loss, own.grad, leaf.weight.grad))
    for clean, same in zip(*found, strict=True):
        assert torch.equal(clean, same)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_products_are_counted(beta: float) -> None:
    """3 of the student and 1 of the teacher, in one pass; a frozen head 2 + 1, lean 4 + 1 or 2."""
    head, rows = make_head(), 4 * 32
    hidden, target = torch.randn(4, 32, head.D), torch.randint(0, head.V, (4, 32))
    ref_head, objective = torch.randn(head.V, head.D), RECIPES["opd"].replace(interpolation=beta)

    def count(frozen: bool = False, **options: Any) -> float:
        def call() -> None:
            leaf, states = leaves(head, hidden, lambda x: x, frozen)
            fused_linear_loss(
                states, leaf, target, objective=objective, ref_hidden=hidden.flip(0),
                ref_lm_head=ref_head, backend=CPU_BACKEND, **options,
            ).loss.backward()  # fmt: skip

        return products(call, rows)

    for budget in (FEW, 64 * head.V * 4, None):
        assert count(plan="fast", memory_budget=budget) == 3 + 1
        assert count(frozen=True, memory_budget=budget) == 2 + 1
    # its two phases make the teacher's logits twice
    assert count(plan="lean") == 4 + 2


def test_the_teachers_logits_never_exist() -> None:
    """Two buffers of a chunk; the teacher has no gradient and keeps no graph."""
    head = make_head()
    words, size = head.weight.shape
    hidden, states = torch.randn(2, 4, 8, size)
    teacher = torch.randn(words, size, requires_grad=True)
    leaf, student = leaves(head, hidden, lambda x: x, False)
    states.requires_grad_()
    with Products(policy=leaf.weight, ref=teacher) as seen:
        fused_linear_loss(
            student,
            leaf,
            torch.randint(0, words, (4, 8)),
            objective="opd",
            ref_hidden=states,
            ref_lm_head=teacher,
            plan="fast",
            memory_budget=2 * FEW,
            backend=CPU_BACKEND,
        ).loss.backward()
    assert seen.seen == ["policy", "ref", "dhidden", "rows"] * 2
    assert len(seen.buffers) == 2
    assert states.grad is None and teacher.grad is None


def test_the_peak_does_not_grow_with_the_rows() -> None:
    """Beyond inputs and gradients a call holds two chunks, for twice the rows as well."""
    words, size = 4096, 32
    weight, teacher = torch.randn(words, size, requires_grad=True), torch.randn(words, 2 * size)

    def peak(N: int) -> int:
        hidden, ref_hidden = torch.randn(N, size, requires_grad=True), torch.randn(N, 2 * size)
        target = torch.randint(0, words, (N,))
        call = lambda: fused_linear_loss(  # noqa: E731
            hidden, weight, target, objective="opd", sequence_id=torch.zeros_like(target),
            ref_hidden=ref_hidden, ref_lm_head=teacher, plan="fast", memory_budget=2**21,
            backend=CPU_BACKEND,
        ).loss.backward()  # fmt: skip
        return peak_extra_bytes(call, "cpu")

    # dhidden and vectors of a row
    assert peak(1024) - peak(512) <= 512 * (4 * size + 256)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_packed_rows_and_logits_are_the_same_loss(backend: str, device: str, beta: float) -> None:
    """Of hidden states, padded and packed, and of their logits; in bfloat16."""
    if is_interpreted(backend) and beta == 1:
        pytest.skip("as any exact KL")
    hidden, given = batch()
    head, (ref_hidden, ref_head) = LinearHead(0.5 * torch.randn(V, D)), make_teacher("wider")
    objective = RECIPES["opd"].replace(interpolation=beta)
    head, ref_head = (changed(x, lambda w: w.to(device)) for x in (head, ref_head))
    hidden, ref_hidden = hidden.to(device), ref_hidden.to(device)
    given = {name: value.to(device) for name, value in given.items()}
    common = {"objective": objective, "backend": backend}
    padded = fused_linear_loss(
        hidden, head, **given, ref_hidden=ref_hidden, ref_lm_head=ref_head, **common
    )
    keep = (given["target"] >= 0) & (given["mask"] != 0)
    packed = fused_linear_loss(
        hidden[keep], head, given["target"][keep], sequence_id=keep.nonzero()[:, 0],
        ref_hidden=ref_hidden[keep], ref_lm_head=ref_head, **common,
    )  # fmt: skip
    assert torch.equal(packed.kl, padded.kl[keep])
    assert torch.allclose(packed.loss, padded.loss, rtol=1e-6)
    logits, ref_logits = materialised(head, hidden), materialised(ref_head, ref_hidden)
    for dtype in (torch.float32, torch.bfloat16):
        out = fused_loss(logits.to(dtype), **given, ref_logits=ref_logits.to(dtype), **common)
        rtol = 1e-5 if dtype == torch.float32 else 0.05
        assert torch.allclose(out.loss, padded.loss, rtol=rtol)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_torch_compile(beta: float) -> None:
    """One graph, the bits of eager; a new interpolation is a number, not a constant."""
    hidden, given = batch()
    weight = 0.5 * torch.randn(V, D)
    ref_hidden, ref_head = make_teacher("padded")
    objective = RECIPES["opd"].replace(interpolation=beta)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_loss(
            hidden, weight, **given, objective=objective, ref_hidden=ref_hidden,
            ref_lm_head=ref_head, backend=CPU_BACKEND,
        ).loss  # fmt: skip

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = call(x, w)
        loss.backward()
        found.append((loss.detach(), x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_on_top_of_grpo() -> None:
    """A·logp beside the divergence; and a per-token advantage, which needs no teacher's logits."""
    hidden, given = batch()
    head, (ref_hidden, ref_head) = LinearHead(torch.randn(V, D)), make_teacher("wider")
    advantage = torch.randn(B)
    common = {**given, "ref_hidden": ref_hidden, "ref_lm_head": ref_head, "backend": CPU_BACKEND}
    kl = fused_linear_loss(hidden, head, objective="opd", **common).loss
    alone = RECIPES["dapo"].replace(kl="exact", beta=0.0)
    policy = fused_linear_loss(hidden, head, objective=alone, advantage=advantage, **common).loss
    both = alone.replace(beta=0.5)
    out = fused_linear_loss(hidden, head, objective=both, advantage=advantage, **common)
    assert torch.allclose(out.loss, policy + 0.5 * kl, rtol=1e-5)


def test_advantages_are_asked_for_by_name() -> None:
    """Needed wherever there is a policy term; both kinds at once are refused without one, too."""
    hidden, given = batch()
    head, (ref_hidden, ref_head) = torch.randn(V, D), make_teacher("wider")
    teacher = {"ref_hidden": ref_hidden, "ref_lm_head": ref_head}
    with pytest.raises(ValueError, match=r"advantage: expected exactly one .*, got neither"):
        fused_linear_loss(hidden, head, objective="dapo", **given)
    with pytest.raises(ValueError, match=r"advantage: expected exactly one .*, got both"):
        fused_linear_loss(
            hidden, head, objective="opd", advantage=torch.ones(B), rewards=torch.ones(B),
            group_size=2, **given, **teacher,
        )  # fmt: skip
    with pytest.raises(ValueError, match="ref_hidden: expected a tensor for kl = 'exact'"):
        fused_linear_loss(hidden, head, objective="opd", **given)
    without = fused_linear_loss(hidden, head, objective="opd", **given, **teacher)
    rewards = {"rewards": torch.rand(B), "group_size": 2}
    beside = fused_linear_loss(hidden, head, objective="opd", **given, **teacher, **rewards)
    assert torch.equal(without.loss, beside.loss)
    assert beside.metrics["clip_fraction"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trls_distillation(beta: float, temperature: float) -> None:
    """TRL 1.16's chunked kernel and GKD's loss over logits: values, and gradients by the states."""
    divergence = pytest.importorskip("trl.kernels.chunked_divergence")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    hidden, given = batch()
    weight = 0.5 * torch.randn(V, D)
    ref_hidden, ref_head = torch.randn(B, T, 24), 0.5 * torch.randn(V, 24)
    keep = (given["target"] >= 0) & (given["mask"] != 0)
    objective, found = RECIPES["opd"].replace(interpolation=beta), []

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return fused_linear_loss(
            x, w, objective=objective, ref_hidden=ref_hidden, ref_lm_head=ref_head,
            temperature=temperature, backend=CPU_BACKEND, **given,
        ).loss  # fmt: skip

    def chunked(x: Tensor, w: Tensor) -> Tensor:
        per_token, _ = divergence.ChunkedDivergenceFunction.apply(
            x[keep], w, None, ref_hidden[keep], ref_head, None, beta, temperature
        )
        return per_token.mean()

    def of_logits(x: Tensor, w: Tensor) -> Tensor:
        labels = torch.where(keep, given["target"], -100)
        return gkd.generalized_jsd_loss(
            x @ w.t(), ref_hidden @ ref_head.t(), labels=labels, beta=beta, temperature=temperature
        )

    for loss in (ours, chunked, of_logits):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(x, w)
        value.backward()
        found.append((value.detach(), x.grad, w.grad))
    for theirs in found[1:]:
        for a, b in zip(found[0], theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-6 * float(b.abs().max()))
