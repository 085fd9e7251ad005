"""The harness around TRL against formulas written out here: TRL is reached, and by every option."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from tests import trl_harness
from tests.trl_harness import TrlCase, trl_advantages, trl_loss, trl_sampler_ratio

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # to import TRL takes longer than to run what is here: one worker does
    pytest.mark.xdist_group("trl"),
    pytest.mark.slow,
]

LENGTHS = [7, 4, 1, 6, 0, 7]
CLIPPED = {
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
}
SCORED = {"reward", "reward_std", "frac_reward_zero_std"}


def make_case(**changes: Any) -> TrlCase:
    """Six rows of float64, one of them empty, with ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(7)
    B, T = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    old_logp = -normal(B, T).abs()
    case = TrlCase(
        logp=old_logp + 0.4 * normal(B, T),
        entropy=normal(B, T).abs(),
        advantages=torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, 0.0]),
        completion_mask=mask,
        old_logp=old_logp,
        ref_logp=old_logp + 0.3 * normal(B, T),
        tool_mask=torch.rand(B, T, generator=g) < 0.8,
        importance_sampling_ratio=torch.exp(0.5 * normal(B, T)),
        sampling_logp=old_logp + 0.2 * normal(B, T),
        num_items_in_batch=61,
        gradient_accumulation_steps=3,
    )
    return dataclasses.replace(case, **changes)


