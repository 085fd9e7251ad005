"""Writes verl.json: inputs made here and what the real verl 0.9.1 answers, so tests need no verl.

The environment is verl's own, outside the repository. verl comes without its dependencies, of which
these are the ones its formulas import; the constraint keeps torch, whose CPU build is enough:

    python3.11 -m venv ENV && echo torch==2.13.0 > torch.txt
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install --no-deps verl==0.9.1
    ENV/bin/pip install --constraint torch.txt ray codetiming hydra-core dill torchdata pandas \
        pyarrow datasets numpy "tensordict>=0.8,<=0.10" "transformers>=5.5.3,<5.11"
    ENV/bin/python tests/golden/make_verl.py

Everything is float64 on the CPU, the masks too: with the integer masks of verl's trainer `n + 1e-8`
and Bessel's n / (n − 1) would be float32. Names of inputs and options are verl's.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import (
    agg_loss,
    get_adv_estimator_fn,
    get_policy_loss_fn,
    kl_penalty,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

Batch = dict[str, Any]
Options = dict[str, Any]
Case = dict[str, Any]

OUT = Path(__file__).with_name("verl.json")
SEED = 20260823

# log π − log π_old; None is a masked token. Every bound of a ratio is crossed for both signs of the
# advantage, 20 and 3 included, and sequence means lie below, within and above [0.8, 1.28].
RAGGED_LOG_RATIO = [
    [0.05, -0.41, 0.52, 1.5, -0.1, -1.02],
    [0.02, -0.5, None, 1.6, 3.4, -0.9],
    [0.45, None, None, None, None, None],
    [-0.9, -2.0, 0.1, 0.43, None, None],
    [-6.0, 3.2, -0.7, None, None, None],
    [0.1, -0.25, 0.3, -0.05, 0.15, None],
]
RAGGED_ADVANTAGE = [1.3, -0.8, 0.6, -1.1, 0.4, -0.5]
MASKED_ROW_LOG_RATIO = [
    [0.3, -0.3, 0.1, 1.3, None],
    [None, None, None, None, None],
    [-0.44, 0.23, 1.9, -0.02, -1.4],
    [0.25, -0.6, None, None, None],
]
# the last sequence has tokens, but no advantage
MASKED_ROW_ADVANTAGE = [0.9, 0.0, -1.2, 0.0]

# prompt of each completion: three, two of equal reward, one alone, two
GROUP_INDEX = [0, 1, 0, 2, 1, 0, 3, 3]
GROUP_REWARDS = [1.0, 0.5, 0.0, 0.7, 0.5, 0.25, 1.0, -1.0]
GROUP_MASK = [
    [1, 1, 1, 1, 0],
    [1, 1, 0, 0, 0],
    [1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1],
    # a tool's answer inside the completion
    [1, 1, 0, 1, 1],
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0],
]

AGG_MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
GLOBAL = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 16, "loss_scale_factor": 8}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
# per loss mode: the options most cases use, then others; what is not named is verl's default
LOSS_OPTIONS: dict[str, list[Options]] = {
    "vanilla": [
        {**CLIP, "clip_ratio_c": 3.0},
        {**CLIP, "clip_ratio_c": 20.0},
        {"clip_ratio": 0.1},
        {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None},
    ],
    "dppo_tv": [
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.2},
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.2, "clip_ratio_c": 20.0},
    ],
    "dppo_kl": [
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08},
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 20.0},
    ],
    "gspo": [CLIP, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}],
    "sapo": [{}, {"tau_pos": 0.5, "tau_neg": 2.0}],
    "gpg": [{}],
    "geo_mean": [{"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, CLIP],
    "dro": [{"dro_beta": 0.1}, {"dro_beta": 1.0}],
    "cispo": [CLIP, {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}],
}
BYPASS_OPTIONS: list[Options] = [
    {"loss_type": "ppo_clip"},
    {"loss_type": "ppo_clip", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"},
    {"loss_type": "reinforce"},
    {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0},
    {
        "loss_type": "reinforce",
        "rollout_is": "sequence",
        "rollout_is_threshold": 2.0,
        "rollout_rs": "seq_mean_k1",
        "rollout_rs_threshold": "0.5_2.0",
    },
]
KL_NAMES = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]

ADVANTAGE_OPTIONS: list[tuple[str, str, Options]] = [
    ("grpo", "groups", {"norm_adv_by_std_in_grpo": True}),
    ("grpo", "groups", {"norm_adv_by_std_in_grpo": False}),
    ("grpo_vectorized", "groups", {"norm_adv_by_std_in_grpo": True}),
    ("grpo_vectorized", "groups", {"norm_adv_by_std_in_grpo": False}),
    ("gdpo", "groups", {}),
    ("gdpo", "groups", {"gdpo_reward_keys": ["format_reward", "accuracy_reward"]}),
    (
        "gdpo",
        "groups",
        {
            "gdpo_reward_keys": ["format_reward", "accuracy_reward"],
            "gdpo_reward_weights": [0.5, 2.0],
        },
    ),
    ("grpo_passk", "pairs", {"norm_adv_by_std_in_grpo": True}),
    ("grpo_passk", "pairs", {"norm_adv_by_std_in_grpo": False}),
    ("reinforce_plus_plus_baseline", "groups", {}),
    ("rloo", "groups", {}),
    ("rloo_vectorized", "groups", {}),
    ("opo", "groups", {}),
    ("gpg", "groups", {}),
    ("reinforce_plus_plus", "groups", {"gamma": 1.0}),
    ("reinforce_plus_plus", "dense", {"gamma": 0.9}),
    ("remax", "groups", {}),
    ("remax", "dense", {}),
    ("gae", "groups", {"gamma": 1.0, "lam": 1.0}),
    ("gae", "dense", {"gamma": 0.9, "lam": 0.8}),
]

IS_OPTIONS: list[Options] = [
    {
        "rollout_is": level,
        "rollout_is_threshold": threshold,
        "rollout_is_batch_normalize": normalize,
    }
    for level in ("token", "sequence")
    for threshold in (1.5, "0.5_1.5")
    for normalize in (False, True)
]
RS_OPTIONS: list[Options] = [
    {"rollout_rs": name, "rollout_rs_threshold": threshold}
    for name, threshold in [
        ("token_k1", "0.5_1.5"),
        ("token_k1", 1.5),
        ("token_k2", 0.1),
        ("token_k3", 0.1),
        ("seq_sum_k1", "0.5_2.4"),
        ("seq_sum_k2", 0.5),
        ("seq_sum_k3", 0.5),
        ("seq_mean_k1", "0.9_1.3"),
        ("seq_mean_k2", 0.12),
        ("seq_mean_k3", 0.12),
        ("seq_max_k2", 0.3),
        ("seq_max_k3", 0.3),
        ("token_k1,seq_max_k2", "0.5_1.5,0.3"),
    ]
]


def rounded(values: Tensor) -> list[Any]:
    """Four decimals are enough for an input, and the file stays small."""
    return [[round(x, 4) for x in row] for row in values.tolist()]


def policy_batch(
    log_ratio_rows: list[list[float | None]], advantages: list[list[float]], seed: int
) -> Batch:
    """The inputs of the losses; in masked places log-probabilities are whatever was drawn."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[x is not None for x in row] for row in log_ratio_rows])
    log_ratio = torch.tensor([[x or 0.0 for x in row] for row in log_ratio_rows]).double()

    def uniform(low: float, high: float) -> Tensor:
        unit = torch.rand(mask.shape, generator=draw, dtype=torch.float64)
        return low + (high - low) * unit

    # of the likelier of the two policies; tokens that moved far are rare ones, so that some ratios
    # beyond DPPO's cap stay within its trust region
    top = -uniform(0.05, 2.5) - 3.0 * (log_ratio.abs() > 3)
    old_log_prob = top - log_ratio.clamp(min=0)
    log_prob = old_log_prob + log_ratio
    return {
        "old_log_prob": rounded(old_log_prob),
        "log_prob": rounded(log_prob),
        "ref_log_prob": rounded((log_prob - uniform(-1.5, 1.5)).clamp(max=-0.001)),
        "rollout_log_prob": rounded((old_log_prob - uniform(-0.9, 0.9)).clamp(max=-0.001)),
        "advantages": rounded(torch.tensor(advantages).double() * mask),
        "response_mask": mask.long().tolist(),
        "rollout_is_weights": rounded(uniform(0.3, 2.0) * mask),
        "loss_mat": rounded(uniform(-1, 1)),
    }


