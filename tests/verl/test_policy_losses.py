"""Registered losses beside verl's own functions, live: value, gradient, metrics, refusals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

import grpo_core.integrations.verl as ours
from grpo_core import RECIPES, Objective, PolicyFactor, SamplerCorrection, clip
from grpo_core.integrations.presets.verl_options import AGGREGATIONS
from tests import oracles

ROOT = Path(__file__).parents[2]
GOLDEN: dict[str, Any] = json.loads((ROOT / "tests/golden/verl.json").read_text())
MODES = {"vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo"}
# float32 on both sides
SINGLE = 3e-6


def batch(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rows = GOLDEN["batches"][name]
    found = {key: torch.tensor(value, dtype=dtype) for key, value in rows.items()}
    # as verl's ppo_loss gives it
    return found | {"response_mask": found["response_mask"].bool()}


def config(**options: Any) -> ActorConfig:
    chosen = dict(options)
    names = ("loss_mode", "dro_beta")
    policy = PolicyLossConfig(**{key: chosen.pop(key) for key in names if key in chosen})
    fixed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(policy_loss=policy, **fixed, **chosen)


def call(name: str, b: dict[str, Tensor], weighted: bool, settings: ActorConfig) -> Any:
    """(loss, gradient by log_prob, metrics) of a registered loss."""
    log_prob = b["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=b["old_log_prob"],
        log_prob=log_prob,
        advantages=b["advantages"],
        response_mask=b["response_mask"],
        loss_agg_mode=settings.loss_agg_mode,
        config=settings,
        rollout_is_weights=b["rollout_is_weights"] if weighted else None,
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return float(loss.detach()), gradient, metrics


def test_verls_own_modes() -> None:
    """Every case of the golden file but those of bypass_mode, which verl's trainer chooses itself.

    The difference for geo_mean in docs/objectives.md is left out.
    """
    used = Counter()
    for case in GOLDEN["policy_losses"]:
        options = dict(case["options"])
        mode = options["loss_mode"]
        if mode == "bypass_mode" or (mode, case["batch"]) == ("geo_mean", "token_advantages"):
            continue
        used[mode] += 1
        b, settings = batch(case["batch"]), config(**options)
        theirs = call(mode, b, case["rollout_is_weights"], settings)
        found = call(f"grpo_core_verl_{mode}", b, case["rollout_is_weights"], settings)
        size = max(abs(theirs[0]), float(theirs[1].abs().max()))
        assert abs(found[0] - theirs[0]) < SINGLE * size, options
        assert float((found[1] - theirs[1]).abs().max()) < SINGLE * size, options
        assert found[2].pop("actor/nonfinite_tokens") == 0
        assert found[2].keys() == theirs[2].keys()
        assert all(isinstance(value, float) for value in found[2].values())
        for name, value in theirs[2].items():
            assert found[2][name] == pytest.approx(value, abs=1e-5), (name, options)
    assert used.keys() == MODES and used.total() == 199


def of_paper(name: str, b: dict[str, Tensor], log_prob: Tensor) -> Tensor:
    """The policy term of a recipe [B, T], from its paper's oracle; to be maximised."""
    old, A, mask = b["old_log_prob"], b["advantages"], b["response_mask"]
    ratio = (log_prob - old).exp()
    s = oracles.sequence_ratio(log_prob, old, mask)
    terms = {
        "dapo": lambda: oracles.ppo_clip(ratio, A, 0.2, 0.28),
        "grpo": lambda: oracles.ppo_clip(ratio, A, 0.2, 0.2),
        "gspo": lambda: oracles.ppo_clip(s, A, 3e-4, 4e-4),
        "cispo": lambda: oracles.cispo(log_prob, ratio, A, 5.0),
        "topr": lambda: oracles.topr(log_prob, ratio, A),
        "vespo": lambda: oracles.vespo(log_prob, old, A, mask),
        "gpg": lambda: A * log_prob,
        "luspo": lambda: oracles.ppo_clip(s, A, 3e-4, 4e-4),
        "dr_grpo": lambda: oracles.ppo_clip(ratio, A, 0.2, 0.2),
    }
    return terms[name]()


