"""Every recipe against its paper: reference_loss = oracle, loss and gradient, in float64."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo_core import (
    RECIPES,
    Estimator,
    GroupNorm,
    Objective,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    SequenceWeight,
    clip,
)
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.objective import RatioLevel, SampledKL, Surrogate, function_of
from tests import oracles

B, T, V = 6, 7, 23
SAMPLED_KLS = get_args(SampledKL)
REWARDS = [1.0, 0.0, 0.25, 1.0, 1.0, 1.0]
LENGTHS = [7, 3, 1, 5, 0, 2]


def batch(temperature: float, spread: float = 0.4) -> dict[str, Tensor]:
    """Logits [B, T, V] in float64 and what goes with them; sequence 4 is fully masked."""
    logits = torch.randn(B, T, V, dtype=torch.float64) * 2
    target = torch.randint(0, V, (B, T))
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    logp, _ = oracles.logp_and_entropy(logits, target, temperature)
    return {
        "logits": logits,
        "target": target,
        "mask": mask,
        "old_logp": logp + spread * torch.randn(B, T),
        "ref_logp": logp + 0.4 * torch.randn(B, T),
    }


def teacher(given: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    """The same with the logits of a reference policy instead of its log-probabilities."""
    del given["ref_logp"]
    return given | {"ref_logits": logits + torch.randn(B, T, V, dtype=torch.float64)}


def relative_to_others(name: str) -> Tensor:
    """RLOO (2402.14740): less the mean of the others; REINFORCE++ (2501.03262): over the batch.

    MaxRL (2602.02710): over the mean; ScaleRL (2510.13786): over the std of all advantages.
    """
    if name == "maxrl":
        groups = [torch.tensor(g, dtype=torch.float64) for g in (REWARDS[:3], REWARDS[3:])]
        return torch.cat([(g - g.mean()) / g.mean() for g in groups])
    if name == "rloo":
        groups = [REWARDS[:3], REWARDS[3:]]
        others = [[(sum(g) - r) / 2 for r in g] for g in groups]
        pairs = zip(REWARDS, others[0] + others[1], strict=True)
        return torch.tensor([r - o for r, o in pairs], dtype=torch.float64)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    if name in ("reinforce_plus_plus_baseline", "scalerl"):
        rewards = (rewards.view(2, 3) - rewards.view(2, 3).mean(1, keepdim=True)).flatten()
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def objective_of_paper(name: str, given: dict[str, Tensor], logits: Tensor, T_: float) -> Tensor:
    """The recipe's loss by the oracles and by nothing else."""
    logp, _ = oracles.logp_and_entropy(logits, given["target"], T_)
    old_logp, mask = given["old_logp"], given["mask"]
    ratio = (logp - old_logp).exp()
    scale = name not in ("dr_grpo", "gpg", "dro", "topr", "ipo")
    A = oracles.group_advantage(REWARDS, 3, scale=scale, ddof=1, eps=1e-4)
    if name in ("rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "maxrl", "scalerl"):
        A = relative_to_others(name)
    A = A[:, None].expand_as(logp)
    of_sequence = oracles.sequence_ratio(logp, old_logp, mask)
    none = torch.zeros_like(logp)
    if name == "opd":
        kl = oracles.exact_kl(logits, given["ref_logits"], T_)
        return oracles.dapo(torch.zeros_like(logp), kl, 1.0, mask)
    kl = oracles.kl_estimate("k3", logp, given["ref_logp"])
    token_mean, sequences = oracles.dapo, oracles.grpo
    clip = oracles.ppo_clip
    losses = {
        "ppo": lambda: token_mean(clip(ratio, A, 0.2, 0.2), none, 0, mask),
        "dual_clip": lambda: token_mean(oracles.dual_clip(ratio, A, 0.2, 0.2, 3.0), none, 0, mask),
        "grpo": lambda: sequences(clip(ratio, A, 0.2, 0.2), kl, 0.04, mask),
        "dr_grpo": lambda: oracles.dr_grpo(clip(ratio, A, 0.2, 0.2), none, 0, mask, length=T),
        "dapo": lambda: token_mean(clip(ratio, A, 0.2, 0.28), none, 0, mask),
        "bnpo": lambda: token_mean(clip(ratio, A, 0.2, 0.2), none, 0, mask),
        "intellect2": lambda: token_mean(
            oracles.dual_clip(ratio, A, 0.2, 0.2, 4.0), kl, 0.001, mask
        ),
        "gspo": lambda: sequences(clip(of_sequence, A, 3e-4, 4e-4), none, 0, mask),
        "gspo_token": lambda: sequences(
            clip(of_sequence.detach() * (logp - logp.detach()).exp(), A, 3e-4, 4e-4), none, 0, mask
        ),
        "gmpo": lambda: sequences(oracles.gmpo(logp, old_logp, A, mask, 0.4), none, 0, mask),
        "luspo": lambda: oracles.sequence_sum_mean(clip(of_sequence, A, 3e-4, 4e-4), mask),
        "cispo": lambda: token_mean(oracles.cispo(logp, ratio, A, 5.0), none, 0, mask),
        "scalerl": lambda: oracles.prompt_mean(
            oracles.cispo(logp, ratio, A, 5.0), mask, [0, 0, 0, 1, 1, 1]
        ),
        "sapo": lambda: sequences(oracles.sapo(ratio, A, 1.0, 1.05), none, 0, mask),
        "vespo": lambda: token_mean(oracles.vespo(logp, old_logp, A, mask), none, 0, mask),
        "gpg": lambda: token_mean(A * logp, none, 0, mask),
        "dro": lambda: sequences(oracles.dro(logp, old_logp, A, 0.1), none, 0, mask),
        "dppo": lambda: token_mean(oracles.dppo_tv(logp, old_logp, A, 0.15, 20.0), none, 0, mask),
        "ipo": lambda: token_mean(
            oracles.ipo(logp, old_logp, A, 0.1), (logp - given["ref_logp"]) ** 2, 1e-3, mask
        ),
        "m2po": lambda: token_mean(oracles.m2po(logp, old_logp, A, mask, 0.04), none, 0, mask),
        "fipo": lambda: token_mean(
            oracles.future_kl(logp.detach(), old_logp, mask, 32.0, 0.8, 1.2, 10.0)
            * oracles.dual_clip(ratio, A, 0.2, 0.28, 10.0),
            none,
            0,
            mask,
        ),
        "sdar": lambda: token_mean(
            clip(ratio, A, 0.2, 0.2), oracles.gated_gap(logp, given["ref_logp"]), 0.01, mask
        ),
        "maxrl": lambda: oracles.sequence_sum_mean(A * logp, mask),
        "gdpo": lambda: token_mean(clip(ratio, A, 0.2, 0.2), none, 0, mask),
        "rloo": lambda: oracles.sequence_sum_mean(A * logp, mask),
        "reinforce_plus_plus": lambda: token_mean(clip(ratio, A, 0.2, 0.2), none, 0, mask),
        "reinforce_plus_plus_baseline": lambda: token_mean(clip(ratio, A, 0.2, 0.2), none, 0, mask),
        "topr": lambda: token_mean(oracles.topr(logp, ratio, A), none, 0, mask),
    }
    return losses[name]()


@pytest.mark.parametrize("spread", [0.4, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_the_papers(name: str, temperature: float, spread: float) -> None:
    """Loss and gradient, near the old policy and far beyond every bound."""
    given = batch(temperature, spread)
    logits = given.pop("logits")
    given = teacher(given, logits) if name == "opd" else given
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    out = reference_loss(
        ours,
        objective=name,
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
        group_size=3,
        temperature=temperature,
        **given,
    )
    out.loss.backward()
    oracle = objective_of_paper(name, given, theirs, temperature)
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-6, abs_tol=1e-7), "weights are float32"
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert (ours.grad[~given["mask"]] == 0).all()
    assert theirs.grad.abs().sum() > 0


def test_sequence_level_ratio_is_gspos() -> None:
    """GSPO: one ratio a sequence, clipped as such, gradient through its mean."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    A = torch.randn(B, dtype=torch.float64)
    objective = Objective(clip(0.1, 0.2), ratio_level="sequence", aggregation="sequence_mean")
    out = reference_loss(ours, objective=objective, advantage=A, **given)
    out.loss.backward()
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    ratio = oracles.sequence_ratio(logp, given["old_logp"], given["mask"])
    policy = oracles.ppo_clip(ratio, A[:, None], 0.1, 0.2)
    oracle = oracles.grpo(policy, policy * 0, 0.0, given["mask"])
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kl", SAMPLED_KLS)
def test_kl_is_apart_from_the_surrogate(kl: str) -> None:
    """beta · KL has the token's weight and nothing else: no advantage, no ratio."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    objective = Objective(clip(0.2), kl=kl, beta=0.7, aggregation="token_sum")  # type: ignore[arg-type]
    out = reference_loss(ours, objective=objective, advantage=torch.zeros(B), **given)
    out.loss.backward()
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    oracle = 0.7 * oracles.kl_estimate(kl, logp, given["ref_logp"])[given["mask"]].sum()
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-9)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kl", SAMPLED_KLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_times_ratio_is_differentiated_through_both(kl: str, level: RatioLevel) -> None:
    """r·kl with r not detached: DeepSeek-V3.2's unbiased estimate, TRL's default."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    objective = Objective(
        clip(0.2),
        kl=kl,  # type: ignore[arg-type]
        beta=0.7,
        ratio_level=level,
        aggregation="token_sum",
        kl_times_ratio=True,
    )
    out = reference_loss(ours, objective=objective, advantage=torch.zeros(B), **given)
    out.loss.backward()
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    ratio = (logp - given["old_logp"]).exp()
    if level == "sequence":
        ratio = oracles.sequence_ratio(logp, given["old_logp"], given["mask"])
    estimate = ratio * oracles.kl_estimate(kl, logp, given["ref_logp"])
    (0.7 * estimate[given["mask"]].sum()).backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_gspo_token_has_the_value_of_the_sequence_and_the_gradient_of_the_token() -> None:
    """GSPO-token: s_i·π/sg(π); other than GSPO where advantages differ within a sequence."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    A = torch.randn(B, T, dtype=torch.float64)
    objective = Objective(clip(0.1, 0.2), ratio_level="sequence_token")
    out = reference_loss(ours, objective=objective, advantage=A, **given)
    out.loss.backward()
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    ratio = oracles.sequence_ratio(logp, given["old_logp"], given["mask"]).detach()
    ratio = ratio * (logp - logp.detach()).exp()
    policy = oracles.ppo_clip(ratio, A, 0.1, 0.2)
    oracles.dapo(policy, policy * 0, 0.0, given["mask"]).backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_bonus_is_differentiated(temperature: float) -> None:
    """−coef · weight · H_n, with the gradient through the whole distribution."""
    given = batch(temperature)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    objective = Objective(clip(0.2), entropy_coef=0.7, aggregation="sequence_mean")
    out = reference_loss(
        ours, objective=objective, advantage=torch.zeros(B), temperature=temperature, **given
    )
    out.loss.backward()
    _, entropy = oracles.logp_and_entropy(theirs, given["target"], temperature)
    oracle = oracles.grpo(0.7 * entropy, entropy * 0, 0.0, given["mask"])
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-9)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("spread", [1e-3, 0.5, 3.0])
def test_exact_kl_is_over_the_whole_vocabulary(temperature: float, spread: float) -> None:
    """beta · KL(π ‖ π_ref), value and gradient, near the reference and far from it."""
    given = batch(temperature)
    logits = given.pop("logits")
    del given["ref_logp"]
    ref_logits = logits + spread * torch.randn(B, T, V, dtype=torch.float64)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    objective = Objective(clip(0.2), kl="exact", beta=0.7, aggregation="token_sum")
    out = reference_loss(
        ours,
        objective=objective,
        advantage=torch.zeros(B),
        ref_logits=ref_logits,
        temperature=temperature,
        **given,
    )
    out.loss.backward()
    kl = oracles.exact_kl(theirs, ref_logits, temperature)
    oracle = 0.7 * kl[given["mask"]].sum()
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-8)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
    assert torch.allclose(out.kl[given["mask"]], kl.detach()[given["mask"]], atol=1e-12)


