"""Prompt mean, gates, second moment and future KL: every backend, packed rows, hidden states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    FutureKL,
    Objective,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    clip,
    fused_linear_loss,
    fused_loss,
    logp_loss,
)
from grpo_core.linear.workspace import Workspace
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.advantage import Estimator, relative_advantages
from grpo_core.objective.policy_factor import within_second_moment
from grpo_core.objective.recipes import importance
from grpo_core.objective.value import gae, rewards_with_kl
from tests import oracles, oracles_estimators
from tests.combinations import paired, slow
from tests.conftest import BACKENDS

B, T, V, D = 6, 7, 23, 11
NEW = ("scalerl", "maxrl", "ipo", "m2po", "fipo", "sdar", "gspo_token", "gdpo")
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.5])
GATES = RECIPES["dapo"].replace(
    factor=PolicyFactor(
        SamplerCorrection("token", "truncate", 0.0, math.inf),
        rejections=(Rejection("binary_kl", "mean", high=0.01, action="zero"),),
    )
)
OBJECTIVES: dict[str, Objective] = {name: RECIPES[name] for name in NEW} | {
    "gates": GATES,
    "all at once": RECIPES["scalerl"].replace(
        factor=PolicyFactor(second_moment=0.02, future_kl=FutureKL(2.0, 0.5, 1.5)),
        kl="gated",
        beta=0.1,
        entropy_coef=0.1,
        entropy_aggregation="prompt_mean",
    ),
}


def batch(spread: float = 0.3) -> dict[str, Any]:
    """Hidden states and a head in float64; masked tokens at the ends and in the middle."""
    hidden, head = torch.randn(B, T, D).double(), torch.randn(V, D).double()
    target = torch.randint(0, V, (B, T))
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5, 0, 6])[:, None]
    mask[0, 2:4] = mask[3, 1] = False
    target[5, 2] = -100
    logp, _ = oracles.logp_and_entropy(hidden @ head.T, target.clamp(min=0), 1.0)
    vectors = {
        n: (logp + spread * torch.randn(B, T)).clamp(max=0) for n in ("old_logp", "ref_logp")
    }
    sampler_logp = (vectors["old_logp"] + 0.1 * torch.randn(B, T)).clamp(max=0)
    vectors = {k: v.float() for k, v in (vectors | {"sampler_logp": sampler_logp}).items()}
    given = {"hidden": hidden, "head": head, "target": target, "mask": mask}
    return given | vectors | {"rewards": REWARDS, "group_size": 3}


def needed(objective: Objective, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments beside the logits."""
    unused = ["hidden", "head"] + ["sampler_logp"] * (not objective.factor.needs_sampler)
    return {name: value for name, value in given.items() if name not in unused}


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """Its rows, neighbours of different sequences, masked ones left out."""
    kept = given["mask"] & (given["target"] >= 0)
    rows = kept.T.nonzero(as_tuple=True)[::-1]
    same = {k: v[rows] if getattr(v, "shape", ())[:2] == (B, T) else v for k, v in given.items()}
    return same | {"sequence_id": rows[0]}


def close(found: Tensor, expected: Tensor, rtol: float = 2e-5) -> bool:
    return torch.allclose(
        found.double(), expected.double(), rtol, 1e-6 * float(expected.abs().max())
    )


