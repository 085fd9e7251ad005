"""`linear_scores` against autograd in float64; its products, counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import LinearHead, linear_logp, linear_token_logp
from grpo_core.integrations.trl_scores import FURTHER, linear_scores
from tests.accuracy import assert_no_worse
from tests.conftest import is_interpreted
from tests.test_linear_loss import D, V, changed, make_head, materialised, products

pytestmark = pytest.mark.usefixtures("poison")

N, T = 40, 0.8
# bytes of a chunk of 16 rows: 40 are no multiple
FEW = 16 * V * 4


def plainly(head: LinearHead, hidden: Tensor, target: Tensor) -> list[Tensor]:
    """All outputs, from logits that are there as a whole; argmax is the first of the largest."""
    z = materialised(head, hidden) / T
    log_p = torch.log_softmax(z, 1)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    further = [(2 * log_p).logsumexp(1), z.mean(1), (z.argmax(1) == target).double()]
    return [logp, entropy, *(x.detach() for x in further)]


def gradients(
    outputs: list[Tensor], grad_outputs: list[Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    """Of Σ grad_output · output."""
    total = sum(((x * s.to(x.dtype)).sum() for x, s in zip(outputs, grad_outputs, strict=False)))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, tensors))


@pytest.mark.parametrize("outputs", [1, 2], ids=["logp", "entropy"])
def test_values_and_gradients(backend: str, device: str, outputs: int) -> None:
    """Of a matrix alone, and of heads with everything around it; trained and frozen."""
    options: dict[str, Any] = {"bias": True, "scale": 1.3, "softcap": 2.0, "vocabulary": 100}
    heads = [make_head(**options, lora=2), make_head()]
    for head, frozen in itertools.product(heads, (False, True)):
        compare(head, frozen, outputs, backend, device)
        if is_interpreted(backend):
            # interpreted: the others would launch the same kernels
            break


def compare(head: LinearHead, frozen: bool, outputs: int, backend: Any, device: str) -> None:
    """Values and gradients of all that requires one."""
    hidden, target = torch.randn(N, D), torch.randint(0, head.V, (N,))
    grad_outputs = [torch.randn(N) * (torch.arange(N) % 3 > 0), torch.randn(N)][:outputs]
    results = []
    for dtype, home in ((None, device), (torch.float32, "cpu"), (torch.float64, "cpu")):
        wants: list[Tensor] = []

        def leaf(
            x: Tensor,
            wanted: bool = not frozen,
            dtype: torch.dtype = dtype or torch.float32,
            home: str = home,
            wants: list[Tensor] = wants,
        ) -> Tensor:
            x = x.to(home, dtype).clone()
            if wanted:
                wants.append(x.requires_grad_())
            return x

        states, mine = leaf(hidden, True), changed(head, leaf)
        words = target.to(home)
        if dtype is None:
            found = linear_scores(
                states,
                mine,
                words,
                temperature=T,
                further=FURTHER,
                memory_budget=FEW,
                backend=backend,
            )
            values = [x for x in found if x is not None]
            assert len(values) == 5 and all(not x.requires_grad for x in values[2:])
        else:
            values = plainly(mine, states, words)
        made = gradients(values[:outputs], [s.to(home) for s in grad_outputs], wants)
        results.append(([x.detach().double().cpu() for x in values], [g.cpu() for g in made]))
    (ours, mine_g), (base, theirs), (truth, exact) = results
    for name, *three in zip(("logp", "entropy", *FURTHER), ours, base, truth, strict=True):
        assert_no_worse(*three, size=float(three[2].abs().amax()), what=name)
    for a, b, c in zip(mine_g, theirs, exact, strict=True):
        assert_no_worse(a, b, c, size=float(c.abs().amax()))


def test_the_first_of_the_largest_is_on_top() -> None:
    """As of argmax: with a tie, the earlier word."""
    head, hidden = LinearHead(torch.zeros(5, D)), torch.randn(2, D)
    found = linear_scores(hidden, head, torch.tensor([0, 1]), further=["is_top1"])
    assert found.is_top1 is not None and found.is_top1.tolist() == [True, False]
    assert found.mean_logits is None and found.log_sum_sq_probs is None


def test_the_same_bits_as_linear_token_logp() -> None:
    """Whatever the chunks are: an old policy that did not move has the ratio 1."""
    head, hidden = make_head(bias=True), torch.randn(N, D)
    target = torch.randint(0, V, (N,))
    wanted = linear_token_logp(hidden, head, target, temperature=T)
    for budget in (FEW, None):
        found = linear_scores(hidden, head, target, temperature=T, memory_budget=budget)
        assert torch.equal(found.logp, wanted.logp) and torch.equal(found.entropy, wanted.entropy)


def test_products_are_counted() -> None:
    """Rows without a gradient take none in the backward; a frozen head takes none there at all."""
    N = 64  # whole chunks, of half of them, too
    weight, target = torch.randn(V, D), torch.randint(0, V, (N,))
    grad_outputs = torch.randn(N) * (torch.arange(N) < N // 2)

    def step(trained: bool, entropy: bool) -> Callable[[], object]:
        def call() -> object:
            states = torch.randn(N, D, requires_grad=True)
            matrix = weight.clone().requires_grad_(trained)
            found = linear_scores(states, matrix, target, memory_budget=FEW)
            total = (found.logp * grad_outputs).sum()
            return (total + (found.entropy * grad_outputs).sum() if entropy else total).backward()

        return call

    assert products(step(True, False), N) == 1 + 3 / 2
    assert products(step(False, False), N) == 2
    assert products(step(False, True), N) == 2 + 2 / 2
    with torch.no_grad():
        leaf = torch.randn(N, D, requires_grad=True)
        assert products(lambda: linear_scores(leaf, weight, target), N) == 1
    mask = torch.arange(N) < N // 2
    for trained, plan, count in ((True, "fast", 4), (True, "lean", 4), (False, "fast", 3)):

        def masked(trained: bool = trained, plan: Any = plan) -> None:
            states = torch.randn(N, D, requires_grad=True)
            matrix = weight.clone().requires_grad_(trained)
            found = linear_logp(states, matrix, target, mask=mask, plan=plan)
            (found.logp.sum() + found.entropy.sum()).backward()

        # the lean plan has its statistics from the forward
        assert products(masked, N // 2) == count


@pytest.mark.parametrize("trained", [False, True])
def test_a_row_that_is_not_finite_passes_nothing_on(trained: bool) -> None:
    """To the head neither: 0·NaN would be in all of its gradient."""
    hidden, target = torch.randn(N, D), torch.randint(0, V, (N,))
    weight = torch.randn(V, D).requires_grad_(trained)
    made = []
    for bad in (False, True):
        states = hidden.clone()
        states[3, 2] = torch.nan if bad else 0.0
        found = linear_scores(states.requires_grad_(), weight, target)
        assert bool(found.logp[3].isnan()) is bad
        rest = torch.arange(N) != 3
        kept = found.logp.sum() if bad else found.logp[rest].sum()
        leaves = [states, weight] if trained else [states]
        made.append(torch.autograd.grad(kept, leaves))
    for clean, found in zip(*made, strict=True):
        assert torch.allclose(found, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Gradients as large as a loss scale makes them, and as small as a mean over many tokens."""
    head, hidden = make_head(dtype=dtype), torch.randn(N, D).to(dtype)
    target = torch.randint(0, V, (N,))
    for size in (1e-4, 1e3):
        grad_outputs = [size * torch.randn(N), size * torch.randn(N)]
        made = []
        for wide in (False, True):
            states = (hidden.double() if wide else hidden).clone().requires_grad_()
            weight = (head.weight.double() if wide else head.weight).clone().requires_grad_()
            if wide:
                values = plainly(LinearHead(weight), states, target)
            else:
                values = [*linear_scores(states, weight, target, temperature=T)]
            made.append(gradients(values[:2], grad_outputs, [states, weight]))
        for ours, truth in zip(*made, strict=True):
            assert ours.dtype == dtype
            error = float((ours.double() - truth).abs().amax() / truth.abs().amax())
            # one rounding at the end, on the CPU another of nothing but the operands
            assert error <= torch.finfo(dtype).eps


