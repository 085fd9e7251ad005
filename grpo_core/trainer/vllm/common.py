"""What the two ways to vLLM have in common: options, seeds, versions, the frame of an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from packaging.version import Version

from grpo_core.trainer.extras import extra
from grpo_core.trainer.rollout import Sampling

# the first with packed pieces announced at the start, and with versions of weights
OLDEST = "0.28"


class Client(Protocol):
    """What takes new weights, as vLLM's `LLM` does."""

    def start_weight_update(self) -> None:
        """Before the first piece."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """After the last; with a version, the weights have it from now on."""
        ...


def vllm_module(name: str = "") -> ModuleType:
    """vLLM, or a module within it.

    Raises:
        ModuleNotFoundError: it is not installed.
        ValueError: it is older than this code can talk to.
    """
    package = f"'vllm>={OLDEST}'"
    vllm = extra("vllm", "rollout: the engine is vLLM, which is not installed", package)
    if Version(vllm.__version__) < Version(OLDEST):
        raise ValueError(f"vllm: expected {OLDEST} or later, got {vllm.__version__}")
    return extra(f"vllm.{name}", f"rollout: needs vllm.{name}", package) if name else vllm


def request_options(sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """The options of one completion, under the names `SamplingParams` and the server share.

    The policy itself is sampled: whatever would bend its distribution is switched off by name,
    since a server fills gaps from the checkpoint's generation_config.json.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(ends),
        # of the token that is drawn, and of no other
        "logprobs": 0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def seeds(count: int) -> list[int]:
    """One for every completion: those of a group would otherwise be the same."""
    return torch.randint(2**31 - 1, (count,)).tolist()


def check_ends(
    completions: Sequence[Sequence[int]], reasons: Sequence[str | None], ends: Sequence[int]
) -> None:
    """Raises RuntimeError unless each ended with an end token of the model, or at the limit."""
    for ids, reason in zip(completions, reasons, strict=True):
        ended = bool(ids) and ids[-1] in ends
        if not ids or reason not in ("stop", "length") or (reason == "stop" and not ended):
            last = ids[-1] if ids else None
            raise RuntimeError(
                f"completion: expected an end by one of the tokens {list(ends)} or by the limit, "
                f"got finish_reason {reason!r} after token {last}"
            )


def version_number(before: str, after: str, session: str) -> int | None:
    """The version that a trainer's session has given, None where another has, or it changed."""
    ours, _, number = before.partition("/")
    return int(number) if before == after and ours == session else None


@contextmanager
def weight_update(client: Client, version: str) -> Iterator[None]:
    """Around the sending of weights: vLLM is told of the end in any case.

    After an error without a version, so that the engine keeps the old one and its completions are
    refused until a whole update has come. Should the end fail as well, its error is raised with the
    first one as its context.
    """
    client.start_weight_update()
    complete = False
    try:
        yield
        complete = True
    finally:
        client.finish_weight_update(version if complete else None)


def dtype_name(dtype: torch.dtype) -> str:
    """As vLLM writes it."""
    return str(dtype).removeprefix("torch.")
