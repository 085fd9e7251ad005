"""The parts of the policy factor that no other file proves, against loops over sequences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_core import Objective, PolicyFactor, Rejection, SamplerCorrection, SequenceWeight, clip
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.off_policy import Measure, Over
from grpo_core.objective.policy_factor import top_share
from grpo_core.objective.recipes import reinforce

B, T, V = 6, 5, 11
LENGTHS = [5, 3, 1, 4, 0, 2]
MASK = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def batch() -> dict[str, Tensor]:
    """Logits in float64 and what three policies say of the target; sequence 4 has no token."""
    logits = torch.randn(B, T, V, dtype=torch.float64)
    target = torch.randint(0, V, (B, T))
    logp = logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    old_logp = logp + 0.4 * torch.randn(B, T)
    sampler_logp = old_logp + 0.4 * torch.randn(B, T)
    return {
        "logits": logits,
        "target": target,
        "mask": MASK,
        "old_logp": old_logp,
        "sampler_logp": sampler_logp,
        "advantage": torch.randn(B, dtype=torch.float64),
    }


def left(factor: PolicyFactor, **given: Tensor) -> Tensor:
    """[B, T] bool: the tokens that are in the loss, which is the sum of their gradients."""
    logits = given.pop("logits").requires_grad_()
    objective = Objective(clip(9.0, 9.0), factor=factor, aggregation="token_sum")
    out = reference_loss(logits, objective=objective, **given)
    out.loss.backward()
    assert out.metrics["tokens"] == (logits.grad != 0).any(-1).sum()
    return (logits.grad != 0).any(-1)


def estimate(measure: str, w: float) -> float:
    """log w; Schulman's k2 and k3 of it."""
    d = math.log(w)
    return {"log_ratio": d, "k2": d * d / 2, "k3": w - 1 - d}[measure]


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("measure", ["log_ratio", "k2", "k3"])
def test_what_is_rejected(measure: Measure, over: Over, current: bool) -> None:
    """Outside the bounds a token leaves alone, a sequence leaves as a whole."""
    given = batch()
    logp = given["logits"].log_softmax(-1).gather(-1, given["target"][..., None]).squeeze(-1)
    upper = logp if current else given["old_logp"]
    w = (upper - given["sampler_logp"]).exp().tolist()
    expected = torch.zeros(B, T, dtype=torch.bool)
    found: list[float] = []
    combined = {"sum": math.fsum, "max": max, "mean": lambda x: math.fsum(x) / len(x)}
    rows = [[estimate(measure, w[i][t]) for t in range(n)] for i, n in enumerate(LENGTHS)]
    for row in rows:
        found += row if over == "token" else [combined[over](row)] if row else []
    low = sorted(found)[1] - 1e-9 if measure == "log_ratio" else -math.inf
    high = sorted(found)[-2] + 1e-9
    for i, row in enumerate(rows):
        for t, x in enumerate(row):
            x = x if over == "token" else combined[over](row)
            expected[i, t] = low <= x <= high
    factor = PolicyFactor(rejections=(Rejection(measure, over, low, high),), current=current)
    assert torch.equal(left(factor, **given), expected)
    assert 0 < expected.sum() < MASK.sum()


def test_rules_do_not_see_what_other_rules_take() -> None:
    """Weights and sums are those of all the tokens given; who is left is what all of them keep."""
    rules = (Rejection(low=-0.3, high=0.3), Rejection("k2", "mean", high=0.08))
    alone = [left(PolicyFactor(rejections=(rule,)), **batch_of(0)) for rule in rules]
    both = left(PolicyFactor(SamplerCorrection("sequence"), rejections=rules), **batch_of(0))
    assert torch.equal(both, alone[0] & alone[1])
    assert both.sum() < min(kept.sum() for kept in alone)


def batch_of(seed: int) -> dict[str, Tensor]:
    """The batch of that seed."""
    torch.manual_seed(seed)
    return batch()


