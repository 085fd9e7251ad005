"""Filters of the vocabulary: what they keep travels with every token to each log-probability."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import RECIPES, Kept
from grpo_core.runs.config import RunConfig
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.checkpoint import save_trainer
from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.rollout import Rollout, Sampling, concat_rollouts, make_rollout, rollout
from grpo_core.trainer.trainer import Trainer
from tests.engines import CopyEngine
from tests.micro import EOS, MAX_NEW_TOKENS, PAD, micro_model
from tests.test_rollout import PROMPTS, logits_after
from tests.test_rollouts import LARGER, ONE_UPDATE, same_weights, trainer
from tests.test_trainer import without_times

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*were clipped"),
]

FILTERS: dict[str, dict[str, Any]] = {
    "top-p": {"top_p": 0.8},
    "top-k": {"top_k": 3},
    "min-p": {"min_p": 0.2},
    "all": {"top_p": 0.9, "top_k": 6, "min_p": 0.05},
}
TEMPERATURES = (0.7, 1.0)
ALL = Sampling(MAX_NEW_TOKENS, 0.7, **FILTERS["all"])


def sets_of(kept: Kept | None) -> list[list[int]]:
    """The ids of each token."""
    assert kept is not None and kept.ids.dtype == torch.int32
    ends = kept.offsets.tolist()
    return [kept.ids[a:b].tolist() for a, b in pairwise(ends)]


def filtered(logits: Tensor, sampling: Sampling) -> list[int]:
    """The ids that are kept of one row of logits, in float64: temperature, top-k, top-p, min-p."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        p = torch.where(p >= p.sort().values[-sampling.top_k], p, 0)
        p /= p.sum()
    order = p.argsort(descending=True).tolist()
    kept, total = [], 0.0
    while total < sampling.top_p and len(kept) < len(order) and p[order[len(kept)]] > 0:
        total += float(p[order[len(kept)]])
        kept.append(order[len(kept)])
    p = torch.where(torch.isin(torch.arange(len(p)), torch.tensor(kept)), p, 0)
    return sorted(id for id in kept if p[id] >= sampling.min_p * p.max())


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FILTERS)
def test_sets_are_what_the_filters_keep_of_the_models_distribution(
    name: str, temperature: float
) -> None:
    model, sampling = micro_model(), Sampling(12, temperature, **FILTERS[name])
    torch.manual_seed(1)
    drawn = rollout(model, PROMPTS * 4, sampling)
    sets = iter(sets_of(drawn.kept))
    for row, ids in enumerate(drawn.completions()):
        logits = logits_after(model, PROMPTS[row % 4], ids)
        for token, scores, logp in zip(ids, logits, drawn.sampler_logp[row], strict=False):
            kept = next(sets)
            assert kept == filtered(scores, sampling) and token in kept
            expected = (scores / temperature)[kept].log_softmax(0)[kept.index(token)]
            torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)
    assert next(sets, None) is None


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FILTERS)
def test_completions_are_those_of_transformers(name: str, temperature: float) -> None:
    """Bit for bit: the same processors in the same order, and the recorder changes nothing."""
    model = micro_model()
    torch.manual_seed(4)
    drawn = rollout(model, [[3, 4, 5]] * 64, Sampling(6, temperature, **FILTERS[name]))
    torch.manual_seed(4)
    neutral = {"top_p": 1.0, "top_k": 0, "pad_token_id": PAD, "eos_token_id": EOS}
    theirs = model.generate(
        torch.tensor([[3, 4, 5]] * 64),
        do_sample=True,
        temperature=temperature,
        max_new_tokens=6,
        output_scores=True,
        return_dict_in_generate=True,
        **neutral | FILTERS[name],
    )
    assert torch.equal(drawn.completion, theirs.sequences[:, 3:])
    finite = torch.stack(theirs.scores, 1).isfinite()[drawn.completion_mask]
    assert sets_of(drawn.kept) == [row.nonzero()[:, 0].tolist() for row in finite]


