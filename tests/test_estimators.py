"""Baselines and scales against their papers, and what must not change an advantage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import group_advantages
from grpo_core.objective.advantage import Estimator, decoupled_advantages, relative_advantages
from tests import oracles_estimators as oracles

ESTIMATORS = {
    "grpo": Estimator(),
    "dr_grpo": Estimator(scale=None),
    "rloo": Estimator("leave_one_out", None),
    "batch_std": Estimator("group", "batch"),
    "reinforce_pp_baseline": Estimator("group", "centred"),
    "reinforce_pp": Estimator("batch", "batch"),
}
OVER_BATCH = ["batch_std", "reinforce_pp_baseline", "reinforce_pp"]
# groups of 3, 1, 4 and 2, mixed up
IDS = [7, 2, 0, 7, 5, 2, 0, 2, 7, 2]
TOKENS = [3, 1, 7, 2, 5, 4, 1, 9, 6, 2]

rewards_and_ids = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(0, 3)), min_size=5, max_size=9
).map(lambda pairs: tuple(list(column) for column in zip(*pairs, strict=True)))


def close(ours: torch.Tensor, truth: np.ndarray | torch.Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(ours.double(), torch.as_tensor(truth).double(), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_advantages_are_the_papers(name: str, ddof: int, epsilon: float) -> None:
    rewards = torch.randn(10) * 3
    spec = ESTIMATORS[name]
    ours = relative_advantages(
        rewards, torch.tensor(IDS), Estimator(spec.baseline, spec.scale, ddof, epsilon)
    )
    scaled = {} if spec.scale is None else {"ddof": ddof, "eps": epsilon}
    truth = getattr(oracles, name)(rewards.double().numpy(), IDS, **scaled)
    assert ours.dtype == torch.float32
    assert close(ours, truth)


@pytest.mark.parametrize("name", OVER_BATCH)
def test_batch_statistics_over_tokens(name: str) -> None:
    rewards = torch.randn(10, dtype=torch.float64)
    ours = relative_advantages(
        rewards, torch.tensor(IDS), ESTIMATORS[name], tokens=torch.tensor(TOKENS)
    )
    assert ours.dtype == torch.float64
    assert close(ours, getattr(oracles, name)(rewards.numpy(), IDS, tokens=TOKENS), 1e-12)


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_decoupled_is_the_papers(tokens: list[int] | None) -> None:
    rewards, weights = torch.randn(10, 3), torch.tensor([1.0, 0.5, 2.0])
    lengths = None if tokens is None else torch.tensor(tokens)
    ours = decoupled_advantages(rewards, torch.tensor(IDS), weights, tokens=lengths)
    truth = oracles.gdpo(rewards.double().numpy(), IDS, weights.double().numpy(), tokens=tokens)
    assert close(ours, truth)


def test_a_loud_reward_function_does_not_drown_the_others() -> None:
    """Multiplied by 100 a function has the same say; without weights each has weight 1."""
    rewards, spec = torch.randn(8, 2), Estimator(epsilon=0.0)
    louder = rewards * torch.tensor([100.0, 1.0])
    once = decoupled_advantages(rewards, 4, torch.ones(2), spec)
    assert close(decoupled_advantages(louder, 4, estimator=spec), once)


def test_a_function_without_a_score_has_no_say() -> None:
    """Its column is normalised over the others of the group; a completion without any is 0."""
    rewards, scored = torch.randn(10, 3).double(), torch.rand(10, 3) < 0.7
    scored[:, 0], scored[3] = True, False
    unscored = torch.where(scored, rewards, torch.nan)
    ours = decoupled_advantages(unscored, torch.tensor(IDS), mask=scored)
    total = np.zeros(10)
    for f in range(3):
        rows = [i for i in range(10) if scored[i, f]]
        total[rows] += oracles.grpo(rewards[rows, f].numpy(), [IDS[i] for i in rows])
    rows = [i for i in range(10) if scored[i].any()]
    assert len(rows) == 9
    std = total[rows].std(ddof=1)
    assert close(ours[rows], total[rows] / (std + 1e-4), 1e-12)
    assert ours[3] == 0


@pytest.mark.parametrize("spec", ESTIMATORS.values(), ids=str)
def test_groups_by_size_are_groups_by_id(spec: Estimator) -> None:
    rewards = torch.randn(12)
    ids = torch.arange(4).repeat_interleave(3)
    by_size = relative_advantages(rewards, 3, spec)
    assert torch.equal(by_size, relative_advantages(rewards, ids, spec))
    if spec == Estimator():
        assert close(by_size, group_advantages(rewards, 3))


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", [None, "group", "batch", "centred"])
def test_nothing_to_compare_with_is_exactly_zero(
    scale: str, baseline: str, dtype: torch.dtype, epsilon: float
) -> None:
    """A group of one and a group of equals, though 0.1 + 0.1 + 0.1 is not 0.3; others live on."""
    rewards = torch.tensor([0.1, 0.1, 0.1, -1.2, 1.0, 2.0], dtype=dtype)
    spec = Estimator(baseline, scale, epsilon=epsilon)  # type: ignore[arg-type]
    advantage = relative_advantages(rewards, torch.tensor([1, 1, 1, 4, 0, 0]), spec)
    assert torch.equal(advantage[:4], torch.zeros_like(advantage[:4]))
    assert (advantage[4:] != 0).all()
    poisoned = torch.cat([-rewards[:3], torch.full((1,), torch.nan, dtype=dtype)])
    masked = relative_advantages(poisoned, 4, spec, mask=torch.tensor([1, 1, 1, 0]))
    assert torch.equal(masked, torch.zeros_like(masked))
    alone = relative_advantages(rewards[:4], torch.tensor([1, 1, 1, 3]), spec)
    assert torch.equal(alone, torch.zeros_like(alone))


@given(
    name=st.sampled_from(list(ESTIMATORS)),
    data=rewards_and_ids,
    order=st.randoms(),
    shift=st.integers(-100, 100),
)
def test_order_names_of_groups_and_shifts_change_nothing(
    name: str, data: tuple[list[int], list[int]], order: object, shift: int
) -> None:
    rewards, ids = torch.tensor(data[0]).float(), torch.tensor(data[1])
    once = relative_advantages(rewards, ids, ESTIMATORS[name])
    places = torch.tensor(order.sample(range(len(ids)), len(ids)))  # type: ignore[attr-defined]
    again = relative_advantages(rewards[places] + shift, 4 - ids[places], ESTIMATORS[name])
    assert close(again, once[places])


@given(
    name=st.sampled_from(list(ESTIMATORS)),
    per_token=st.booleans(),
    data=rewards_and_ids,
    dropped=st.sets(st.integers(0, 8), max_size=4),
)
def test_masking_is_removing(
    name: str, per_token: bool, data: tuple[list[int], list[int]], dropped: set[int]
) -> None:
    rewards, ids = torch.tensor(data[0]).float(), torch.tensor(data[1])
    tokens = torch.arange(1, len(ids) + 1) if per_token else None
    kept = torch.tensor([i not in dropped for i in range(len(ids))])
    poisoned = torch.where(kept, rewards, torch.nan)
    masked = relative_advantages(poisoned, ids, ESTIMATORS[name], tokens=tokens, mask=kept)
    # ids in [0, B) of a smaller B
    names = {int(g): n for n, g in enumerate(ids[kept].unique())}
    fewer = torch.tensor([names[int(g)] for g in ids[kept]], dtype=torch.int64)
    lengths = None if tokens is None else tokens[kept]
    removed = relative_advantages(rewards[kept], fewer, ESTIMATORS[name], tokens=lengths)
    assert close(masked[kept], removed)
    assert torch.equal(masked[~kept], torch.zeros_like(masked[~kept]))


def test_leave_one_out_baseline_does_not_see_its_own_reward() -> None:
    rewards = torch.randn(5, dtype=torch.float64)
    more = rewards + torch.tensor([2.0, 0, 0, 0, 0])
    spec = ESTIMATORS["rloo"]
    change = relative_advantages(more, 5, spec) - relative_advantages(rewards, 5, spec)
    assert close(change, torch.tensor([2.0, -0.5, -0.5, -0.5, -0.5]), 1e-12)


@pytest.mark.parametrize("spec", ESTIMATORS.values(), ids=str)
def test_no_completions_and_none_that_count(spec: Estimator) -> None:
    assert relative_advantages(torch.zeros(0), 4, spec).shape == (0,)
    assert relative_advantages(torch.zeros(0), torch.zeros(0).long(), spec).shape == (0,)
    nothing = relative_advantages(torch.full((4,), torch.nan), 2, spec, mask=torch.zeros(4))
    assert torch.equal(nothing, torch.zeros(4))
    untouched = torch.randn(4, requires_grad=True)
    assert not relative_advantages(untouched, 2, spec).requires_grad


@pytest.mark.parametrize("spec", ESTIMATORS.values(), ids=str)
def test_nothing_waits_for_the_device(spec: Estimator) -> None:
    """A tensor without values refuses every question about them."""
    rewards, tokens = torch.zeros(6, 2, device="meta"), torch.ones(6, device="meta")
    for groups in (3, torch.zeros(6, dtype=torch.int64, device="meta")):
        one = relative_advantages(rewards[:, 0], groups, spec, tokens=tokens, mask=tokens)
        several = decoupled_advantages(rewards, groups, tokens[:2], spec, tokens=tokens)
        assert one.shape == several.shape == (6,)


def test_unseen_bad_input_stays_among_its_own() -> None:
    rewards = torch.tensor([torch.nan, 1.0, 1.0, 2.0])
    spread = relative_advantages(rewards, 2, validate=False)
    assert spread[:2].isnan().all()
    assert close(spread[2:], group_advantages(rewards[2:], 2))
    wrong = relative_advantages(
        torch.tensor([5.0, 9.0, 1.0, 2.0]), torch.tensor([-1, 4, 0, 0]), validate=False
    )
    assert close(wrong, torch.cat([torch.zeros(2), spread[2:]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 2), r"rewards: expected a tensor, got list"),
        ((torch.zeros(4).long(), 2), r"rewards: expected a floating-point tensor, got .*int64"),
        ((torch.zeros(4), 3), r"groups: expected ids or a divisor of B = 4, got 3"),
        ((torch.zeros(4), 0), r"groups: expected ids or a divisor of B = 4, got 0"),
        ((torch.zeros(4), torch.zeros(3).long()), r"groups: expected shape \[4\], got \[3\]"),
        ((torch.zeros(4), torch.zeros(4)), r"groups: expected an integer tensor, got .*float32"),
        (
            (torch.zeros(4), torch.tensor([0, 0, 4, 1])),
            r"groups: expected integers in \[0, B = 4\), got 4 at row 2",
        ),
        (
            (torch.tensor([0.0, 0.0, torch.nan, torch.inf]), 2),
            r"rewards: expected finite numbers, got nan at index 2",
        ),
        ((torch.tensor([0.0, -torch.inf]), 2), r"rewards: .* got -inf at index 1"),
    ],
)
def test_bad_input_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relative_advantages(*arguments)


def test_bad_options_are_named() -> None:
    rewards = torch.zeros(4)
    with pytest.raises(ValueError, match=r"mask: expected shape \[4\], got \[3\]"):
        relative_advantages(rewards, 2, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"tokens: expected shape \[4\], got \[3\]"):
        relative_advantages(rewards, 2, tokens=torch.ones(3))
    with pytest.raises(ValueError, match=r"rewards: .* \[B, F >= 1\], got \[4\]"):
        decoupled_advantages(rewards, 2)
    with pytest.raises(ValueError, match=r"mask: expected shape \[4\] or \[4, 3\], got \[4, 2\]"):
        decoupled_advantages(torch.zeros(4, 3), 2, mask=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"weights: expected shape \[3\], got \[2\]"):
        decoupled_advantages(torch.zeros(4, 3), 2, torch.ones(2))
    with pytest.raises(ValueError, match=r"rewards\[:, 1\]: expected finite .* got nan at index 0"):
        decoupled_advantages(torch.eye(4)[:, :2] / torch.tensor([1.0, 0.0]), 2)
    for options in ({"baseline": "mean"}, {"scale": "std"}, {"ddof": 2}, {"epsilon": -1.0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Estimator(**options)  # type: ignore[arg-type]
