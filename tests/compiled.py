"""Runs the instrument in a process of its own: an interpreted kernel cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
ROOT = Path(__file__).parent.parent


class Inspected(NamedTuple):
    """What the instrument left."""

    status: int
    printed: str
    records: list[Record]


def uninterpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without TRITON_INTERPRET, from the root of the repository."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def inspected(*arguments: str, command: tuple[str, str] = ("-m", "grpo_core.inspect")) -> Inspected:
    """`python -m grpo_core.inspect`, or what stands for it."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "figures.json"
        done = uninterpreted(*command, *arguments, "--json", str(file))
        assert file.exists(), done.stderr[-4000:]
        return Inspected(done.returncode, done.stdout, json.loads(file.read_text("utf-8")))
