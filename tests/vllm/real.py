"""A real vLLM server on a CPU, the micro model that it serves, and runs of the command over it."""

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

import torch

from grpo_core.runs.demo import decimals
from tests.micro import micro_model

ROOT = Path(__file__).parents[2]
# tokens of prompt and completion that the server has room for; the model itself has 64
LONGEST = 40
# seconds until it must have started, and until a run must have ended; an idle core needs 75 and 60
START, END = 900, 900
# of every process that runs vLLM
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def environment(**more: str) -> dict[str, str]:
    """That of this process, in which Triton's kernels need not be interpreted, and vLLM's."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | ENVIRONMENT | more


def model_like(seed: int = 0, **changes: Any) -> Any:
    """A micro model of the demo's tokens, untied, with a head dimension that CPU attention has."""
    tokenizer = decimals.build_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        # rounding grows with the logits
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return micro_model(seed, **settings | changes)


def save_files(folder: Path, **changes: Any) -> Path:
    """Makes what a run reads: model/, train.jsonl and rewards.py."""
    model_like(**changes).save_pretrained(folder / "model")
    decimals.build_tokenizer().save_pretrained(folder / "model")
    pairs = decimals.held_out_pairs(40)
    records = [{"prompt": pair.question, "answer": pair.answer} for pair in pairs]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "rewards.py").write_text(
        "def digits(completions, **_):\n"
        "    return [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
    )
    return folder


class RealServer:
    """`vllm serve`, in a session of its own, so that all its processes end together.

    Args:
        model: folder of the model it starts with.
        log: file for its output.
        more: options.
    """

    def __init__(self, model: Path, log: Path, *more: str) -> None:
        self.model, self.log, self.more = model, log, more
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # seconds that each start took
        self.starts: list[float] = []

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        words = [str(Path(sys.executable).parent / "vllm"), "serve", str(self.model)]
        words += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--enforce-eager", "--max-model-len", str(LONGEST), "--max-num-seqs", "32"]
        words += ["--gpu-memory-utilization", "0.1", "--logprobs-mode", "processed_logprobs"]
        words += ["--weight-transfer-config", json.dumps({"backend": "grpo_folder"})]
        begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *self.more],
                env=environment(VLLM_SERVER_DEV_MODE="1"),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while time.monotonic() < begin + START and self.process.poll() is None:
            if self.is_up():
                self.starts.append(time.monotonic() - begin)
                return
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.tail()}")

    def is_up(self) -> bool:
        """Whether it completes requests."""
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False

    def ask(self, route: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
        """Status and answer of a GET, or of a POST with a body."""
        return ask(self.url + route, body, timeout)

    def freeze(self) -> None:
        """Stops all its processes during a completion; connections are accepted all the same."""
        assert self.process is not None
        # keys and values are not discarded while completions run
        while self.ask("/reset_prefix_cache", {})[1]["success"]:
            pass
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Ends `freeze`."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

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
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


def ask(url: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
    """Status and answer of a GET, or of a POST with a body.

    Raises:
        OSError: there is no answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    return status, json.loads(text) if text else None


def options(files: Path, output: Path, *more: str) -> list[str]:
    """Of a run on the share of digits, which the micro model learns in 15 steps."""
    given: dict[str, Any] = {
        "model": files / "model",
        "data": files / "train.jsonl",
        "output": output,
        "rewards": f"{files / 'rewards.py'}:digits",
        "steps": 15,
        "prompts": 4,
        "group_size": 8,
        "minibatches": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "max_new_tokens": 8,
        "checkpoint_every": 1,
        "threads": 1,
        "console": "plain",
    }
    return [*(w for name, value in given.items() for w in (f"--{name}", str(value))), *more]


def over(url: str, files: Path, folder: Path, *more: str) -> list[str]:
    """The same over servers, in the folder."""
    engine = ["--rollout", "vllm-server", "--rollout_url", url]
    engine += ["--rollout_weights", "folder", "--rollout_folder", str(folder / "weights")]
    return options(files, folder / "run", *engine, *more)


class Command:
    """`python -m grpo_core.reinforce`, with its output in a file beside the run."""

    def __init__(self, words: list[str]) -> None:
        self.run = Path(words[words.index("--output") + 1])
        self.log = self.run.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo_core.reinforce", *words],
                env=environment(),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Its exit status; killed if it takes too long."""
        try:
            return self.process.wait(END)
        finally:
            self.kill()

    def wait_for(self, steps: int) -> None:
        """Waits for a record of this many steps."""
        end = time.monotonic() + END
        while time.monotonic() < end and self.process.poll() is None:
            if len(records(self.run)) >= steps:
                return
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"{steps} steps were expected:\n{self.output()}")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kills it, and an engine that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """What it wrote."""
        return self.log.read_text("utf-8", "replace")


def records(run: Path) -> list[dict[str, Any]]:
    """The records of its steps; a line may be half written."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] > 0]


def mismatch(model: Any, prompts: list[list[int]], drawn: Any, temperature: float) -> float:
    """Largest difference between the engine's log-probabilities and the model's, nats."""
    return max(
        (
            difference.abs().max().item()
            for difference in differences(model, prompts, drawn, temperature)
        ),
        default=0.0,
    )


def differences(
    model: Any, prompts: Any, drawn: Any, temperature: float = 1.0
) -> list[torch.Tensor]:
    """log π_model - log π_engine of the sampled tokens of each completion, nats."""
    found = []
    columns = drawn.completions(), drawn.sampler_logp, drawn.is_sampled
    for prompt, ids, logp, sampled in zip(prompts, *columns, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        found.append((expected - logp[: len(ids)])[sampled[: len(ids)]])
    return found
