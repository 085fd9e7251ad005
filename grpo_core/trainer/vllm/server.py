"""Rollouts by vLLM servers on other devices.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --weight-transfer-config '{"backend": "nccl"}'

Completions come over HTTP, one request each. During an update the servers pause. Weights come by
NCCL, see `nccl`, or as files, see `files`, for servers with the backend `grpo_folder`.

Routes and names are those of vLLM 0.28.0, 0.30.0 and 0.32.0; 0.32.0 was run on a CPU.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import is_main
from grpo_core.trainer.vllm.common import Completion, Vllm, in_threads
from grpo_core.trainer.vllm.files import Folder
from grpo_core.trainer.vllm.nccl import Nccl

# concurrent requests to a server, which batches them
CONCURRENCY = 128
# retries of a request whose connection broke; completions have seeds and come out equal
RETRIES = 3
# seconds for a request, and for one that may follow an error, while workers may wait for weights
TIMEOUT, ABORT_TIMEOUT = 1800.0, 30.0


class Server:
    """A vLLM server's HTTP routes.

    Raises:
        ConnectionError: by all methods; no connection, or a status that is an error.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, route: str) -> Any:
        """The answer to a GET."""
        return self._ask(route, None, TIMEOUT, RETRIES)

    def post(
        self, route: str, body: dict[str, Any], timeout: float = TIMEOUT, retries: int = 0
    ) -> Any:
        """The answer to a POST, repeated `retries` times if the connection breaks."""
        return self._ask(route, json.dumps(body).encode(), timeout, retries)

    def _ask(self, route: str, data: bytes | None, timeout: float, retries: int) -> Any:
        url, head = f"{self.url}/{route}", {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(url, data, head)
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            if error.code == 404:
                message += "; was the server started with VLLM_SERVER_DEV_MODE=1"
                message += " and --enable-scale-out?" if "inference/" in route else "?"
            raise ConnectionError(f"{url}: status {error.code}, {message}") from error
        # an answer that breaks off is no OSError
        except (OSError, HTTPException) as error:
            if retries:
                time.sleep(0.5)
                return self._ask(route, data, timeout, retries - 1)
            raise ConnectionError(f"{url}: {error}; is the server up?") from error
        return json.loads(text) if text else None


class Servers:
    """The methods of vLLM's `LLM` that an update needs, of several servers at once.

    Raises:
        ConnectionError: by all methods, after every server was asked; see `Server`.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers

    def each(self, call: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """What a function returns for each server, and its arguments, at the same time."""
        return in_threads(call, len(self.servers), self.servers, *arguments)

    def post(self, route: str, body: dict[str, Any], timeout: float = TIMEOUT) -> list[Any]:
        """The answers to a POST."""
        return self.each(lambda server: server.post(route, body, timeout))

    def pause(self) -> None:
        """Waits for completions that are under way; new ones wait from now on."""
        self.post("pause?mode=wait", {})

    def resume(self) -> None:
        """Completions go on."""
        self.post("resume", {}, ABORT_TIMEOUT)

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        """Called once."""
        self.post("init_weight_transfer_engine", request)

    def start_weight_update(self) -> None:
        """Called before the weights are sent."""
        self.post("start_weight_update", {}, ABORT_TIMEOUT)

    def update_weights(self, request: dict[str, Any]) -> None:
        """Has the servers load weights."""
        self.post("update_weights", request)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Called after the weights are sent; without a version after an error."""
        timeout = ABORT_TIMEOUT if weight_version is None else TIMEOUT
        self.post("finish_weight_update", {"weight_version": weight_version}, timeout)

    def get_weight_version(self) -> str:
        """The version that the last update has set; "" if it is not the same everywhere."""
        found = set(self.each(lambda server: server.get("weight_info")["weight_version"]))
        return found.pop() if len(found) == 1 else ""

    def reset_prefix_cache(self) -> bool:
        """Discards keys and values; whether all have done so."""
        return all(answer["success"] for answer in self.post("reset_prefix_cache", {}))


class VllmServer(Vllm):
    """vLLM servers that all ranks share; see `engine.Engine`.

    Args:
        url: such as http://localhost:8000, or several with commas between them. Each completes a
            part of the prompts, one after the other.
        model: the trainer's; gives padding and end tokens.
        longest: tokens of prompt and completion that are needed; None if that is not known.
        folder: folder for weights as files, the same path on the servers; None for NCCL.
        keeps: completions come with the ids that top-p, top-k and min-p kept.

    Raises:
        ModuleNotFoundError: vLLM, whose code sends weights by NCCL, is not installed beside the
            trainer.
        ConnectionError: a server cannot be reached.
        ValueError: a server was started with other options than needed.
    """

    def __init__(
        self,
        url: str,
        model: PreTrainedModel,
        *,
        longest: int | None = None,
        folder: str | None = None,
        keeps: bool = False,
    ) -> None:
        self.transfer = Nccl() if folder is None else Folder(folder)
        self.client = servers = Servers([Server(each.strip()) for each in url.split(",")])
        urls = [each.url for each in servers.servers]
        if not all(urls) or len({*urls}) < len(urls):
            raise ValueError(f"rollout_url: expected one or several that differ, got {url!r}")
        backend = self.transfer.backend
        found = {check_server(each, backend, longest, keeps) for each in servers.servers}
        if len(found) > 1:
            raise ValueError(f"rollout_url: expected servers of one dtype, got {sorted(found)}")
        super().__init__(model, getattr(torch, found.pop()), keeps)
        names = servers.each(lambda server: server.get("v1/models")["data"][0]["id"])
        if len({*names}) > 1:
            raise ValueError(f"rollout_url: expected servers of one model, got {sorted({*names})}")
        self.name: str = names[0]
        if is_main():
            # of a trainer that has died during an update
            self.pause()
            self.close_update()
            self.transfer.open(servers)

    def complete(
        self, prompts: Sequence[Sequence[int]], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[Completion]:
        """Samples one completion per prompt, by a request each."""

        def ask(server: Server, prompt: Sequence[int], seed: int) -> Completion:
            if self.keeps:
                return ask_for_kept(server, prompt, seed)
            body = {"model": self.name, "prompt": list(prompt), "seed": seed, **options}
            body["return_token_ids"] = True
            answer = server.post("v1/completions", body, retries=RETRIES)
            (choice,) = answer["choices"]
            logp = choice["logprobs"]["token_logprobs"]
            return Completion(choice["token_ids"], logp, choice["finish_reason"])

        def ask_for_kept(server: Server, prompt: Sequence[int], seed: int) -> Completion:
            # the one route that returns sampling masks
            params = {**options, "seed": seed, "detokenize": False}
            body = {"model": self.name, "token_ids": list(prompt), "sampling_params": params}
            answer = server.post("inference/v1/generate", body, retries=RETRIES)
            (choice,) = answer["choices"]
            logp = [each["logprob"] for each in choice["logprobs"]["content"]]
            ids, kept = choice["token_ids"], choice["sampling_mask"]
            return Completion(ids, logp, choice["finish_reason"], kept)

        def ask_for_all(server: Server, part: slice) -> list[Completion]:
            return in_threads(partial(ask, server), CONCURRENCY, prompts[part], seeds[part])

        count, total = len(self.client.servers), len(prompts)
        parts = [slice(total * n // count, total * (n + 1) // count) for n in range(count)]
        return [each for part in self.client.each(ask_for_all, parts) for each in part]


def check_server(server: Server, backend: str, longest: int | None, keeps: bool) -> str:
    """Returns the name of the server's dtype.

    Raises:
        ValueError: it lacks an option for weights and log-probabilities, or is too short.
    """
    config = server.get("server_info?config_format=json")["vllm_config"]
    transfer = (config.get("weight_transfer_config") or {}).get("backend")
    if transfer != backend:
        wanted = f"--weight-transfer-config '{json.dumps({'backend': backend})}'"
        raise ValueError(f"rollout_url: expected a server with {wanted}, got {transfer!r}")
    length = config["model_config"]["max_model_len"]
    if longest is not None and longest > length:
        raise ValueError(
            f"max_new_tokens: expected at most {length} tokens with the longest prompt, the "
            f"max_model_len of {server.url}, got {longest}"
        )
    mode = config["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            "rollout_url: expected a server with --logprobs-mode processed_logprobs (at the "
            f"sampling temperature), got {mode!r}"
        )
    if keeps != bool(config["model_config"].get("return_sampling_mask")):
        expected = (
            "with --return-sampling-mask, of vLLM 0.28 or later, which returns what top_p, top_k "
            "and min_p keep, or --replay_sampling False"
            if keeps
            else "without --return-sampling-mask, since nothing is replayed"
        )
        got = "one without" if keeps else "one with it"
        raise ValueError(f"rollout_url: expected a server {expected}, got {got}")
    dtype: str = config["model_config"]["dtype"]
    return dtype.removeprefix("torch.")