def test_a_token_nobody_scored_is_rejected() -> None:
    given = batch()
    given["sampler_logp"][0, 1] = math.nan
    given["sampler_logp"][1, 0] = -math.inf
    kept = left(PolicyFactor(rejections=(Rejection("k2", "mean", high=1e3),)), **given)
    expected = MASK.clone()
    expected[0, 1] = expected[1, 0] = False
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_sequence_weight_is_of_both_ratios(sampled: bool) -> None:
    """φ(W)·A scales the gradient; the sampler's bounded ratio is in W and nowhere else."""
    given = batch()
    given["old_logp"][3, 0] -= 30
    A = given["advantage"]
    logp = given["logits"].log_softmax(-1).gather(-1, given["target"][..., None]).squeeze(-1)
    rule = SamplerCorrection("token", "truncate", 0.0, 1.1) if sampled else None
    spec = SequenceWeight(0.4, 0.3, 0.5, 0.2)
    factor = PolicyFactor(rule, sequence_weight=spec)
    out = reference_loss(
        given.pop("logits"), objective=Objective(reinforce(), factor=factor), **given
    )
    for i, n in enumerate(LENGTHS):
        total = 0.0
        for t in range(n):
            total += max(min(float(logp[i, t] - given["old_logp"][i, t]), 20.0), -20.0)
            if sampled:
                w = float((given["old_logp"][i, t] - given["sampler_logp"][i, t]).exp())
                total += max(math.log(min(w, 1.1)), math.log(1e-8))
        W = math.exp(max(min(total, 20.0), math.log(1e-8)))
        k, decay = (0.4, 0.3) if A[i] >= 0 else (0.5, 0.2)
        phi = W**k * math.exp(decay * (1 - W))
        assert torch.allclose(out.factor[i, :n].double(), torch.tensor(phi).double(), rtol=1e-6)


def test_on_policy_a_sequence_weighs_one() -> None:
    given = batch() | {"old_logp": None, "sampler_logp": None}
    objective = Objective(reinforce(), factor=PolicyFactor(sequence_weight=SequenceWeight()))
    out = reference_loss(given.pop("logits"), objective=objective, **given)  # type: ignore[arg-type]
    assert torch.equal(out.factor, torch.ones_like(out.factor))


def test_a_share_of_zero_is_the_highest_alone() -> None:
    values, valid = torch.tensor([1.0, 3.0, 9.0, 2.0]), torch.tensor([True, True, False, True])
    assert top_share(values, valid, 0.0).tolist() == [False, True, False, False]
    PolicyFactor(top_entropy=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rejection("k1"), "measure: expected one of .*got 'k1'"),  # type: ignore[arg-type]
        (lambda: Rejection("k2", "min"), "over: expected one of .*got 'min'"),  # type: ignore[arg-type]
        (lambda: Rejection(low=1.0, high=0.5), "low: expected low <= high, got 1.0 and 0.5"),
        (lambda: SequenceWeight(k_neg=-1.0), "k_neg: expected a finite number >= 0, got -1"),
        (lambda: SequenceWeight(lambda_pos=math.nan), "lambda_pos: expected .* got nan"),
        (
            lambda: PolicyFactor(SamplerCorrection("sequence"), sequence_weight=SequenceWeight()),
            "sampler: expected level 'token' beside a sequence_weight",
        ),
        (lambda: PolicyFactor(top_entropy=-0.1), r"top_entropy: expected a number in \[0, 1\]"),
    ],
)
def test_nonsense_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rejections_need_the_sampler() -> None:
    given = batch() | {"sampler_logp": None}
    objective = Objective(clip(0.2), factor=PolicyFactor(rejections=(Rejection(),)))
    with pytest.raises(ValueError, match=r"sampler_logp: expected a tensor for factor\.rejections"):
        reference_loss(given.pop("logits"), objective=objective, **given)  # type: ignore[arg-type]
