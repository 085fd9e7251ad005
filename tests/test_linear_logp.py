"""`linear_logp` against float64 autograd through dense logits, for every kind of head and plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_core import LinearHead, linear_logp, linear_token_logp
from tests.oracles import logp_and_entropy

B, T, D, V = 3, 7, 20, 83
# float32 products and sums against float64, relative to the largest entry
SINGLE = 3e-6


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def dense_logits(hidden: Tensor, head: LinearHead) -> Tensor:
    """What a model does with its head, in float64."""
    weight, bias, A, B_ = (None if x is None else x.double() for x in head.tensors)
    assert weight is not None
    h = hidden.double()
    logits = h @ weight.T
    if bias is not None:
        logits = logits + bias
    if A is not None and B_ is not None:
        logits = logits + head.lora_scaling * (h @ A.T) @ B_.T
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[..., : head.V]


def deviation(ours: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    ours, exact = ours.detach().double(), exact.detach()
    return float((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def heads(dtype: torch.dtype = torch.float32) -> dict[str, LinearHead]:
    def make(*shape: int) -> Tensor:
        return draw(*shape, scale=0.7, dtype=dtype)

    return {
        "plain": LinearHead(make(V, D)),
        "bias": LinearHead(make(V, D), bias=make(V)),
        "softcap and scale": LinearHead(make(V, D), softcap=3.0, scale=0.6),
        "padded": LinearHead(make(V, D), vocabulary=V - 6),
        "adapter": LinearHead(make(V, D).detach(), lora_A=make(4, D), lora_B=make(V, 4)),
    }


def a_loss(logp: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
    """Of both, not linear in either; what is masked must not matter."""
    wave = torch.linspace(-1.0, 1.0, logp.numel(), dtype=logp.dtype).view(logp.shape)
    parts = (0.3 * logp).exp() * wave - 0.2 * entropy.square() * wave.flip(-1) + 0.1 * logp
    return torch.where(mask, parts, 0.0).sum()


def inputs() -> tuple[Tensor, Tensor]:
    target = torch.randint(0, V - 6, (B, T))
    mask = torch.rand(B, T) < 0.7
    mask[1] = False
    return target, mask


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("kind", heads())
def test_values_and_gradients(backend: str, device: str, kind: str, plan: str) -> None:
    """Every tensor of every head, small chunks, temperature, masked rows."""
    hidden, head = draw(B, T, D), heads()[kind]
    target, mask = inputs()
    leaves = [hidden, *(x for x in head.tensors if x is not None and x.requires_grad)]
    dense = dense_logits(hidden, head)
    logp, entropy = logp_and_entropy(dense, target, 0.8)
    exact = torch.autograd.grad(a_loss(logp, entropy, mask), leaves)
    there = {x: x.detach().to(device).requires_grad_() for x in leaves}
    moved = {
        name: there.get(x, x.to(device)) if x is not None else None
        for name, x in zip(("weight", "bias", "lora_A", "lora_B"), head.tensors, strict=True)
    }
    options = {name: getattr(head, name) for name in ("softcap", "scale", "vocabulary")}
    found = linear_logp(
        there[hidden],
        LinearHead(**moved, **options),  # type: ignore[arg-type]
        target.to(device),
        mask=mask.to(device),
        temperature=0.8,
        plan=plan,  # type: ignore[arg-type]
        memory_budget=16 * 4 * V,
        backend=backend,  # type: ignore[arg-type]
    )
    assert found.logp.shape == (B, T) and found.logp.dtype == torch.float32
    for ours, theirs in ((found.logp, logp), (found.entropy, entropy)):
        assert (ours.cpu()[~mask] == 0).all()
        assert deviation(ours.cpu()[mask], theirs[mask]) < SINGLE
    got = torch.autograd.grad(a_loss(*(x.cpu() for x in found), mask), [there[x] for x in leaves])
    for ours, theirs in zip(got, exact, strict=True):
        assert deviation(ours.cpu(), theirs) < SINGLE


@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_one_of_the_two(used: str) -> None:
    """The other's gradient is absent, not a tensor of zeros that someone has to make."""
    hidden, weight = draw(B, T, D), draw(V, D)
    target, _ = inputs()
    index = ("logp", "entropy").index(used)
    exact = logp_and_entropy(hidden.double() @ weight.double().T, target, 1.0)[index]
    theirs = torch.autograd.grad(exact.square().sum(), [hidden, weight])
    ours = linear_logp(hidden, weight, target)[index]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), [hidden, weight]), theirs, strict=True
    ):
        assert deviation(a, b) < SINGLE