def clipped(case: TrlCase, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) and its derivative by logp: -r A where the first is the smaller."""
    A = case.advantages.double()[:, None]
    ratio = torch.exp(case.logp - case.old_logp)
    bounded = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * A, bounded * A), -ratio * A * (ratio * A <= bounded * A)


def close(ours: Tensor, theirs: Tensor | float) -> bool:
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return torch.allclose(ours.double(), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tools", [False, True])
def test_dapo_is_a_mean_over_the_window(tools: bool) -> None:
    """Σ L m / (N · G / steps_per_generation), N tokens in all the generation batch."""
    case = make_case() if tools else make_case(tool_mask=None)
    mask = case.completion_mask.double() * (1 if case.tool_mask is None else case.tool_mask)
    loss, dlogp = clipped(case, 0.2, 0.28)
    result = trl_loss(
        case, loss_type="dapo", epsilon_high=0.28, steps_per_generation=8, max_completion_length=9
    )
    tokens = 61 * 3 / 8
    assert close((loss * mask).sum() / tokens, result.loss)
    assert close(dlogp * mask / tokens, result.dlogp)
    assert not result.dentropy.any()


def test_grpo_is_a_mean_of_means_with_its_kl_and_entropy() -> None:
    """mean_b(Σ (L + β kl r) m / max(Σ m, 1)) / G - c Σ H m / Σ m / G."""
    case = make_case()
    mask = case.completion_mask.double() * case.tool_mask
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask) / 3
    loss, dlogp = clipped(case, 0.2, 0.2)
    ratio, far = torch.exp(case.logp - case.old_logp), case.ref_logp - case.logp
    kl, dkl = torch.expm1(far) - far, -torch.expm1(far)
    result = trl_loss(case, loss_type="grpo", beta=0.04, entropy_coef=0.01)
    bonus = 0.01 * mask / mask.sum() / 3
    expected = ((loss + 0.04 * kl * ratio) * weight).sum() - (bonus * case.entropy).sum()
    assert close(expected, result.loss)
    assert close((dlogp + 0.04 * (dkl + kl) * ratio) * weight, result.dlogp)
    assert close(-bonus, result.dentropy)
    assert result.metrics["kl"] == pytest.approx(((kl * ratio) * mask).sum() / mask.sum())
    assert result.metrics["entropy"] == pytest.approx((case.entropy * mask).sum() / mask.sum())


def test_without_old_logp_the_ratio_is_one() -> None:
    case = make_case(old_logp=None, tool_mask=None, num_items_in_batch=None)
    result = trl_loss(case, loss_type="dapo", steps_per_generation=3)
    mask = case.completion_mask.double()
    assert close(-case.advantages[:, None] * mask / mask.sum(), result.dlogp)


def test_a_token_counts_as_clipped_by_its_ratio_and_sign() -> None:
    """Low: r < 1 - ε and A < 0. Means are over tokens, extremes over rows that have some."""
    case = make_case()
    mask = case.completion_mask.double() * case.tool_mask
    ratio, A = torch.exp(case.logp - case.old_logp), case.advantages[:, None]
    low, high = (ratio < 0.8) & (A < 0), (ratio > 1.3) & (A > 0)
    rows = mask.sum(1) > 0
    metrics = trl_loss(case, loss_type="dapo", epsilon_high=0.3).metrics
    assert low.any() and high.any()
    assert metrics["clip_ratio/low_mean"] == pytest.approx((low * mask).sum() / mask.sum())
    assert metrics["clip_ratio/high_mean"] == pytest.approx((high * mask).sum() / mask.sum())
    assert metrics["clip_ratio/region_mean"] == pytest.approx(
        ((low | high) * mask).sum() / mask.sum()
    )
    by_row = [(clip * mask).sum(1)[rows] / mask.sum(1)[rows] for clip in (low, high)]
    assert metrics["clip_ratio/low_min"] == pytest.approx(by_row[0].min())
    assert metrics["clip_ratio/high_max"] == pytest.approx(by_row[1].max())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"loss_type": "grpo"}, CLIPPED),
        ({"loss_type": "bnpo"}, CLIPPED),
        ({"loss_type": "dr_grpo"}, CLIPPED),
        ({"loss_type": "dapo"}, CLIPPED),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, CLIPPED),
        ({"loss_type": "cispo"}, {"cispo_clip_ratio"}),
        ({"loss_type": "sapo"}, set()),
        ({"loss_type": "vespo"}, {"vespo/phi_seq_mean"}),
        ({"beta": 0.1}, CLIPPED | {"kl"}),
        ({"entropy_coef": 0.1}, CLIPPED | {"policy_loss", "entropy_coef"}),
        ({"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.1}, CLIPPED),
        ({"use_vllm": True}, CLIPPED),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else f"{len(value)} names",
)
def test_what_trl_logs(options: dict[str, Any], names: set[str]) -> None:
    """`entropy` always, the rest by option; and nothing stays for the next call."""
    for _ in range(2):
        assert trl_loss(make_case(), **options).metrics.keys() == names | {"entropy"}


VESPO = {"loss_type": "vespo"}
SAPO = {"loss_type": "sapo"}
VLLM = {"use_vllm": True}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"loss_type": "grpo"}),
        ({}, {"loss_type": "bnpo"}),
        ({}, {"loss_type": "dr_grpo"}),
        ({}, {"loss_type": "luspo"}),
        ({}, {"loss_type": "cispo"}),
        ({}, SAPO),
        ({}, VESPO),
        ({}, {"importance_sampling_level": "sequence"}),
        ({}, {"epsilon": 0.1}),
        ({}, {"epsilon_high": 0.5}),
        ({}, {"delta": 1.3}),
        ({}, {"beta": 0.1}),
        ({"beta": 0.1}, {"use_bias_correction_kl": False}),
        (SAPO, {"sapo_temperature_pos": 2.0}),
        (SAPO, {"sapo_temperature_neg": 2.0}),
        (VESPO, {"vespo_k_pos": 1.0}),
        (VESPO, {"vespo_k_neg": 1.0}),
        (VESPO, {"vespo_lambda_pos": 1.0}),
        (VESPO, {"vespo_lambda_neg": 1.0}),
        ({}, {"entropy_coef": 0.1}),
        ({}, {"top_entropy_quantile": 0.5}),
        ({}, {"off_policy_mask_threshold": 0.05}),
        ({"loss_type": "dr_grpo"}, {"max_completion_length": 9}),
        ({}, {"steps_per_generation": 2}),
        ({}, VLLM),
        (VLLM, {"vllm_importance_sampling_correction": False}),
    ],
    ids=str,
)
def test_every_option_reaches_the_loss(base: dict[str, Any], change: dict[str, Any]) -> None:
    case = make_case()
    assert trl_loss(case, **base).loss != trl_loss(case, **base, **change).loss


@pytest.mark.parametrize("top", [1.0, 0.5, 0.34, 0.33, 0.0])
def test_the_most_uncertain_tokens_alone_learn(top: float) -> None:
    """Kept is H >= the (1 - top) quantile of unmasked H, linear between two; KL is not dropped."""
    case = make_case(tool_mask=None, entropy=make_case().entropy.float().double())
    mask = case.completion_mask
    kept = (case.entropy >= torch.quantile(case.entropy[mask].float(), 1 - top)) & mask
    _, dlogp = clipped(case, 0.2, 0.2)
    everywhere = trl_loss(case, loss_type="bnpo", beta=0.1).dlogp
    result = trl_loss(case, loss_type="bnpo", beta=0.1, top_entropy_quantile=top)
    assert close(everywhere - dlogp * (mask & ~kept) / mask.sum() / 3, result.dlogp)


def test_a_row_far_off_policy_is_dropped_unless_it_did_well() -> None:
    """Kept: A >= 0, or mean(sampling - logp) <= the threshold; NaN counts as 0 and is counted."""
    case = make_case(tool_mask=None)
    case.sampling_logp[1, 1] = math.nan
    mask = case.completion_mask.double()
    gap = (case.sampling_logp - case.logp).nan_to_num(nan=0.0) * mask
    mean = gap.sum(1) / mask.sum(1).clamp(min=1)
    threshold = (mean[1] + mean[3]).item() / 2
    kept = (case.advantages >= 0) | (mean <= threshold)
    assert kept.sum() == len(kept) - 1
    _, dlogp = clipped(case, 0.2, 0.2)
    result = trl_loss(case, loss_type="bnpo", off_policy_mask_threshold=threshold)
    assert close(dlogp * kept[:, None] * mask / mask.sum() / 3, result.dlogp)


def test_a_kept_trainer_answers_as_a_new_one_does() -> None:
    """No call leaves a trace: not in the trainer, the case, or the random numbers."""
    case = make_case()
    before = [x.clone() for x in vars(case).values() if isinstance(x, Tensor)]
    options = {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}
    first = trl_loss(case, **options)
    trl_loss(make_case(gradient_accumulation_steps=1), **options, gradient_accumulation_steps=3)
    again = trl_loss(case, **options)
    trl_harness._kept_trainer.cache_clear()
    torch.manual_seed(3)
    fresh = trl_loss(case, **options)
    drawn = torch.rand(4)
    for other in (again, fresh):
        assert (other.loss, other.metrics) == (first.loss, first.metrics)
        assert torch.equal(other.dlogp, first.dlogp)
        assert torch.equal(other.dentropy, first.dentropy)
    after = [x for x in vars(case).values() if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


def test_adaptive_entropy_is_refused() -> None:
    with pytest.raises(ValueError, match="use_adaptive_entropy"):
        trl_loss(make_case(), use_adaptive_entropy=True)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_scores_within_the_group(scale: str) -> None:
    """(R - mean) / (std + 1e-4), R the weighted sum; no reward at all gives an advantage of 0."""
    none = math.nan
    rewards = [[1.0, 0.0], [0.0, none], [3.0, 1.0], [none, none], [2.0, 1.0], [2.5, none]]
    total = [1.0, 0.0, 3.5, none, 2.5, 2.5]
    means = [1.5] * 3 + [2.5] * 3
    spread = {
        "group": [statistics.stdev(total[:3]) + 1e-4] * 3 + [1e-4] * 3,
        "batch": [statistics.stdev(r for r in total if r == r) + 1e-4] * 6,
        "none": [1.0] * 6,
    }[scale]
    expected = [
        0.0 if math.isnan(r) else (r - m) / s for r, m, s in zip(total, means, spread, strict=True)
    ]
    result = trl_advantages(
        torch.tensor(rewards), 3, reward_weights=[1.0, 0.5], scale_rewards=scale
    )
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    names = {f"rewards/reward_{i}/{kind}" for i in (0, 1) for kind in ("mean", "std")}
    assert result.metrics.keys() == names | SCORED
    assert result.metrics["reward"] == pytest.approx(9.5 / 5)


def test_gdpo_scores_each_reward_before_it_sums() -> None:
    """Each function within its group, then the weighted sum over the whole batch."""
    rewards = torch.randn(8, 3, dtype=torch.float64)
    weights = [1.0, 0.5, 2.0]

    def score(values: list[float]) -> list[float]:
        mean, std = statistics.mean(values), statistics.stdev(values)
        return [(value - mean) / (std + 1e-4) for value in values]

    columns = [score(c[:4]) + score(c[4:]) for c in rewards.T.tolist()]
    rows = zip(*columns, strict=True)
    sums = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows]
    result = trl_advantages(
        rewards, 4, reward_weights=weights, multi_objective_aggregation="normalize_then_sum"
    )
    assert result.advantages.tolist() == pytest.approx(score(sums), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("clip_min", [None, 0.9])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_the_samplers_ratio(mode: str, clip_min: float | None) -> None:
    """exp(old - sampling), per token or of the row's sum; bounded, or 0 outside; NaN gives 1."""
    case = make_case()
    sampling_logp = case.sampling_logp.float().double()
    sampling_logp[0, 2] = math.nan
    mask = case.completion_mask.double() * case.tool_mask
    gap = torch.where(sampling_logp.isnan(), 0.0, (case.old_logp - sampling_logp)) * mask
    ratio = torch.exp(gap if mode.startswith("token") else gap.sum(1, keepdim=True))
    low, high = clip_min or 0.0, 1.2
    inside = (ratio >= low) & (ratio <= high)
    assert not inside.all()
    expected = ratio.clamp(low, high) if mode.endswith("truncate") else ratio * inside
    result = trl_sampler_ratio(
        case.old_logp,
        sampling_logp,
        case.completion_mask,
        case.tool_mask,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=high,
        vllm_importance_sampling_clip_min=clip_min,
    )
    assert close(expected, result.ratio)
    assert result.num_items_in_batch == mask.sum()
    read = expected if mode.startswith("sequence") else expected[mask.bool()]
    assert result.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(read.mean())


def test_a_mask_trl_could_not_have_made_is_refused() -> None:
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="completion_mask"):
        trl_sampler_ratio(logp, logp, torch.tensor([[1, 0, 1], [1, 1, 1]]))
