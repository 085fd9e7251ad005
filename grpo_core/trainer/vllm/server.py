"""Rollouts by a vLLM server on other GPUs.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --weight-transfer-config '{"backend": "nccl"}'

Completions come over HTTP, one request each. Weights are sent to the workers by NCCL, packed, in a
group whose rank 0 is the trainer's: the server gets the list of weights first, then receives while
the trainer sends. Server and trainer cannot share a GPU, since NCCL allows one rank per GPU.

For vLLM 0.28 to 0.33: routes and names were compared with the source of 0.28.0 and 0.33.0. Tested
only with a stand-in for both sides, see `tests/fake_vllm`.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import is_main
from grpo_core.trainer.vllm.common import Completion, Vllm, dtype_name, vllm_module
from grpo_core.trainer.weights import ModelWeights

# concurrent requests; the server batches them
CONCURRENCY = 128
# retries of a request whose connection broke; completions have seeds and come out equal
RETRIES = 3
# seconds for a request, and for ending an update that failed, while workers may wait for weights
TIMEOUT, ABORT_TIMEOUT = 1800.0, 30.0


class Server:
    """A vLLM server's HTTP routes, and the methods of vLLM's `LLM` that an update needs.

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

    def get_weight_version(self) -> str:
        """The version that the last update has set."""
        version: str = self.get("weight_info")["weight_version"]
        return version

    def start_weight_update(self) -> None:
        """Called before the weights are sent."""
        self.post("start_weight_update", {})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Called after the weights are sent; without a version after an error."""
        if weight_version is None:
            self.post("finish_weight_update", {}, ABORT_TIMEOUT)
        else:
            self.post("finish_weight_update", {"weight_version": weight_version})

    def reset_prefix_cache(self) -> None:
        """Discards keys and values."""
        self.post("reset_prefix_cache", {})

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
        except OSError as error:
            if retries:
                time.sleep(0.5)
                return self._ask(route, data, timeout, retries - 1)
            raise ConnectionError(f"{url}: {error}; is the server up?") from error
        return json.loads(text) if text else None


class VllmServer(Vllm):
    """A vLLM server that all ranks share; see `engine.Engine`.

    Args:
        url: such as http://localhost:8000.
        model: the trainer's; gives padding and end tokens.
        dtype: of the weights that are sent, ideally that of the server.
        keeps: completions come with the ids that top-p, top-k and min-p kept.

    Raises:
        ModuleNotFoundError: vLLM, whose code sends weights, is not installed beside the trainer.
        ConnectionError: the server cannot be reached.
        ValueError: the server was started with other options than needed.
    """

    def __init__(
        self,
        url: str,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.bfloat16,
        keeps: bool = False,
    ) -> None:
        vllm_module()
        self.client = server = Server(url)
        check_server(server, keeps)
        super().__init__(model, dtype, keeps)
        self.name = server.get("v1/models")["data"][0]["id"]
        self.group = open_group(server) if is_main() else None

    def complete(
        self, prompts: Sequence[Sequence[int]], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[Completion]:
        """Samples one completion per prompt, by a request each."""

        def ask(prompt: Sequence[int], seed: int) -> Completion:
            if self.keeps:
                return ask_for_kept(prompt, seed)
            body = {"model": self.name, "prompt": list(prompt), "seed": seed, **options}
            body["return_token_ids"] = True
            answer = self.client.post("v1/completions", body, retries=RETRIES)
            (choice,) = answer["choices"]
            logp = choice["logprobs"]["token_logprobs"]
            return Completion(choice["token_ids"], logp, choice["finish_reason"])

        def ask_for_kept(prompt: Sequence[int], seed: int) -> Completion:
            # the one route that returns sampling masks
            params = {**options, "seed": seed, "detokenize": False}
            body = {"model": self.name, "token_ids": list(prompt), "sampling_params": params}
            answer = self.client.post("inference/v1/generate", body, retries=RETRIES)
            (choice,) = answer["choices"]
            logp = [each["logprob"] for each in choice["logprobs"]["content"]]
            ids, kept = choice["token_ids"], choice["sampling_mask"]
            return Completion(ids, logp, choice["finish_reason"], kept)

        with ThreadPoolExecutor(CONCURRENCY) as threads:
            return list(threads.map(ask, prompts, seeds))

    def send(self, weights: ModelWeights) -> None:
        """Sends weights by NCCL from rank 0 while the server receives."""
        specs = weights.describe()
        update = {
            "names": [spec.name for spec in specs],
            "dtype_names": [dtype_name(spec.dtype) for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
        }
        transfer = vllm_module("distributed.weight_transfer.packed_tensor")
        both_sides(
            lambda: self.client.post("update_weights", {"update_info": update}),
            lambda received: transfer.packed_nccl_broadcast_producer(
                iterator=while_receiving(weights, received),
                group=self.group,
                src=0,
                post_iter_func=lambda pair: pair[1],
            ),
        )


def check_server(server: Server, keeps: bool = False) -> None:
    """Raises ValueError unless the server has the options for weights and log-probabilities."""
    config = server.get("server_info?config_format=json")["vllm_config"]
    transfer = (config.get("weight_transfer_config") or {}).get("backend")
    if transfer != "nccl":
        wanted = """--weight-transfer-config '{"backend": "nccl"}'"""
        raise ValueError(f"rollout_url: expected a server with {wanted}, got {transfer!r}")
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


def open_group(server: Server) -> Any:
    """Opens the NCCL group of the trainer, rank 0, and the server's workers."""
    network = vllm_module("utils.network_utils")
    address = {
        "master_address": network.get_ip(),
        "master_port": network.get_open_port(),
        "world_size": server.get("get_world_size")["world_size"] + 1,
    }
    init = {**address, "rank_offset": 1, "packed": True}
    join = vllm_module("distributed.weight_transfer.nccl_common").trainer_init
    return both_sides(
        lambda: server.post("init_weight_transfer_engine", {"init_info": init}),
        lambda joined: join(address),
    )


def both_sides(request: Callable[[], Any], act: Callable[[Future[Any]], Any]) -> Any:
    """The result of `act` in this thread, during a request to the server in another one."""
    threads = ThreadPoolExecutor(1)
    try:
        answer = threads.submit(request)
        result = act(answer)
        answer.result()
        return result
    finally:
        # after an error the server may not answer
        threads.shutdown(wait=False)


def while_receiving(weights: ModelWeights, received: Future[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights; raises the server's error if it has one, since sending would hang."""
    for weight in weights:
        if received.done():
            received.result()
        yield weight