def test_without_filters_nothing_is_kept_and_greedy_completions_have_none() -> None:
    for sampling in (Sampling(4), Sampling(4, 0.7), Sampling(4, 0.0, top_p=0.5, top_k=2)):
        assert not sampling.is_filtered
        assert rollout(micro_model(), PROMPTS, sampling).kept is None
    greedy = [rollout(micro_model(), PROMPTS, Sampling(4, 0.0, top_k=k)) for k in (0, 2)]
    assert torch.equal(greedy[0].sampler_logp, greedy[1].sampler_logp)
    unrecorded = replace(ALL, replay=False)
    assert unrecorded.is_filtered and not unrecorded.keeps
    torch.manual_seed(2)
    drawn = rollout(micro_model(), PROMPTS, unrecorded)
    torch.manual_seed(2)
    again = rollout(micro_model(), PROMPTS, ALL)
    assert drawn.kept is None
    assert torch.equal(drawn.completion, again.completion)
    assert torch.equal(drawn.sampler_logp, again.sampler_logp)


def numbered(lengths: list[int], first: int = 0) -> Rollout:
    """Completions of these lengths; the set of token n has n % 3 + 1 ids, the first of them n."""
    numbers = iter(range(first, first + sum(lengths)))
    completions = [[next(numbers) for _ in range(length)] for length in lengths]
    kept = [[list(range(n, n + n % 3 + 1)) for n in ids] for ids in completions]
    logp = [[float(-n) for n in ids] for ids in completions]
    prompts = [[2] * (n + 1) for n in range(len(lengths))]
    options: dict[str, Any] = {"pad": 0, "ends": [999], "device": torch.device("cpu")}
    return make_rollout(prompts, completions, logp, kept=kept, **options)


def are_aligned(batch: Batch) -> bool:
    """Whether every token still has its own set, target and log-probability."""
    target = batch.rows.target.tolist()
    assert batch.sampler_logp.tolist() == [-n for n in target]
    return sets_of(batch.rows.kept) == [list(range(n, n + n % 3 + 1)) for n in target]


def test_sets_stay_with_their_tokens() -> None:
    """Through dynamic sampling, packing, minibatches, microbatches and fillers."""
    drawn = [numbered([3, 1, 5, 2]), numbered([4, 7], first=100), numbered([1], first=200)]
    whole = concat_rollouts([drawn[0].select(torch.tensor([2, 0, 3])), *drawn[1:]], PAD)
    assert whole.completions()[:2] == [[4, 5, 6, 7, 8], [0, 1, 2]]
    for chosen in (slice(1, 5), torch.tensor([5, 0, 4]), torch.tensor([0, 2])):
        some = whole.select(chosen)
        for options in ({}, {"padding_free": True}):
            packed = pack(some, torch.zeros(len(some.completion)), **options)
            assert are_aligned(packed)
            half = packed.select(torch.tensor([1, 0]))
            assert are_aligned(half) and len(half.rows.ids) == 2
            parts = packed.microbatches(9)
            assert len(parts) > 1 and all(map(are_aligned, parts))
            assert sum(len(part.rows.target) for part in parts) == len(packed.rows.target)
            assert sets_of(packed.filler().rows.kept) == []
    cut = replace(whole, truncated=torch.tensor([True, False, True, False, False, True]))
    packed = pack(cut, torch.zeros(6), mask_truncated=True)
    assert are_aligned(packed) and packed.rows.sequence.unique().tolist() == [1, 3, 4]


def test_lists_that_do_not_match_are_refused() -> None:
    options: dict[str, Any] = {"pad": PAD, "ends": [EOS], "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="a log-probability each, got 2 and 2, and 1 sets"):
        make_rollout([[3]], [[4, 5]], [[-1.0, -1.0]], kept=[[[4]]], **options)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FILTERS)
def test_the_mismatch_is_rounding_with_replay_alone(name: str, temperature: float) -> None:
    sampling = Sampling(MAX_NEW_TOKENS, temperature, **FILTERS[name])
    for loss in ("fused", "logits", "naive"):
        metrics = trainer(sampling=sampling, loss=loss).step()
        assert metrics["sampler_mismatch_max"] <= 1e-5, loss
        assert "sampler_mismatch_unknown" not in metrics
        # of what the filters left, less than what the vocabulary has
        assert metrics["entropy"] < 2.2
    with pytest.warns(UserWarning, match=r"over the vocabulary.* 52% of the ratios leave"):
        run = trainer(sampling=replace(sampling, replay=False))
    assert run.step()["sampler_mismatch_max"] > 0.1


