"""`fused_loss` of both backends against the float64 reference, and against misuse of autograd."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    Objective,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    SequenceWeight,
    clip,
    fused_loss,
    token_logp,
)
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.objective import KL
from grpo_core.verify.accuracy import Result, compare_losses
from tests.combinations import over_backends, paired
from tests.conftest import BACKENDS

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES: dict[str, Objective] = {
    **RECIPES,
    **{
        f"{name}+{kl}": RECIPES[name].replace(kl=kl, beta=0.04, kl_times_ratio=times_ratio)
        for name in ("dr_grpo", "dapo")
        for kl in get_args(KL)
        if kl != "exact"
        for times_ratio in (name == "dapo",)
    },
    "entropy": RECIPES["grpo"].replace(entropy_coef=0.3),
    "entropy of sequences": RECIPES["gspo"].replace(entropy_coef=0.3),
    "entropy kept low": RECIPES["dapo"].replace(entropy_coef=-0.2),
    "exact KL": RECIPES["grpo"].replace(kl="exact", beta=0.3),
    "exact KL, entropy": RECIPES["dapo"].replace(kl="exact", beta=0.3, entropy_coef=0.2),
    "exact KL of sequences": RECIPES["gspo"].replace(kl="exact", beta=0.3, entropy_coef=-0.1),
    "exact KL, only measured": RECIPES["dapo"].replace(kl="exact"),
    "forward KL": RECIPES["opd"].replace(interpolation=0.0),
    "forward KL, entropy": RECIPES["dapo"].replace(
        kl="exact", beta=0.3, interpolation=0.0, entropy_coef=0.2
    ),
    "Jensen-Shannon": RECIPES["opd"].replace(interpolation=0.3),
    "Jensen-Shannon of sequences": RECIPES["gspo"].replace(
        kl="exact", beta=0.3, interpolation=0.5, entropy_coef=-0.1
    ),
    "entropy averaged apart": RECIPES["grpo"].replace(
        entropy_coef=0.3, entropy_aggregation="token_mean"
    ),
    "top entropy": RECIPES["grpo"].replace(factor=PolicyFactor(top_entropy=0.4)),
    "top entropy, bonus": RECIPES["dapo"].replace(
        factor=PolicyFactor(top_entropy=0.4), entropy_coef=0.3, entropy_aggregation="token_mean"
    ),
    "top entropy, DRO": RECIPES["dro"].replace(factor=PolicyFactor(top_entropy=0.6)),
    "off-policy mask": RECIPES["grpo"].replace(factor=PolicyFactor(off_policy_delta=0.02)),
    **{
        f"{action} {level}": RECIPES["grpo"].replace(
            factor=PolicyFactor(SamplerCorrection(level, action, 0.8, 1.2))
        )
        for level, action in (
            ("token", "truncate"),
            ("token", "zero"),
            ("token", "reject"),
            ("sequence", "truncate"),
            ("geometric", "reject"),
        )
    },
    "sampler of sequences": RECIPES["gmpo"].replace(
        factor=PolicyFactor(SamplerCorrection("token", "zero", 0.8, 1.2)), entropy_coef=0.1
    ),
    "sampler, mask, entropy, exact KL": RECIPES["dapo"].replace(
        factor=PolicyFactor(SamplerCorrection(), 0.05, 0.5),
        kl="exact",
        beta=0.1,
        entropy_coef=0.2,
    ),
    "sequence weight, sampler": RECIPES["vespo"].replace(
        factor=PolicyFactor(
            SamplerCorrection("token", "zero", 0.8, 1.2), 0.05, 0.5, SequenceWeight(0.3, 0.2, 0.4)
        ),
        kl="k3",
        beta=0.1,
        kl_times_ratio=True,
    ),
    "rejections": RECIPES["grpo"].replace(
        factor=PolicyFactor(
            SamplerCorrection(),
            rejections=(
                Rejection("log_ratio", "token", -0.2, 0.2),
                Rejection("k3", "max", high=0.1),
            ),
        )
    ),
    "rejections of the current policy": RECIPES["gspo"].replace(
        factor=PolicyFactor(rejections=(Rejection("k2", "mean", high=0.02),), current=True)
    ),
    "two-sided": Objective(clip(0.2, 0.28, 3.0), aggregation="token_sum"),
    "sequence": Objective(
        clip(0.02, 0.03), "k3", 0.04, ratio_level="sequence", aggregation="sequence_mean"
    ),
    "sequence token": Objective(
        clip(0.02, 0.03), "k3", 0.04, ratio_level="sequence_token", kl_times_ratio=True
    ),
}
# name: (shape of the logits' buffer, what is taken of it)
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "padded": ((4, 5, 300), slice(None)),
    "odd V": ((4, 2, 1003), slice(None)),
    "V = 2": ((4, 5, 2), slice(None)),
    "a multiple of the block": ((4, 2, 2048), slice(None)),
    "one row a sequence": ((4, 1, 257), slice(None)),
    "all but the last": ((4, 6, 131), (slice(None), slice(None, -1))),
    "part of the vocabulary": ((4, 3, 160), (..., slice(8, 141))),
    "every other word": ((4, 3, 160), (..., slice(None, None, 2))),
    "time first": ((5, 4, 96), None),
}


def view(buffer: Tensor, shape: str) -> Tensor:
    """The part of a buffer that is the case's logits [B, T, V]."""
    taken = SHAPES[shape][1]
    return buffer.transpose(0, 1) if taken is None else buffer[taken]


