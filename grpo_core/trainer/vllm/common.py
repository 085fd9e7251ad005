"""Shared by both vLLM engines: options, seeds, weight versions, weight updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
from packaging.version import Version

from grpo_core.cli.options import check_package
from grpo_core.trainer.rollout import Sampling

# the first version with packed weight transfer and weight versions
OLDEST = "0.28"


class Client(Protocol):
    """Receives weights, as vLLM's `LLM` does."""

    def start_weight_update(self) -> None:
        """Called before the first piece."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Called after the last piece; sets the version of the weights, if there is one."""
        ...


def vllm_module(name: str = "") -> ModuleType:
    """vLLM, or a module within it.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: the version is too old.
    """
    package = f"'vllm>={OLDEST}'"
    check_package("rollout", "vllm", package)
    vllm = import_module("vllm")
    if Version(vllm.__version__) < Version(OLDEST):
        raise ValueError(f"vllm: expected {OLDEST} or later, got {vllm.__version__}")
    if not name:
        return vllm
    check_package("rollout", f"vllm.{name}", package)
    return import_module(f"vllm.{name}")


def request_options(sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """Options of a completion, under the names that `SamplingParams` and the server share.

    Everything that would change the policy's distribution is set to its neutral value, since a
    server takes missing options from the checkpoint's generation_config.json.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(ends),
        # only the sampled token
        "logprobs": 0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def seeds(count: int) -> list[int]:
    """One seed per completion, so that completions of a group differ."""
    return torch.randint(2**31 - 1, (count,)).tolist()


def check_ends(
    completions: Sequence[Sequence[int]], reasons: Sequence[str | None], ends: Sequence[int]
) -> None:
    """Raises RuntimeError unless each completion ends with an end token or at the limit."""
    for ids, reason in zip(completions, reasons, strict=True):
        ended = bool(ids) and ids[-1] in ends
        if not ids or reason not in ("stop", "length") or (reason == "stop" and not ended):
            last = ids[-1] if ids else None
            raise RuntimeError(
                f"completion: expected one of the end tokens {list(ends)}, or the length limit, "
                f"got finish_reason {reason!r} after token {last}"
            )


def version_number(before: str, after: str, session: str) -> int | None:
    """The version that this session has set; None if another has, or if it changed."""
    ours, _, number = before.partition("/")
    return int(number) if before == after and ours == session else None


@contextmanager
def weight_update(client: Client, version: str) -> Iterator[None]:
    """Context for sending weights, which ends the update in vLLM in any case.

    After an error no version is set, so that completions are refused until an update succeeds.
    """
    client.start_weight_update()
    complete = False
    try:
        yield
        complete = True
    finally:
        client.finish_weight_update(version if complete else None)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in vLLM."""
    return str(dtype).removeprefix("torch.")
