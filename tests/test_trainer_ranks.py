"""The trainer on two processes makes the updates of one: replicas and shards, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compiled import ROOT
from tests.micro import MAX_NEW_TOKENS, micro_model
from tests.test_checkpoint import records, trainer
from tests.test_reinforce import files, options  # noqa: F401
from tests.test_reinforce import records as records_of
from tests.trainer_ranks import (
    CASES,
    SHARDS,
    adapted,
    fixed_run,
    held_out,
    model_of,
    run,
    shards_of,
)

pytestmark = [
    pytest.mark.slow,
    # one worker starts the two processes
    pytest.mark.xdist_group("trainer_ranks"),
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*an update was skipped"),
]

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes leave their files."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Found:
    """What each of two processes found; they are started once."""
    return run(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process makes of the whole batch."""
    return {name: fixed_run(name, "ddp") for name in CASES}


@pytest.mark.parametrize(
    ("shard", "name"), [(shard, name) for name in CASES for shard in shards_of(name)]
)
def test_two_processes_make_the_updates_of_one(
    shard: str, name: str, ranks: Found, alone: dict[str, dict[str, Any]]
) -> None:
    """Under SGD, whose step shows a wrong factor of the gradient; every figure is the whole's."""
    one, start = alone[name], fixed_start(name)
    for found in (rank[f"{shard}: {name}"] for rank in ranks):
        for mine, theirs in zip(found["history"], one["history"], strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                if key == "warnings":
                    assert mine[key] == value
                elif key != "skipped_rows":  # a filler has none, and a part may be packed otherwise
                    assert mine[key] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), key
        moved = 0.0
        for key, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=3e-6)
            moved = max(moved, float((value - start[key]).abs().amax()))
        assert (moved > 1e-3) == ("not finite" not in name)
    if CASES[name][0].get("tokens_per_microbatch") and name != "a rank without rows, tied":
        first, second = (rank[f"{shard}: {name}"]["counts"] for rank in ranks)
        assert [parts for parts, _ in first] == [parts for parts, _ in second]
        assert all(fillers == 0 for _, fillers in first)
        assert all(fillers > 0 for _, fillers in second)
    if "without rows" in name:
        assert one["history"][0]["truncated"] == 0.5
    if "not finite" in name:
        assert [m["skipped_updates"] for m in one["history"]] == [4, 8]


def fixed_start(name: str) -> dict[str, torch.Tensor]:
    """The weights that a case begins with."""
    return {k: p.detach() for k, p in model_of(CASES[name][2]).named_parameters()}


