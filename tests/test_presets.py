"""Presets as such: what they refuse, how they print, and that they never wait for the device."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_core import Estimator, GroupNorm, Objective, clip, fused_loss, preset
from grpo_core.integrations.presets import Preset
from grpo_core.integrations.presets.trl import AGGREGATIONS as TRL_LOSSES
from grpo_core.integrations.presets.trl import TrlOptions
from grpo_core.integrations.presets.verl_options import LOSSES as VERL_LOSSES
from grpo_core.integrations.presets.verl_options import VerlOptions
from grpo_core.objective.recipes import cispo, dppo_tv

B, T, V = 4, 3, 7


def every_preset() -> list[Any]:
    """One of every loss, with everything on that goes with it."""
    vllm = {"use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}
    extras = {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}
    of_trl = [
        preset("trl", loss_type=name, off_policy_mask_threshold=0.1, **vllm, **extras)
        for name in TRL_LOSSES
    ]
    rejects = {"rollout_rs": "token_k1,seq_max_k2", "rollout_rs_threshold": "0.5_2.0,0.3"}
    of_verl = [
        preset("verl", loss_mode=name, dro_beta=0.1, rollout_correction=rejects)
        for name in VERL_LOSSES
    ]
    return [*of_trl, *of_verl, preset("trl"), preset("verl")]


def call(ours: Preset, **changes: Any) -> dict[str, Any]:
    """Arguments of `fused_loss`, those that a preset asks for."""
    logits = torch.randn(B, T, V)
    old_logp = logits.log_softmax(-1)[..., 0] + 0.3 * torch.randn(B, T)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
    given: dict[str, Any] = {
        "advantage": torch.tensor([1.0, -1.0, 0.5, -0.3]),
        "mask": mask,
        "old_logp": old_logp,
        "ref_logp": old_logp + 0.1,
        "sampler_logp": old_logp + 0.2 * torch.randn(B, T),
        "normalizer": 7.0,
        "temperature": 1.0,
    }
    asked = {name: given[name] for name in ours.arguments}
    target = torch.zeros(B, T, dtype=torch.int64)
    return {"logits": logits, "target": target, "objective": ours.objective} | asked | changes


class NothingWaits(TorchDispatchMode):
    """Raises where a GPU would make the host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        assert function.__name__.split(".")[0] not in names, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ours", every_preset(), ids=lambda p: type(p).__name__)
def test_normalizer_and_metrics_never_wait(ours: Any) -> None:
    """All of them on the device: 0-dim tensors, or numbers that were there already."""
    arguments = call(ours)
    out = fused_loss(**arguments)
    counts = {"num_items_in_batch": torch.tensor(9)}
    if "dp_size" in inspect.signature(ours.normalizer).parameters:
        counts = {"batch_num_tokens": torch.tensor(9), "global_batch_size": torch.tensor(4)}
    with NothingWaits():
        divisor = ours.normalizer(arguments["mask"], **counts)
        metrics = ours.metrics(out)
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in metrics.values())
    assert all(math.isfinite(value) for value in metrics.values())
    assert fused_loss(**arguments | {"normalizer": divisor}).loss.isfinite()
    with pytest.raises(AssertionError), NothingWaits():
        float(out.loss.detach())


