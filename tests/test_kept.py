"""Losses over the ids that a sampler kept, against the float64 softmax of exactly these ids."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_core import (
    RECIPES,
    Kept,
    LinearHead,
    LogpRequest,
    LossRequest,
    Objective,
    fused_linear_loss,
    fused_loss,
    linear_logp,
    linear_token_logp,
    token_logp,
    with_fused_head,
)
from grpo_core.backends import choose_backend, kept
from grpo_core.kernels.records import Rows
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.recipes import clip
from grpo_core.verify.accuracy import Result, compare_losses
from tests import oracles
from tests.accuracy import assert_no_worse
from tests.combinations import over_backends, paired
from tests.conftest import BACKENDS, is_interpreted
from tests.test_fused_loss import DTYPES, OBJECTIVES, moved

pytestmark = pytest.mark.usefixtures("poison")

B, T, V = 4, 6, 1203
# of the sets of a sequence
SIZES = (1, 2, 20, 1000, V, 17)


def draw_sets(target: Tensor, V: int, sizes: tuple[int, ...] = SIZES) -> list[list[int]]:
    """A random set for each token that holds its target; the empty set where that is negative."""
    sets = []
    for n, y in enumerate(target.flatten().tolist()):
        ids = torch.randperm(V)[: min(sizes[n % len(sizes)], V)].tolist() if y >= 0 else []
        sets.append([y, *ids[1:]] if ids and y not in ids else ids)
    return sets


def case(dtype: torch.dtype, V: int = V) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B, T, V] and the other arguments; token (2, 3) was sampled outside of its set."""
    logits = (2 * torch.randn(B, T, V)).to(dtype)
    target = torch.randint(0, V, (B, T))
    target[1, T // 2 :] = -100
    sets = draw_sets(target, V)
    # three ids without the target
    sets[2 * T + 3] = [y for y in range(4) if y != target[2, 3]][:3]
    found = Kept.from_sets(sets)
    logp, _ = softmax_of_sets(logits.double() / 0.9, sets, target)
    old_logp, ref_logp = ((logp + 0.2 * torch.randn(B, T)).float() for _ in range(2))
    return logits, {
        "target": target,
        "mask": torch.rand(B, T) < 0.9,
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.25]),
        "group_size": 2,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "temperature": 0.9,
        "kept": found,
    }