def test_the_backward_gathers_the_head() -> None:
    """A weight that is spread over ranks is there only inside of the context."""
    weight = torch.randn(V, D, requires_grad=True)
    kept, entered = weight.detach().clone(), []

    @contextlib.contextmanager
    def gathered() -> Iterator[None]:
        entered.append(True)
        weight.data.copy_(kept)
        yield
        weight.data.zero_()

    hidden, target = torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N,))
    plain = linear_scores(hidden, weight, target).logp.sum()
    wanted = torch.autograd.grad(plain, (hidden, weight))
    found = linear_scores(hidden, weight, target, gathered=gathered).logp.sum()
    assert not entered
    with torch.no_grad():
        weight.data.zero_()
    made = torch.autograd.grad(found, (hidden, weight))
    assert entered and all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_backward_twice_and_never_differentiated_itself() -> None:
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    total = linear_scores(hidden, weight, torch.randint(0, V, (N,))).logp.sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(total, (hidden, weight), create_graph=True)


def test_no_rows_at_all() -> None:
    """Zeros for whatever wants a gradient, so that every rank has one."""
    hidden, weight = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    found = linear_scores(hidden, weight, torch.empty(0, dtype=torch.int64), further=FURTHER)
    assert all(x is not None and x.shape == (0,) for x in found)
    (found.logp.sum() + found.entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.full((N,), V)}, "target: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(N, D),
        "lm_head": torch.randn(V, D),
        "target": torch.zeros(N, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_scores(**arguments | changes)