@pytest.mark.parametrize("ours", every_preset(), ids=lambda p: type(p).__name__)
def test_packed_rows_log_what_the_padded_batch_does(ours: Any) -> None:
    """Masked tokens left out, as long as no row of the batch is empty."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 1]])
    arguments = call(ours, mask=mask)
    padded = ours.metrics(fused_loss(**arguments))
    keep = mask.bool()
    arguments["advantage"] = arguments["advantage"][:, None].expand(B, T)
    packed = {
        name: value[keep] if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in arguments.items()
        if name != "mask"
    }
    sequence_id = torch.arange(B)[:, None].expand(B, T)[keep]
    logged = ours.metrics(fused_loss(**packed, sequence_id=sequence_id))
    assert logged.keys() == padded.keys()
    assert all(torch.isclose(logged[name], padded[name]) for name in logged)


@pytest.mark.parametrize("ours", every_preset(), ids=lambda p: type(p).__name__)
def test_arguments_are_those_of_the_loss(ours: Any) -> None:
    """By name; what the objective needs is among them, and every one is printed."""
    assert ours.arguments.keys() <= inspect.signature(fused_loss).parameters.keys()
    assert ("ref_logp" in ours.arguments) == (ours.objective.beta > 0)
    if ours.objective.factor.needs_sampler:
        assert "sampler_logp" in ours.arguments
    printed = str(ours)
    for name, text in ours.arguments.items():
        assert f"  {name} " in printed and text.split()[0] in printed
    assert ours.objective.surrogate.function.__name__ in printed
    assert max(map(len, printed.splitlines())) <= 90


def test_a_preset_prints_what_was_chosen() -> None:
    ours = preset("trl", loss_type="cispo", epsilon_high=5, off_policy_mask_threshold=0.5)
    assert str(ours).splitlines() == [
        "objective",
        "  surrogate                cispo(0, 5)",
        "  aggregation              token_mean",
        "  factor.off_policy_delta  0.5",
        "arguments",
        "  advantage     inputs['advantages'], or preset.advantages(rewards_per_func); with one",
        "                reward function that never returns None also rewards= and",
        "                group_size=num_generations",
        "  mask          completion_mask · tool_mask",
        "  old_logp      inputs.get('old_per_token_logps')",
        "  normalizer    preset.normalizer(mask, num_items_in_batch=inputs['num_items_in_batch'],",
        "                num_processes=...)",
        "  temperature   1.0",
        "  sampler_logp  inputs.get('sampling_per_token_logps'); a NaN takes its token out of the",
        "                mask, old_per_token_logps in its place gives the ratio 1, as in TRL",
    ]


def test_defaults_are_the_frameworks() -> None:
    """Of TRL also against `GRPOConfig`, in test_conformance_trl; verl's are transcribed here."""
    assert preset("trl").objective == Objective(clip(0.2))
    assert preset("verl").objective == Objective(
        clip(0.2, 0.2, 3.0), advantage=GroupNorm(epsilon=1e-6)
    )
    defaults = {f.name: f.default for f in dataclasses.fields(VerlOptions)}
    assert defaults == {
        "loss_agg_mode": "token-mean",
        "loss_scale_factor": None,
        "clip_ratio": 0.2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.2,
        "clip_ratio_c": 3.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "entropy_coeff": 0,
        "use_kl_loss": False,
        "kl_loss_coef": 0.001,
        "kl_loss_type": "low_var_kl",
        "loss_mode": "vanilla",
        "dro_beta": None,
        "rollout_correction": None,
        "adv_estimator": "gae",
        "norm_adv_by_std_in_grpo": True,
        "gamma": 1.0,
        "lam": 1.0,
        "gdpo_reward_keys": None,
        "gdpo_reward_weights": None,
    }
    correction = preset("verl", rollout_correction={}).objective.factor.sampler
    assert correction is not None
    assert (correction.level, correction.action, correction.high) == ("sequence", "truncate", 2.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, GroupNorm()),
        ({"scale_rewards": "none"}, GroupNorm(scale=False)),
        ({"scale_rewards": False}, GroupNorm(scale=False)),
        ({"scale_rewards": "batch"}, Estimator("group", "batch")),
    ],
)
def test_trls_rewards(changes: dict[str, Any], expected: Estimator) -> None:
    assert preset("trl", **changes).objective.advantage == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adv_estimator": "grpo"}, GroupNorm(epsilon=1e-6)),
        ({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}, GroupNorm(scale=False)),
        ({"adv_estimator": "rloo"}, Estimator("leave_one_out", None)),
    ],
)
def test_verls_rewards(changes: dict[str, Any], expected: Estimator) -> None:
    assert preset("verl", **changes).objective.advantage == expected