@pytest.mark.parametrize("run", ["ddp: resumed", "fsdp: resumed", "fsdp: resumed, adapter"])
def test_an_interrupted_run_goes_on_bit_for_bit(run: str, ranks: Found) -> None:
    """A signal to one process stops both, after the step that it came in."""
    for found in (rank[run] for rank in ranks):
        assert "SIGTERM: stopped after saving" in found["stopped"]
        assert found["stopped"].endswith("step-000003")
        assert found["before"] == 3
        straight, resumed = found["weights"]
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
        assert len(found["moments"][0]) > 0
        for mine, theirs in zip(*found["moments"], strict=True):
            assert torch.equal(mine, theirs)
        straight, resumed = found["records"]
        assert straight == resumed
        assert [record["step"] for record in straight] == list(range(6))
        assert found["folders"] == ["step-000004", "step-000005"]
    first, second = (rank[run]["weights"][0] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(sys.platform != "linux", reason="finds a file by its handle in /proc")
def test_killed_in_the_middle_of_a_sharded_save(tmp_path: Path) -> None:
    """`kill -9` inside a shard, before and after the rename: only whole checkpoints are read."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_ranks", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *killed, last = torch.load(tmp_path / "codes.pt")
    assert last == [0, 0] and all(0 not in codes for codes in killed)
    # who is not killed loses the other, and ends with an error or by the kill that follows
    victims = [codes[rank] for codes, rank in zip(killed, (1, 0, 0), strict=True)]
    assert victims == [-signal.SIGKILL] * 3, done.stderr[-4000:]
    for rank in range(2):
        before = [torch.load(tmp_path / f"before-{number}-{rank}.pt") for number in range(4)]
        # killed at the saves of steps 2, 3 and 4, the last of which was whole by then
        assert [found["resumed"] for found in before] == [0, 1, 2, 4]
        after = torch.load(tmp_path / f"after-3-{rank}.pt")
        straight = before[0]
        assert after["weights"].keys() == straight["weights"].keys()
        for name, weight in straight["weights"].items():
            assert torch.equal(weight, after["weights"][name])
        assert len(straight["moments"]) > 0
        for mine, theirs in zip(straight["moments"], after["moments"], strict=True):
            assert torch.equal(mine, theirs)
    assert records(tmp_path / "parts") == records(tmp_path / "straight")
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize("shard", SHARDS)
def test_another_way_to_spread_it_is_refused(shard: str, ranks: Found) -> None:
    other = {"ddp": "fsdp", "fsdp": "ddp"}[shard]
    for rank in ranks:
        message = rank[f"{shard}: resumed"]["refused"]
        assert message.startswith(f"processes: expected 2 ({shard}) as in ")
        assert message.endswith(f"got 2 ({other})")


@pytest.mark.parametrize("shard", SHARDS)
def test_what_is_exported_is_a_model_of_transformers(
    shard: str, ranks: Found, folder: Path
) -> None:
    config = json.loads((folder / shard / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder / shard / "model")
    expected = ranks[0][f"{shard}: resumed"]["weights"][1]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name])


def test_what_is_exported_is_an_adapter_of_peft(ranks: Found, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(micro_model(), folder / "fsdp-lora/model")
    expected = ranks[0]["fsdp: resumed, adapter"]["weights"][1]
    named = dict(model.named_parameters())
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[name], expected[name]) for name in named)


@pytest.mark.parametrize("shard", SHARDS)
def test_held_out_problems_are_shared(shard: str, ranks: Found) -> None:
    one = held_out(micro_model())
    for rank in ranks:
        found = rank[f"{shard}: evaluated"]
        assert found["completions"] == one["completions"]
        assert found["metrics"] == pytest.approx(one["metrics"])


@pytest.mark.parametrize("shard", SHARDS)
def test_an_engine_follows_and_all_processes_draw_as_often(shard: str, ranks: Found) -> None:
    """Weights of shards are put together for it; one engine serves all, and gets them once."""
    own, theirs = ranks[0][f"{shard}: own model"], ranks[0][f"{shard}: engine"]
    for rank in ranks:
        for kind in ("own model", "engine"):
            found = rank[f"{shard}: {kind}"]
            assert found["history"] == ranks[0][f"{shard}: {kind}"]["history"]
            for name, weight in found["weights"].items():
                assert torch.equal(weight, own["weights"][name])
    for mine, other in zip(own["history"], theirs["history"], strict=True):
        assert mine == {**other, **{k: mine[k] for k in mine if k.startswith("sampler")}}
    steps = own["history"][1:]
    assert any(metrics["resamples"] for metrics in steps)
    for metrics in steps:
        assert metrics["groups_kept"] + metrics["groups_missing"] == 4
        assert metrics["groups_drawn"] == 4 * (1 + metrics["resamples"])


@pytest.mark.parametrize("shard", SHARDS)
def test_environments_take_more_turns_on_one_process_than_on_the_other(
    shard: str, ranks: Found
) -> None:
    """The other draws as often, with its shards of the weights; figures are those of both."""
    for kind in ("turns", "turns, engine"):
        first, second = (rank[f"{shard}: {kind}"] for rank in ranks)
        assert not any(first["observed"]) and any(second["observed"])
        assert first["history"] == second["history"] and first["held out"] == second["held out"]
        mean = sum(first["observed"] + second["observed"]) / 8
        assert first["history"][-1]["observed"] == mean > 0
        assert 1 < first["held out"]["turns"] < 3
        for name, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][name])
            assert torch.equal(weight, ranks[0][f"{shard}: turns"]["weights"][name])


@pytest.mark.parametrize("shard", SHARDS)
def test_processes_sample_one_step_ahead_and_resume(shard: str, ranks: Found) -> None:
    """Weights are gathered by all of them together; each keeps its own pending completions."""
    for rank in ranks:
        found = rank[f"{shard}: ahead"]
        assert found["history"] == ranks[0][f"{shard}: ahead"]["history"]
        assert found["resumed"] == found["history"][2:]
        for name, weight in found["weights"].items():
            assert torch.equal(weight, found["again"][name])
        assert [each["staleness"] for each in found["history"]] == [
            (step > 0) / (1 + each["resamples"]) for step, each in enumerate(found["history"])
        ]


def test_an_update_that_fails_on_one_process_fails_on_all(ranks: Found) -> None:
    assert ranks[0]["failed"] == "OSError: half way"
    assert ranks[1]["failed"].startswith("EngineError: engine: rank 0 could not send")


def test_an_adapter_on_shards_is_merged(ranks: Found) -> None:
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    expected = model.merge_and_unload().state_dict()
    for rank in ranks:
        assert rank["merged"].keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(rank["merged"][name], weight, rtol=1e-6, atol=1e-6)
        assert rank["alone"].startswith("engine: expected one that all 2 ranks share")


def test_processes_draw_apart(ranks: Found) -> None:
    assert ranks[0]["drawn"] != ranks[1]["drawn"]


def test_shards_write_completions_of_unequal_lengths(ranks: Found) -> None:
    """Each process its own number of prompts and tokens; afterwards all is in shards again."""
    for number, rank in enumerate(ranks):
        completions, in_shards = rank["written"]
        assert len(completions) == 2 + number
        assert max(map(len, completions)) <= 2 + 4 * number
        assert all(in_shards)


def test_weights_that_one_process_has_poisoned_are_not_saved(ranks: Found, folder: Path) -> None:
    for rank in ranks:
        assert rank["poisoned"].startswith("non-finite values in lm_head.wei")
    assert not list((folder / "poisoned").glob("*step*"))


def test_what_several_processes_cannot_do_is_refused(ranks: Found) -> None:
    beginnings = (
        "prompts_per_step: expected a multiple of 2, the number of ranks, got 3",
        "minibatches: expected at most 4, the completions of a step on each of 2 ranks, got 5",
        "loss: expected 'fused' on 2 ranks",
        "objective.entropy_aggregation: expected None on 2 ranks",
        "objective.factor.top_entropy: expected 1 on 2 ranks",
        "asynchronous: expected 0, or an engine that all ranks share, such as rollout vllm-server",
    )
    for rank in ranks:
        for message, beginning in zip(rank["refused"], beginnings, strict=True):
            assert message.startswith(beginning)


def test_shards_need_a_process_group() -> None:
    with pytest.raises(ValueError, match="shard: expected a process group for 'fsdp'"):
        trainer(None, micro_model(), shard="fsdp")


def test_the_command_under_torchrun(files: Path, tmp_path: Path) -> None:  # noqa: F811
    """One set of files, from the main process, and a model that transformers reads."""
    words = [*options(files, tmp_path / "run"), "--shard", "fsdp", "--max_new_tokens", "4"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "grpo_core.reinforce", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all results are in") == 1
    logged = records_of(tmp_path / "run")
    assert [record["step"] for record in logged] == [0, 1, 2, 3]
    assert all(record["length"] <= MAX_NEW_TOKENS for record in logged[1:])
    assert done.stdout.count("grpo: step 0 of 3") == 1
    assert len(re.findall(r"^ +[123] +\d\.\d{3} ", done.stdout, flags=re.MULTILINE)) == 3
    samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    kinds = [json.loads(sample)["kind"] for sample in samples]
    assert kinds.count("held out") == 12 and kinds.count("best") == 2 and len(kinds) <= 16
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    start = AutoModelForCausalLM.from_pretrained(files / "model")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["after"]["greedy"]["length"] <= 4