@pytest.mark.parametrize("action", ["truncate", "zero", "reject"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_sampler_correction_scales_the_policy_term(
    level: str, action: str, on_policy: bool
) -> None:
    """w·ℓ, the KL untouched; rejected and unscored tokens are in no mean."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    if on_policy:
        given["old_logp"] = logp.detach()
    sampler_logp = given["old_logp"] + 0.3 * torch.randn(B, T)
    sampler_logp[0, 1], sampler_logp[3, 0] = torch.nan, -torch.inf
    rule = SamplerCorrection(level, action, 0.8, 1.25)  # type: ignore[arg-type]
    objective = RECIPES["grpo"].replace(factor=PolicyFactor(rule))
    A = torch.randn(B, dtype=torch.float64)
    arguments = {k: v for k, v in given.items() if k != "old_logp" or not on_policy}
    out = reference_loss(
        ours, objective=objective, advantage=A, sampler_logp=sampler_logp, **arguments
    )
    out.loss.backward()
    weight, kept = oracles.sampler_weight(
        given["old_logp"], sampler_logp, given["mask"], level, action, 0.8, 1.25
    )
    policy = oracles.ppo_clip((logp - given["old_logp"]).exp(), A[:, None], 0.2, 0.2)
    kl = oracles.kl_estimate("k3", logp, given["ref_logp"])
    oracle = oracles.grpo(weight * policy, kl, 0.04, kept)
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-6, abs_tol=1e-8)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert out.metrics["unscored_tokens"] == 2
    assert out.metrics["tokens"] == kept.sum()
    assert (weight[kept] != 1).any()


@pytest.mark.parametrize("of_sampler", [False, True])
def test_off_policy_mask_drops_what_became_unlikely(of_sampler: bool) -> None:
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    logp, _ = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    given["old_logp"][3:] += 0.3
    extra = {"sampler_logp": given["old_logp"] - 0.5} if of_sampler else {}
    objective = RECIPES["grpo"].replace(factor=PolicyFactor(off_policy_delta=0.05))
    A = torch.tensor([1.0, -1.0, -0.5, -1.0, 1.0, -2.0], dtype=torch.float64)
    out = reference_loss(ours, objective=objective, advantage=A, **given, **extra)
    out.loss.backward()
    before = extra.get("sampler_logp", given["old_logp"])
    keep = oracles.off_policy_sequences(
        logp.detach(), before, A[:, None].expand(B, T), given["mask"], 0.05
    )
    policy = oracles.ppo_clip((logp - given["old_logp"]).exp(), A[:, None], 0.2, 0.2)
    kl = oracles.kl_estimate("k3", logp, given["ref_logp"])
    oracle = oracles.grpo(keep * policy, kl, 0.04, given["mask"])
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-6, abs_tol=1e-8)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert of_sampler or (keep == 0).any()


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("apart", [False, True])
def test_top_entropy_keeps_the_deciding_tokens(share: float, apart: bool) -> None:
    """Policy gradient and entropy bonus above the quantile only; the KL everywhere."""
    given = batch(1.0)
    logits = given.pop("logits")
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    objective = RECIPES["dapo"].replace(
        factor=PolicyFactor(top_entropy=share),
        kl="k3",
        beta=0.1,
        entropy_coef=0.3,
        entropy_aggregation="token_mean" if apart else None,
    )
    A = torch.randn(B, dtype=torch.float64)
    out = reference_loss(ours, objective=objective, advantage=A, **given)
    out.loss.backward()
    logp, entropy = oracles.logp_and_entropy(theirs, given["target"], 1.0)
    mask = given["mask"]
    high = oracles.high_entropy(entropy.detach(), mask, share)
    policy = oracles.ppo_clip((logp - given["old_logp"]).exp(), A[:, None], 0.2, 0.28)
    kl = oracles.kl_estimate("k3", logp, given["ref_logp"])
    oracle = oracles.dapo(high * policy, kl, 0.1, mask)
    oracle = oracle - 0.3 * (entropy * high)[mask].sum() / (high if apart else mask).sum()
    oracle.backward()
    assert math.isclose(out.loss, oracle, rel_tol=1e-6, abs_tol=1e-8)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert (high.sum() == mask.sum()) == (share == 1.0)


def test_objectives_are_values() -> None:
    """Hashable, comparable, changed by `replace`; nonsense is refused by name."""
    dapo = RECIPES["dapo"]
    assert GroupNorm(True, 0, 0.5) == Estimator("group", "group", 0, 0.5)
    assert GroupNorm(scale=False) == Estimator(scale=None) == RECIPES["dr_grpo"].advantage
    assert dapo.replace(beta=0.0) == dapo
    assert len({dapo, dapo.replace(beta=0.0), dapo.replace(kl="k3", beta=0.1)}) == 2
    for changes, message in (
        ({"beta": 0.1}, "kl: expected an estimator for beta = 0.1, got None"),
        (
            {"kl": "exact", "kl_times_ratio": True},
            "kl_times_ratio: expected False for kl = 'exact'",
        ),
        ({"entropy_aggregation": "mean"}, "entropy_aggregation: expected one of .*got 'mean'"),
        ({"factor": 2.0}, "factor: expected an instance of PolicyFactor, got 2.0"),
        ({"interpolation": 0.5}, "interpolation: expected 1 for kl = None, got 0.5"),
        ({"kl": "exact", "interpolation": 1.5}, r"interpolation: .* in \[0, 1\], got 1.5"),
        ({"kl": "exact", "interpolation": math.nan}, r"interpolation: .* in \[0, 1\], got nan"),
        ({"kl": "exact", "interpolation": "jsd"}, r"interpolation: .* in \[0, 1\], got 'jsd'"),
        ({"beta": -1.0}, "beta: expected a finite number >= 0, got -1"),
        ({"kl": "k9"}, "kl: expected one of .*got 'k9'"),
        ({"ratio_level": "word"}, "ratio_level: expected one of .*got 'word'"),
        ({"aggregation": "mean"}, "aggregation: expected one of .*got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            dapo.replace(**changes)
    for changes, message in (
        ({"top_entropy": 1.5}, r"top_entropy: expected a number in \[0, 1\], got 1.5"),
        ({"off_policy_delta": math.nan}, "off_policy_delta: expected a number, got nan"),
        ({"sampler": "TIS"}, "sampler: expected an instance of SamplerCorrection, got 'TIS'"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyFactor(**changes)  # type: ignore[arg-type]


def linear(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Any:
    """A surrogate of a user's module."""
    return -advantage * logp, -advantage, advantage * 0


VALUES: dict[str, Any] = RECIPES | {
    "a user's": Objective(Surrogate(linear), token_clip=(0.5, 0.25)),
    "surrogate": clip(0.1, 0.3),
    "advantage": GroupNorm(False, 0, 1e-6),
    "factor": PolicyFactor(
        sampler=SamplerCorrection(),
        off_policy_delta=0.5,
        sequence_weight=SequenceWeight(),
        rejections=(Rejection("k3", "mean", high=0.1),),
        current=True,
    ),
    "factor of an objective": RECIPES["dapo"].replace(
        factor=PolicyFactor(top_entropy=0.2), kl="exact", beta=0.1, entropy_coef=0.01
    ),
}


@pytest.mark.parametrize(
    "through",
    [copy.copy, copy.deepcopy, *(lambda x, k=k: pickle.loads(pickle.dumps(x, k)) for k in (2, 5))],
    ids=["copy", "deepcopy", "pickle 2", "pickle 5"],
)
def test_a_copy_of_a_value_is_the_same_value(through: Callable[[Any], Any]) -> None:
    """Also what it is called in a compiled graph, and what is computed with it."""
    for name, value in VALUES.items():
        found = through(value)
        assert found == value and hash(found) == hash(value), name
        assert repr(found) == repr(value)
        if isinstance(value, Objective):
            assert function_of(found.surrogate.name) is value.surrogate.function
    given = batch(1.0) | {"advantage": torch.randn(B, dtype=torch.float64)}
    gspo = RECIPES["gspo"]
    assert torch.equal(
        reference_loss(objective=through(gspo), **given).loss,
        reference_loss(objective=gspo, **given).loss,
    )


def arrived(values: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether they are this process's own; and they themselves."""
    same = all(hash(values[k]) == hash(v) and values[k] == v for k, v in VALUES.items())
    surrogate = values["grpo"].surrogate
    return same and function_of(surrogate.name) is surrogate.function, values


@pytest.mark.slow
def test_values_are_the_same_in_another_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        same, back = pool.submit(arrived, VALUES).result()
    assert same and back == VALUES
    assert {k: hash(v) for k, v in back.items()} == {k: hash(v) for k, v in VALUES.items()}


def test_a_function_that_has_no_name_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local one, and one whose name is another's by now; either can be copied."""
    local: Any = lambda logp, log_ratio, advantage: (logp, advantage, advantage)  # noqa: E731
    for function, name in ((local, "<locals>.<lambda>"), (linear, "linear")):
        value = Objective(Surrogate(function))
        monkeypatch.setattr(f"{__name__}.linear", local)
        with pytest.raises(pickle.PicklingError, match=f"importable as {__name__}:.*{name}"):
            pickle.dumps(value)
        assert copy.deepcopy(value) == copy.copy(value) == value
        monkeypatch.undo()


def test_functions_are_not_kept() -> None:
    """As a notebook's cell makes one each time it is run: the last hundred or so at most."""

    def made() -> weakref.ref[Any]:
        def surrogate(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Any:
            return linear(logp, log_ratio, advantage)

        Objective(Surrogate(surrogate))
        return weakref.ref(surrogate)

    refs = [made() for _ in range(300)]
    gc.collect()
    assert sum(ref() is not None for ref in refs) <= 128
