"""Whole short trainings in verl's own FSDP2 engine: with and without ours, the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")

ROOT = Path(__file__).parents[2]
PLAIN = {
    "loss_mode": "vanilla",
    "head": "logits",
    "ours": False,
    "tied": True,
    "packed": False,
    "weights": False,
    "checkpointing": False,
    "lora_rank": 0,
    "dtype": "float32",
    "actor": {},
}
# what the training is; its head and its loss come from verl or from us
TRAININGS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gspo, sequence mean": {
        "loss_mode": "gspo",
        "actor": {
            "loss_agg_mode": "seq-mean-token-mean",
            "clip_ratio_low": 3e-2,
            "clip_ratio_high": 4e-2,
        },
    },
    "cispo, weighted": {"loss_mode": "cispo", "weights": True},
    "vanilla, untied, checkpointing": {"tied": False, "checkpointing": True},
    "dro, constant length": {
        "loss_mode": "dro",
        "actor": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 10},
    },
    "vanilla, packed": {"packed": True},
    "vanilla, an adapter": {"lora_rank": 4, "tied": False},
}


def run_all(directory: Path, runs: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """The results of `tests.verl.train`, in processes of their own."""
    (directory / "runs.json").write_text(json.dumps(runs))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.verl.train", str(directory)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((directory / "results.json").read_text())


def variants(training: dict[str, Any]) -> list[dict[str, Any]]:
    """verl alone, and ours: the head, the loss, both."""
    base = PLAIN | training
    ours = f"grpo_core_verl_{base['loss_mode']}"
    return [
        base,
        base | {"head": "torch", "ours": True},
        base | {"loss_mode": ours},
        base | {"head": "triton", "ours": True, "loss_mode": ours},
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainings_end_with_the_same_parameters(tmp_path: Path, ranks: int) -> None:
    """And log the same figures at every step; where verl can train at all as it is told to."""
    chosen = list(TRAININGS.values()) if ranks == 1 else list(TRAININGS.values())[:4]
    runs = [run for training in chosen for run in variants(training)]
    results = run_all(tmp_path, runs, ranks)
    assert len(results) == len(runs) == 4 * len(chosen)
    for start in range(0, len(runs), 4):
        theirs = results[start]
        first = theirs["metrics"][0]
        assert first["grad_norm"] > 0 and first["actor/pg_loss"] != 0
        for run, ours in zip(runs[start + 1 : start + 4], results[start + 1 :], strict=False):
            for step, (a, b) in enumerate(zip(ours["metrics"], theirs["metrics"], strict=True)):
                a = dict(a)
                assert a.pop("actor/nonfinite_tokens", 0.0) == 0.0
                assert a.keys() == b.keys()
                for name in a:
                    assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), (step, name, run)
            for name, values in ours["parameters"].items():
                wanted = theirs["parameters"][name]
                gap = max(abs(x - y) for x, y in zip(values, wanted, strict=True))
                # three steps of Adam with 1e-2: 3e-2 of way in all
                assert gap < 2e-4, (name, gap, run)


def test_bfloat16(tmp_path: Path) -> None:
    """verl's default: parameters rounded for the forward, autocast around it, sums in float32.

    Its logits are rounded and ours are not; the first figures agree within that.
    """
    found = run_all(tmp_path, variants({"dtype": "bfloat16"}), 1)
    first = [result["metrics"][0] for result in found]
    for ours in first[1:]:
        for name in ("actor/pg_loss", "actor/entropy_loss", "kl_loss", "grad_norm"):
            assert ours[name] == pytest.approx(first[0][name], rel=2e-2, abs=5e-3), name


def test_one_process_and_two_are_the_same_training(tmp_path: Path) -> None:
    """Counts of tokens and sequences are those of all ranks, gradients are averaged over them."""
    runs = [run for run in variants(TRAININGS["gspo, sequence mean"]) if run["ours"]]
    found = []
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        found.append(run_all(directory, runs, ranks))
    for one, two in zip(*found, strict=True):
        for name, values in one["parameters"].items():
            gap = max(abs(x - y) for x, y in zip(values, two["parameters"][name], strict=True))
            assert gap < 2e-4, name