def needed(name: str, logits: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that go with an objective."""
    spec, arguments = OBJECTIVES[name], arguments | {"objective": OBJECTIVES[name]}
    if spec.kl == "exact":
        noise = 0.3 * torch.randn(logits.shape).to(logits.dtype)
        arguments |= {"ref_logp": None, "ref_logits": logits + noise}
    if spec.factor.needs_sampler:
        sampler_logp = arguments["old_logp"] + 0.2 * torch.randn(B, T)
        sampler_logp[0, 0] = torch.nan
        arguments["sampler_logp"] = sampler_logp
    return arguments


def softmax_of_sets(logits: Tensor, sets: list[list[int]], target: Tensor) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy [B, T] of the softmax over each set, one token after another.

    Both 0 without a set; log 0 taken as 0 where the target is outside.
    """
    logp, entropy = [], []
    for row, ids, y in zip(logits.flatten(0, -2), sets, target.flatten().tolist(), strict=True):
        log_pi = row[ids].log_softmax(0)
        logp.append(log_pi[ids.index(y)] if y in ids else row.sum() * 0)
        entropy.append(-(log_pi.exp() * log_pi).sum() if ids else row.sum() * 0)
    return torch.stack(logp).view(target.shape), torch.stack(entropy).view(target.shape)


def sets_of(found: Kept) -> list[list[int]]:
    """The ids of each token."""
    ends = found.offsets.tolist()
    return [found.ids[a:b].tolist() for a, b in pairwise(ends)]


def mask_of(found: Kept, V: int = V) -> Tensor:
    """[N, V] bool."""
    mask = torch.zeros(len(found.offsets) - 1, V, dtype=torch.bool)
    for row, ids in zip(mask, sets_of(found), strict=True):
        row[ids] = True
    return mask


def filled(logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The same loss without `kept`: −inf outside of the sets, targets outside masked."""
    arguments = dict(arguments)
    mask = mask_of(arguments.pop("kept"), logits.shape[-1]).view(logits.shape)
    target = arguments["target"]
    inside = mask.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    arguments["target"] = target.masked_fill(~inside, -100)
    if arguments.get("ref_logits") is not None:
        arguments["ref_logits"] = arguments["ref_logits"].masked_fill(~mask, -torch.inf)
    # a masked token has a set of any kind
    return logits.masked_fill(~mask & inside[..., None], -torch.inf), arguments


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on another device."""
    found = arguments.get("kept")
    if isinstance(found, Kept):
        arguments = arguments | {"kept": Kept(found.ids.to(device), found.offsets.to(device))}
    return moved(arguments, device)


def run(loss: Any, logits: Tensor, **arguments: Any) -> tuple[Any, Tensor]:
    """(output, gradient of the logits)."""
    leaf = logits.detach().clone().requires_grad_()
    given = leaf if loss is fused_loss and not arguments.get("inplace") else leaf * 1
    out = loss(given, **arguments)
    out.loss.backward()
    return out, leaf.grad


def check(backend: str, device: str, name: str, logits: Tensor, given: dict[str, Any]) -> None:
    """No worse than masked PyTorch of the same dtype, judged by float64; 0 outside of the sets."""
    given = needed(name, logits, given)
    mask = mask_of(given["kept"], logits.shape[-1]).view(logits.shape)
    ours, gradient = run(
        fused_loss,
        logits.to(device),
        backend=backend,
        inplace=logits.dtype == torch.bfloat16,
        **to_device(given, device),
    )
    plain, others = filled(logits, given)
    # the reference's gradient at −inf is 0 or NaN
    honest, honest_gradient = run(reference_loss, plain, **others)
    exact, exact_gradient = run(reference_loss, plain.double(), **others)
    results = [
        Result(out, torch.where(mask, x.cpu(), 0.0))
        for out, x in (
            (ours, gradient),
            (honest, honest_gradient),
            (exact, exact_gradient),
        )
    ]
    for found in compare_losses(OBJECTIVES[name], T, *results):
        assert found.ok, found
    assert (gradient.cpu()[~mask] == 0).all()
    assert ours.metrics["unkept_rows"] == int(given["mask"][2, 3])
    for key, value in exact.metrics.items():
        assert torch.isclose(ours.metrics[key].cpu().double(), value.double(), 1e-4, 1e-5), key


# one of each pass over the rows: which formula a token has is decided after it
PASSES = (
    "grpo",
    "dapo+k3",
    "gspo",
    "entropy",
    "exact KL, entropy",
    "exact KL of sequences",
    "forward KL, entropy",
    "Jensen-Shannon",
    "top entropy",
    "off-policy mask",
    "sampler, mask, entropy, exact KL",
    "sequence weight, sampler",
    "sequence token",
)


@paired(PASSES, name=OBJECTIVES, dtype=DTYPES, backend=BACKENDS)
def test_every_objective(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    check(backend, device, name, *case(dtype, 203 if is_interpreted(backend) else V))


def test_the_formulas_of_the_papers(backend: str, device: str) -> None:
    """DAPO and GSPO with an exact KL and an entropy bonus, over exactly the kept ids."""
    logits, given = case(torch.float32, 60)
    sets, target, old_logp = sets_of(given["kept"]), given["target"], given["old_logp"]
    given["mask"][:] = True
    given["mask"][0, 1] = False
    counts = given["mask"] & (target >= 0)
    counts[2, 3] = False
    advantage, ref_logits = torch.randn(B), logits + 0.3 * torch.randn(logits.shape)
    leaf = logits.double().requires_grad_()
    logp, entropy = softmax_of_sets(leaf / 0.9, sets, target)
    kl = torch.stack(
        [
            oracles.exact_kl(p[ids], q[ids], 0.9) if ids else p.sum() * 0
            for p, q, ids in zip(leaf.flatten(0, 1), ref_logits.flatten(0, 1), sets, strict=True)
        ]
    ).view(B, T)
    A = advantage.double()[:, None]
    of_token = (logp - old_logp).exp()
    of_sequence = oracles.sequence_ratio(logp, old_logp.double(), counts)
    for name, ratio, low, high in (
        ("dapo", of_token, 0.2, 0.28),
        ("gspo", of_sequence, 3e-4, 4e-4),
    ):
        spec = RECIPES[name].replace(kl="exact", beta=0.3, entropy_coef=0.1)
        policy = oracles.ppo_clip(ratio, A, low, high)
        bonus = oracles.dapo if name == "dapo" else oracles.grpo
        expected = bonus(policy + 0.1 * entropy, kl, 0.3, counts)
        (gradient,) = torch.autograd.grad(expected, leaf, retain_graph=True)
        arguments = {"objective": spec, "advantage": advantage, "ref_logits": ref_logits}
        arguments |= {k: given[k] for k in ("target", "mask", "old_logp", "temperature", "kept")}
        out, ours = run(
            fused_loss, logits.to(device), backend=backend, **to_device(arguments, device)
        )
        assert torch.isclose(out.loss.cpu().double(), expected, 1e-5, 1e-6), name
        assert torch.allclose(ours.cpu().double(), gradient, 1e-4, 1e-7), name
        for ours_of, truth in ((out.logp, logp), (out.entropy, entropy), (out.kl, kl)):
            difference = (ours_of.cpu() - truth.detach())[counts].abs()
            assert difference.max() < 1e-5, name


def test_the_reference_takes_kept_ids() -> None:
    logits, given = case(torch.float32)
    given = needed("exact KL, entropy", logits, given)
    ours, gradient = run(reference_loss, logits, **given)
    plain, others = filled(logits, given)
    expected, _ = run(reference_loss, plain, **others)
    assert torch.equal(ours.loss, expected.loss)
    assert (gradient[~mask_of(given["kept"]).view(B, T, V)] == 0).all()


@over_backends(["dapo", "exact KL of sequences"], interpreted=["dapo"])
def test_every_form_has_the_same_bits(backend: str, device: str, name: str) -> None:
    """A bool mask, int64 ids; other logits, NaN among them, are not read."""
    logits, given = case(torch.float32, 203)
    given = to_device(needed(name, logits, given), device) | {"backend": backend}
    found, logits = given["kept"], logits.to(device)
    mask = mask_of(Kept(found.ids.cpu(), found.offsets.cpu()), 203).view(logits.shape).to(device)
    first, gradient = run(fused_loss, logits, **given)
    variants: list[tuple[Any, Tensor]] = [
        (mask, logits),
        (Kept(found.ids.long(), found.offsets), logits),
        (found, torch.where(mask, logits, torch.nan)),
        (found, torch.where(mask, logits, torch.inf)),
    ]
    for kept_ids, x in variants:
        out, other = run(fused_loss, x, **given | {"kept": kept_ids})
        assert torch.equal(out.logp, first.logp)
        assert torch.equal(out.entropy, first.entropy)
        assert torch.equal(out.loss, first.loss)
        assert torch.equal(other, gradient)


@pytest.mark.parametrize("V", [203, 256])
def test_bits_depend_on_the_row_alone(
    backend: str, device: str, V: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any batch, order and grouping, packed and padded, in place and beside, of a view."""
    logits, given = case(torch.bfloat16, V)
    given.pop("rewards"), given.pop("group_size")
    given |= {"objective": "dapo", "advantage": torch.randn(B, T), "normalizer": 7.0}
    buffer = torch.randn(B, T + 1, V + 3).bfloat16()
    buffer[:, :-1, 2:-1] = logits

    def of_view(buffer: Tensor, **given: Any) -> Any:
        return fused_loss(buffer[:, :-1, 2:-1], **given)

    given = to_device(given, device) | {"backend": backend}
    logits = logits.to(device)
    plain, gradient = run(fused_loss, logits, **given)
    for inplace in (False, True):
        there, over = run(of_view, buffer.to(device), **given, inplace=inplace)
        assert torch.equal(there.logp, plain.logp)
        assert torch.equal(over[:, :-1, 2:-1], gradient)
    sets, order = sets_of(given.pop("kept")), torch.randperm(B * T)
    vectors = {k: v.flatten()[order] for k, v in given.items() if isinstance(v, Tensor)}
    vectors["sequence_id"] = (order // T).to(device)
    monkeypatch.setattr(kept, "CPU_LOGITS", 2 * 64)
    monkeypatch.setattr(kept, "GPU_LOGITS", 2 * 64)
    packed, packed_gradient = run(
        fused_loss,
        logits.flatten(0, 1)[order],
        **given | vectors,
        kept=Kept.from_sets([sets[n] for n in order], device),
    )
    assert torch.equal(packed.logp, plain.logp.flatten()[order])
    assert torch.equal(packed_gradient, gradient.flatten(0, 1)[order])
    n = 3
    alone = token_logp(
        logits[0, n : n + 1],
        given["target"][0, n : n + 1],
        kept=Kept.from_sets([sets[n]], device),
        temperature=0.9,
        backend=backend,
    )
    if plain.logp[0, n]:
        assert torch.equal(alone.logp, plain.logp[0, n : n + 1])


@pytest.mark.parametrize("V", [10, 203, 2048])
def test_all_ids_are_no_restriction(backend: str, device: str, V: int) -> None:
    """The same bits as without `kept`."""
    logits, given = case(torch.float32, V)
    given = to_device(needed("entropy", logits, given), device) | {"backend": backend}
    del given["kept"]
    plain, gradient = run(fused_loss, logits.to(device), **given)
    every = torch.ones(logits.shape, dtype=torch.bool, device=device)
    out, same = run(fused_loss, logits.to(device), **given, kept=every)
    assert out.metrics["unkept_rows"] == 0
    assert torch.equal(out.logp, plain.logp)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(same, gradient)


def test_logits_of_any_size(backend: str, device: str) -> None:
    """What pads a row is −inf, not merely small."""
    logits, given = case(torch.float32, 50)
    given = to_device(needed("entropy", logits, given), device) | {"backend": backend}
    # multiples of 2⁻⁶ stay exact
    logits = (64 * logits).round().div(64).to(device)
    plain, gradient = run(fused_loss, logits, **given)
    out, same = run(fused_loss, logits - 2**17, **given)
    assert torch.allclose(out.logp, plain.logp, 1e-5, 1e-5)
    assert torch.allclose(same, gradient, 1e-4, 1e-7)


class Counted:
    """A backend that counts its calls and the logits that it is given."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.calls, self.logits = kernels, [], 0

    def __getattr__(self, name: str) -> Any:
        def function(rows: Rows, *arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            self.logits += rows.N * rows.V
            return getattr(self.kernels, name)(rows, *arguments, **named)

        return function


def test_small_sets_read_few_logits() -> None:
    """One row of 50,000 ids does not widen the others; one reading, in place."""
    N, V = 200, 60_000
    sizes = torch.randint(1, 33, (N,))
    sizes[7] = 50_000
    target = torch.randint(0, V, (N,))
    found = Kept.from_sets(draw_sets(target, V, tuple(sizes.tolist())))
    counted = Counted(choose_backend("cpu", target))
    rows = kept.keep_rows(counted, found, target)  # type: ignore[arg-type]
    tokens = fused_loss(
        torch.zeros(N, V),
        target,
        objective="dapo",
        advantage=torch.ones(N),
        sequence_id=torch.arange(N),
        kept=found,
    )._tokens
    logits = torch.randn(N, V)
    rows.row_loss(Rows(logits), tokens, tokens.terms, logits)
    # widths 16, 32 and V
    assert counted.calls == ["row_loss"] * 3
    assert counted.logits <= V + 32 * N
    assert ((logits != 0).sum(1) <= sizes).all()


def test_a_target_that_was_not_kept(backend: str, device: str) -> None:
    """It is as masked in the loss; log-probabilities of it are −inf, without a gradient."""
    logits, given = case(torch.float32, 50)
    given["mask"][2, 3] = True
    given = to_device(needed("gspo", logits, given), device) | {"backend": backend}
    logits = logits.to(device)
    out, gradient = run(fused_loss, logits, **given)
    assert out.metrics["unkept_rows"] == 1
    masked = given["target"].clone()
    masked[2, 3] = -100
    same, same_gradient = run(fused_loss, logits, **given | {"target": masked})
    assert torch.equal(out.loss, same.loss)
    assert torch.equal(gradient, same_gradient)
    options = {k: given[k] for k in ("target", "temperature", "mask", "kept", "backend")}
    found = token_logp(logits, **options)
    counts = out.logp != 0
    assert torch.equal(found.logp[counts], out.logp[counts])
    assert torch.equal(found.entropy[counts], out.entropy[counts])
    assert found.logp[2, 3] == -torch.inf
    ids = sets_of(given["kept"])[2 * T + 3]
    log_pi = (logits[2, 3, ids] / 0.9).log_softmax(0)
    assert torch.isclose(found.entropy[2, 3], -(log_pi.exp() * log_pi).sum(), 1e-5)
    leaf, head = logits.clone().requires_grad_(), torch.eye(50, device=device)
    of_hidden = linear_logp(leaf, head, **options)
    assert torch.allclose(of_hidden.logp, found.logp, 1e-6, 1e-6)
    (of_hidden.logp + of_hidden.entropy).sum().backward()
    assert (leaf.grad[2, 3] == 0).all()
    assert (leaf.grad[counts].abs().sum(1) > 0).sum() > B
    assert leaf.grad.isfinite().all()


def linear_case(V: int = 131, D: int = 24) -> tuple[Tensor, LinearHead, dict[str, Any]]:
    """Hidden states, a head with a soft cap and a bias, and the arguments of a loss."""
    _, given = case(torch.float32, V)
    head = LinearHead(0.4 * torch.randn(V, D), torch.randn(V), softcap=3.0)
    hidden = torch.randn(B, T, D)
    sets = sets_of(given["kept"])
    logp, _ = softmax_of_sets(materialise(head, hidden).double() / 0.9, sets, given["target"])
    given["old_logp"] = (logp + 0.2 * torch.randn(B, T)).float()
    # rows without an advantage are left out
    given |= {"rewards": None, "group_size": None, "advantage": torch.randn(B)}
    given["advantage"][3] = 0
    return hidden, head, given


def materialise(head: LinearHead, hidden: Tensor) -> Tensor:
    """The logits, plainly."""
    assert head.softcap is not None and head.bias is not None
    logits = hidden @ head.weight.t() + head.bias
    return head.softcap * torch.tanh(logits / head.softcap)


FEW = 16 * 131 * 4
PLANS: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "chunks": {"memory_budget": FEW},
    "lean": {"plan": "lean"},
    "lean chunks": {"plan": "lean", "memory_budget": FEW},
}


def hidden_gradients(
    loss: Any, hidden: Tensor, head: LinearHead, dtype: torch.dtype, **given: Any
) -> tuple[Any, list[Tensor]]:
    """(output, gradients of hidden states, matrix and bias)."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, head.weight, head.bias)]
    hidden, weight, bias = leaves
    out = loss(hidden, replace(head, weight=weight, bias=bias), **given)
    out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


@paired(
    name=["dapo", "gspo", "grpo", "exact KL, entropy", "exact KL of sequences", "top entropy"],
    plan=PLANS,
    backend=BACKENDS,
)
def test_losses_from_hidden_states(backend: str, device: str, name: str, plan: str) -> None:
    """Chunks of any size and both plans; a reference from its hidden states over the same ids."""
    hidden, head, given = linear_case()
    spec = OBJECTIVES[name]
    given |= {"objective": spec, "ref_logp": None}
    reference = {}
    if spec.beta:
        reference["ref_hidden"] = hidden + 0.1 * torch.randn(hidden.shape)

    def dense(hidden: Tensor, head: LinearHead, **given: Any) -> Any:
        logits = materialise(head, hidden)
        if reference:
            ref = materialise(replace(head, weight=head.weight.detach()), reference["ref_hidden"])
            ref = ref.detach().to(hidden.dtype)
            if spec.kl != "exact":
                sets = sets_of(given["kept"])
                given["ref_logp"], _ = softmax_of_sets(ref / 0.9, sets, given["target"])
            else:
                given["ref_logits"] = ref
        plain, given = filled(logits, given)
        return reference_loss(plain, **given)

    honest = hidden_gradients(dense, hidden, head, torch.float32, **given)
    if reference:
        reference["ref_hidden"] = reference["ref_hidden"].double()
    exact = hidden_gradients(dense, hidden, head, torch.float64, **given)
    there = LinearHead(head.weight.to(device), head.bias.to(device), softcap=head.softcap)
    options = {k: v.float().to(device) for k, v in reference.items()} | PLANS[plan]
    out, found = hidden_gradients(
        fused_linear_loss,
        hidden.to(device),
        there,
        torch.float32,
        all_logp=True,
        backend=backend,
        **to_device(given, device),
        **options,
    )
    for quantity in ("loss", "logp", "entropy", "ratio", "kl"):
        values = [getattr(x, quantity).detach().cpu() for x in (out, honest[0], exact[0])]
        assert_no_worse(*values, size=8.0, what=quantity)
    for ours, plain, truth in zip(found, honest[1], exact[1], strict=True):
        assert_no_worse(
            ours.cpu(), plain, truth, size=4 * float(truth.abs().max()), what="gradient"
        )
    assert out.metrics["unkept_rows"] == int(given["mask"][2, 3])


@pytest.mark.parametrize("plan", ["fast", "lean"])
def test_logp_from_hidden_states(backend: str, device: str, plan: str) -> None:
    """Any loss of logp and entropy, once and again; the bits of `linear_token_logp`."""
    hidden, head, given = linear_case()
    sets, target = sets_of(given["kept"]), given["target"]
    counts = given["mask"] & (target >= 0)
    counts[2, 3] = False
    a, b = torch.randn(2, B, T).double()
    leaf, weight = hidden.double().requires_grad_(), head.weight.double().requires_grad_()
    logits = materialise(LinearHead(weight, head.bias.double(), softcap=head.softcap), leaf)
    logp, entropy = softmax_of_sets(logits / 0.9, sets, target)
    (a * logp + b * entropy)[counts].sum().backward()
    names = ("target", "mask", "temperature", "kept")
    options = to_device({k: given[k] for k in names}, device) | {"backend": backend}
    x, w = (t.to(device, copy=True).requires_grad_() for t in (hidden, head.weight))
    there = LinearHead(w, head.bias.to(device), softcap=head.softcap)
    out = linear_logp(x, there, plan=plan, memory_budget=FEW, **options)
    loss = (a.to(device) * out.logp + b.to(device) * out.entropy)[counts.to(device)].sum()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert torch.allclose(x.grad.cpu().double(), times * leaf.grad, 1e-4, 1e-5)
        assert torch.allclose(w.grad.cpu().double(), times * weight.grad, 1e-4, 1e-5)
    same = linear_token_logp(x, there, **options)
    assert torch.equal(out.logp, same.logp)
    assert torch.equal(out.entropy, same.entropy)


def test_a_second_backward(backend: str, device: str) -> None:
    logits, given = case(torch.float32, 50)
    given = to_device(needed("exact KL, entropy", logits, given), device)
    leaf = logits.to(device).requires_grad_()
    out = fused_loss(leaf, backend=backend, **given)
    out.loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    (2 * out.loss).backward()
    assert torch.allclose(leaf.grad, 3 * once, 1e-5, 1e-8)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(compiler: str) -> None:
    """The bits of eager mode from logits and hidden states; the record passes through a graph."""
    torch._dynamo.reset()
    logits, given = case(torch.float32, 50)
    given = needed("gspo", logits, given)
    hidden, head, others = linear_case()
    others |= {"objective": "dapo"}
    options = {k: given[k] for k in ("target", "temperature", "kept")}

    def step(logits: Tensor, hidden: Tensor, head: LinearHead) -> tuple[Any, ...]:
        out = fused_loss(logits * 1.0, **given)
        of_hidden = fused_linear_loss(hidden * 1.0, head, **others)
        found = token_logp(logits, **options)
        unkept = out.metrics["unkept_rows"] + of_hidden.metrics["unkept_rows"]
        return out.loss + of_hidden.loss, found.logp, unkept

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaves = [x.clone().requires_grad_() for x in (logits, hidden)]
        loss, logp, unkept = function(*leaves, head)
        loss.backward()
        results.append((loss.detach(), logp, unkept, *(leaf.grad for leaf in leaves)))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert int(results[0][2]) == int(given["mask"][2, 3]) + int(others["mask"][2, 3])


def test_inside_a_model() -> None:
    """`kept` of a request belongs to its packed rows."""
    from tests.tiny_models import tiny

    model = with_fused_head(tiny())
    ids = torch.randint(0, model.config.vocab_size, (2, 7))
    rows = torch.ones(2, 7, dtype=torch.bool)
    rows[0, :3] = rows[1, 5:] = False
    target = ids.roll(-1, 1)[rows]
    found = Kept.from_sets(draw_sets(target, model.config.vocab_size, (1, 5, 20)))
    answer = model(ids, request=LogpRequest(target, rows=rows, kept=found)).logp
    logits = model(ids).logits[rows]
    expected, _ = softmax_of_sets(logits.double(), sets_of(found), target)
    assert torch.allclose(answer.double(), expected, 1e-5, 1e-5)
    request = LossRequest(
        target,
        rows=rows,
        objective="dapo",
        advantage=torch.ones(len(target)),
        sequence_id=rows.nonzero()[:, 0],
        kept=found,
    )
    out = model(ids, request=request)
    assert torch.allclose(out.logp.double(), expected, 1e-5, 1e-5)
    out.loss.backward()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).isfinite()


def bad_input() -> dict[str, tuple[Any, str]]:
    """Refused values of `kept` for 4 tokens and V = 9, and what is said."""
    ids, offsets = torch.tensor([0, 3, 8, 1, 2, 5]), torch.tensor([0, 2, 3, 3, 6])

    def changed(at: int, to: int, of: Tensor) -> Tensor:
        return of.index_fill(0, torch.tensor([at]), to)

    return {
        "another kind": ([[0, 3]], r"kept: expected an instance of Kept, got \[\[0, 3\]\]"),
        "a float mask": (
            torch.ones(4, 9),
            "kept: expected a Kept or a bool mask, got torch.float32",
        ),
        "a mask of another shape": (
            torch.ones(4, 8, dtype=torch.bool),
            r"kept: expected shape \[4, 9\], got \[4, 8\]",
        ),
        "a mask without an id": (
            torch.zeros(4, 9, dtype=torch.bool),
            "kept: expected ids for every unmasked token, got 0 at row 0",
        ),
        "float ids": (
            Kept(ids.float(), offsets),
            r"kept.ids: expected int32 or int64 of shape \[M\]",
        ),
        "a matrix of ids": (
            Kept(ids.view(2, 3), offsets),
            r"kept.ids: expected int32 .* got \[2, 3\]",
        ),
        "int32 offsets": (
            Kept(ids, offsets.int()),
            "kept.offsets: expected int64, got torch.int32",
        ),
        "too few offsets": (
            Kept(ids, offsets[1:]),
            r"kept.offsets: expected shape \[5\], got \[4\]",
        ),
        "another device": (Kept(ids.to("meta"), offsets), r"kept.ids: expected"),
        "another first offset": (
            Kept(ids, changed(0, 1, offsets)),
            "kept.offsets: expected 0 to M = 6, got 1 to 6",
        ),
        "another last offset": (
            Kept(ids, changed(4, 5, offsets)),
            "kept.offsets: expected 0 to M = 6, got 0 to 5",
        ),
        "decreasing offsets": (
            Kept(ids, changed(2, 1, offsets)),
            "kept.offsets: expected numbers that do not decrease, got -1 at row 1",
        ),
        "no ids for a live token": (
            Kept(ids, changed(2, 2, offsets)),
            "kept: expected ids for every unmasked token, got 0 at row 1",
        ),
        "an id of V": (
            Kept(changed(2, 9, ids), offsets),
            r"kept.ids: expected ids in \[0, V = 9\), got 9",
        ),
        "a negative id": (Kept(changed(0, -1, ids), offsets), r"kept.ids: .* got -1 at row 0"),
        "unsorted ids": (
            Kept(changed(5, 1, ids), offsets),
            "kept.ids: expected ascending ids within a token, got 1 after 2 at row 3",
        ),
        "repeated ids": (Kept(changed(1, 0, ids), offsets), "got 0 after 0 at row 0"),
    }


@pytest.mark.parametrize("name", bad_input())
def test_bad_input_is_named(name: str) -> None:
    """By every function, before anything is overwritten."""
    found, message = bad_input()[name]
    target, logits = torch.tensor([0, 8, -100, 5]), torch.randn(4, 9)
    given = {"objective": "dapo", "advantage": torch.ones(4), "kept": found}
    given["sequence_id"] = torch.arange(4)
    head, before = torch.eye(9), logits.clone()
    error = NotImplementedError if name == "another device" else ValueError
    for call in (
        lambda: fused_loss(logits, target, inplace=True, **given),
        lambda: token_logp(logits, target, kept=found),
        lambda: fused_linear_loss(logits, head, target, **given),
        lambda: linear_token_logp(logits, head, target, kept=found),
        lambda: linear_logp(logits, head, target, kept=found),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(logits, before)


def test_unchecked_input_stays_within_the_row(backend: str, device: str) -> None:
    """As on a GPU: a bad set changes its own row alone; a token without ids is left out."""
    logits = torch.randn(4, 9, device=device)
    target = torch.tensor([0, 8, 1, 5], device=device)
    ids = torch.tensor([0, 3, 8, 99, 2, 5], dtype=torch.int32, device=device)
    found = Kept(ids, torch.tensor([0, 2, 4, 4, 9], device=device))
    given = {"objective": "dapo", "advantage": torch.ones(4, device=device), "backend": backend}
    given["sequence_id"] = torch.arange(4, device=device)
    out, gradient = run(fused_loss, logits, target=target, kept=found, validate=False, **given)
    assert out.metrics["unkept_rows"] == 1
    assert out.metrics["tokens"] == 3
    right = Kept.from_sets([[0, 3], [8], [], [2, 5]], device)
    same, other = run(fused_loss, logits, target=target, kept=right, validate=False, **given)
    assert torch.equal(out.logp[[0, 3]], same.logp[[0, 3]])
    assert torch.equal(gradient[[0, 2, 3]], other[[0, 2, 3]])


def test_no_rows(backend: str, device: str) -> None:
    """No token, and tokens that are all masked."""
    for N in (0, 3):
        logits = torch.randn(N, 9, device=device)
        target = torch.full((N,), -100, device=device)
        out, gradient = run(
            fused_loss,
            logits,
            target=target,
            objective="gspo",
            advantage=torch.ones(N, device=device),
            sequence_id=torch.arange(N, device=device),
            kept=Kept.from_sets([[]] * N, device),
            backend=backend,
        )
        assert out.loss == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_is_not_combined_is_refused() -> None:
    logits, target = torch.randn(4, 9), torch.tensor([0, 8, 2, 5])
    given = {"kept": Kept.from_sets([range(9)] * 4), "sequence_id": torch.arange(4)}
    topk = torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1)
    ones = torch.ones(4)
    for name, others in (
        ("ref_topk", {"objective": Objective(clip(0.2), kl="topk_tail"), "ref_topk": topk}),
        ("nll_weight", {"objective": "dapo", "nll_weight": ones}),
    ):
        with pytest.raises(ValueError, match=f"kept: expected None with {name}, got both"):
            fused_loss(logits, target, advantage=ones, **others, **given)
