"""Every kernel compiled for cards that are not here: no spills, wide loads, quiet loops."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import HAS_TRITON
from tests.test_formulas import KLS, SURROGATES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(architecture: str) -> None:
    """In a process of its own: an interpreted kernel cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, "-m", "tests.aot", architecture],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr[-4000:]
    reports = [json.loads(line) for line in output.stdout.splitlines()]
    compiled = {report["kernel"] for report in reports}
    for surrogate, _ in SURROGATES:
        assert {f"row_loss_of-{surrogate}", f"token_loss-{surrogate}-k3"} <= compiled
    assert {f"token_loss-clip-{estimator}" for estimator in KLS} <= compiled
    for report in reports:
        name = report["kernel"]
        assert report["spills"] == 0, report
        if architecture == "gfx942":
            continue
        assert report["registers"] <= 64, report
        assert report["barriers"] == 0, f"{name}: a thread waits inside a loop over the vocabulary"
        if "vector" in name and "row_scale" not in name:
            reading = [loads for loads in report["loads"] if loads]
            assert reading, report
            assert all("LDG.E.128" in loads for loads in reading), report