def test_ratios_are_exactly_1_on_policy_and_the_kl_to_the_start_0() -> None:
    objective = RECIPES["grpo"].replace(beta=0.1, kl="k3")
    for changes in ({}, {"tokens_per_microbatch": 40}, {"padding_free": "always"}):
        engine = CopyEngine(micro_model())
        run = trainer(engine, objective=objective, sampling=ALL, **changes, **ONE_UPDATE, **LARGER)
        metrics = run.step()
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1
        assert metrics["kl"] == 0
        assert not same_weights(run.model, micro_model())
        assert metrics["sampler_mismatch_max"] <= 1e-5
    run = trainer(sampling=ALL, old_logp="sampler", **ONE_UPDATE, **LARGER)
    metrics = run.step()
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-5)


def test_every_loss_makes_the_same_update_in_parts_and_padded_or_not() -> None:

    def stepped(**changes: Any) -> tuple[Trainer, dict[str, Any]]:
        """By SGD, which does not blow up the rounding of small gradients."""
        settings = {"sampling": ALL, "objective": RECIPES["grpo"].replace(beta=0.1, kl="k3")}
        run = trainer(**settings | {"max_grad_norm": 1e9} | LARGER | changes)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
        return run, run.step()

    expected, metrics = stepped(loss="naive")
    assert metrics["ratio_max"] > 1.01
    for changes in (
        {},
        {"loss": "logits"},
        {"tokens_per_microbatch": 40},
        {"padding_free": "always", "tokens_per_microbatch": 60},
    ):
        run, got = stepped(**changes)
        for name in ("loss", "kl", "entropy", "ratio_max", "grad_norm"):
            assert got[name] == pytest.approx(metrics[name], rel=2e-4, abs=1e-6), name
        for mine, theirs in zip(run.model.parameters(), expected.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    assert not same_weights(expected.model, micro_model())


def test_dynamic_sampling_takes_sets_along() -> None:
    """Among the groups of several rounds, those that vary."""
    changes: dict[str, Any] = {"dynamic_sampling": "resample", "max_resamples": 2}
    run = trainer(sampling=ALL, **changes, **LARGER | {"group_size": 2})
    metrics = run.step()
    assert metrics["resamples"] > 0 and metrics["groups_kept"] > 0
    assert metrics["sampler_mismatch_max"] <= 1e-5


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    straight = trainer(sampling=ALL)
    expected = without_times(straight.train())
    first = trainer(sampling=ALL)
    for _ in range(2):
        first.step()
    save_trainer(first, tmp_path)
    second = trainer(sampling=ALL, model=micro_model(), checkpoints=tmp_path)
    assert second.resume() == 2
    assert without_times(second.train()) == expected[3:]
    assert same_weights(second.model, straight.model)
    other = trainer(sampling=replace(ALL, top_k=5), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"sampling: expected .*top_k=6.* got .*top_k=5"):
        other.resume()


class Forgetful(CopyEngine):
    """An engine that does not return what the filters kept."""

    def generate(self, prompts: Any, sampling: Sampling) -> Rollout:
        return super().generate(prompts, replace(sampling, replay=False))


def test_an_engine_without_sets_is_refused_unless_nothing_is_replayed() -> None:
    engine = Forgetful(micro_model())
    expected = "top_p, top_k, min_p: expected an engine that returns the ids they kept, got Forget"
    with pytest.raises(ValueError, match=expected):
        EngineSync(micro_model(), engine).draw([[3]], ALL, 0)
    EngineSync(micro_model(), engine).draw([[3]], replace(ALL, replay=False), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EngineSync(micro_model(), engine).draw([[3]], Sampling(2), 0)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("top_p", 0.0, r"top_p: expected a number above 0, at most 1, got 0\.0"),
        ("top_p", 1.2, r"top_p: expected a number above 0, at most 1, got 1\.2"),
        ("top_p", float("nan"), "top_p: expected a number above 0, at most 1, got nan"),
        ("top_k", -1, "top_k: expected 0 or more, got -1"),
        ("min_p", 1.0, r"min_p: expected a number from 0, below 1, got 1\.0"),
    ],
)
def test_filters_out_of_range_are_refused(option: str, value: float, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Sampling(4, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected):
        RunConfig(model="m", data="d", **{option: value})  # type: ignore[arg-type]
