"""What both vLLM engines share: sampling options, seeds, weight versions, the end of an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from packaging.version import Version
from transformers import PreTrainedModel

from grpo_core.cli.options import check_package
from grpo_core.trainer.distributed import all_gather_object
from grpo_core.trainer.engine import EngineError, in_background
from grpo_core.trainer.generation import special_tokens
from grpo_core.trainer.rollout import Rollout, Sampling, make_rollout
from grpo_core.trainer.weights import ModelWeights

# the first version with packed weight transfer and weight versions
OLDEST = "0.28"
# tries to discard old keys and values, which blocks in transfer delay, and seconds between them
RESETS, RESET_PAUSE = 20, 0.5


class Completion(NamedTuple):
    """What vLLM returns for a prompt."""

    ids: list[int]
    logp: list[float]  # nats
    finish_reason: str | None
    kept: list[list[int]] | None = None  # of each token, what the filters kept


class Vllm:
    """An engine whose weights are updated by vLLM's own weight transfer; see `engine.Engine`.

    Args:
        model: the trainer's; gives padding and end tokens.
        dtype: of the weights that are sent, that of vLLM's.
        keeps: completions come with the ids that the filters kept (`sampling_mask`). vLLM then
            refuses temperature 0 and completions without top_k.
    """

    client: Any  # vLLM's `LLM`, or `Servers` with methods of the same names
    transfer: Any  # way of the weights: `Ipc`, `Nccl` or `Folder`

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, keeps: bool = False) -> None:
        self.pad, self.ends = special_tokens(model)
        self.device, self.dtype, self.keeps = model.device, dtype, keeps
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        # equal on all ranks; part of the version of the weights
        self.session = all_gather_object(uuid4().hex)[0]

    def complete(
        self, prompts: Sequence[Sequence[int]], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[Completion]:
        """Samples one completion per prompt."""
        raise NotImplementedError

    def pause(self) -> None:
        """Makes vLLM ready for an update, with no completion under way."""
        self.client.pause()

    def resume(self) -> None:
        """Ends what `pause` has started."""
        self.client.resume()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, each with a seed from torch's generator."""
        return self.begin(prompts, sampling)()

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Rollout]:
        """Draws the seeds; the result samples, in any thread."""
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        return partial(self.sample, prompts, sampling, seeds)

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout:
        """One completion per prompt and seed."""
        before = self.client.get_weight_version()
        options = request_options(sampling, self.ends)
        if self.keeps:
            options = always_filtered(options, self.vocabulary)
        completions = self.complete(prompts, options, seeds)
        after = self.client.get_weight_version()
        check_ends(completions, self.ends)
        session, _, version = before.partition("/")
        is_ours = before == after and session == self.session
        return make_rollout(
            prompts,
            [completion.ids for completion in completions],
            [completion.logp for completion in completions],
            pad=self.pad,
            ends=self.ends,
            device=self.device,
            weight_version=int(version) if is_ours else None,
            kept=kept_sets(completions) if sampling.keeps else None,
        )

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Sends weights while vLLM pauses; its version is set last.

        After an error no version is set, so that completions are refused until an update succeeds.
        """
        try:
            self.pause()
            self.client.start_weight_update()
            self.transfer.send(self.client, weights.to(self.dtype))
            self.reset_cache()
            self.client.finish_weight_update(f"{self.session}/{version}")
        except BaseException:
            self.close_update()
            raise
        self.resume()

    def close_update(self) -> None:
        """Ends an update that has failed, or that a trainer has left open, and resumes.

        An open one refuses another start and needs an end. One that vLLM has ended may leave layers
        that take the next weights wrongly; an empty update restores them.
        """
        client = self.client
        for call in (client.start_weight_update, client.finish_weight_update, self.resume):
            # it would hide the first error; `LLM` raises no other kind
            with suppress(Exception):
                call()

    def reset_cache(self) -> None:
        """Discards keys and values of other weights; raises EngineError if vLLM keeps them."""
        for _ in range(RESETS):
            if self.client.reset_prefix_cache():
                return
            time.sleep(RESET_PAUSE)
        raise EngineError(
            "reset_prefix_cache: expected success, got none; does vLLM serve others meanwhile?"
        )


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
    return import_module(f"vllm.{name}") if name else vllm


def request_options(sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """Options of a completion, under the names that `SamplingParams` and the server share.

    Everything else that would change the policy's distribution is set to its neutral value, since
    a server takes missing options from the checkpoint's generation_config.json.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(ends),
        # only the sampled token
        "logprobs": 0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def always_filtered(options: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The same distribution by a temperature and a top_k above 0, which sampling masks require."""
    if options["temperature"] == 0:
        return {**options, "temperature": 1.0, "top_k": 1}
    return {**options, "top_k": options["top_k"] or vocabulary}


def kept_sets(completions: Sequence[Completion]) -> list[list[list[int]]]:
    """What the filters kept, of each token of each completion.

    Raises:
        EngineError: vLLM did not return it.
    """
    if any(completion.kept is None for completion in completions):
        raise EngineError("completion: expected the kept ids of every token, got no sampling_mask")
    return [completion.kept or [] for completion in completions]


def check_ends(completions: Sequence[Completion], ends: Sequence[int]) -> None:
    """Raises EngineError unless each completion ends with an end token or at the limit."""
    for ids, _, reason, _ in completions:
        ended = bool(ids) and ids[-1] in ends
        if not ids or reason not in ("stop", "length") or (reason == "stop" and not ended):
            last = ids[-1] if ids else None
            raise EngineError(
                f"completion: expected one of the end tokens {list(ends)}, or the length limit, "
                f"got finish_reason {reason!r} after token {last}"
            )


def in_threads(call: Callable[..., Any], count: int, *arguments: Sequence[Any]) -> list[Any]:
    """Results of a function for each of the arguments, by at most `count` threads.

    After an error or Ctrl-C nothing is begun but the first call of each thread. Ctrl-C and the end
    of the program do not wait for calls that run, as they do for those of an executor.
    """
    calls = list(zip(*arguments, strict=True))
    results: list[Any] = [None] * len(calls)
    # all threads share the later numbers: to advance is atomic
    first, later = range(len(calls))[:count], iter(range(len(calls))[count:])

    def work(number: int | None) -> None:
        while number is not None:
            results[number] = call(*calls[number])
            number = next(later, None)

    threads = [in_background(partial(work, number)) for number in first]
    try:
        wait(threads, return_when=FIRST_EXCEPTION)
    finally:
        for _ in later:
            pass
    wait(threads)
    for thread in threads:
        thread.result()
    return results


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in vLLM."""
    return str(dtype).removeprefix("torch.")