def test_packed_rows_and_a_frozen_head_or_body() -> None:
    hidden, weight = draw(11, D), draw(V, D)
    target = torch.randint(0, V, (11,))
    both = torch.autograd.grad(linear_logp(hidden, weight, target).logp.sum(), [hidden, weight])
    (alone,) = torch.autograd.grad(linear_logp(hidden, weight.detach(), target).logp.sum(), hidden)
    assert torch.equal(alone, both[0])
    (alone,) = torch.autograd.grad(linear_logp(hidden.detach(), weight, target).logp.sum(), weight)
    assert torch.equal(alone, both[1])
    assert not linear_logp(hidden.detach(), weight.detach(), target).logp.requires_grad


def test_a_tied_matrix_and_views() -> None:
    """The embedding is the head, hidden[:, :-1] the states: gradients add up where they belong."""
    weight, target = draw(V, D), torch.randint(0, V, (B, T))

    def states() -> Tensor:
        return torch.tanh(weight[target])[:, :-1]

    exact, _ = logp_and_entropy(states().double() @ weight.double().T, target[:, 1:], 1.0)
    (theirs,) = torch.autograd.grad(exact.mean(), weight)
    (ours,) = torch.autograd.grad(linear_logp(states(), weight, target[:, 1:]).logp.mean(), weight)
    assert deviation(ours, theirs) < SINGLE


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters(dtype: torch.dtype, plan: Any) -> None:
    """Sums are float32: the error is that of rounding the result, whatever the number of chunks.

    The loss scale makes float16 gradients representable and is part of what comes back.
    """
    hidden, weight = draw(40, D, dtype=dtype), draw(V, D, scale=0.5, dtype=dtype)
    target, scale = torch.randint(0, V, (40,)), 1024.0
    exact = logp_and_entropy(hidden.double() @ weight.double().T, target, 1.0)
    loss = (exact[0] + 0.1 * exact[1]).mean() * scale
    theirs = torch.autograd.grad(loss, [hidden, weight])
    found = linear_logp(hidden, weight, target, plan=plan, memory_budget=16 * 4 * V)
    loss = (found.logp + 0.1 * found.entropy).mean() * scale
    for ours, same in zip(torch.autograd.grad(loss, [hidden, weight]), theirs, strict=True):
        assert ours.dtype == dtype
        # a rounding of the product's operands and one of the result
        assert deviation(ours, same.double()) < 2 * torch.finfo(dtype).eps


def test_the_same_bits_as_without_a_gradient() -> None:
    hidden, weight, target = draw(B, T, D), draw(V, D), inputs()[0]
    plain = linear_token_logp(hidden, weight, target, temperature=0.7)
    found = linear_logp(hidden, weight, target, temperature=0.7)
    assert torch.equal(found.logp, plain.logp) and torch.equal(found.entropy, plain.entropy)


