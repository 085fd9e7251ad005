"""`fused_linear_loss` against the float64 loss of materialised logits; its products, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.meter import one_thread, peak_extra_bytes
from grpo_core import (
    RECIPES,
    LinearHead,
    Objective,
    PolicyFactor,
    SamplerCorrection,
    fused_linear_loss,
    fused_loss,
    linear_token_logp,
)
from grpo_core.backends.formula import as_torch
from grpo_core.linear.matmuls import Layout, choose_layout
from grpo_core.loss.reference import reference_loss
from tests.accuracy import assert_no_worse
from tests.combinations import over_backends, slow
from tests.conftest import CPU_BACKEND, is_interpreted
from tests.test_fused_loss import OBJECTIVES

pytestmark = pytest.mark.usefixtures("poison")

B, T, D, V = 4, 9, 24, 131
# bytes of logits: chunks of 16 rows, of 32, and one chunk; 36 rows are no multiple of the first two
FEW, SOME, ALL = 16 * V * 4, 32 * V * 4, None
HEADS = {
    "matrix": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3, "bias": True},
    "soft cap": {"softcap": 1.5},
    "padded": {"vocabulary": 100, "bias": True},
    "adapter": {"lora": 3},
    "everything": {"bias": True, "scale": 1.3, "softcap": 2.0, "vocabulary": 100, "lora": 2},
}


def make_head(
    *, bias: bool = False, lora: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> LinearHead:
    """A random head."""
    more: dict[str, Any] = {"bias": torch.randn(V).to(dtype)} if bias else {}
    if lora:
        more |= {
            "lora_A": torch.randn(lora, D).to(dtype),
            "lora_B": (0.3 * torch.randn(V, lora)).to(dtype),
            "lora_scaling": 0.7,
        }
    return LinearHead((0.4 * torch.randn(V, D)).to(dtype), **more, **options)


def changed(head: LinearHead, change: Callable[[Tensor], Tensor]) -> LinearHead:
    """The head with each of its tensors changed."""
    names = ("weight", "bias", "lora_A", "lora_B")
    tensors = {name: getattr(head, name) for name in names}
    return replace(head, **{k: None if v is None else change(v) for k, v in tensors.items()})


def materialised(head: LinearHead, hidden: Tensor) -> Tensor:
    """The logits, plainly."""
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    hidden, head = hidden.to(dtype), changed(head, lambda x: x.to(dtype))
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    if head.lora_A is not None and head.lora_B is not None:
        logits = logits + head.lora_scaling * ((hidden @ head.lora_A.t()) @ head.lora_B.t())
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[..., : head.V]


def case(head: LinearHead, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states [B, T, D] and the other arguments of a loss over them."""
    hidden = torch.randn(B, T, D).to(dtype)
    target = torch.randint(0, head.V, (B, T))
    target[1, T // 2 :] = -100
    # 28 tokens: neither quantile of their entropies is one of them, which rounding would decide
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[[0, 2, 3], [2, 5, 8]] = False
    logits = materialised(changed(head, Tensor.double), hidden.double())
    logp = torch.log_softmax(logits / 0.9, -1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    return hidden, {
        "target": target,
        "mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25]),
        "group_size": 2,
        "old_logp": (logp + 0.2 * torch.randn(B, T)).float(),
        "ref_logp": (logp + 0.2 * torch.randn(B, T)).float(),
        "temperature": 0.9,
    }


def needed(
    objective: Objective, head: LinearHead, hidden: Tensor, arguments: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Tensor, LinearHead] | None]:
    """Arguments that go with an objective, and a reference policy for the exact KL."""
    arguments, reference = dict(arguments), None
    if objective.kl == "exact":
        del arguments["ref_logp"]
        other = changed(head, lambda x: x + (0.1 * torch.randn(x.shape)).to(x.dtype))
        reference = (hidden + (0.1 * torch.randn(hidden.shape)).to(hidden.dtype), other)
    if objective.factor.needs_sampler:
        old_logp = arguments["old_logp"]
        arguments["sampler_logp"] = old_logp + 0.2 * torch.randn(old_logp.shape)
        arguments["sampler_logp"][0, 0] = torch.nan
    return arguments, reference


def gradients(out: Any, hidden: Tensor, head: LinearHead) -> dict[str, Tensor]:
    """What the backward gives to each leaf."""
    out.loss.backward()
    leaves = {"hidden": hidden} | {k: v for k, v in vars(head).items() if isinstance(v, Tensor)}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def leaves(
    head: LinearHead, hidden: Tensor, convert: Callable[[Tensor], Tensor], frozen: bool
) -> tuple[LinearHead, Tensor]:
    """Copies that require a gradient."""

    def leaf(tensor: Tensor) -> Tensor:
        return convert(tensor.detach()).clone().requires_grad_(not frozen)

    return changed(head, leaf), convert(hidden.detach()).clone().requires_grad_()


def dense(
    head: LinearHead,
    hidden: Tensor,
    reference: tuple[Tensor, LinearHead] | None,
    convert: Callable[[Tensor], Tensor],
    frozen: bool,
    **arguments: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """(output, gradients) of the reference loss over materialised logits."""
    head, hidden = leaves(head, hidden, convert, frozen)
    if reference is not None:
        ref_head = changed(reference[1], convert)
        arguments["ref_logits"] = materialised(ref_head, convert(reference[0])).detach()
    out = reference_loss(materialised(head, hidden), **arguments)
    return out, gradients(out, hidden, head)


def ours(
    head: LinearHead,
    hidden: Tensor,
    reference: tuple[Tensor, LinearHead] | None,
    frozen: bool = False,
    device: str = "cpu",
    **arguments: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """(output, gradients) of the loss under test."""
    head, hidden = leaves(head, hidden, lambda x: x.to(device), frozen)
    if reference is not None:
        arguments["ref_hidden"] = reference[0].to(device)
        arguments["ref_lm_head"] = changed(reference[1], lambda x: x.to(device))
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    out = fused_linear_loss(hidden, head, **arguments)
    return out, gradients(out, hidden, head)


def check(
    objective: Objective,
    head: LinearHead,
    hidden: Tensor,
    arguments: dict[str, Any],
    variants: list[dict[str, Any]],
    *,
    frozen: bool = False,
) -> None:
    """Every variant is no worse than materialised logits of the same dtype, judged by float64."""
    arguments, reference = needed(objective, head, hidden, arguments)
    arguments["objective"] = objective
    honest = dense(head, hidden, reference, lambda x: x, frozen, **arguments)
    exact = dense(head, hidden, reference, Tensor.double, frozen, **arguments)
    largest = float(exact[0].logp.abs().amax())
    counted = exact[0].logp != 0
    for variant in variants:
        found = ours(head, hidden, reference, frozen, all_logp=True, **arguments, **variant)
        for name in ("loss", "logp", "entropy", "ratio", "kl", "factor"):
            values = [getattr(out, name).detach().cpu() for out, _ in (found, honest, exact)]
            if name == "factor":
                # of a row that is not read it says nothing
                values = [value[counted] for value in values]
            assert_no_worse(*values, size=max(largest, 1.0), what=f"{name} {variant}")
        assert found[1].keys() == exact[1].keys()
        for name, gradient in found[1].items():
            assert gradient.dtype == getattr(head, name, hidden).dtype
            triple = (gradient.cpu(), honest[1][name], exact[1][name])
            assert_no_worse(*triple, size=0.0, what=f"d{name} {variant}")
        for name, value in exact[0].metrics.items():
            close = torch.isclose(found[0].metrics[name].cpu().double(), value.double(), 1e-4, 1e-5)
            assert close, f"{name} {variant}: {found[0].metrics[name]} is not {value}"


PLANS: list[dict[str, Any]] = [
    {"plan": plan, "memory_budget": budget} for plan in ("fast", "lean") for budget in (FEW, ALL)
]


# one of each plan
FEW_FROZEN = ("grpo", "sequence", "exact KL, entropy", "sampler, mask, entropy, exact KL")


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        *((name, False) for name in OBJECTIVES),
        *((name, True) for name in FEW_FROZEN),
        *slow(*((name, True) for name in OBJECTIVES if name not in FEW_FROZEN)),
    ],
)
def test_every_objective(name: str, frozen: bool) -> None:
    """Both plans, chunks that do and do not divide the rows."""
    head = make_head()
    hidden, arguments = case(head)
    variants = [{**plan, "backend": CPU_BACKEND} for plan in PLANS]
    variants.append({"plan": "fast", "memory_budget": SOME, "backend": CPU_BACKEND})
    check(OBJECTIVES[name], head, hidden, arguments, variants, frozen=frozen)


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("name", ["dapo", "sequence", "exact KL, entropy"])
def test_every_head(name: str, options: str) -> None:
    head = make_head(**HEADS[options])
    hidden, arguments = case(head)
    variants = [{**plan, "backend": CPU_BACKEND} for plan in PLANS]
    check(OBJECTIVES[name], head, hidden, arguments, variants)


@over_backends(
    ["grpo", "sequence", "exact KL, entropy", "top entropy, bonus"],
    interpreted=["sequence", "exact KL, entropy"],
)
def test_every_backend(backend: str, device: str, name: str) -> None:
    """The kernels, too, on a head with everything."""
    head = make_head(**HEADS["everything"])
    hidden, arguments = case(head)
    # interpreted: small chunks of the one plan, and one chunk of the other
    plans = [PLANS[0], PLANS[-1]] if is_interpreted(backend) else PLANS
    variants = [{**plan, "backend": backend, "device": device} for plan in plans]
    check(OBJECTIVES[name], head, hidden, arguments, variants)


@pytest.mark.parametrize("name", ["grpo", "sequence", "entropy"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_every_dtype(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Also a float32 head with hidden states of 16 bits, and the reverse."""
    head = make_head(dtype=dtypes[1], bias=True)
    hidden, arguments = case(head, dtypes[0])
    variants = [{**plan, "backend": CPU_BACKEND} for plan in PLANS]
    check(OBJECTIVES[name], head, hidden, arguments, variants)


@pytest.mark.parametrize("name", ["dapo", "sequence"])
def test_logits_of_16_bits(name: str) -> None:
    """By request they are rounded as PyTorch rounds them: an error of that size, and no more."""
    head = make_head(dtype=torch.bfloat16)
    hidden, arguments = case(head, torch.bfloat16)
    arguments["objective"] = OBJECTIVES[name]
    exact, exact_gradients = dense(head, hidden, None, Tensor.double, False, **arguments)
    for plan in PLANS:
        found, gradient = ours(
            head,
            hidden,
            None,
            backend=CPU_BACKEND,
            logits_dtype=torch.bfloat16,
            **arguments,
            **plan,
        )
        assert (found.logp - exact.logp).abs().max() < 0.05
        for key, value in gradient.items():
            error = (value.double() - exact_gradients[key]).norm() / exact_gradients[key].norm()
            assert error < 0.03, key


def test_autocast_is_followed() -> None:
    """Products in its dtype, as the model's own head would take them; gradients in the leaves'."""
    head = make_head()
    hidden, arguments = case(head)
    arguments["objective"] = "dapo"
    rounded = changed(head, lambda x: x.bfloat16().float())
    plain, plain_gradients = ours(rounded, hidden.bfloat16().float(), None, **arguments)
    for plan in ("fast", "lean"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, gradient = ours(head, hidden, None, plan=plan, **arguments)
        assert torch.equal(found.logp, plain.logp)
        for name, value in gradient.items():
            assert value.dtype == torch.float32
            assert torch.allclose(value, plain_gradients[name], rtol=1e-4, atol=1e-7)


def test_views_and_packed_rows(backend: str, device: str) -> None:
    """hidden[:, :-1], a transposed batch, and rows of sequences in any order: the same loss."""
    head = changed(make_head(), lambda x: x.to(device))
    buffer = torch.randn(T, B, D + 1, device=device)[..., :D].transpose(0, 1)
    target = torch.randint(0, V, (B, T - 1), device=device)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25], device=device)
    names = ("dapo", "gspo", "gmpo")
    for name in names[:2] if is_interpreted(backend) else names:
        arguments = {"objective": name, "rewards": rewards, "group_size": 2, "backend": backend}
        leaf = buffer.clone().requires_grad_()
        padded = fused_linear_loss(leaf[:, :-1], head, target, **arguments)
        padded.loss.backward()
        view = buffer.detach().requires_grad_()
        again = fused_linear_loss(view[:, :-1], head, target, **arguments)
        again.loss.backward()
        assert torch.equal(padded.loss, again.loss)
        assert torch.equal(leaf.grad, view.grad)
        order = torch.randperm(B * (T - 1), device=device)
        rows = leaf.detach()[:, :-1].reshape(-1, D)[order].requires_grad_()
        sequence = torch.arange(B, device=device).repeat_interleave(T - 1)[order]
        packed = fused_linear_loss(
            rows, head, target.view(-1)[order], sequence_id=sequence, memory_budget=FEW, **arguments
        )
        packed.loss.backward()
        assert torch.equal(packed.logp, padded.logp.view(-1)[order])
        assert torch.allclose(packed.loss, padded.loss, rtol=1e-5, atol=1e-7)
        expected = leaf.grad[:, :-1].reshape(-1, D)[order]
        assert torch.allclose(rows.grad, expected, rtol=1e-4, atol=1e-7)


def products(call: Callable[[], object], rows: int) -> float:
    """Operations of a call, in products of 2·rows·V·D."""
    with FlopCounterMode(display=False) as counter, one_thread():
        call()
    return counter.get_total_flops() / (2 * rows * V * D)


def step(
    head: LinearHead, hidden: Tensor, frozen: bool = False, **arguments: Any
) -> Callable[[], object]:
    """Forward and backward as one call."""
    return lambda: ours(head, hidden, None, frozen, backend=CPU_BACKEND, **arguments)


def test_products_are_counted() -> None:
    """3 with a trained head, 2 with a frozen one, 1 without a gradient; lean takes one more."""
    head, N = make_head(), 4 * 32
    hidden, target = torch.randn(4, 32, D), torch.randint(0, V, (4, 32))
    common: dict[str, Any] = {"target": target, "advantage": torch.ones(4)}
    token, sequence = common | {"objective": "dapo"}, common | {"objective": "gspo"}
    for budget in (64 * V * 4, 128 * V * 4):
        for arguments in (token, sequence):
            arguments = {**arguments, "memory_budget": budget}
            assert products(step(head, hidden, plan="fast", **arguments), N) == 3
            assert products(step(head, hidden, frozen=True, **arguments), N) == 2
            assert products(step(head, hidden, plan="lean", **arguments), N) == 4
            assert products(step(head, hidden, frozen=True, plan="lean", **arguments), N) == 2
    # a sequence longer than a chunk: its logits once more, unless the head is frozen
    small = {**sequence, "memory_budget": FEW}
    assert products(step(head, hidden, plan="fast", **small), N) == 4
    assert products(step(head, hidden, frozen=True, **small), N) == 2
    bonus = {**small, "objective": RECIPES["gspo"].replace(entropy_coef=0.1)}
    assert products(step(head, hidden, frozen=True, **bonus), N) == 3
    with torch.no_grad():
        for arguments in (token, sequence):
            call = lambda a=arguments: fused_linear_loss(hidden, head, **a)  # noqa: E731
            assert products(call, N) == 1
    assert products(lambda: linear_token_logp(hidden, head, target), N) == 1
    only_head = lambda: fused_linear_loss(  # noqa: E731
        hidden, changed(head, lambda x: x.requires_grad_()), **token
    ).loss.backward()
    assert products(only_head, N) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_without_a_gradient_are_left_out(frozen: bool) -> None:
    """Groups of equal rewards, and masked rows: half of the rows, half of the products."""
    head, (batch, width) = make_head(), (8, 32)
    hidden, target = torch.randn(batch, width, D), torch.randint(0, V, (batch, width))
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0])
    count = 2 if frozen else 3
    arguments: dict[str, Any] = {"rewards": rewards, "group_size": 2}
    for name in ("dapo", "dr_grpo", "gspo", "gmpo", "cispo", "rloo"):
        call = step(head, hidden, frozen, target=target, objective=name, **arguments)
        assert products(call, batch * width // 2) == count, name
        call = step(head, hidden, frozen, target=target, objective=name, all_logp=True, **arguments)
        assert products(call, batch * width // 2) == count + 1
    for name in ("dro", "grpo", "entropy"):
        given = dict(arguments)
        if OBJECTIVES[name].beta:
            given["ref_logp"] = torch.full((batch, width), -4.0)
        call = step(head, hidden, frozen, target=target, objective=OBJECTIVES[name], **given)
        assert products(call, batch * width) == count, name
    masked = target.clone()
    masked[:, width // 2 :] = -100
    call = step(head, hidden, frozen, target=masked, objective="dro", **arguments)
    assert products(call, batch * width // 2) == count


def test_rows_left_out_change_nothing_else() -> None:
    """Loss and gradients are those of the reference; what was not computed reads 0, and is told."""
    head = make_head()
    hidden, arguments = case(head)
    arguments |= {"rewards": torch.tensor([1.0, 1.0, 0.5, 0.25]), "objective": "dapo"}
    exact, exact_gradients = dense(head, hidden, None, Tensor.double, False, **arguments)
    honest, honest_gradients = dense(head, hidden, None, lambda x: x, False, **arguments)
    few, gradient = ours(head, hidden, None, **arguments)
    every, same = ours(head, hidden, None, all_logp=True, **arguments)
    assert_no_worse(few.loss.detach(), honest.loss.detach(), exact.loss.detach(), what="loss")
    for name in gradient:
        assert torch.equal(gradient[name], same[name])
        assert_no_worse(
            gradient[name], honest_gradients[name], exact_gradients[name], size=0.0, what=name
        )
    counted = arguments["mask"] & (arguments["target"] >= 0)
    moving = counted & (torch.arange(B) >= 2)[:, None]
    for name in ("logp", "entropy", "ratio", "kl"):
        assert torch.equal(getattr(few, name)[moving], getattr(every, name)[moving])
        assert (getattr(few, name)[~moving] == 0).all()
    assert few.metrics["tokens"] == moving.sum()
    assert few.metrics["skipped_rows"] == (~moving).sum()
    assert every.metrics["tokens"] == counted.sum()
    assert every.metrics["skipped_rows"] == (~counted).sum()
    assert torch.equal(few.metrics["clip_fraction"], every.metrics["clip_fraction"])


def test_surrogates_that_promise_it_vanish_without_an_advantage() -> None:
    """What `Surrogate.homogeneous` says holds for value and derivatives; dro does not say it."""
    logp = torch.linspace(-30, 0, 41, dtype=torch.float64)[:, None]
    log_ratio = torch.linspace(-15, 15, 61, dtype=torch.float64)[None]
    logp, log_ratio = torch.broadcast_tensors(logp, log_ratio)
    for name, objective in RECIPES.items():
        surrogate = objective.surrogate
        found = as_torch(surrogate.function)(
            logp, log_ratio, torch.zeros_like(logp), *surrogate.args
        )
        assert surrogate.homogeneous == all(bool((part == 0).all()) for part in found), name


@over_backends(["dapo", "sequence", "exact KL, entropy"], interpreted=["exact KL, entropy"])
def test_logp_has_the_same_bits_in_every_chunk(backend: str, device: str, name: str) -> None:
    """Whatever the budget, the plan, the rows beside it; and those of `linear_token_logp`."""
    head = make_head()
    hidden, arguments = case(head)
    arguments, reference = needed(OBJECTIVES[name], head, hidden, arguments)
    common = {"objective": OBJECTIVES[name], "backend": backend, "device": device, **arguments}
    layouts = [(plan, budget) for plan in ("fast", "lean") for budget in (1, FEW, SOME, ALL)]
    slow = is_interpreted(backend)
    if slow:
        # chunks of 16 rows and of 36; the first reading of the lean plan
        layouts = [("fast", FEW), ("fast", ALL), ("lean", SOME)]
    found = [
        ours(head, hidden, reference, plan=plan, memory_budget=budget, all_logp=True, **common)[0]
        for plan, budget in layouts
    ]
    for other in found[1:]:
        for vector in ("logp", "entropy", "kl"):
            assert torch.equal(getattr(other, vector), getattr(found[0], vector)), vector
    moved = (hidden.to(device), changed(head, lambda x: x.to(device)))
    target, mask = arguments["target"].to(device), arguments["mask"].to(device)
    for budget in (SOME,) if slow else (1, SOME, ALL):
        alone = linear_token_logp(
            *moved, target, mask=mask, temperature=0.9, memory_budget=budget, backend=backend
        )
        assert torch.equal(alone.logp, found[0].logp)
        assert torch.equal(alone.entropy, found[0].entropy)
    row = linear_token_logp(
        moved[0][:1, 1:2], moved[1], target[:1, 1:2], temperature=0.9, backend=backend
    )
    assert mask[0, 1] and row.logp == found[0].logp[0, 1]


def test_on_policy_the_ratio_is_one(backend: str, device: str) -> None:
    head = changed(make_head(), lambda x: x.to(device))
    hidden = torch.randn(B, T, D, device=device)
    target = torch.randint(0, V, (B, T), device=device)
    old = linear_token_logp(hidden, head, target, backend=backend).logp
    for name in ("dapo", "gspo"):
        out = fused_linear_loss(
            hidden.requires_grad_(),
            head,
            target,
            objective=RECIPES[name].replace(kl="k3", beta=0.1),
            advantage=torch.randn(B, device=device),
            old_logp=old,
            ref_logp=old,
            memory_budget=FEW,
            backend=backend,
        )
        assert torch.equal(out.ratio, torch.ones_like(out.ratio))
        assert torch.equal(out.kl, torch.zeros_like(out.kl))


SECOND = ["dapo", "sequence", "exact KL, entropy"]


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("name", SECOND)
def test_backward_twice_scaled_and_accumulated(name: str, plan: str) -> None:
    head = make_head(bias=True)
    hidden, arguments = case(head)
    arguments, reference = needed(OBJECTIVES[name], head, hidden, arguments)
    arguments |= {"objective": OBJECTIVES[name], "plan": plan, "memory_budget": FEW}
    _, plain = ours(head, hidden, reference, **arguments)
    if reference is not None:
        arguments |= {"ref_hidden": reference[0], "ref_lm_head": reference[1]}
    head, hidden = leaves(head, hidden, lambda x: x, False)
    tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    loss = fused_linear_loss(hidden * 1.0, head, **arguments).loss
    (0.25 * loss).backward(retain_graph=True)
    for key, tensor in tensors.items():
        assert torch.equal(tensor.grad, 0.25 * plain[key])
    (0.25 * loss).backward()
    for key, tensor in tensors.items():
        assert torch.equal(tensor.grad, 0.5 * plain[key])
    (3 * fused_linear_loss(hidden, head, **arguments).loss).backward()
    for key, tensor in tensors.items():
        assert torch.allclose(tensor.grad, 3.5 * plain[key], rtol=1e-5, atol=1e-8)
    loss = fused_linear_loss(hidden, head, **arguments).loss
    with pytest.raises(RuntimeError, match="its gradient cannot be differentiated"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_head_that_has_changed_is_noticed_by_a_second_backward() -> None:
    head, hidden = leaves(make_head(), torch.randn(B, T, D), lambda x: x, False)
    target = torch.randint(0, V, (B, T))
    loss = fused_linear_loss(hidden, head, target, objective="dapo", advantage=torch.ones(B)).loss
    loss.backward(retain_graph=True)
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tied_matrix_gets_both_gradients() -> None:
    """As embedding and as head."""
    weight = torch.randn(V, D, dtype=torch.float64) * 0.3
    target = torch.randint(0, V, (B, T))
    ids = torch.randint(0, V, (B, T))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = weight.to(dtype).requires_grad_()
        hidden = torch.tanh(leaf[ids])
        common = {"objective": "dapo", "advantage": torch.ones(B)}
        if dtype == torch.float32:
            out = fused_linear_loss(hidden, leaf, target, **common)  # type: ignore[arg-type]
        else:
            out = reference_loss(hidden @ leaf.t(), target, **common)  # type: ignore[arg-type]
        out.loss.backward()
        found.append(leaf.grad)
    assert torch.allclose(found[0].double(), found[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "vespo"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_to_learn_from(
    backend: str, device: str, name: str, shape: tuple[int, int], plan: str
) -> None:
    """No rows at all, or every token masked: loss 0 and zero gradients."""
    head = make_head(**HEADS["everything"])
    head, hidden = leaves(head, torch.randn(*shape, D), lambda x: x.to(device), False)
    for frozen in (False, True):
        out = fused_linear_loss(
            hidden,
            changed(head, Tensor.detach) if frozen else head,
            torch.full(shape, -100, device=device),
            objective=name,
            advantage=torch.ones(shape[0], device=device),
            ref_logp=torch.zeros(shape, device=device),
            plan=plan,
            backend=backend,
        )
        out.loss.backward()
        assert out.loss == 0
        assert (hidden.grad == 0).all()
        assert hidden.grad.shape == hidden.shape
        for vector in (out.logp, out.entropy, out.ratio, out.kl):
            assert torch.equal(vector, torch.zeros(shape, device=device))
        assert all(torch.isfinite(value) for value in out.metrics.values())
        assert out.metrics["skipped_rows"] == shape[0] * shape[1]
    for tensor in head.tensors:
        assert tensor is not None and (tensor.grad == 0).all()


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("name", ["dapo", "sequence", "entropy", "gspo"])
def test_rows_that_are_not_finite_stay_alone(name: str, plan: str) -> None:
    """The bad row, or its sequence under a sequence ratio; the head's gradient is that of the rest.

    The product would spread 0·NaN over the whole head.
    """
    head = make_head()
    hidden, arguments = case(head)
    arguments |= {"objective": OBJECTIVES[name], "plan": plan, "normalizer": 10.0, "mask": None}
    arguments["target"] = arguments["target"].clamp(min=0)
    hit = torch.zeros(B, T, dtype=torch.bool)
    hit[2, slice(None) if name in ("sequence", "gspo") else 1] = True
    clean = dict(arguments, mask=~hit)
    if OBJECTIVES[name].aggregation == "sequence_mean" and name == "entropy":
        # a dropped row still counts in the mean of its sequence
        clean = None  # type: ignore[assignment]
    poisoned = hidden.clone()
    poisoned[2, 1, 3] = torch.nan
    for frozen in (False, True):
        out, gradient = ours(head, poisoned, None, frozen, **arguments)
        assert out.metrics["nonfinite_rows"] == hit.sum()
        assert torch.isfinite(out.loss)
        assert (gradient["hidden"][hit] == 0).all()
        assert torch.isfinite(gradient["hidden"]).all()
        if not frozen:
            assert torch.isfinite(gradient["weight"]).all()
        if clean is not None:
            rest, expected = ours(head, hidden, None, frozen, **clean)
            assert torch.allclose(out.loss, rest.loss, rtol=1e-5, atol=1e-7)
            for key, value in gradient.items():
                assert torch.allclose(value, expected[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("name", ["dapo", "sequence", "entropy"])
@pytest.mark.parametrize("logits_dtype", [None, torch.float16])
def test_float16_gradients_survive_by_the_loss_scale(
    name: str, plan: str, logits_dtype: torch.dtype | None
) -> None:
    """Neither dlogits nor what is made of them underflows before the loss scale has come."""
    head = make_head(dtype=torch.float16)
    hidden, arguments = case(head, torch.float16)
    arguments |= {"normalizer": 1e8, "objective": OBJECTIVES[name], "old_logp": None}
    _, exact = dense(head, hidden, None, Tensor.double, False, **arguments)
    assert (exact["weight"].half() == 0).double().mean() > 0.9, "it would underflow without care"
    head, hidden = leaves(head, hidden, lambda x: x, False)
    out = fused_linear_loss(hidden, head, plan=plan, logits_dtype=logits_dtype, **arguments)
    (2.0**20 * out.loss).backward()
    for tensor, truth in ((hidden, exact["hidden"]), (head.weight, exact["weight"])):
        error = (tensor.grad.double() / 2**20 - truth).norm() / truth.norm()
        assert error < (2e-3 if logits_dtype is None else 1e-2)


def live_bytes_after(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes that a call leaves behind, and what it returned, which holds them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, one_thread():
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return list(accumulate((event.nbytes() for event in events), initial=0))[-1], result


def test_memory_is_the_budget_and_the_gradients() -> None:
    """Not the logits (16 MiB); after the forward not even the buffer."""
    N, words, size, budget = 1024, 4096, 32, 2**20
    hidden = torch.randn(N, size, requires_grad=True)
    weight = torch.randn(words, size, requires_grad=True)
    arguments: dict[str, Any] = {
        "target": torch.randint(0, words, (N,)),
        "sequence_id": torch.arange(N) // 32,
        "advantage": torch.randn(N),
        "memory_budget": budget,
        "backend": CPU_BACKEND,
    }
    # the row kernels' scratch, two chunks of 1 MiB each at most, and vectors of N
    scratch = 2**23 + 2**20
    returned = 4 * (hidden.numel() + weight.numel())
    for name in ("dapo", "gspo"):

        def forward(name: str = name) -> Tensor:
            return fused_linear_loss(hidden, weight, objective=name, **arguments).loss

        peak = peak_extra_bytes(lambda f=forward: f().backward(), "cpu")
        assert peak < budget + scratch + returned
        left, _ = live_bytes_after(forward)
        assert left < returned + 2**18


def test_lean_holds_no_float32_sum_of_the_matrix() -> None:
    """Beyond inputs and returned gradients: less than 4 bytes · V · D, whatever V is."""
    N, size, extra = 64, 256, {}
    for words in (4096, 8192):
        hidden = torch.randn(N, size).bfloat16().requires_grad_()
        weight = torch.randn(words, size).bfloat16().requires_grad_()
        arguments: dict[str, Any] = {
            "target": torch.randint(0, words, (N,)),
            "sequence_id": torch.arange(N) // 32,
            "advantage": torch.randn(N),
            "objective": "dapo",
            "backend": CPU_BACKEND,
        }
        returned = 2 * (hidden.numel() + weight.numel())
        for plan, budget in (("fast", None), ("lean", 2**20)):
            call = partial(fused_linear_loss, hidden, weight, plan=plan, memory_budget=budget)
            peak = peak_extra_bytes(lambda c=call, a=arguments: c(**a).loss.backward(), "cpu")
            extra[plan, words] = peak - returned
        assert extra["fast", words] > 4 * words * size
        assert extra["lean", words] < extra["fast", words] - 2 * words * size
    # the row kernels' scratch grows with a row; a sum of the matrix would add 4 MiB
    assert extra["lean", 8192] - extra["lean", 4096] < 4 * 4096 * 3 * N


def test_layouts_at_the_size_of_the_issue() -> None:
    """8,192 x 151,936 x 4,096 in bfloat16 on a GPU: 3.5 GiB in the fast plan, 0.5 in the lean."""
    n, words, size, GiB = 8192, 151_936, 4096, 2**30
    # float32 logits and their bfloat16 gradient
    row, sums = 6 * words, 4 * words * size
    head = LinearHead(torch.empty(words, size, dtype=torch.bfloat16, device="meta"))
    cpu, trained = torch.device("cpu"), (True, True, False, False, False)
    fast = choose_layout(n, head, trained, row, "fast", int(3.35 * GiB), cpu)
    chunks = -(-n // fast.rows)
    assert fast.plan == "fast" and chunks <= 8
    assert fast.rows * row + sums + 4 * n * size < 3.5 * GiB
    lean = choose_layout(n, head, trained, row, None, GiB // 2, cpu)
    assert lean.plan == "lean" and lean.slice_rows == n
    slices = 6 * n * lean.width + 4 * lean.width * size
    assert max(slices, 4 * lean.rows * words) + 4 * n * size + 2 * n * size < GiB // 2
    frozen = (True, False, False, False, False)
    assert choose_layout(n, head, frozen, row, "lean", GiB // 2, cpu).plan == "fast"
    # a CPU's 64 MiB would be fewer rows
    assert choose_layout(n, head, trained, row, None, None, cpu) == Layout("fast", 256)


def test_errors_name_the_argument() -> None:
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D)
    target = torch.zeros(B, T, dtype=torch.int64)
    good: dict[str, Any] = {
        "hidden": hidden,
        "lm_head": weight,
        "target": target,
        "objective": "dapo",
        "advantage": torch.ones(B),
    }
    exact = RECIPES["grpo"].replace(kl="exact", beta=0.1)
    for name, change in {
        "hidden: expected a tensor": {"hidden": hidden[0, 0]},
        "hidden: expected one of": {"hidden": hidden.double()},
        "lm_head: expected": {"lm_head": torch.randn(V, D + 1)},
        "lm_head: expected a matrix": {"lm_head": weight[0]},
        "target: expected shape": {"target": target[:, :-1]},
        "target: expected -100 or an id": {"target": target + V},
        "temperature: expected": {"temperature": 0.0},
        "plan: expected": {"plan": "small"},
        "memory_budget: expected": {"memory_budget": 0},
        "logits_dtype: expected": {"logits_dtype": torch.float64},
        "ref_hidden: expected None with ref_logp": {
            "ref_logp": torch.zeros(B, T),
            "ref_hidden": hidden,
        },
        "ref_hidden: expected shape": {"ref_hidden": hidden[:, :-1]},
        "ref_lm_head: expected None": {"ref_lm_head": weight},
        "ref_hidden: expected a tensor for kl": {"objective": exact},
        "ref_lm_head: expected V": {
            "objective": exact,
            "ref_hidden": hidden,
            "ref_lm_head": weight[:-1],
        },
        "advantage: expected exactly one": {"advantage": None},
        "old_logp: expected shape": {"old_logp": torch.zeros(B)},
        "sequence_id: expected": {
            "hidden": hidden[0],
            "target": target[0],
            "advantage": torch.ones(T),
        },
    }.items():
        with pytest.raises(ValueError, match=name):
            fused_linear_loss(**{**good, **change})
    for name, fields in {
        "bias: expected shape": {"bias": torch.zeros(D)},
        "lora_A: expected both": {"lora_A": torch.zeros(2, D)},
        "lora_B: expected shape": {"lora_A": torch.zeros(2, D), "lora_B": torch.zeros(V, 3)},
        "softcap: expected": {"softcap": 0.0},
        "scale: expected": {"scale": float("inf")},
        "vocabulary: expected": {"vocabulary": V + 1},
    }.items():
        with pytest.raises(ValueError, match=name):
            LinearHead(weight, **fields)


def test_it_is_the_loss_from_logits() -> None:
    """Over the same logits `fused_loss` says the same, to a few roundings, sampler and all."""
    head = make_head()
    hidden, arguments = case(head)
    objective = RECIPES["dapo"].replace(
        factor=PolicyFactor(SamplerCorrection(), top_entropy=0.5), entropy_coef=0.1
    )
    arguments, _ = needed(objective, head, hidden, arguments)
    found, _ = ours(head, hidden, None, objective=objective, **arguments)
    logits = materialised(head, hidden)
    expected = fused_loss(logits, objective=objective, **arguments)
    assert torch.allclose(found.loss, expected.loss, rtol=1e-5)
    assert torch.allclose(found.logp, expected.logp, atol=1e-5)
    counted = found.logp != 0
    assert torch.equal(found.factor[counted], expected.factor[counted])


@pytest.mark.parametrize("where", ["weight", "bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("name", ["dapo", "sequence", "entropy", "exact KL"])
@pytest.mark.parametrize("plan", ["fast", "lean"])
def test_a_head_that_is_not_finite_passes_nothing_on(name: str, plan: str, where: str) -> None:
    """Every row is dropped, and 0·NaN must not become its gradient, nor that of the head."""
    head = make_head(bias=True, lora=2)
    hidden, arguments = case(head)
    arguments |= {"objective": OBJECTIVES[name], "plan": plan}
    arguments, reference = needed(OBJECTIVES[name], head, hidden, arguments)
    bad = {name: x.clone() for name, x in vars(head).items() if isinstance(x, Tensor)}
    bad[where][1] = torch.nan
    head = replace(head, **bad)
    for frozen in (False, True):
        out, found = ours(head, hidden, reference, frozen, **arguments)
        assert out.loss == 0
        assert out.metrics["tokens"] == 0
        assert out.metrics["nonfinite_rows"] > 0
        for key, gradient in found.items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), key


def test_a_target_at_the_edge_of_a_vocabulary_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vocabulary entry is a target once, so that all first and last columns are."""
    from grpo_core.linear import vocab_slices

    V = 384
    hidden, weight = torch.randn(V, 8), torch.randn(V, 8)
    slices = []
    add = vocab_slices._add_slice
    monkeypatch.setattr(
        vocab_slices, "_add_slice", lambda *given: slices.append(given[2]) or add(*given)
    )
    gradients = []
    for plan in ("fast", "lean"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = fused_linear_loss(
            *leaves,
            torch.arange(V),
            objective="dapo",
            advantage=torch.randn(V, generator=torch.Generator().manual_seed(1)),
            sequence_id=torch.arange(V) // 4,
            plan=plan,
            memory_budget=2**18,
        )
        out.loss.backward()
        gradients.append([x.grad for x in leaves])
    assert len(slices) > 2
    for lean, fast in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(lean, fast)


def test_lean_keeps_the_gradient_of_the_entropy_of_large_logits() -> None:
    """A constant on all logits, all of them exact, changes nothing, though their lse is rounded."""
    hidden, weight = torch.randint(-8, 9, (6, 4)) / 8, torch.randint(-8, 9, (97, 4)) / 8
    given = {"advantage": torch.ones(6), "sequence_id": torch.arange(6), "plan": "lean"}
    gradients = []
    for constant in (0.0, 2e5):
        leaf = hidden.clone().requires_grad_()
        matrix = weight.clone().requires_grad_()
        head = LinearHead(matrix, torch.full((97,), constant))
        objective = OBJECTIVES["entropy kept low"]
        fused_linear_loss(leaf, head, torch.arange(6), objective=objective, **given).loss.backward()
        gradients.append((leaf.grad, matrix.grad))
    for near, far in zip(*gradients, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-6)
