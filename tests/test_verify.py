"""`python -m grpo_core.verify` passes on what is right and fails on everything that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.backends import cpu as cpu_backend
from grpo_core.backends import pytorch as torch_backend
from grpo_core.kernels import row_loss as row_loss_kernel
from grpo_core.kernels.language import tl, triton
from grpo_core.kernels.row_reading import read_row
from grpo_core.verify.__main__ import main
from grpo_core.verify.accuracy import QUANTITIES, compare_confident, exact_tokens
from grpo_core.verify.inputs import LARGEST_MARGIN, OBJECTIVES, one_per_plan, set_margins
from tests import oracles
from tests.combinations import slow
from tests.conftest import HAS_GPU, HAS_TRITON

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("vocabulary", [*slow("2"), "257"])
def test_what_is_right_passes(
    backend: str, vocabulary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--dtype", "bfloat16", "--recipe", "grpo", "gspo", "exact KL, entropy", "sampler"]
    assert main([*few, "--backend", backend, "--vocabulary", vocabulary]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    assert printed.splitlines()[-1].endswith("all ok")


def scaled(function: Callable, factor: float, part: int | None = None) -> Callable:
    """A function whose result, or a part of it, is slightly too large."""

    def wrong(*args: Any, **options: Any) -> Any:
        found = function(*args, **options)
        if part is None:
            return found * factor
        return found._replace(**{found._fields[part]: found[part] * factor})

    return wrong


def statistics(spoil: Callable) -> property:
    """The statistics of the torch backend after `spoil(logp, entropy, kl)`."""
    right = torch_backend._Softmax.statistics
    return property(lambda self: spoil(*right.fget(self)))


def put_beyond(logits: torch.Tensor, at: torch.Tensor, values: Any) -> None:
    """Writes rows, and also changes the number behind the last one."""
    put(logits, at, values)
    last = logits.flatten(0, -2)[-1, -1] if logits.is_contiguous() else logits[-1, -1, -1]
    behind = last.storage_offset() + 1
    if behind < last.untyped_storage().nbytes() // last.itemsize:
        last.as_strided((1,), (1,), behind).add_(1.0)


put = torch_backend.put_rows
ENTROPY = statistics(lambda logp, entropy, kl: (logp, entropy * (1 + 1e-5), kl))
# a log-probability that ends where that of a float32 log_softmax ends
CARELESS = statistics(lambda logp, *others: (logp.masked_fill(logp > -6e-8, 0.0), *others))
GRADIENT = scaled(torch_backend._Softmax.gradient, 1 + 1e-5)
LOSS = scaled(torch_backend.token_loss, 1 + 1e-3, 0)
SLOPE = scaled(torch_backend.token_loss, 1 + 1e-5, 1)
KL = scaled(torch_backend.token_loss, 1 + 1e-4, 3)
# what is wrong: the line of the report that fails, the backend, and what is replaced
BREAKAGES: dict[str, tuple[str, str, Any, str, Any]] = {
    "the gradient": ("dlogits", "torch", torch_backend._Softmax, "gradient", GRADIENT),
    "the entropy": ("entropy", "torch", torch_backend._Softmax, "statistics", ENTROPY),
    "a confident token": ("logp", "torch", torch_backend._Softmax, "statistics", CARELESS),
    "the loss": ("loss", "torch", torch_backend, "token_loss", LOSS),
    "the slope of the surrogate": ("dlogits", "torch", torch_backend, "token_loss", SLOPE),
    "the KL": ("kl", "torch", torch_backend, "token_loss", KL),
    "a number beside a view": (
        "nothing is written beside a view",
        "torch",
        torch_backend,
        "put_rows",
        put_beyond,
    ),
    "a bit of one plan": (
        "token_logp",
        "cpu",
        cpu_backend,
        "row_stats",
        scaled(cpu_backend.row_stats, 1 + 2**-23, 0),
    ),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_what_is_wrong_fails(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred-thousandth, or a single bit, is enough; a thousandth of a sum near zero."""
    line, backend, home, name, wrong = BREAKAGES[what]
    monkeypatch.setattr(home, name, wrong)
    assert main(["--backend", backend, "--dtype", "float32", "--quick"]) == 1
    shown = [text for text in capsys.readouterr().out.splitlines() if text.endswith("FAIL")]
    assert any(text.strip().startswith(line) for text in shown)


