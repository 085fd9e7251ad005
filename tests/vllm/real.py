"""A real vLLM server on a CPU, and the micro model that it serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from grpo_core.runs.demo import decimals
from tests.micro import micro_model

# positions of prompt and completion that the server has; the model itself has 64
LONGEST = 40
# seconds until it must have started; 75 on an idle core
START = 420
# what it runs with, beside the search path; `pytest` itself interprets Triton's kernels
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def environment() -> dict[str, str]:
    """For every process that runs vLLM."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | ENVIRONMENT


def save_model(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A micro model, untied, with a head dimension of 32, which CPU attention has."""
    tokenizer = decimals.build_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    micro_model(seed, **settings | changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class RealServer:
    """`vllm serve`, in a session of its own, so that all its processes end together.

    Args:
        model: folder of the model it starts with.
        log: file for its output.
    """

    def __init__(self, model: Path, log: Path, *more: str) -> None:
        self.model, self.log, self.more = model, log, more
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Starts it on a free port and waits until it answers."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = [str(Path(sys.executable).parent / "vllm"), "serve", str(self.model)]
        words += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        words += ["--enforce-eager", "--max-model-len", str(LONGEST), "--max-num-seqs", "32"]
        words += ["--gpu-memory-utilization", "0.1", "--logprobs-mode", "processed_logprobs"]
        words += ["--weight-transfer-config", json.dumps({"backend": "grpo_folder"})]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *self.more],
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(START * 2):
            if self.answers("/health"):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.tail()}")

    def ensure(self) -> None:
        """Starts it unless it runs."""
        if self.process is None or not self.answers("/health"):
            self.stop()
            self.start()

    def answers(self, route: str) -> bool:
        """Whether a GET succeeds."""
        try:
            return self.ask(route)[0] == 200
        except OSError:
            return False

    def ask(self, route: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
        """Status and answer of a GET, or of a POST with a body."""
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + route, data, head)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text) if text else None
        except ValueError:
            return status, text.decode()

    def stop(self) -> None:
        """Kills all its processes."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
