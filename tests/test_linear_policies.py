"""A reference policy from hidden states: the bits of `ref_logp`, and one product more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.meter import peak_extra_bytes
from grpo_core import (
    RECIPES,
    LinearHead,
    PolicyFactor,
    SamplerCorrection,
    fused_linear_loss,
    linear_token_logp,
)
from tests.conftest import CPU_BACKEND
from tests.test_linear_loss import (
    FEW,
    HEADS,
    PLANS,
    B,
    D,
    T,
    V,
    case,
    changed,
    gradients,
    leaves,
    make_head,
    products,
)

pytestmark = pytest.mark.usefixtures("poison")

K3: dict[str, Any] = {"kl": "k3", "beta": 0.1}
OBJECTIVES = {
    "token": RECIPES["dapo"].replace(**K3),
    "sequence": RECIPES["gspo"].replace(**K3),
    "no KL": RECIPES["gspo"],
    "mask of sequences": RECIPES["dapo"].replace(factor=PolicyFactor(off_policy_delta=0.2), **K3),
    "all rows wait": RECIPES["dapo"].replace(factor=PolicyFactor(top_entropy=0.5), **K3),
    "sampler": RECIPES["dapo"].replace(
        factor=PolicyFactor(SamplerCorrection(action="reject", low=0.8, high=1.25)), **K3
    ),
    "sampler, current": RECIPES["dapo"].replace(
        factor=PolicyFactor(SamplerCorrection(), current=True), **K3
    ),
    "exact KL": RECIPES["dapo"].replace(kl="exact", beta=0.1),
}


def reference(head: LinearHead, hidden: Tensor, words: int = 0) -> dict[str, Any]:
    """A policy near the trained one, with `words` more entries in its vocabulary."""
    more = torch.randn(max(words, 0), D)
    wider = torch.cat([head.weight[: head.V], more])[: head.V + words]
    return {
        "ref_hidden": hidden - 0.1 * torch.randn(hidden.shape),
        "ref_lm_head": wider + 0.02 * torch.randn(wider.shape),
    }


def everything(head: LinearHead, hidden: Tensor, frozen: bool, **arguments: Any) -> list[Tensor]:
    """Loss, what is known of the rows, metrics, and gradients of two backwards."""
    head, hidden = leaves(head, hidden, lambda x: x, frozen)
    out = fused_linear_loss(hidden, head, **arguments)
    out.loss.backward(retain_graph=True)
    twice = gradients(out, hidden, head).values()
    vectors = [out.loss.detach(), out.logp, out.entropy, out.ratio, out.kl, out.factor]
    return [*vectors, *out.metrics.values(), *twice]


def check(name: str, head: LinearHead, frozen: bool, words: int = 0, **changes: Any) -> None:
    """The same bits from hidden states as from `ref_logp`, in every plan."""
    objective = OBJECTIVES[name]
    hidden, arguments = case(head)
    del arguments["ref_logp"]
    arguments |= {"objective": objective, "backend": CPU_BACKEND, **changes}
    given = reference(head, hidden, words)
    target = arguments["target"].clamp(max=head.V + min(words, 0) - 1)
    arguments["target"] = target
    states, matrix = given.values()
    ref = linear_token_logp(states, matrix, target, temperature=0.9, backend=CPU_BACKEND)
    if objective.factor.needs_sampler:
        arguments["sampler_logp"] = arguments["old_logp"] + 0.2 * torch.randn(B, T)
    for plan in PLANS:
        together = everything(head, hidden, frozen, **arguments, **given, **plan)
        apart = everything(head, hidden, frozen, **arguments, ref_logp=ref.logp, **plan)
        assert together[4].std() > 0, "the policies differ"
        for k, (one, other) in enumerate(zip(together, apart, strict=True)):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), (plan, k)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "exact KL"])
def test_hidden_states_give_the_bits_of_ref_logp(name: str, frozen: bool) -> None:
    """Chunks that hold a sequence and chunks that do not, rows left out and rows that are not."""
    check(name, make_head(), frozen)
    check(name, make_head(**HEADS["everything"]), frozen, all_logp=True)


@pytest.mark.parametrize("words", [-20, 20])
@pytest.mark.parametrize("name", ["token", "sequence"])
def test_a_reference_of_another_vocabulary(name: str, words: int) -> None:
    check(name, make_head(vocabulary=V - 25), False, words)


def test_by_the_kernels(backend: str, device: str) -> None:
    """Over several chunks."""
    head = changed(make_head(), lambda x: x.to(device))
    hidden = torch.randn(1, 20, D, device=device)
    target = torch.randint(0, V, (1, 20), device=device)
    ref = torch.randn(V, 3, device=device)
    out = fused_linear_loss(
        hidden,
        head,
        target,
        objective=OBJECTIVES["token"],
        advantage=torch.ones(1, device=device),
        ref_hidden=hidden[..., :3],
        ref_lm_head=ref,
        memory_budget=FEW,
        backend=backend,
    )
    ref_logp = linear_token_logp(hidden[..., :3], ref, target, backend=backend).logp
    gap = (ref_logp - out.logp).double()
    assert torch.allclose(out.kl.double(), gap.exp() - gap - 1, rtol=1e-5)


class Products(TorchDispatchMode):
    """Which matrices enter products, in order, and the memory that takes their logits."""

    def __init__(self, **matrices: Tensor) -> None:
        super().__init__()
        self.names = {x.data_ptr(): name for name, x in matrices.items()}
        self.seen: list[str] = []
        self.buffers: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.out:
            *_, right = args
            out, name = kwargs["out"], self.names.get(right.data_ptr(), "rows")
            if name != "rows" and out.shape[1] == V:
                self.buffers.add(out.untyped_storage().data_ptr())
            elif name != "rows":
                name = "dhidden"
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_exact_kl_takes_two_buffers_for_all_chunks() -> None:
    """The logits of policy and reference of a chunk, its gradients, then the next chunk."""
    head, hidden, ref = make_head(), torch.randn(4, 8, D), torch.randn(V, D)
    leaf, states = leaves(head, hidden, lambda x: x, False)
    with Products(policy=leaf.weight, ref=ref) as seen:
        fused_linear_loss(
            states,
            leaf,
            torch.randint(0, V, (4, 8)),
            objective=OBJECTIVES["exact KL"],
            advantage=torch.ones(4),
            ref_hidden=hidden,
            ref_lm_head=ref,
            plan="fast",
            memory_budget=2 * FEW,
            backend=CPU_BACKEND,
        )
    assert seen.seen == ["policy", "ref", "dhidden", "rows"] * 2
    assert len(seen.buffers) == 2


def test_products_are_counted() -> None:
    """One for the reference and each row that is made, whatever the plan; none in a backward."""
    head, rows = make_head(), 4 * 32
    hidden, target = torch.randn(4, 32, D), torch.randint(0, V, (4, 32))
    common = {"target": target, "backend": CPU_BACKEND, "ref_hidden": hidden.clone()}

    def count(name: str, frozen: bool = False, again: bool = False, **options: Any) -> float:
        def call() -> None:
            leaf, states = leaves(head, hidden, lambda x: x, frozen)
            advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
            given = {"advantage": advantage, "objective": OBJECTIVES[name]} | common | options
            loss = fused_linear_loss(states, leaf, **given).loss
            loss.backward(retain_graph=again)
            if again:
                loss.backward()

        return products(call, rows)

    half, long = 64 * V * 4, FEW
    for name in ("token", "sequence"):
        assert count(name, plan="fast", memory_budget=half) == 3 + 1
        assert count(name, plan="lean") == 4 + 1
        assert count(name, frozen=True, memory_budget=half) == 2 + 1
        # the second makes its chunks again, the reference is known by then
        assert count(name, plan="fast", again=True) == 2 * 3 + 1
    assert count("sequence", plan="fast", memory_budget=long) == 4 + 1
    # half of the sequences have no gradient: their KL is not measured
    still = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert count("no KL", plan="fast", advantage=still) == (3 + 1) / 2


def test_the_peak_is_that_of_the_loss_alone() -> None:
    """But for two vectors of all rows."""
    N, words, size, peaks = 512, 4096, 32, []
    hidden = torch.randn(N, size, requires_grad=True)
    weight, ref = torch.randn(words, size, requires_grad=True), torch.randn(words, size)
    arguments: dict[str, Any] = {
        "target": torch.randint(0, words, (N,)),
        "sequence_id": torch.arange(N) // 32,
        "advantage": torch.randn(N),
        "plan": "fast",
        "memory_budget": 2**20,
        "objective": OBJECTIVES["token"],
        "backend": CPU_BACKEND,
    }
    others = {"ref_hidden": hidden.detach(), "ref_lm_head": ref}
    for given in ({"ref_logp": torch.zeros(N)}, others):
        call = lambda g=given: fused_linear_loss(hidden, weight, **arguments, **g).loss  # noqa: E731
        peaks.append(peak_extra_bytes(lambda c=call: c().backward(), "cpu"))
    assert peaks[1] <= peaks[0] + 2 * 4 * N + 2**12


def test_the_reference_has_no_gradient() -> None:
    """Policy and reference by one matrix: its gradient is that of the policy alone."""
    head = make_head(bias=True)
    hidden, arguments = case(head)
    del arguments["ref_logp"]
    arguments |= {"objective": OBJECTIVES["token"], "backend": CPU_BACKEND}
    other = hidden + 0.1 * torch.randn(hidden.shape)
    ref = linear_token_logp(other, head, arguments["target"], temperature=0.9).logp
    results = []
    for given in ({"ref_logp": ref}, {"ref_hidden": other}):
        leaf = changed(head, lambda x: x.clone().requires_grad_())
        if "ref_hidden" in given:
            given = {"ref_hidden": other.clone().requires_grad_(), "ref_lm_head": leaf}
        fused_linear_loss(hidden.clone(), leaf, **arguments, **given).loss.backward()
        results.append([leaf.weight.grad, leaf.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