def test_bounds_of_the_same_name_are_not_the_same() -> None:
    """CISPO's is absolute in TRL and 1 ± ε in verl; DPPO's cap is verl's dual-clip constant."""
    assert preset("trl", loss_type="cispo", epsilon_high=5).objective.surrogate == cispo(5.0)
    of_verl = preset("verl", loss_mode="cispo", clip_ratio_low=0.2, clip_ratio_high=0.3)
    assert of_verl.objective.surrogate == cispo(1.3, 0.8)
    wide = preset("verl", loss_mode="cispo", clip_ratio_low=2.0, clip_ratio_high=4.0)
    assert wide.objective.surrogate == cispo(5.0, 0.0)
    dppo = preset("verl", loss_mode="dppo_tv", clip_ratio_low=0.1, clip_ratio_high=0.15)
    assert dppo.objective.surrogate == dppo_tv(0.1, 0.15, cap=3.0)


def test_bypass_mode_by_either_name() -> None:
    by_flag = preset("verl", rollout_correction={"bypass_mode": True})
    assert by_flag.objective == preset("verl", loss_mode="bypass_mode").objective
    assert by_flag.arguments["old_logp"] == "data['rollout_log_probs']"


def test_weights_that_are_given_come_with_the_mask_that_is_left() -> None:
    """What is rejected has left the batch's mask; the weights say nothing about it any more."""
    rejects = {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
    ours = preset("verl", rollout_correction=rejects)
    assert ours.objective.factor.rejections and "before" in ours.arguments["mask"]
    normalised = preset("verl", rollout_correction=rejects | {"rollout_is_batch_normalize": True})
    for other in (ours.weighted(), normalised):
        assert other.is_weighted and not other.objective.factor.rejections
        assert "after" in other.arguments["mask"]
    in_bypass = preset("verl", loss_mode="bypass_mode", rollout_correction=rejects)
    assert in_bypass.objective.factor.rejections and not in_bypass.is_weighted


def test_a_window_of_another_length() -> None:
    """The last one of an epoch: TRL's steps_per_generation stays, the bonus is divided anew."""
    ours = preset("trl", entropy_coef=0.6, gradient_accumulation_steps=4)
    mask = torch.ones(2, 3)
    count = {"num_items_in_batch": 24, "num_processes": 2}
    assert ours.normalizer(mask, **count) == 12
    assert ours.accumulating(3).normalizer(mask, **count) == 9
    assert ours.in_evaluation().normalizer(mask, **count) == 12
    of = [x.objective.entropy_coef for x in (ours, ours.accumulating(3), ours.in_evaluation())]
    assert of == pytest.approx([0.15, 0.2, 0.6])


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("trl", {"loss_type": "gspo"}, r"loss_type: expected one of \('grpo', .*got 'gspo'"),
    ("trl", {"epsilon": -0.1}, r"epsilon: expected a number >= 0, got -0\.1"),
    ("trl", {"epsilon": True}, "epsilon: expected a number >= 0, got True"),
    ("trl", {"epsilon_high": math.nan}, "epsilon_high: expected a number >= 0 or None, got nan"),
    ("trl", {"delta": 1.1}, r"delta: expected a number >= 1\.2 or None, got 1\.1"),
    ("trl", {"beta": "0.1"}, "beta: expected a number >= 0, got '0.1'"),
    ("trl", {"sapo_temperature_neg": 0.0}, "sapo_temperature_neg: expected a number > 0, got 0"),
    ("trl", {"vespo_k_pos": -1}, "vespo_k_pos: expected a number >= 0, got -1"),
    ("trl", {"loss_type": "cispo", "epsilon": 0}, "epsilon_high: expected a number > 0, got 0"),
    ("trl", {"top_entropy_quantile": 1.5}, "top_entropy_quantile: expected a number >= 0 and <= 1"),
    ("trl", {"scale_rewards": "std"}, "scale_rewards: expected one of .*got 'std'"),
    ("trl", {"multi_objective_aggregation": "max"}, "multi_objective_aggregation: expected one of"),
    ("trl", {"reward_weights": [1.0, None]}, r"reward_weights\[1\]: expected a number, got None"),
    ("trl", {"use_vllm": "yes"}, "use_vllm: expected one of .*got 'yes'"),
    ("trl", {"vllm_importance_sampling_mode": "token"}, "vllm_importance_sampling_mode: expected"),
    (
        "trl",
        {"vllm_importance_sampling_clip_min": 3.0},
        "vllm_importance_sampling_clip_max: expected a number > 3 or None, got 3",
    ),
    (
        "trl",
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps: expected an int >= 1",
    ),
    ("trl", {"steps_per_generation": 1.5}, "steps_per_generation: expected an int >= 1 or None"),
    ("verl", {"loss_mode": "ppo"}, r"loss_mode: expected one of \('vanilla', .*got 'ppo'"),
    ("verl", {"loss_agg_mode": "mean"}, r"loss_agg_mode: expected one of .*got 'mean'"),
    ("verl", {"kl_loss_type": "k4"}, "kl_loss_type: expected one of .*got 'k4'"),
    ("verl", {"adv_estimator": "ppo"}, "adv_estimator: expected one of .*got 'ppo'"),
    ("verl", {"clip_ratio_low": -1}, "clip_ratio_low: expected a number >= 0 or None, got -1"),
    ("verl", {"clip_ratio_c": 1.1}, r"clip_ratio_c: expected a number >= 1\.2, got 1\.1"),
    ("verl", {"loss_mode": "dro"}, "dro_beta: expected a number > 0, got None"),
    ("verl", {"loss_mode": "dro", "dro_beta": 0}, "dro_beta: expected a number > 0, got 0"),
    ("verl", {"tau_pos": 0}, "tau_pos: expected a number > 0, got 0"),
    ("verl", {"gamma": 1.5}, "gamma: expected a number >= 0 and <= 1, got 1.5"),
    ("verl", {"loss_scale_factor": 0}, "loss_scale_factor: expected an int >= 1 or None, got 0"),
    ("verl", {"rollout_correction": "token"}, "rollout_correction: expected a mapping or None"),
    (
        "verl",
        {"rollout_correction": {"level": "token"}},
        "level: expected an option of verl's rollout_correction, one of rollout_is, ",
    ),
    ("verl", {"rollout_correction": {"rollout_is": "geo"}}, "rollout_is: expected one of"),
    (
        "verl",
        {"rollout_correction": {"rollout_is_threshold": "2_1"}},
        "rollout_is_threshold: expected a number > 0, or two in order, 'lower_upper', got '2_1'",
    ),
    (
        "verl",
        {"rollout_correction": {"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2}},
        "rollout_rs: expected one of .*got 'seq_max_k1'",
    ),
    (
        "verl",
        {"rollout_correction": {"rollout_rs": "token_k1"}},
        "rollout_rs_threshold: expected one for token_k1, got None",
    ),
    (
        "verl",
        {"rollout_correction": {"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}},
        "rollout_rs_threshold: expected one number for token_k2, got '1_2'",
    ),
    (
        "verl",
        {"rollout_correction": {"rollout_rs": "token_k2", "rollout_rs_threshold": "1,2"}},
        "rollout_rs_threshold: expected 1 or 1 thresholds, separated by commas, got '1,2'",
    ),
    ("openrlhf", {}, r"framework: expected one of \('trl', 'verl'\), got 'openrlhf'"),
]


@pytest.mark.parametrize(("framework", "options", "message"), WRONG)
def test_wrong_values_are_refused(framework: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(framework, **options)


@pytest.mark.parametrize("framework", ["trl", "verl"])
def test_other_options_are_refused_with_a_list(framework: Any) -> None:
    """Also those the framework has, but that the loss does not read."""
    kind = {"trl": TrlOptions, "verl": VerlOptions}[framework]
    known = ", ".join(field.name for field in dataclasses.fields(kind))
    with pytest.raises(ValueError) as refusal:
        preset(framework, learning_rate=1e-6)
    whose = {"trl": "TRL", "verl": "verl"}[framework]
    want = f"learning_rate: expected an option of {whose}'s loss, one of {known}; "
    assert str(refusal.value) == f"{want}got learning_rate=1e-06"


@pytest.mark.parametrize(
    ("framework", "options", "message"),
    [
        ("trl", {"use_adaptive_entropy": True}, "use_adaptive_entropy: .*change entropy_coef"),
        ("trl", {"mask_truncated_completions": True}, "mask_truncated.*set the mask"),
        ("trl", {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: .*add the router's loss"),
        ("trl", {"vllm_importance_sampling_cap": 2.0}, "vllm_importance_sampling_clip_max now"),
        ("verl", {"loss_mode": "clip_cov"}, "loss_mode='clip_cov': .*give advantage = 0"),
        ("verl", {"loss_mode": "kl_cov"}, "loss_mode='kl_cov': .*kl='absolute'"),
        ("verl", {"adv_estimator": "opo"}, "adv_estimator='opo': .*give advantage="),
        ("verl", {"kl_loss_type": "full"}, "kl_loss_type='full': .*kl='exact'"),
        ("verl", {"use_kl_in_reward": True}, "use_kl_in_reward: .*value.rewards_with_kl"),
        (
            "verl",
            {"loss_mode": "sapo", "use_kl_loss": True},
            "use_kl_loss, entropy_coeff: with loss_mode='sapo' .*give loss_agg_mode='seq-mean",
        ),
        ("verl", {"loss_mode": "geo_mean", "entropy_coeff": 0.1}, "use_kl_loss, entropy_coeff"),
        (
            "verl",
            {
                "loss_mode": "bypass_mode",
                "use_kl_loss": True,
                "rollout_correction": {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0},
            },
            "with loss_mode='bypass_mode' .*reject before the loss",
        ),
        (
            "verl",
            {
                "loss_mode": "bypass_mode",
                "rollout_correction": {
                    "loss_type": "reinforce",
                    "rollout_is_batch_normalize": True,
                },
            },
            "rollout_is_batch_normalize: .*scale the advantages",
        ),
    ],
)
def test_what_is_left_out_says_what_to_do(
    framework: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        preset(framework, **options)
    # switched off it is nothing to speak of
    off = {name: False for name, value in options.items() if value is True}
    if len(off) == len(options):
        preset(framework, **off)


def test_the_helpers_name_what_is_missing() -> None:
    mask = torch.ones(2, 3)
    norm = {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 8}
    rejects = {"rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
    for make, message in (
        (lambda: preset("trl").normalizer(mask), "num_items_in_batch: expected the tokens"),
        (lambda: preset("trl").normalizer(mask[0]), r"mask: expected a tensor \[B, T\], got \[3\]"),
        (
            lambda: preset("trl").advantages(torch.ones(8)),
            r"rewards_per_func: expected shape \[B, F\], got \[8\]",
        ),
        (
            lambda: preset("trl", reward_weights=[1.0]).advantages(torch.ones(8, 2)),
            "reward_weights: expected 2, one per column of rewards_per_func, got 1",
        ),
        (
            lambda: preset("verl").normalizer(mask, dp_size=2),
            "batch_num_tokens: expected a count for dp_size = 2, got None",
        ),
        (
            lambda: preset("verl", **norm, rollout_correction=rejects).normalizer(mask),
            "global_batch_size: expected a count, since rollout_rs",
        ),
        (lambda: preset("verl").advantages(mask, mask), "values: expected a tensor for gae"),
        (
            lambda: preset("verl", adv_estimator="grpo").advantages(mask, mask),
            "index: expected a tensor for grpo, got None",
        ),
        (
            lambda: preset("verl", adv_estimator="gdpo", gdpo_reward_weights=[1.0]).advantages(
                mask, mask, torch.tensor([0, 0])
            ),
            "gdpo_reward_weights: expected 3, one per column of rewards, got 1",
        ),
        (
            lambda: preset("verl").rollout_correction(mask, mask, mask),
            "rollout_correction: expected a preset with one, got None",
        ),
        (
            lambda: preset("verl", loss_mode="bypass_mode").weighted(),
            "loss_mode: expected one that takes weights, got 'bypass_mode'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