def reward_batch(mask_rows: list[list[int]], rewards: list[float], index: list[int]) -> Batch:
    """The inputs of the estimators: the reward of a completion is that of its last token."""
    draw = torch.Generator().manual_seed(SEED)
    mask = torch.tensor(mask_rows)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    token_level_rewards = torch.zeros(mask.shape, dtype=torch.float64)
    token_level_rewards[torch.arange(len(mask)), last] = torch.tensor(rewards).double()
    values = torch.rand(mask.shape, generator=draw, dtype=torch.float64) * mask
    return {
        "token_level_rewards": rounded(token_level_rewards),
        "response_mask": mask_rows,
        "index": index,
        "values": rounded(values),
        "reward_baselines": [round(0.1 * i - 0.2, 1) for i in range(len(mask))],
        "format_reward": [float(i % 2) for i in range(len(mask))],
        "accuracy_reward": rewards,
    }


def make_batches() -> dict[str, Batch]:
    """Every input, by the name the cases use for it."""
    ragged_advantages = [[a] * 6 for a in RAGGED_ADVANTAGE]
    # one sign per token, as from GAE, and one that is exactly 0
    signs = torch.tensor([1.0, -0.7, 0.0, -1.4, 0.6, 1.8])
    token_advantages = (torch.tensor(RAGGED_ADVANTAGE)[:, None] * signs).tolist()
    masked_row_advantages = [[a] * 5 for a in MASKED_ROW_ADVANTAGE]
    kept = [i for i, prompt in enumerate(GROUP_INDEX) if GROUP_INDEX.count(prompt) > 1]
    groups = reward_batch(GROUP_MASK, GROUP_REWARDS, GROUP_INDEX)
    noise = torch.randn(8, 5, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    masked_row = policy_batch(MASKED_ROW_LOG_RATIO, masked_row_advantages, SEED + 1)
    # a token the correction has zeroed
    masked_row["rollout_is_weights"][2][1] = 0.0
    return {
        "ragged": policy_batch(RAGGED_LOG_RATIO, ragged_advantages, SEED),
        "token_advantages": policy_batch(RAGGED_LOG_RATIO, token_advantages, SEED),
        "masked_row": masked_row,
        # beyond the clamps of verl's KL: ±20 within, ±10 without
        "far": {
            "log_prob": [[-4.0, -1.0, -6.0, -1.0, -14.0, -1.0, -30.0, -1.0]],
            "ref_log_prob": [[-2.0, -3.0, -2.5, -4.5, -2.0, -13.0, -5.0, -26.0]],
        },
        "groups": groups,
        "pairs": {name: [rows[i] for i in kept] for name, rows in groups.items()},
        "dense": {**groups, "token_level_rewards": rounded(noise * torch.tensor(GROUP_MASK))},
    }


def tensors(batch: Batch) -> Batch:
    """A batch as verl takes it, new for every call."""
    return {
        name: np.array(rows) if name == "index" else torch.tensor(rows, dtype=torch.float64)
        for name, rows in batch.items()
    }


def policy_loss_case(
    batches: dict[str, Batch], name: str, weighted: bool, options: Options
) -> Case:
    """Value, gradient by log_prob and metrics of one call of a registered loss."""
    batch = tensors(batches[name])
    log_prob = batch["log_prob"].requires_grad_()
    chosen = dict(options)
    of_policy = {key: chosen.pop(key) for key in ("loss_mode", "dro_beta") if key in chosen}
    if "rollout_correction" in chosen:
        correction = RolloutCorrectionConfig(**chosen.pop("rollout_correction"))
        of_policy["rollout_correction"] = correction
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**of_policy),
        **chosen,
    )
    loss, metrics = get_policy_loss_fn(options["loss_mode"])(
        old_log_prob=batch["old_log_prob"],
        log_prob=log_prob,
        advantages=batch["advantages"],
        response_mask=batch["response_mask"],
        loss_agg_mode=options["loss_agg_mode"],
        config=config,
        rollout_is_weights=batch["rollout_is_weights"] if weighted else None,
    )
    (grad,) = torch.autograd.grad(loss, log_prob)
    outputs = {"loss": loss.item(), "grad": grad.tolist(), "metrics": metrics}
    return {"batch": name, "rollout_is_weights": weighted, "options": options, "outputs": outputs}


