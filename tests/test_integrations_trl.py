"""Our losses inside the real TRL: the same losses, gradients, metrics and trained parameters.

Stock TRL and ours start from the same model and are given the same batches; `tests/trl_training`
makes them.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from grpo_core.integrations import trl_forward, trl_hook
from grpo_core.integrations.trl import SUPPORTED, FusedGRPOTrainer, patch_log_probs
from grpo_core.presets.trl_options import AGGREGATIONS
from tests.trl_training import (
    Batch,
    Outcome,
    logged,
    make_trainer,
    micro_batch,
    outcome,
    pairwise,
    parameters,
    quick,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.xdist_group("trl"),
]
# float32, sums in another order
CLOSE = 2e-5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often our loss and our log-probabilities were asked for."""
    count = {"fused_linear_loss": 0, "linear_scores": 0}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(trl_forward, "fused_linear_loss")
    counted(trl_hook, "linear_scores")
    yield count


def lora(**options: Any) -> Any:
    """An adapter that does something from the start."""
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


def pair(output: Path, **options: Any) -> tuple[GRPOTrainer, FusedGRPOTrainer]:
    """Stock TRL's trainer and ours, with the same parameters."""
    with mock.patch.object(grpo_trainer, "VLLMGeneration"):
        stock, ours = (make_trainer(k, output, **options) for k in (GRPOTrainer, FusedGRPOTrainer))
    ours.model.load_state_dict(stock.model.state_dict())
    return stock, ours


def assert_equal(ours: Outcome, theirs: Outcome, what: object = "") -> None:
    """The same loss, gradients and metrics, within float32's rounding."""
    sizes = [float(g.abs().max()) for g in theirs.gradients.values() if g is not None]
    largest = max(sizes, default=0.0)
    assert abs(ours.loss - theirs.loss) <= CLOSE * max(abs(theirs.loss), largest, 1e-6), what
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, wanted in theirs.gradients.items():
        found = ours.gradients[name]
        if wanted is None or found is None:
            # what has no part in a graph, and a zero
            others = [g for g in (wanted, found) if g is not None]
            assert all((g == 0).all() for g in others), (name, what)
            continue
        assert float((found - wanted).abs().max()) <= CLOSE * max(largest, 1e-6), (name, what)
    assert list(ours.metrics) == list(theirs.metrics), what
    for name, wanted in theirs.metrics.items():
        assert ours.metrics[name] == pytest.approx(wanted, rel=CLOSE, abs=CLOSE, nan_ok=True), (
            name,
            what,
        )


ENTROPY = {
    "none": {},
    "bonus": {"entropy_coef": 0.02},
    "quantile": {"top_entropy_quantile": 0.4},
    "bonus of a quantile": {"entropy_coef": 0.02, "top_entropy_quantile": 0.4},
    "adaptive": {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 2.9},
}
VLLM = {
    "none": {},
    **{
        mode: {
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.2,
        }
        for mode in ("token_truncate", "token_mask", "sequence_mask", "sequence_truncate")
    },
}
BATCHES = [
    Batch(),
    Batch(tools=True),
    Batch(lengths=(5, 0, 2, 4), seed=1),
    Batch(lengths=(0, 0, 0, 0)),
    Batch(per_token=True, tools=True, seed=2),
    Batch(old=False, seed=3),
]
GRID = {
    "loss_type": list(AGGREGATIONS),
    "importance_sampling_level": ["token", "sequence"],
    "beta": [0.0, 0.04],
    "use_bias_correction_kl": [True, False],
    "delta": [None, 1.6],
    "off_policy_mask_threshold": [None, 0.1],
    "entropy": list(ENTROPY),
    "vllm": list(VLLM),
    "batch": BATCHES,
    "window": [1, 3],
    "training": [True, False],
    "lora": [False, True],
    "temperature": [1.0, 0.7],
    "cast_lm_head_to_fp32": [False, True],
    "tied": [False, True],
}


def test_the_grid(tmp_path: Path, calls: dict[str, int]) -> None:
    """Any two choices of `GRID` meet in some case; loss, gradients and metrics are stock TRL's."""
    cases = pairwise(GRID)
    fast = 0
    for case in cases:
        options = dict(case)
        batch, window, training = (options.pop(n) for n in ("batch", "window", "training"))
        options |= ENTROPY[options.pop("entropy")] | VLLM[options.pop("vllm")]
        if options["loss_type"] == "vespo" and "sequence" in options.get(
            "vllm_importance_sampling_mode", ""
        ):
            options["vllm_importance_sampling_mode"] = "token_mask"
        if options.pop("lora"):
            options["peft"] = lora()
            # TRL itself raises for all three
            options["tied"] = options["tied"] and not options["cast_lm_head_to_fp32"]
        if options.get("use_vllm"):
            # TRL then always has them
            batch = dataclasses.replace(batch, old=True)
        options["epsilon_high"] = 0.28
        stock, ours = pair(tmp_path, gradient_accumulation_steps=3, **options)
        inputs = micro_batch(stock, batch)
        before = calls["fused_linear_loss"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for _ in range(2):
                found = outcome(ours, inputs, window, training)
                wanted = outcome(stock, inputs, window, training)
                assert_equal(found, wanted, case)
        fast += calls["fused_linear_loss"] - before
        assert ours.entropy_coef == stock.entropy_coef
    assert len(cases) >= 40 and fast == 2 * len(cases)