@paired(
    name=OBJECTIVES,
    form=["padded", "packed", "hidden", "hidden, packed", "logp"],
    backend=BACKENDS,
)
def test_every_way_is_the_reference(backend: str, device: str, name: str, form: str) -> None:
    """Loss, factor and gradient, in float32, against the reference in float64 on a padded batch."""
    objective, given = OBJECTIVES[name], batch()
    hidden = given["hidden"].clone().requires_grad_()
    exact = reference_loss(
        hidden @ given["head"].T, objective=objective, **needed(objective, given)
    )
    exact.loss.backward()
    whole = {name: given[name] for name in ("mask", "target")}
    given = packed(given) if "packed" in form else given
    arguments = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in needed(objective, given).items()
    }
    leaf = given["hidden"].float().to(device).requires_grad_()
    head = given["head"].float().to(device)
    if "hidden" in form:
        out = fused_linear_loss(
            leaf, head, objective=objective, backend=backend, memory_budget=2**10, **arguments
        )
    elif form == "logp":
        target = arguments.pop("target")
        arguments["mask"] = arguments["mask"] & (target >= 0)
        rows = (leaf @ head.T).log_softmax(-1)
        logp = rows.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        entropy = -(rows.exp() * rows).sum(-1)
        out = logp_loss(logp, entropy=entropy, objective=objective, backend=backend, **arguments)
    else:
        out = fused_loss(leaf @ head.T, objective=objective, backend=backend, **arguments)
    out.loss.backward()
    assert leaf.grad is not None and hidden.grad is not None
    expected, factor = hidden.grad, exact.factor
    if "packed" in form:
        rows = packed(whole | {"g": expected, "f": factor})
        expected, factor = rows["g"], rows["f"]
    assert close(out.loss.cpu(), exact.loss.detach())
    assert close(leaf.grad.cpu(), expected, rtol=2e-4)
    counts = out._valid.view(out.factor.shape).cpu() & (out.ratio.cpu() != 0)
    assert close(out.factor.cpu()[counts], factor[counts])


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("ids", [False, True])
def test_prompt_mean_takes_the_groups_of_given_advantages(form: str, ids: bool) -> None:
    """As with rewards, by size or by id, groups of any size; all else is the papers'."""
    given = batch()
    group = [1, 4, 1, 4, 0, 1] if ids else [0, 0, 0, 1, 1, 1]
    spec = RECIPES["scalerl"]
    A = relative_advantages(REWARDS.double(), torch.tensor(group), spec.advantage)
    logits = (given["hidden"] @ given["head"].T).requires_grad_()
    mask = given["mask"] & (given["target"] >= 0)
    logp, _ = oracles.logp_and_entropy(logits, given["target"].clamp(min=0), 1.0)
    ratio = (logp - given["old_logp"]).exp()
    policy = oracles.cispo(logp, ratio, A[:, None].expand(B, T), 5.0)
    oracle = oracles.prompt_mean(policy, mask, group)
    groups = {"group_id": torch.tensor(group)} if ids else {"group_size": 3}
    arguments = {k: given[k] for k in ("target", "mask", "old_logp")} | {"advantage": A}
    rewards = {k: v for k, v in arguments.items() if k != "advantage"} | {"rewards": REWARDS}
    leaf = logits.detach()
    if form == "packed":
        rows = packed(arguments | {"logits": leaf, "rewards": REWARDS})
        leaf, A = rows.pop("logits"), A[rows["sequence_id"]]
        rewards = {k: v for k, v in rows.items() if k != "advantage"}
        arguments = {k: v for k, v in rows.items() if k != "rewards"} | {"advantage": A}
    for each in (arguments, rewards):
        out = reference_loss(leaf.clone(), objective=spec, **each, **groups)
        assert math.isclose(out.loss, oracle.detach(), rel_tol=1e-6)


