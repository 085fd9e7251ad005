"""The trainer with the mean over prompts: whole groups in a minibatch, any part in a microbatch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_core import RECIPES, fused_loss
from grpo_core.loss.reference import reference_loss
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.rewards import Scores
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, rollout
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests import oracles
from tests.engines import GivenEngine
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*no reward applies"),
]

P, G, RATE = 5, 4, 0.03
SCALERL = RECIPES["scalerl"]
# the weights of the other terms are those of the policy term
WITH_KL = SCALERL.replace(beta=0.3, kl="k3", entropy_coef=0.2)
PROBLEMS = [Problem((n + 2,) * (n % 3 + 1)) for n in range(P)]
# group 3 is equal, a completion of group 1 has no reward
REWARDS = torch.rand(P, G, generator=torch.Generator().manual_seed(0))
REWARDS[3] = 0.25
REWARDS[1, 2] = torch.nan
ORDER = torch.randperm(P * G, generator=torch.Generator().manual_seed(1))
# order of the groups' first completions
GROUPS = [n // G for n in ORDER.tolist() if n % G == 0]


def config(**changes: Any) -> TrainerConfig:
    """Two updates twice."""
    settings: dict[str, Any] = {
        "objective": SCALERL,
        "prompts_per_step": P,
        "group_size": G,
        "learning_rate": RATE,
        "max_grad_norm": 1e9,
        "max_log_ratio": 0,
        "warmup_steps": 0,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    return TrainerConfig(**settings | changes)


def given() -> Rollout:
    torch.manual_seed(3)
    prompts = [problem.prompt for problem in PROBLEMS for _ in range(G)]
    return rollout(micro_model(), prompts, Sampling(MAX_NEW_TOKENS))


def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
    return Scores(REWARDS.flatten(), {"some": REWARDS.flatten()})


class Ordered(Trainer):
    """Deals out in `ORDER`, and keeps the microbatches."""

    def minibatches(self, drawn: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        self.dealt = super().minibatches(drawn, rewards, ORDER)
        return self.dealt


def trained(**changes: Any) -> tuple[Ordered, dict[str, Any]]:
    """A step by SGD, which shows a wrong factor of the gradient."""
    engine = GivenEngine(given())
    run = Ordered(micro_model(), lambda *_: PROBLEMS, reward, config(**changes), engine=engine)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=RATE)
    return run, run.step()


def advantages(groups: Sequence[int]) -> dict[tuple[int, int], float]:
    """ScaleRL: reward minus the mean of its group, over the deviation of these differences."""
    spec = SCALERL.advantage
    centred = {
        (g, i): float(REWARDS[g, i].double() - REWARDS[g].double().nanmean())
        for g in groups
        for i in range(G)
        if not REWARDS[g, i].isnan()
    }
    deviation = sum(A * A for A in centred.values()) / (len(centred) - spec.ddof)
    return {key: A / (deviation**0.5 + spec.epsilon) for key, A in centred.items()}


def logp_and_entropy(model: nn.Module, prompt: list[int], ids: list[int]) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    log_p = logits.log_softmax(-1)
    return log_p[range(len(ids)), ids], -(log_p.exp() * log_p).sum(-1)


def oracle(settings: TrainerConfig, split: Sequence[Sequence[int]]) -> tuple[nn.Module, list[int]]:
    """The updates in float64, one completion after the other, and the groups in each.

    `split` are minibatches of groups.
    """
    start, drawn = micro_model().double(), given()
    model, A = copy.deepcopy(start), advantages([g for part in split for g in part])
    completions, spec, counts = drawn.completions(), settings.objective, []
    for part in [*split] * settings.epochs:
        means = []
        for g in part:
            tokens = []
            for i in range(G):
                n = g * G + i
                cut = settings.mask_truncated and drawn.truncated[n]
                if (g, i) not in A or cut:
                    continue
                text = list(PROBLEMS[g].prompt), completions[n]
                logp, entropy = logp_and_entropy(model, *text)
                old_logp = logp_and_entropy(start, *text)[0].detach()
                ratio = (logp - old_logp).exp()
                gain = oracles.cispo(logp, ratio, torch.tensor(A[g, i]), 5.0)
                kl = oracles.kl_estimate("k3", logp, old_logp)
                tokens.append(spec.beta * kl - gain - spec.entropy_coef * entropy)
            if tokens:
                means.append(torch.cat(tokens).mean())
        counts.append(len(means))
        model.zero_grad()
        torch.stack(means).mean().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad  # type: ignore[operator]
    return model, counts[: len(split)]


VARIED = [g for g in GROUPS if g != 3]


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"minibatches": 1}, [GROUPS]),
        ({"minibatches": 1, "tokens_per_microbatch": 40}, [GROUPS]),
        ({"tokens_per_microbatch": 30, "objective": WITH_KL}, [GROUPS[:3], GROUPS[3:]]),
        ({"tokens_per_microbatch": 30, "mask_truncated": True}, [GROUPS[:3], GROUPS[3:]]),
        (
            {"tokens_per_microbatch": 30, "dynamic_sampling": "filter", "loss": "logits"},
            [VARIED[:2], VARIED[2:]],
        ),
        (
            {"dynamic_sampling": "filter", "mask_truncated": True, "objective": WITH_KL},
            [VARIED[:2], VARIED[2:]],
        ),
    ],
    ids=["whole", "parts", "two, KL", "two, truncated", "two, filtered", "all of it"],
)
def test_updates_are_those_of_the_formula(changes: dict[str, Any], split: Any) -> None:
    run, metrics = trained(**changes)
    expected, counts = oracle(run.config, split)
    assert metrics["skipped_updates"] == 0
    moved = 0.0
    for mine, other, start in zip(
        run.model.parameters(), expected.parameters(), micro_model().parameters(), strict=True
    ):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=2e-6)
        moved = max(moved, float((mine - start).detach().abs().max()))
    assert moved > 1e-2
    shares = [[float((1 / part.group_rows).sum()) for part in parts] for parts in run.dealt]
    # of each group 1 in all; a microbatch has a part of some
    assert [sum(each) for each in shares] == pytest.approx(counts)
    if run.config.tokens_per_microbatch:
        assert any(abs(share - round(share)) > 0.1 for each in shares for share in each)
    else:
        assert [len(each) for each in shares] == [1] * len(split)


def test_minibatches_without_a_group_are_fillers() -> None:
    """Of five groups four have different rewards."""
    run, _ = trained(minibatches=5, dynamic_sampling="filter", epochs=1)
    assert [[part.is_filler for part in parts] for parts in run.dealt] == [[False]] * 4 + [[True]]


def test_what_would_split_groups_is_refused() -> None:
    def make(**changes: Any) -> Trainer:
        return Trainer(micro_model(), draw_problems, share_of_sevens, config(**changes))

    make(minibatches=5)
    expected = "minibatches: expected at most 5, the prompts of a step on each rank, got 6, which"
    with pytest.raises(ValueError, match=expected):
        make(minibatches=6)
    by_prompt = RECIPES["dapo"].replace(entropy_coef=0.1, entropy_aggregation="prompt_mean")
    with pytest.raises(ValueError, match=r"objective\.entropy_aggregation: expected one of tokens"):
        make(objective=by_prompt)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
def test_a_normalizer_for_every_token(name: str, packed: bool) -> None:
    """Against plain PyTorch, and against a sum of losses of single tokens; masked ones may be 0."""
    torch.manual_seed(0)
    B, T, V = 3, 4, 11
    logits, target = torch.randn(B, T, V), torch.randint(V, (B, T))
    target[1, 2:] = -100
    divisor = torch.rand(B, T) + 0.5
    divisor[1, 3] = 0
    spec = RECIPES[name].replace(aggregation="token_sum", beta=0.1, kl="k3", entropy_coef=0.1)
    vectors = {"old_logp": -torch.rand(B, T) - 2, "ref_logp": -torch.rand(B, T) - 2}
    given = vectors | {"target": target, "advantage": torch.randn(B)[:, None].expand(B, T)}
    if packed:
        given = {key: value.flatten() for key, value in given.items()}
        given["sequence_id"] = torch.arange(B).repeat_interleave(T)
        logits, divisor = logits.flatten(0, 1), divisor.flatten()
    results = []
    for loss in (fused_loss, reference_loss):
        leaf = logits.clone().requires_grad_()
        out = loss(leaf, objective=spec, normalizer=divisor, **given)
        out.loss.backward()
        results.append((out.loss.detach().float(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    singles = torch.zeros(())
    for n in (given["target"].flatten() != -100).nonzero()[:, 0].tolist():
        # only this token's divisor is finite
        only = torch.full((B * T,), 1e30)
        only[n] = divisor.flatten()[n]
        only = only.view_as(divisor)
        singles += fused_loss(logits, objective=spec, normalizer=only, **given).loss
    torch.testing.assert_close(results[0][0], singles, rtol=1e-5, atol=1e-6)


def test_a_bad_normalizer_of_a_token_is_named() -> None:
    logits, target = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    divisor = torch.ones(2, 3)
    divisor[1, 1] = 0
    given = {"objective": "dapo", "advantage": torch.ones(2), "normalizer": divisor}
    with pytest.raises(ValueError, match=r"finite numbers > 0, got 0\.0 at row 4"):
        fused_loss(logits, target, **given)
    # unchecked, its weight is 0
    leaf = logits.clone().requires_grad_()
    fused_loss(leaf, target, validate=False, **given).loss.backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[1, 1] == 0).all() and (leaf.grad[1, 0] != 0).any()