def averaged(terms: Tensor, mask: Tensor, aggregation: str) -> Tensor:
    """verl's averages, in their plainest form."""
    rows = [terms[i][mask[i]] for i in range(len(mask)) if mask[i].any()]
    return {
        "token_mean": lambda: torch.cat(rows).mean(),
        "sequence_mean": lambda: torch.stack([r.mean() for r in rows]).mean(),
        "sequence_sum": lambda: torch.stack([r.sum() for r in rows]).mean(),
        "constant_length": lambda: torch.stack([r.sum() for r in rows]).mean() / mask.shape[1],
    }[aggregation]()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "name", ["dapo", "grpo", "gspo", "cispo", "topr", "vespo", "gpg", "luspo", "dr_grpo"]
)
def test_recipes(name: str, weighted: bool) -> None:
    """Against the papers, float64, with verl's weights on the policy term."""
    aggregation = RECIPES[name].aggregation
    (mode,) = (theirs for theirs, same in AGGREGATIONS.items() if same == aggregation)
    b, exact = batch("ragged"), batch("ragged", torch.float64)
    log_prob = exact["log_prob"].requires_grad_()
    terms = of_paper(name, exact, log_prob)
    terms = terms * exact["rollout_is_weights"] if weighted else terms
    loss = -averaged(terms, exact["response_mask"], aggregation)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    found = call(f"grpo_core_{name}", b, weighted, config(loss_agg_mode=mode))
    size = max(abs(float(loss.detach())), float(gradient.abs().max()))
    assert abs(found[0] - float(loss.detach())) < SINGLE * size
    assert float((found[1] - gradient).abs().max()) < SINGLE * size
    gap = (log_prob - exact["old_log_prob"])[exact["response_mask"]].mean()
    assert found[2]["actor/ppo_kl"] == pytest.approx(-float(gap.detach()), abs=1e-5)
    assert 0 <= found[2]["actor/pg_clipfrac_lower"] <= found[2]["actor/pg_clipfrac"] <= 1


def test_every_name_is_there() -> None:
    mine = {name for name in POLICY_LOSS_REGISTRY if name.startswith("grpo_core_")}
    known = {
        name
        for name, spec in RECIPES.items()
        if spec.has_policy_term and spec.aggregation in AGGREGATIONS.values()
    }
    wanted = {f"grpo_core_{name}" for name in known} | {f"grpo_core_verl_{m}" for m in MODES}
    assert mine == wanted and POLICY_LOSS_REGISTRY.keys() > MODES


def test_an_objective_of_ones_own() -> None:
    mine = Objective(clip(0.1, 0.3), aggregation="sequence_mean", kl="k3", beta=0.1)
    ours.register("mine", mine)
    b = batch("ragged")
    found = call("mine", b, False, config(loss_agg_mode="seq-mean-token-mean"))
    same = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1e9}
    theirs = call("vanilla", b, False, config(loss_agg_mode="seq-mean-token-mean", **same))
    assert found[0] == pytest.approx(theirs[0], rel=1e-6)
    assert torch.allclose(found[1], theirs[1], 1e-5, 1e-7)
    del POLICY_LOSS_REGISTRY["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_agg_mode": "token-mean"}, r"loss_agg_mode: expected 'seq-mean-token-mean'"),
        ({"clip_ratio_high": 0.28}, r"clip_ratio_high: expected verl's default 0\.2"),
        ({"clip_ratio_c": 2.0}, r"clip_ratio_c: expected verl's default 3\.0"),
        ({"dro_beta": 0.1}, r"dro_beta: expected verl's default None"),
    ],
)
def test_options_that_would_not_act_are_refused(options: dict[str, Any], message: str) -> None:
    settings = config(**{"loss_agg_mode": "seq-mean-token-mean"} | options)
    with pytest.raises(ValueError, match=message):
        call("grpo_core_grpo", batch("ragged"), False, settings)


def test_objectives_that_need_more_than_verl_gives_are_refused() -> None:
    factor = PolicyFactor(SamplerCorrection())
    with pytest.raises(ValueError, match=r"factor\.sampler.*rollout_correction"):
        ours.register("mine", RECIPES["dapo"].replace(factor=factor))
    with pytest.raises(ValueError, match="top_entropy"):
        ours.register("mine", RECIPES["dapo"].replace(factor=PolicyFactor(top_entropy=0.2)))
    assert "mine" not in POLICY_LOSS_REGISTRY
    with pytest.raises(ValueError, match="config: expected verl's ActorConfig, got None"):
        none = torch.zeros(1, 1)
        get_policy_loss_fn("grpo_core_verl_vanilla")(none, none, none, none.bool())


def test_a_token_that_is_not_finite_is_counted() -> None:
    b = batch("ragged")
    spoilt = b["log_prob"].clone()
    spoilt[0, 0] = torch.nan
    assert b["response_mask"][0, 0]
    loss, gradient, metrics = call(
        "grpo_core_verl_vanilla", b | {"log_prob": spoilt}, False, config()
    )
    assert metrics["actor/nonfinite_tokens"] == 1 and math.isfinite(loss)
    assert gradient.isfinite().all() and gradient[0, 0] == 0
    assert math.isnan(call("vanilla", b | {"log_prob": spoilt}, False, config())[0])


def test_loaded_as_an_external_module() -> None:
    """In a process of its own, while verl's package is still being imported."""
    probe = (
        "import verl, sys; from verl.trainer.ppo.core_algos import get_policy_loss_fn;"
        "import verl.utils.experimental.torch_functional as f;"
        "print(get_policy_loss_fn('grpo_core_dapo').__module__, f.FusedLinearForPPO.__module__)"
    )
    modules = "grpo_core.integrations.verl,grpo_core.integrations.verl_log_probs"
    for chosen, head in (
        (modules, "grpo_core.integrations.verl_head"),
        (modules.split(",")[0], "verl.utils.experimental.torch_functional"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", probe],
            cwd=ROOT,
            env=os.environ | {"VERL_USE_EXTERNAL_MODULES": chosen},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split()[-2:] == ["grpo_core.integrations.verl", head]