def test_groups_that_do_not_fit_are_named() -> None:
    given = {k: batch()[k] for k in ("target", "mask", "old_logp")}
    logits, A = torch.randn(B, T, V), torch.randn(B)
    for objective, groups, message in (
        ("scalerl", {}, "group_size: expected it or group_id for prompt_mean, got neither"),
        ("dapo", {"group_size": 3}, "group_size: expected None without rewards"),
        ("scalerl", {"group_size": 4}, "group_size: expected an int that divides B = 6, got 4"),
        ("scalerl", {"group_size": True}, "group_size: expected an int that divides B"),
        ("scalerl", {"group_id": torch.zeros(5).long()}, r"group_id: expected shape \[6\]"),
        ("scalerl", {"group_id": torch.zeros(6)}, "group_id: expected an integer tensor"),
        ("scalerl", {"group_id": torch.arange(6) + 1}, r"group_id: expected integers in \[0, B"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_loss(logits, objective=objective, advantage=A, **given, **groups)
    rows = {k: v.flatten() for k, v in given.items()}
    rows |= {"sequence_id": torch.arange(B).repeat_interleave(T)}
    groups = {"group_id": torch.zeros(3).long()}
    with pytest.raises(ValueError, match="sequence_id: expected ids below the 3 of group_id, got"):
        fused_loss(
            logits.flatten(0, 1),
            objective="scalerl",
            advantage=A.repeat_interleave(T),
            **rows,
            **groups,
        )


def test_parts_with_whole_groups_add_up() -> None:
    """With the number of prompts as normalizer."""
    given = batch()
    logits = (given["hidden"] @ given["head"].T).float()
    vectors = {k: given[k] for k in ("target", "mask", "old_logp")} | {"advantage": torch.randn(B)}
    whole = fused_loss(logits, objective="scalerl", group_size=3, **vectors).loss
    parts = [
        fused_loss(
            logits[part],
            objective="scalerl",
            group_size=3,
            normalizer=2,
            **{k: v[part] for k, v in vectors.items()},
        ).loss
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert torch.allclose(whole, sum(parts))


@pytest.mark.parametrize("measure", ["binary_kl", "tv"])
@pytest.mark.parametrize("over", ["token", "mean"])
@pytest.mark.parametrize("action", ["zero", "reject"])
def test_gates_keep_the_denominators(measure: Any, over: Any, action: Any) -> None:
    """OpenRLHF's: w·ℓ of the tokens inside, the mean over all; "reject" also out of the mask."""
    given = batch()
    given["old_logp"][0, 0], given["sampler_logp"][0, 0] = -1e-9, -20.0
    A = torch.randn(B, T).double()
    logits = (given["hidden"] @ given["head"].T).requires_grad_()
    mask = given["mask"] & (given["target"] >= 0)
    old_logp, sampler_logp = given["old_logp"].double(), given["sampler_logp"].double()
    gate, bound = torch.zeros(B, T), 0.02
    for i in range(B):
        places = mask[i].nonzero().flatten().tolist()
        x = [
            oracles.bernoulli_distance(measure, float(sampler_logp[i, t]), float(old_logp[i, t]))
            for t in places
        ]
        for t, each in zip(places, x, strict=True):
            gate[i, t] = (each if over == "token" else math.fsum(x) / len(x)) <= bound
    assert 0 < gate.sum() < mask.sum()
    logp, _ = oracles.logp_and_entropy(logits, given["target"].clamp(min=0), 1.0)
    policy = oracles.ppo_clip((logp - old_logp).exp(), A, 0.2, 0.28)
    weight = (old_logp - sampler_logp).exp() * gate
    counted = mask & (gate != 0) if action == "reject" else mask
    oracle = oracles.dapo(weight * policy, policy * 0, 0.0, counted)
    (expected,) = torch.autograd.grad(oracle, logits)
    rule = Rejection(measure, over, high=bound, action=action)
    sampler = SamplerCorrection("token", "truncate", 0.0, math.inf)
    objective = RECIPES["dapo"].replace(factor=PolicyFactor(sampler, rejections=(rule,)))
    leaf = logits.detach().clone().requires_grad_()
    names = ("target", "mask", "old_logp", "sampler_logp")
    arguments = {k: given[k] for k in names}
    out = reference_loss(leaf, objective=objective, advantage=A, **arguments)
    out.loss.backward()
    assert math.isclose(out.loss, oracle.detach(), rel_tol=1e-6)
    assert close(leaf.grad, expected) and out.metrics["tokens"] == counted.sum()


@pytest.mark.parametrize("tau", [1e-12, 1e-3, 0.02, 0.1, 10.0])
def test_the_second_moment_is_below_its_bound(tau: float) -> None:
    """By removing one after the other; without candidates, or without any below, too."""
    d = torch.randn(5, 40).double() * 0.4
    A, mask = torch.randn(5, 40).double().round(), torch.rand(5, 40) < 0.8
    d[0, 0], d[0, 1] = torch.nan, torch.inf
    ours = within_second_moment(d.flatten(), A.flatten(), mask.flatten(), tau).view(5, 40)
    zero = torch.zeros_like(d)
    # the loss drops tokens that are not finite itself
    theirs = oracles.m2po(d, zero, A, mask & d.isfinite(), tau) / (d.exp() * A)
    counted = mask & d.isfinite() & (A != 0)
    assert torch.equal(ours[counted], theirs[counted] > 0.5)
    assert ours[~mask].all()
    away = counted & ours & (A * d > 0)
    assert not away.any() or d[away].square().mean() < tau


@pytest.mark.parametrize("half_life", [0.5, 32.0])
@pytest.mark.parametrize("max_ratio", [math.inf, 1.2])
def test_future_kl_is_the_papers(half_life: float, max_ratio: float) -> None:
    """Holes in the mask cost no discount, a token that is not finite adds nothing."""
    d, mask = torch.randn(5, 12).double() * 0.4, torch.rand(5, 12) < 0.7
    d[2, 5], d[1, 4] = torch.nan, -torch.inf
    finite = torch.where(d.isfinite(), d, 0.0)
    truth = oracles.future_kl(finite, finite * 0, mask, half_life, 0.6, 1.6, max_ratio)
    sequence = torch.arange(5).repeat_interleave(12)
    rule = FutureKL(half_life, 0.6, 1.6, max_ratio)
    ours = rule.weigh(d.flatten(), mask.flatten(), sequence, 5).view(5, 12)
    assert torch.allclose(ours[mask], truth[mask], rtol=1e-12)
    assert ((ours > 0.6) & (ours < 1.6) & mask).sum() > 5
    # another order of sequences, the same order of tokens within each
    order = torch.arange(60).view(5, 12).T.flatten()
    other = rule.weigh(d.flatten()[order], mask.flatten()[order], sequence[order], 5)
    assert torch.equal(other[order.argsort()].view(5, 12)[mask], ours[mask])


def test_future_kl_of_nothing() -> None:
    nothing = torch.zeros(0)
    assert FutureKL().weigh(nothing, nothing.bool(), nothing.long(), 0).shape == (0,)
    assert within_second_moment(nothing, nothing, nothing.bool(), 0.1).shape == (0,)


def test_the_mean_reward_as_a_scale() -> None:
    """MaxRL: 0 where the mean is not positive; masked completions count in no mean."""
    rewards = [1.0, 0, 0, 0, 0, 0, -1, 1, 3, 1e30, 1e30, 4e30, -3, 0, 1]
    rewards = torch.tensor(rewards).double()
    spec = Estimator("group", "mean", epsilon=0.0)
    found = relative_advantages(rewards, 3, spec)
    expected = torch.tensor([2.0, -1, -1, 0, 0, 0, -2, 0, 2, -0.5, -0.5, 1, 0, 0, 0]).double()
    assert torch.allclose(found, expected, rtol=1e-12)
    mask = torch.tensor([1, 1, 0, 1])
    found = relative_advantages(torch.tensor([1.0, 3, torch.nan, 2]), 4, spec, mask=mask)
    assert torch.equal(found, torch.tensor([-0.5, 0.5, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("all at once", False),
        *slow(("all at once", True), *((name, False) for name in ("scalerl", "fipo", "m2po"))),
        *slow(("sdar", False), ("gates", True), ("ipo", False), ("fipo", True)),
    ],
)
def test_compiled(name: str, hidden: bool) -> None:
    """The same bits as in eager mode, in one graph."""
    given = batch()
    arguments = needed(OBJECTIVES[name], given) | {"objective": OBJECTIVES[name]}
    head = given["head"].float()

    def loss(leaf: Tensor) -> Any:
        if hidden:
            return fused_linear_loss(leaf, head, **arguments)
        return fused_loss(leaf @ head.T, **arguments)

    results = []
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = given["hidden"].float().requires_grad_()
        out = function(leaf)
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad, out.factor))
    assert all(map(torch.equal, *results))


def test_advantages_flow_over_tool_output() -> None:
    """GAE with masked tokens in the middle and at the end: the reward is at the last valid one."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0, 0]])
    r, values = torch.tensor([2.0, -1.0]).double(), torch.randn(2, 7).double()
    logp = torch.where(mask != 0, 0.0, torch.nan).double()
    rewards = rewards_with_kl(r, logp, logp, mask, beta=0.0)
    assert torch.equal(rewards.sum(1), r)
    advantage, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for i, places in enumerate(([0, 1, 4, 5], [0, 2])):
        # the completion without the tool's tokens
        cut = torch.zeros(1, len(places)).double()
        cut[0, -1] = r[i]
        ones = torch.ones_like(cut)
        truth, _ = oracles_estimators.gae(
            cut.numpy(), values[i : i + 1, places].numpy(), ones.numpy(), 0.9, 0.8, None
        )
        assert torch.allclose(advantage[i, places], torch.tensor(truth)[0], rtol=0, atol=1e-12)
        assert advantage[i, places[0]] != 0 and not advantage[i][mask[i] == 0].any()


def test_a_second_moment_and_clipping_are_apart() -> None:
    """On policy nothing has moved: no second phase, the plain loss."""
    given = batch()
    logits = (given["hidden"] @ given["head"].T).float()
    arguments = {k: given[k] for k in ("target", "mask", "rewards", "group_size")}
    found = fused_loss(logits, objective="m2po", **arguments)
    plain = fused_loss(logits, objective=Objective(importance()), **arguments)
    assert torch.equal(found.loss, plain.loss) and (found.factor == 1).all()
    with pytest.raises(ValueError, match="second_moment: expected a number > 0, got 0"):
        PolicyFactor(second_moment=0)
    assert clip(0.2) == RECIPES["gdpo"].surrogate


def with_observations(given: dict[str, Any]) -> dict[str, Any]:
    """A tool's output in the gaps of the mask; what other policies say of it may be anything."""
    observed = (~given["mask"]) & (given["target"] >= 0) & (torch.arange(T) < 6)
    given["nll_weight"] = (0.05 * observed / observed.sum()).float()
    given["nll_weight"][0, 0] = 0.1
    for name in ("old_logp", "ref_logp", "sampler_logp"):
        given[name] = torch.where(given["mask"], given[name], torch.nan)
    given["mask"] = given["mask"] & (given["target"] >= 0)
    return given


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo"])
def test_observations_have_a_cross_entropy(name: str) -> None:
    """ECHO (2605.24517): L + λ·Σ_obs(−log π)/N_obs; with a divisor of its own."""
    given = with_observations(batch())
    logits = (given["hidden"] @ given["head"].T).requires_grad_()
    arguments = needed(RECIPES[name], given)
    weight = arguments.pop("nll_weight").double()
    plain = reference_loss(logits, objective=name, **arguments).loss
    logp, _ = oracles.logp_and_entropy(logits, given["target"].clamp(min=0), 1.0)
    oracle = plain - (weight * logp).sum()
    (expected,) = torch.autograd.grad(oracle, logits)
    leaf = logits.detach().clone().requires_grad_()
    out = reference_loss(leaf, objective=name, nll_weight=weight, **arguments)
    out.loss.backward()
    assert math.isclose(out.loss, oracle.detach(), rel_tol=1e-6)
    assert close(leaf.grad, expected)
    assert torch.allclose(out.logp[weight != 0], logp[weight != 0])
    assert out.metrics["tokens"] == given["mask"].sum()
    assert (weight != 0).sum() > (weight[given["mask"]] != 0).sum() == 1


@paired(
    name=["grpo", "gspo", "gates", "all at once", "gpg"],
    form=["padded", "packed", "hidden", "hidden, lean", "hidden, frozen", "logp"],
    dtype=[torch.float32, torch.bfloat16],
    backend=BACKENDS,
)
def test_observations_every_way(
    backend: str, device: str, name: str, form: str, dtype: torch.dtype
) -> None:
    """Loss and gradient against the reference in float64; advantages of 0 leave them there."""
    objective = (OBJECTIVES | RECIPES)[name]
    if objective.beta and name == "grpo":
        objective = objective.replace(kl="k2")
    given = with_observations(batch())
    given["rewards"] = torch.tensor([1.0, 1, 1, 1, 0, 0.5])
    given["hidden"] = given["hidden"].to(dtype).double()
    given["head"] = given["head"].to(dtype).double()
    if "hidden" not in form:
        logits = (given["hidden"] @ given["head"].T).to(dtype)
        given["hidden"], given["head"] = logits.double(), torch.eye(V).double()
    hidden = given["hidden"].clone().requires_grad_()
    head = given["head"].clone().requires_grad_()
    exact = reference_loss(hidden @ head.T, objective=objective, **needed(objective, given))
    exact.loss.backward()
    assert hidden.grad is not None
    expected = hidden.grad
    if form == "packed":
        kept = ((given["target"] >= 0) & (torch.rand(B, T) < 2)).T.nonzero(as_tuple=True)[::-1]
        given = {
            k: v[kept] if getattr(v, "shape", ())[:2] == (B, T) else v for k, v in given.items()
        }
        given, expected = given | {"sequence_id": kept[0]}, expected[kept]
    arguments = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in needed(objective, given).items()
    }
    leaf = given["hidden"].to(dtype).to(device).requires_grad_()
    matrix = given["head"].to(dtype).to(device).requires_grad_("frozen" not in form)
    same = {"objective": objective, "backend": backend}
    if "hidden" in form:
        plan = "lean" if "lean" in form else "fast"
        budget = 2**11 if "frozen" not in form else None
        out = fused_linear_loss(leaf, matrix, plan=plan, memory_budget=budget, **same, **arguments)
    elif form == "logp":
        target = arguments.pop("target")
        known = target >= 0
        arguments["nll_weight"] = arguments["nll_weight"] * known
        rows = leaf.float().log_softmax(-1)
        logp = rows.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        out = logp_loss(logp, entropy=-(rows.exp() * rows).sum(-1), **same, **arguments)
    else:
        out = fused_loss(leaf, **same, **arguments)
    out.loss.backward()
    assert leaf.grad is not None
    tolerance = 2e-4 if dtype == torch.float32 else 0.02
    size = float(expected.abs().max())
    assert math.isclose(out.loss, exact.loss, rel_tol=1e-4)
    assert torch.allclose(leaf.grad.cpu().double(), expected, tolerance, tolerance * size)
    if "hidden" in form and "frozen" not in form:
        assert matrix.grad is not None and head.grad is not None
        size = float(head.grad.abs().max())
        assert torch.allclose(matrix.grad.cpu().double(), head.grad, tolerance, tolerance * size)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_observations_that_are_not_finite_are_left_out(backend: Any) -> None:
    """And counted; a second backward and a compiled graph give the same gradient."""
    given = with_observations(batch())
    arguments = needed(RECIPES["dapo"], given)
    logits = (given["hidden"] @ given["head"].T).float()
    logits[0, 2] = torch.nan
    logits[3, 1].scatter_(0, given["target"][3, 1], -torch.inf)
    assert arguments["nll_weight"][0, 2] and arguments["nll_weight"][3, 1]
    results = []
    torch._dynamo.reset()
    for loss in (fused_loss, torch.compile(fused_loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        out = loss(leaf, objective="dapo", backend=backend, **arguments)
        (gradient,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(out.loss, leaf)
        assert torch.equal(gradient, again) and gradient.isfinite().all()
        assert not gradient[0, 2].any() and not gradient[3, 1].any()
        assert out.metrics["nonfinite_rows"] == 2
        results.append((out.loss.detach(), gradient))
    assert all(map(torch.equal, *results))


def test_observations_stay_when_tokens_are_rejected() -> None:
    """After their rows have been read; a token that leaves the mask keeps its −logp."""
    given = with_observations(batch())
    rule = Rejection("log_ratio", high=0.0)
    objective = RECIPES["dapo"].replace(factor=PolicyFactor(rejections=(rule,), current=True))
    given["sampler_logp"][0, 0] = -9.0
    logits = (given["hidden"] @ given["head"].T).float()
    arguments = needed(objective, given)
    out = fused_loss(logits, objective=objective, **arguments)
    weight = arguments.pop("nll_weight")
    logp = logits.log_softmax(-1).gather(-1, given["target"].clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(out.logp[weight != 0], logp[weight != 0])
    assert 0 < out.metrics["tokens"] < given["mask"].sum() and weight[0, 0] != 0
    plain = fused_loss(logits, objective=objective, **arguments).loss
    assert torch.allclose(out.loss, plain - (weight * logp).sum())


def test_observations_of_tokens_take_no_product_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk suffices for a row, however long its sequence is; the logits are made once."""
    made = []
    original = Workspace.make_logits
    monkeypatch.setattr(
        Workspace, "make_logits", lambda self, chunk: made.append(chunk) or original(self, chunk)
    )
    given = with_observations(batch())
    leaf = given["hidden"].float().requires_grad_()
    head = given["head"].float().requires_grad_()
    arguments = needed(RECIPES["dapo"], given)
    fused_linear_loss(leaf, head, objective="dapo", plan="fast", memory_budget=2**10, **arguments)
    rows = [row for chunk in made for row in range(chunk.start, chunk.stop)]
    assert len(made) > 1 and len(rows) == len(set(rows))


def test_wrong_weights_are_named() -> None:
    given = {k: batch()[k] for k in ("target", "mask", "old_logp")} | {"advantage": torch.ones(B)}
    logits, ones = torch.randn(B, T, V), torch.ones(B, T)
    for weight, message in (
        (-ones, "nll_weight: expected finite numbers >= 0, got -1.0 at row 0"),
        (ones * torch.inf, "nll_weight: expected finite numbers >= 0, got inf"),
        (ones[0], r"nll_weight: expected shape \[6, 7\], got \[7\]"),
        (ones.bool(), "nll_weight: expected a floating-point tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_loss(logits, objective="dapo", nll_weight=weight, **given)
    outside = given | {"target": torch.where(given["mask"], given["target"], V)}
    with pytest.raises(ValueError, match=r"target: expected an id in \[0, V = 23\), got 23"):
        fused_loss(logits, objective="dapo", nll_weight=ones, **outside)
