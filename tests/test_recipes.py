"""Every recipe against its paper: reference_loss = oracle, loss and gradient, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_core import RECIPES, Objective, clip
from grpo_core.reference import reference_loss
from tests import oracles

B, T, V = 6, 7, 23
REWARDS = [1.0, 0.0, 0.25, 1.0, 1.0, 1.0]
LENGTHS = [7, 3, 1, 5, 0, 2]


def batch(temperature: float) -> dict[str, Tensor]:
    """Logits [B, T, V] in float64 and what goes with them; sequence 4 is fully masked."""
    logits = torch.randn(B, T, V, dtype=torch.float64) * 2
    target = torch.randint(0, V, (B, T))
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    logp, _ = oracles.logp_and_entropy(logits, target, temperature)
    return {
        "logits": logits,
        "target": target,
        "mask": mask,
        "old_logp": logp + 0.4 * torch.randn(B, T),
        "ref_logp": logp + 0.4 * torch.randn(B, T),
    }


def objective_of_paper(name: str, given: dict[str, Tensor], logits: Tensor, T_: float) -> Tensor:
    """The recipe's loss by the oracles, with beta 0.04 for grpo and none for the others."""
    logp, _ = oracles.logp_and_entropy(logits, given["target"], T_)
    ratio = (logp - given["old_logp"]).exp()
    scale = name != "dr_grpo"
    A = oracles.group_advantage(REWARDS, 3, scale=scale, ddof=1, eps=1e-4)[:, None]
    policy = oracles.ppo_clip(ratio, A, 0.2, 0.28 if name == "dapo" else 0.2)
    kl = oracles.kl_estimate("k3", logp, given["ref_logp"])
    if name == "grpo":
        return oracles.grpo(policy, kl, 0.04, given["mask"])
    if name == "dr_grpo":
        return oracles.dr_grpo(policy, kl, 0.0, given["mask"], length=T)
    return oracles.dapo(policy, kl, 0.0, given["mask"])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_the_papers(name: str, temperature: float) -> None:
    given = batch(temperature)
    logits = given.pop("logits")
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
    assert math.isclose(out.loss, oracle, rel_tol=1e-6), "weights are float32"
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert (ours.grad[~given["mask"]] == 0).all()


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


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
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


def test_objectives_are_values() -> None:
    """Hashable, comparable, changed by `replace`; nonsense is refused by name."""
    dapo = RECIPES["dapo"]
    assert dapo.replace(beta=0.0) == dapo
    assert len({dapo, dapo.replace(beta=0.0), dapo.replace(kl="k3", beta=0.1)}) == 2
    for changes, message in (
        ({"beta": 0.1}, "kl: expected an estimator for beta = 0.1, got None"),
        ({"beta": -1.0}, "beta: expected a finite number >= 0, got -1"),
        ({"kl": "k9"}, "kl: expected one of .*got 'k9'"),
        ({"ratio_level": "word"}, "ratio_level: expected one of .*got 'word'"),
        ({"aggregation": "mean"}, "aggregation: expected one of .*got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            dapo.replace(**changes)