def test_backward_again_and_backward_of_backward() -> None:
    hidden, weight, target = draw(B, T, D), draw(V, D), inputs()[0]
    found = linear_logp(hidden, weight, target)
    loss = found.logp.sum() + found.entropy.sum()
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    for a, b in zip(once, again, strict=True):
        assert deviation(b, 2 * a.double()) < 1e-6
    with pytest.raises(RuntimeError, match=r"linear_logp.*create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_outputs_may_be_written_over() -> None:
    """What the backward needs of them has been put aside."""
    hidden, weight, target = draw(B, T, D), draw(V, D), inputs()[0]
    (plain,) = torch.autograd.grad(linear_logp(hidden, weight, target).logp.sum(), hidden)
    logp = linear_logp(hidden, weight, target).logp
    (same,) = torch.autograd.grad(logp.sub_(1).sum(), hidden)
    assert torch.equal(same, plain)


def test_states_changed_in_place_are_noticed() -> None:
    hidden, weight, target = draw(B, T, D) * 1.0, draw(V, D), inputs()[0]
    logp = linear_logp(hidden, weight, target).logp
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("plan", ["fast", "lean"])
def test_a_row_that_is_not_finite_passes_nothing_on(plan: Any) -> None:
    hidden, weight, target = draw(B, T, D), draw(V, D), inputs()[0]
    with torch.no_grad():
        hidden[0, 2, 3] = torch.nan
    found = linear_logp(hidden, weight, target, plan=plan)
    assert found.logp.isnan().sum() == 1 and found.logp[0, 2].isnan()
    dhidden, dweight = torch.autograd.grad(
        found.logp.nan_to_num().sum() + found.entropy.sum(), [hidden, weight]
    )
    assert (dhidden[0, 2] == 0).all() and dhidden.isfinite().all() and dweight.isfinite().all()
    sound = torch.ones(B, T, dtype=torch.bool)
    sound[0, 2] = False
    rest = linear_logp(hidden.detach(), weight, target, mask=sound, plan=plan)
    (same,) = torch.autograd.grad(rest.logp.sum() + rest.entropy.sum(), weight)
    assert deviation(dweight, same.double()) < 1e-6


def test_under_autocast() -> None:
    """Products round their operands as torch does; the backward does so outside the context."""
    hidden, weight, target = draw(40, D), draw(V, D, scale=0.5), torch.randint(0, V, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logp(hidden, weight, target).logp
        logits = (hidden @ weight.T).float()
    theirs = torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)
    exact = logp_and_entropy(hidden.double() @ weight.double().T, target, 1.0)[0]
    assert 1e-4 < deviation(ours, exact) <= deviation(theirs, exact) * 1.05
    for a, b in zip(
        torch.autograd.grad(ours.mean(), [hidden, weight]),
        torch.autograd.grad(exact.mean(), [hidden, weight]),
        strict=True,
    ):
        assert deviation(a, b.double()) < 2e-2 and a.dtype == torch.float32


def test_memory_stays_within_the_budget() -> None:
    """No tensor as large as the logits is made, in neither direction."""
    rows, words, budget = 256, 2048, 2**18
    hidden, weight = draw(rows, 16), draw(words, 16)
    target = torch.randint(0, words, (rows,))
    largest = 0

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Meter():
        found = linear_logp(hidden, weight, target, memory_budget=budget)
        (found.logp.sum() - found.entropy.sum()).backward()
    # scratch on a CPU has a row more than a chunk
    assert largest <= budget + words * 4 < rows * words * 4 / 4


def test_nothing_to_do() -> None:
    hidden, weight = draw(2, 3, D), draw(V, D)
    found = linear_logp(hidden, weight, torch.full((2, 3), -100))
    (found.logp.sum() + found.entropy.sum()).backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    empty = draw(0, 3, D)
    linear_logp(empty, weight, torch.zeros(0, 3, dtype=torch.int64)).logp.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite Python number"),
        ({"target": torch.zeros(B, T + 1, dtype=torch.int64)}, "target: expected shape"),
        ({"target": torch.full((B, T), V)}, "target: expected -100 or a word in"),
        ({"mask": torch.ones(B)}, "mask: expected shape"),
        ({"plan": "thrifty"}, "plan: expected one of"),
        ({"memory_budget": 0}, "memory_budget: expected an int >= 1"),
        ({"lm_head": torch.zeros(V, D + 1)}, r"lm_head: expected \[V, D = 20\]"),
        ({"hidden": torch.zeros(B, T, D, dtype=torch.float64)}, "hidden: expected one of"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"hidden": torch.zeros(B, T, D), "lm_head": torch.zeros(V, D), "target": inputs()[0]}
    with pytest.raises(ValueError, match=message):
        linear_logp(**given | change)


@pytest.mark.parametrize("plan", ["fast", "lean"])
def test_rows_of_huge_and_of_certain_logits(backend: str, device: str, plan: str) -> None:
    """A bias that makes all logits −1e32 leaves −log V; another word's certainty its entropy."""
    hidden = torch.zeros(1, D, device=device)
    weight = torch.zeros(V, D, device=device)
    target = torch.tensor([5], device=device)
    bias = torch.full((V,), -1e32, device=device).requires_grad_()
    head = LinearHead(weight, bias=bias)
    logp, entropy = linear_logp(hidden, head, target, plan=plan, backend=backend)
    (logp + entropy).sum().backward()
    assert logp.item() == pytest.approx(-math.log(V), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(V), rel=1e-6)
    expected = torch.full((V,), -1 / V).scatter_add(0, target.cpu(), torch.ones(1))
    torch.testing.assert_close(bias.grad.cpu(), expected, rtol=1e-5, atol=1e-6)

    # one word 12 nats above 82 others: e = 82·exp(−12), H = log(1 + e) + 12·e/(1 + e)
    bias = torch.full((V,), -7.0, device=device)
    bias[3] = 5.0
    head = LinearHead(weight, bias=bias.requires_grad_())
    _, entropy = linear_logp(hidden, head, target, plan=plan, backend=backend)
    entropy.sum().backward()
    e = (V - 1) * math.exp(-12)
    assert entropy.item() == pytest.approx(math.log1p(e) + 12 * e / (1 + e), rel=1e-5)
    # dH/dx_w = −p_w·(log p_w + H), and log p_w = −log(1 + e)
    assert bias.grad[3].item() == pytest.approx(-12 * e / (1 + e) ** 2, rel=1e-3)