def case(shape: str, dtype: torch.dtype, *, peaked: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """A buffer of logits, and the other arguments of a loss over its view."""
    buffer = (2 * torch.randn(SHAPES[shape][0])).to(dtype)
    logits = view(buffer, shape)
    B, T, V = logits.shape
    target = torch.randint(0, V, (B, T))
    if peaked:
        margins = torch.linspace(0, 30, B * T).view(B, T, 1).to(dtype)
        logits.scatter_(2, target[..., None], logits.amax(2, keepdim=True) + margins)
    target[1, T // 2 :] = -100
    mask = torch.rand(B, T) < 0.9
    logp = torch.log_softmax(logits.double() / 0.9, -1).gather(2, target.clamp(min=0)[..., None])
    return buffer, {
        "target": target,
        "mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25]),
        "group_size": 2,
        "old_logp": (logp[..., 0] + 0.2 * torch.randn(B, T)).float(),
        "ref_logp": (logp[..., 0] + 0.2 * torch.randn(B, T)).float(),
        "temperature": 0.9,
    }


def needed(objective: Objective, logits: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that go with an objective; a sampler that could not score two tokens."""
    arguments = dict(arguments)
    if objective.kl == "exact":
        del arguments["ref_logp"]
        arguments["ref_logits"] = logits + 0.3 * torch.randn(logits.shape).to(logits.dtype)
    if objective.factor.needs_sampler:
        old_logp = arguments["old_logp"]
        arguments["sampler_logp"] = old_logp + 0.2 * torch.randn(old_logp.shape)
        arguments["sampler_logp"][0, 0] = torch.nan
        arguments["sampler_logp"][-1, 0] = -torch.inf
    return arguments


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run(loss: Any, buffer: Tensor, shape: str, **arguments: Any) -> tuple[Any, Tensor]:
    """(output, gradient of the whole buffer)."""
    leaf = buffer.clone().requires_grad_()
    out = loss(view(leaf, shape), **arguments)
    out.loss.backward()
    return out, leaf.grad


def check(
    backend: str,
    device: str,
    objective: Objective,
    shape: str,
    buffer: Tensor,
    arguments: dict[str, Any],
) -> None:
    """Ours is no worse than the reference in float32, both measured by the reference in float64."""
    arguments = needed(objective, view(buffer, shape), arguments)
    ours, gradient = run(
        fused_loss,
        buffer.to(device),
        shape,
        objective=objective,
        backend=backend,
        **moved(arguments, device),
    )
    honest, honest_gradient = run(reference_loss, buffer, shape, objective=objective, **arguments)
    exact, exact_gradient = run(
        reference_loss, buffer.double(), shape, objective=objective, **arguments
    )
    assert gradient.dtype == buffer.dtype
    longest = arguments["target"].shape[1]
    results = (
        Result(ours, gradient),
        Result(honest, honest_gradient),
        Result(exact, exact_gradient),
    )
    for found in compare_losses(objective, longest, *results):
        assert found.ok, found
    for name, value in ours.metrics.items():
        close = torch.isclose(value.cpu().double(), exact.metrics[name].double(), 1e-4, 1e-5)
        assert close, f"{name}: {value} is not {exact.metrics[name]}"


@paired(name=OBJECTIVES, dtype=DTYPES, backend=BACKENDS)
def test_every_objective(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    buffer, arguments = case("odd V", dtype)
    check(backend, device, OBJECTIVES[name], "odd V", buffer, arguments)


@paired(
    shape=SHAPES,
    dtype=DTYPES,
    peaked=[False, True],
    name=["grpo", "sequence", "entropy", "exact KL, entropy"],
    backend=BACKENDS,
)
def test_every_shape(
    backend: str, device: str, shape: str, dtype: torch.dtype, peaked: bool, name: str
) -> None:
    buffer, arguments = case(shape, dtype, peaked=peaked)
    check(backend, device, OBJECTIVES[name], shape, buffer, arguments)


@over_backends(["grpo", "dapo", "sequence"], interpreted=["sequence"])
def test_packed_rows_are_the_padded_batch(backend: str, device: str, name: str) -> None:
    """Without its masked tokens, in any row order of sequences, a batch is the same loss."""
    buffer, arguments = case("padded", torch.float32)
    keep = arguments["mask"] & (arguments["target"] >= 0)
    padded, gradient = run(
        fused_loss,
        buffer.to(device),
        "padded",
        objective=OBJECTIVES[name],
        backend=backend,
        **moved(arguments, device),
    )
    rows = keep.nonzero(as_tuple=True)
    logits = buffer[rows].to(device).requires_grad_()
    vectors = {k: arguments[k][rows].to(device) for k in ("target", "old_logp", "ref_logp")}
    packed = fused_loss(
        logits,
        objective=OBJECTIVES[name],
        sequence_id=rows[0].to(device),
        rewards=arguments["rewards"].to(device),
        group_size=2,
        temperature=0.9,
        backend=backend,
        **vectors,
    )
    packed.loss.backward()
    assert torch.allclose(packed.loss, padded.loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(packed.logp, padded.logp[keep.to(device)])
    assert torch.allclose(logits.grad, gradient[keep.to(device)], rtol=1e-5, atol=1e-8)
    masked = gradient[~keep.to(device)]
    assert torch.equal(masked, torch.zeros_like(masked))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_policy_ratio_is_one_and_kl_is_zero(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    """Exactly: with no old_logp, and with the one that `token_logp` found on another view."""
    logits = (3 * torch.randn(3, 4, 1003)).to(dtype).to(device)
    target = torch.randint(0, 1003, (3, 3), device=device)
    here = token_logp(logits[:, :-1], target, backend=backend).logp
    rows = logits[:, :-1].reshape(9, 1003)
    there = torch.cat(
        [
            token_logp(rows[n : n + 2], target.view(-1)[n : n + 2], backend=backend).logp
            for n in range(0, 9, 2)
        ]
    )
    assert torch.equal(here.view(-1), there)
    advantage = torch.randn(3, 3, device=device)
    for old_logp in (None, there.view(3, 3)):
        leaf = logits.clone().requires_grad_()
        out = fused_loss(
            leaf[:, :-1],
            target,
            objective="grpo",
            advantage=advantage,
            old_logp=old_logp,
            ref_logp=here,
            backend=backend,
        )
        assert torch.equal(out.ratio, torch.ones_like(out.ratio))
        assert torch.equal(out.kl, torch.zeros_like(out.kl))
        out.loss.backward()
        reinforce = logits.double().requires_grad_()
        logp = torch.log_softmax(reinforce[:, :-1], -1).gather(2, target[..., None])[..., 0]
        (-(advantage * logp).mean(1).mean()).backward()
        error = (leaf.grad.double() - reinforce.grad).abs().max()
        assert error < (1e-7 if dtype == torch.float32 else 1e-3)


@paired(inplace=[False, True], name=["dapo", "sequence"], backend=BACKENDS)
def test_grad_output_is_honoured(backend: str, device: str, name: str, inplace: bool) -> None:
    """(c · loss).backward() gives c times the gradient; accumulation adds up."""
    buffer, arguments = case("all but the last", torch.float32)
    arguments = moved(arguments, device) | {"objective": OBJECTIVES[name], "backend": backend}
    _, plain = run(fused_loss, buffer.to(device), "all but the last", **arguments)
    leaf = buffer.to(device).requires_grad_()
    logits = leaf * 1.0
    (0.25 * fused_loss(logits[:, :-1], inplace=inplace, **arguments).loss).backward()
    assert torch.equal(leaf.grad, 0.25 * plain)
    logits = leaf * 1.0
    (3 * fused_loss(logits[:, :-1], inplace=inplace, **arguments).loss).backward()
    assert torch.allclose(leaf.grad, 3.25 * plain, rtol=1e-6, atol=1e-9)


SECOND = ["dapo", "sequence", "entropy", "exact KL, entropy", "sampler, mask, entropy, exact KL"]


@over_backends(SECOND, interpreted=["sequence", "sampler, mask, entropy, exact KL"])
def test_second_backward_is_right_or_refused(backend: str, device: str, name: str) -> None:
    buffer, arguments = case("padded", torch.float32)
    arguments = needed(OBJECTIVES[name], buffer, arguments)
    arguments = moved(arguments, device) | {"objective": OBJECTIVES[name], "backend": backend}
    leaf = buffer.to(device).requires_grad_()
    loss = fused_loss(leaf, **arguments).loss
    (2 * loss).backward(retain_graph=True)
    first, leaf.grad = leaf.grad, None
    (2 * loss).backward()
    assert torch.equal(leaf.grad, first)
    leaf.grad = None
    loss = fused_loss(leaf * 1.0, inplace=True, **arguments).loss
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first / 2)
    with pytest.raises(RuntimeError, match="second backward needs the logits"):
        loss.backward()


def test_a_gradient_of_a_gradient_is_refused(backend: str, device: str) -> None:
    """Not silently taken for a constant."""
    weight = torch.randn(4, 30, device=device, requires_grad=True)
    hidden = torch.randn(2, 3, 4, device=device, requires_grad=True)
    target = torch.zeros(2, 3, dtype=torch.int64, device=device)
    advantage = torch.ones(2, device=device)
    out = fused_loss(
        hidden @ weight, target, objective="dapo", advantage=advantage, backend=backend
    )
    with pytest.raises(RuntimeError, match="its gradient cannot be differentiated"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)


@paired(inplace=[False, True], name=["dapo", "sequence"], backend=BACKENDS)
def test_float16_gradients_survive_by_the_loss_scale(
    backend: str, device: str, name: str, inplace: bool
) -> None:
    """Made in the backward, 65,536 times what would underflow: nearly every entry is there."""
    buffer, arguments = case("odd V", torch.float16)
    buffer = buffer * 0.1
    arguments |= {"normalizer": 1e5, "objective": OBJECTIVES[name], "old_logp": None}
    _, exact = run(reference_loss, buffer.double(), "odd V", **arguments)
    leaf = buffer.to(device).requires_grad_()
    logits = leaf * 1.0
    loss = fused_loss(logits, inplace=inplace, backend=backend, **moved(arguments, device)).loss
    assert torch.equal(logits.detach(), leaf.detach())
    (65536.0 * loss).backward(retain_graph=True)
    error = (leaf.grad.cpu().double() / 65536 - exact).abs().amax() / exact.abs().amax()
    assert error < 2**-10
    assert ((leaf.grad != 0).cpu() == (exact != 0)).double().mean() > 0.999
    assert (exact.half() == 0).double().mean() > 0.9, "it would underflow without the scale"
    if inplace:
        with pytest.raises(RuntimeError, match="second backward needs the logits"):
            loss.backward()


def test_the_gradient_takes_no_more_than_the_view(backend: str, device: str) -> None:
    """Of a short completion at the end of a long prompt, too."""
    buffer = torch.randn(3, 40, 130, device=device)
    logits = buffer[:, -5:-1].detach().requires_grad_()
    target = torch.randint(0, 130, (3, 4), device=device)
    advantage = torch.randn(3, device=device)
    arguments = {"objective": "dapo", "advantage": advantage, "backend": backend}
    fused_loss(logits, target, **arguments).loss.backward()  # type: ignore[arg-type]
    assert logits.grad.untyped_storage().nbytes() <= 3 * 4 * 130 * 4
    packed = logits.detach().clone().requires_grad_()
    fused_loss(packed, target, **arguments).loss.backward()  # type: ignore[arg-type]
    assert torch.equal(logits.grad, packed.grad)


@paired(level=["sequence", "sequence_token", "token"], bad=[torch.nan, torch.inf], backend=BACKENDS)
def test_one_term_drops_all_that_share_its_ratio(
    backend: str, device: str, level: str, bad: float
) -> None:
    """The KL of one token is not finite, the sequence's ratio is: the sequence is out all the same.

    Where ratios are those of tokens, even bounded ones, it is the token alone.
    """
    logits = torch.randn(2, 3, 20, dtype=torch.float64)
    target = torch.randint(0, 20, (2, 3))
    target[0, 0] = -100
    ref_logp = torch.full((2, 3), -3.0)
    ref_logp[0, 1] = bad
    objective = OBJECTIVES["sequence"].replace(ratio_level=level, entropy_coef=0.1)
    arguments = {
        "target": target,
        "objective": objective.replace(token_clip=(0.5, 0.5)) if level == "token" else objective,
        "advantage": torch.tensor([1.0, -1.0]),
        "old_logp": torch.full((2, 3), -3.0) + 0.01 * torch.randn(2, 3),
        "ref_logp": ref_logp,
    }
    lost = torch.zeros(2, 3, dtype=torch.bool)
    lost[0, 1 if level == "token" else slice(1, None)] = True
    leaf = logits.float().to(device).requires_grad_()
    ours = fused_loss(leaf, backend=backend, **moved(arguments, device))
    ours.loss.backward()
    exact_leaf = logits.float().double().requires_grad_()
    exact = reference_loss(exact_leaf, **arguments)
    exact.loss.backward()
    assert ours.metrics["nonfinite_rows"] == exact.metrics["nonfinite_rows"] == lost.sum()
    assert (leaf.grad.cpu()[lost] == 0).all()
    assert (leaf.grad.cpu()[~lost & (target >= 0)] != 0).any(-1).all()
    assert torch.allclose(ours.loss.cpu().double(), exact.loss, atol=1e-6)
    assert torch.allclose(leaf.grad.cpu().double(), exact_leaf.grad, atol=1e-6)


def test_a_ratio_beyond_float32_drops_the_row(backend: str, device: str) -> None:
    """Of either sign of advantage, in the reference too, and the metrics stay finite."""
    target = torch.zeros(1, 3, dtype=torch.int64)
    arguments = {
        "target": target,
        "objective": "dapo",
        "advantage": torch.tensor([[1.0, -1.0, 1.0]]),
        "old_logp": torch.tensor([[-200.0, -200.0, -2.0]]),
    }
    for loss, where in ((fused_loss, device), (reference_loss, "cpu")):
        leaf = torch.randn(1, 3, 20).to(where).requires_grad_()
        options = {"backend": backend} if loss is fused_loss else {}
        out = loss(leaf, **moved(arguments, where), **options)
        out.loss.backward()
        assert out.metrics["nonfinite_rows"] == 2
        assert (leaf.grad[0, :2] == 0).all()
        assert leaf.grad[0, 2].abs().sum() > 0
        assert all(torch.isfinite(value) for value in out.metrics.values())


def test_with_beta_zero_the_kl_is_only_looked_at(backend: str, device: str) -> None:
    """However far or undefined the reference is, loss and gradient are those without it."""
    logits = torch.randn(1, 4, 20, device=device)
    target = torch.randint(0, 20, (1, 4), device=device)
    advantage = torch.ones(1, device=device)
    results = []
    for ref_logp in (None, torch.tensor([[-2.0, torch.nan, 300.0, -torch.inf]], device=device)):
        for times_ratio in (False, True):
            objective = RECIPES["grpo"].replace(beta=0.0, kl_times_ratio=times_ratio)
            leaf = logits.clone().requires_grad_()
            out = fused_loss(
                leaf,
                target,
                objective=objective,
                advantage=advantage,
                ref_logp=ref_logp,
                backend=backend,
            )
            out.loss.backward()
            assert out.metrics["nonfinite_rows"] == 0
            results.append((out.loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@over_backends(["dapo", "dr_grpo", "rloo", "reinforce_plus_plus"], interpreted=["dapo"])
def test_groups_by_id_are_groups_by_size(backend: str, device: str, name: str) -> None:
    """In any order; and groups of other sizes give what they give alone."""
    buffer, arguments = case("padded", torch.float32)
    arguments = moved(arguments, device) | {"objective": OBJECTIVES[name], "backend": backend}
    by_size, gradient = run(fused_loss, buffer.to(device), "padded", **arguments)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {
        k: v[order.to(device)] if isinstance(v, Tensor) else v for k, v in arguments.items()
    }
    shuffled |= {"group_size": None, "group_id": torch.tensor([1, 0, 1, 0], device=device)}
    by_id, again = run(fused_loss, buffer[order].to(device), "padded", **shuffled)
    assert torch.allclose(by_id.loss, by_size.loss, rtol=1e-5, atol=1e-7)
    assert torch.allclose(again, gradient[order.to(device)], rtol=1e-5, atol=1e-8)


def test_inplace_writes_the_gradient_over_the_logits(backend: str, device: str) -> None:
    buffer, arguments = case("all but the last", torch.bfloat16)
    arguments = moved(arguments, device) | {"objective": "dapo", "backend": backend}
    _, gradient = run(fused_loss, buffer.to(device), "all but the last", **arguments)
    leaf = buffer.to(device).requires_grad_()
    logits = leaf * 1.0
    out = fused_loss(logits[:, :-1], inplace=True, **arguments)
    assert torch.equal(logits[:, :-1].detach(), gradient[:, :-1])
    assert torch.equal(logits[:, -1].detach(), leaf[:, -1].detach()), "wrote beyond the view"
    out.loss.backward()
    assert torch.equal(leaf.grad, gradient)


def test_inplace_is_noticed_by_operations_that_saved_the_logits(backend: str, device: str) -> None:
    """tanh differentiates through its output: overwritten, it must raise and not lie."""
    leaf = torch.randn(2, 3, 50, device=device, requires_grad=True)
    target = torch.zeros(2, 3, dtype=torch.int64, device=device)
    advantage = torch.ones(2, device=device)
    out = fused_loss(
        leaf.tanh(), target, objective="dapo", advantage=advantage, inplace=True, backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_without_a_gradient_nothing_is_written(backend: str, device: str) -> None:
    """Under no_grad, or for logits that need none, even inplace leaves the logits alone."""
    logits = torch.randn(2, 3, 50, device=device)
    target = torch.randint(0, 50, (2, 3), device=device)
    before = logits.clone()
    arguments = {"objective": "dapo", "advantage": torch.ones(2, device=device), "inplace": True}
    plain = fused_loss(logits, target, backend=backend, **arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        leaf = logits.clone().requires_grad_()
        quiet = fused_loss(leaf, target, backend=backend, **arguments)  # type: ignore[arg-type]
    assert torch.equal(logits, before)
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(plain.loss, quiet.loss)
    assert not plain.loss.requires_grad
    assert not quiet.loss.requires_grad


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (2, 3, 7)])
def test_nothing_to_learn_from(
    backend: str, device: str, name: str, shape: tuple[int, ...]
) -> None:
    """No rows at all, or every token masked: loss 0 and zero gradients."""
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.full(shape[:-1], -100, device=device)
    out = fused_loss(
        logits,
        target,
        objective=name,
        advantage=torch.ones(shape[0], device=device),
        ref_logp=torch.zeros(shape[:-1], device=device),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(logits.grad, torch.zeros(shape, device=device))
    for vector in (out.logp, out.entropy, out.ratio, out.kl):
        assert torch.equal(vector, torch.zeros(shape[:-1], device=device))
    assert all(torch.isfinite(value) for value in out.metrics.values())
    assert out.metrics["tokens"] == 0


@paired(poisoned=[float("nan"), float("inf")], name=["dapo", "sequence"], backend=BACKENDS)
def test_rows_that_are_not_finite_stay_alone(
    backend: str, device: str, name: str, poisoned: float
) -> None:
    """The bad row, or its sequence under a sequence ratio, is counted; the others go on alone."""
    buffer, arguments = case("padded", torch.float32)
    arguments = moved(arguments, device) | {
        "objective": OBJECTIVES[name],
        "backend": backend,
        "normalizer": 10.0,
        "mask": None,
        "target": arguments["target"].clamp(min=0).to(device),
    }
    _, healthy = run(fused_loss, buffer.to(device), "padded", **arguments)
    buffer[2, 1, 17] = poisoned
    out, gradient = run(fused_loss, buffer.to(device), "padded", **arguments)
    hit = torch.zeros(4, 5, dtype=torch.bool, device=device)
    hit[2, slice(None) if name == "sequence" else 1] = True
    assert out.metrics["nonfinite_rows"] == hit.sum()
    assert torch.isfinite(out.loss)
    assert out.logp[2, 1].isnan()
    assert (gradient[hit] == 0).all()
    assert torch.equal(gradient[~hit], healthy[~hit])
    finite = (v for k, v in out.metrics.items() if k not in ("nonfinite_rows",))
    assert all(torch.isfinite(value) for value in finite)


def test_bad_targets_without_validation_are_never_read(backend: str, device: str) -> None:
    """As on a GPU: the row has weight 0, is counted, and changes nothing for the others."""
    logits = torch.randn(2, 3, 50, device=device, requires_grad=True)
    target = torch.tensor([[3, 50, 7], [-1, 49, 2**31]], device=device)
    advantage = torch.ones(2, device=device)
    out = fused_loss(
        logits, target, objective="dapo", advantage=advantage, backend=backend, validate=False
    )
    out.loss.backward()
    good = (target >= 0) & (target < 50)
    same = fused_loss(
        logits,
        target.masked_fill(~good, -100),
        objective="dapo",
        advantage=advantage,
        backend=backend,
    )
    assert out.metrics["bad_target_rows"] == 3
    assert out.metrics["tokens"] == 3
    assert torch.equal(out.loss, same.loss)
    assert (logits.grad[~good] == 0).all()
    assert (logits.grad[good].abs().sum(1) > 0).all()


def test_metrics_say_what_happened(backend: str, device: str) -> None:
    """Six tokens by hand: two clipped, one masked, one without advantage."""
    V = 4
    logits = torch.zeros(1, 6, V, device=device)
    target = torch.tensor([[0, 1, 2, 3, 0, -100]], device=device)
    log_ratio = torch.tensor([[0.0, 0.5, -0.5, 0.5, 0.1, 0.0]], device=device)
    logp = -torch.log(torch.tensor(float(V), device=device))
    out = fused_loss(
        logits,
        target,
        objective=RECIPES["dapo"].replace(kl="k2"),
        advantage=torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0, 1.0]], device=device),
        old_logp=logp - log_ratio,
        ref_logp=(logp - 0.2).expand(1, 6).contiguous(),
        backend=backend,
    )
    ratio = log_ratio[0, :5].exp()
    expected = {
        "tokens": 5,
        "moved_tokens": 4,
        "clip_fraction": 2 / 4,
        "clip_fraction_low": 1 / 4,
        "clip_fraction_high": 1 / 4,
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "ratio_square": ratio.square().mean(),
        "effective_sample_size": ratio.sum() ** 2 / (5 * ratio.square().sum()),
        "factor_mean": 1,
        "kl": 0.02,
        "entropy": -logp,
        "approx_kl_old": (ratio - 1 - log_ratio[0, :5]).mean(),
        "nonfinite_rows": 0,
        "bad_target_rows": 0,
        "loss": out.loss,
    }
    assert set(out.metrics) == set(expected)
    for name, value in expected.items():
        assert torch.isclose(
            out.metrics[name].float(), torch.as_tensor(value).float().to(device)
        ), name


@pytest.mark.gpu
def test_no_host_synchronisation_and_no_recompilation() -> None:
    """On a GPU a step never waits for the device, and new sizes or scalars compile nothing."""
    from grpo_core.kernels.row_loss import _row_loss_kernel

    def step(B: int, T: int, beta: float, temperature: float) -> None:
        logits = torch.randn(B, T, 1024, device="cuda", requires_grad=True)
        target = torch.randint(0, 1024, (B, T), device="cuda")
        out = fused_loss(
            logits,
            target,
            objective=RECIPES["grpo"].replace(beta=beta),
            temperature=temperature,
            rewards=torch.randn(B, device="cuda"),
            group_size=2,
            ref_logp=torch.full((B, T), -7.0, device="cuda"),
        )
        (0.5 * out.loss).backward()
        _ = out.metrics

    step(4, 16, 0.1, 1.0)
    compiled = sum(len(cache[0]) for cache in _row_loss_kernel.device_caches.values())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for B, T, beta, temperature in ((2, 17, 0.2, 0.7), (8, 1, 0.3, 1.3), (6, 33, 0.04, 1.0)):
            step(B, T, beta, temperature)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled == sum(len(cache[0]) for cache in _row_loss_kernel.device_caches.values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_logits_is_used() -> None:
    """Whichever is the current one."""
    arguments = {"objective": "dapo", "advantage": torch.ones(2)}
    target = torch.randint(0, 300, (2, 3))
    logits = torch.randn(2, 3, 300)
    losses = [
        fused_loss(logits.to(place), target.to(place), **moved(arguments, place)).loss.item()
        for place in ("cuda:0", "cuda:1")
    ]
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory_is_one_gradient_or_nothing(inplace: bool) -> None:
    """Beside the logits: one buffer of their size, or in place less than 1 % of it."""
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    arguments = {
        "target": torch.randint(0, 151_936, (512,), device="cuda"),
        "sequence_id": torch.zeros(512, dtype=torch.int64, device="cuda"),
        "advantage": torch.randn(512, device="cuda"),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_loss(logits, objective="dapo", inplace=inplace, **arguments).loss.backward()  # type: ignore[arg-type]
    extra = torch.cuda.max_memory_allocated() - before
    size = logits.numel() * 2
    assert extra < 0.01 * size if inplace else size <= extra < 1.01 * size