def policy_loss_cases(batches: dict[str, Batch]) -> Iterator[Case]:
    """Every mode by every aggregation, weighted and not, with and without global counts."""
    for mode, (base, *others) in LOSS_OPTIONS.items():
        for agg_mode in AGG_MODES:
            options = {"loss_mode": mode, "loss_agg_mode": agg_mode, **base}
            for_all = {**options, "global_batch_info": GLOBAL}
            yield policy_loss_case(batches, "ragged", False, options)
            yield policy_loss_case(batches, "ragged", True, for_all)
            yield policy_loss_case(batches, "masked_row", True, options)
            yield policy_loss_case(batches, "masked_row", False, for_all)
        options = {"loss_mode": mode, "loss_agg_mode": "token-mean"}
        yield policy_loss_case(batches, "token_advantages", False, {**options, **base})
        for other in others:
            yield policy_loss_case(batches, "ragged", False, {**options, **other})
    # read by verl's `ppo_loss`, which puts it into global_batch_info, and by no loss function
    ignored = {"loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-sum-norm", **CLIP}
    yield policy_loss_case(batches, "ragged", False, {**ignored, "loss_scale_factor": 8})
    for correction in BYPASS_OPTIONS:
        options = {"loss_mode": "bypass_mode", "loss_agg_mode": "token-mean", **CLIP}
        options["rollout_correction"] = correction
        yield policy_loss_case(batches, "ragged", False, options)