@triton.jit
def wrong_reading(row_ptr, ref_ptr, V, target_col, scale, beta, KIND, THREADS, WIDTH, TILES):
    logp, entropy, *others = read_row(
        row_ptr, ref_ptr, V, target_col, scale, beta, KIND, THREADS, WIDTH, TILES
    )
    return logp, entropy + 0.00001 * tl.abs(entropy), *others


@pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="replaces an interpreted kernel's function")
def test_a_wrong_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(row_loss_kernel, "read_row", wrong_reading)
    options = ["--vocabulary", "70", "--dtype", "float32", "--recipe", "dapo"]
    assert main(["--backend", "triton", *options]) == 1
    printed = capsys.readouterr().out
    assert "  entropy, float32: " in printed[printed.index("Failed") :]
    # the statistics alone are untouched, so bits differ between the plans
    assert any(
        line.startswith("  token_logp is the one pass") and line.endswith("FAIL")
        for line in printed.splitlines()
    )


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_every_comparison(tmp_path: Path) -> None:
    """Each recipe, quantity and claim has a line, none is wider than 100 columns."""
    file = tmp_path / "found.json"
    options = ["--backend", "torch", "--vocabulary", "33", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_core.verify", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    first = {line.strip()[: len(name)] for line in lines for name in (*OBJECTIVES, *QUANTITIES)}
    assert first >= {*OBJECTIVES, *QUANTITIES}
    found = json.loads(file.read_text())
    assert found["failures"] == 0
    checks = found["checks"]
    assert f"{len(checks):,} comparisons in" in lines[-1]
    losses = [one for one in checks if one["part"] == "losses"]
    assert {one["recipe"] for one in losses} == set(OBJECTIVES)
    assert {one["quantity"] for one in losses} == set(QUANTITIES)
    assert {one["part"] for one in checks} == {"losses", "confident", "bits"}
    assert all(one["ok"] for one in checks)


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="asks for what needs a GPU")
def test_without_a_gpu_it_says_how_to_interpret() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "grpo_core.verify", "--backend", "triton"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_is_one_line() -> None:
    """Like the other commands, also while it imports; `inspect` shares the way."""
    # interpreted kernels are not inspected
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for module in ("verify", "inspect"):
        process = subprocess.Popen(
            [sys.executable, "-m", f"grpo_core.{module}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background jobs ignore SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors.strip()) == (130, "interrupted")


def test_every_plan_has_a_recipe() -> None:
    names = one_per_plan(list(OBJECTIVES))
    assert names == ["ppo", "gspo", "opd", "entropy bonus", "exact KL, entropy", "sampler"]
    assert one_per_plan(["vespo", "dapo", "bnpo"]) == ["vespo", "dapo"]


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_the_truth_of_confident_tokens_is_that_of_the_oracle(offset: float) -> None:
    """In float64 both, by two formulas; float32 log_softmax is found to be nothing like it."""
    target = torch.randint(0, 300, (31,))
    logits = set_margins(torch.randn(31, 300), target, torch.linspace(0, LARGEST_MARGIN, 31))
    logits = logits + offset
    exact = exact_tokens(logits, target)
    x = logits.double().requires_grad_()
    logp, entropy = oracles.logp_and_entropy(x, target, 1.0)
    logp.sum().backward()
    for ours, theirs in ((exact.logp, logp), (exact.entropy, entropy), (exact.slope, x.grad)):
        assert torch.allclose(ours, theirs.detach(), rtol=1e-9, atol=0)
    careless = torch.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)
    found = compare_confident("logp", careless, careless, exact.logp)
    assert not found.ok
    assert found.error == found.baseline == 1