def agg_loss_cases(batches: dict[str, Batch]) -> Iterator[Case]:
    """Value and gradient by loss_mat of every aggregation."""
    for name in ("ragged", "masked_row"):
        for mode in AGG_MODES:
            for counts in ({}, {"loss_scale_factor": 8}, GLOBAL):
                batch = tensors(batches[name])
                options = {"loss_agg_mode": mode, **counts}
                loss_mat = batch["loss_mat"].requires_grad_()
                loss = agg_loss(loss_mat=loss_mat, loss_mask=batch["response_mask"], **options)
                (grad,) = torch.autograd.grad(loss, loss_mat)
                outputs = {"loss": loss.item(), "grad": grad.tolist()}
                yield {"batch": name, "options": options, "outputs": outputs}


def kl_penalty_cases(batches: dict[str, Batch]) -> Iterator[Case]:
    """Value and gradient by log_prob of every estimator, token by token and unmasked."""
    for name in ("ragged", "far"):
        for estimator in [*KL_NAMES, *(f"{base}+" for base in KL_NAMES)]:
            batch = tensors(batches[name])
            log_prob = batch["log_prob"].requires_grad_()
            kl = kl_penalty(log_prob, batch["ref_log_prob"], estimator)
            (grad,) = torch.autograd.grad(kl.sum(), log_prob)
            outputs = {"kl": kl.tolist(), "grad": grad.tolist()}
            yield {"batch": name, "options": {"kl_penalty": estimator}, "outputs": outputs}


def gdpo_inputs(batch: Batch) -> dict[str, Any]:
    """What GDPO reads its several rewards from: a prompt of one token before each completion."""
    mask = batch["response_mask"].long()
    prompts = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "non_tensor_batch": {
            name: batch[name].numpy() for name in ("format_reward", "accuracy_reward")
        },
        "batch": {"prompts": prompts, "attention_mask": torch.cat([prompts, mask], dim=1)},
    }


def advantage_cases(batches: dict[str, Batch]) -> Iterator[Case]:
    """Advantages and returns of every estimator, given what its signature asks for."""
    for estimator, name, options in ADVANTAGE_OPTIONS:
        function = get_adv_estimator_fn(estimator)
        config = AlgoConfig(adv_estimator=estimator, **options)
        offered = {**tensors(batches[name]), **options, "config": config}
        if "gdpo_reward_keys" in options:
            offered |= gdpo_inputs(offered)
        wanted = inspect.signature(function).parameters
        given = {key: value for key, value in offered.items() if key in wanted}
        advantages, returns = function(**given)
        yield {
            "batch": name,
            "options": {"adv_estimator": estimator, **options},
            "outputs": {"advantages": advantages.tolist(), "returns": returns.tolist()},
        }


def rollout_correction_cases(batches: dict[str, Batch]) -> Iterator[Case]:
    """Weights, mask and metrics of every correction and rejection, and of the two together."""
    both = {"rollout_is": "token", "rollout_is_threshold": 1.5, **RS_OPTIONS[0]}
    of_masked_row = [*IS_OPTIONS, RS_OPTIONS[0], RS_OPTIONS[4]]
    chosen = [("ragged", options) for options in (*IS_OPTIONS, *RS_OPTIONS, both)]
    for name, options in [*chosen, *(("masked_row", options) for options in of_masked_row)]:
        batch = tensors(batches[name])
        weights, mask, metrics = compute_rollout_correction_and_rejection_mask(
            old_log_prob=batch["old_log_prob"],
            rollout_log_prob=batch["rollout_log_prob"],
            response_mask=batch["response_mask"],
            **options,
        )
        outputs = {
            "rollout_is_weights": weights and weights.batch["rollout_is_weights"].tolist(),
            "response_mask": mask.long().tolist(),
            "metrics": metrics,
        }
        yield {"batch": name, "options": options, "outputs": outputs}


def rendered(golden: dict[str, Any]) -> str:
    """JSON with a line for each batch and each case."""

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    sections = []
    for name, section in golden.items():
        if isinstance(section, dict):
            entries = [f'"{key}":{line(value)}' for key, value in section.items()]
            left, right = "{", "}"
        else:
            entries = [line(case) for case in section]
            left, right = "[", "]"
        sections.append(f'"{name}":{left}\n' + ",\n".join(entries) + f"\n{right}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main() -> None:
    """Asks verl and writes the file."""
    torch.set_num_threads(1)
    batches = make_batches()
    golden = {
        "versions": {name: version(name) for name in ("verl", "torch")},
        "batches": batches,
        "policy_losses": list(policy_loss_cases(batches)),
        "agg_loss": list(agg_loss_cases(batches)),
        "kl_penalty": list(kl_penalty_cases(batches)),
        "advantages": list(advantage_cases(batches)),
        "rollout_correction": list(rollout_correction_cases(batches)),
    }
    OUT.write_text(rendered(golden), encoding="utf-8")
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
