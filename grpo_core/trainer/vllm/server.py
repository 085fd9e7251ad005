"""Rollouts by a vLLM server, on GPUs of its own.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --weight-transfer-config '{"backend": "nccl"}'

Completions come over HTTP, one request each. Weights go to its workers by NCCL, packed, in a group
in which the trainer's main process is rank 0: the server is told what is to come, and receives
while the trainer sends. Server and trainer cannot share a GPU, since NCCL refuses two ranks on one.

For vLLM 0.28 to 0.33: routes and names were compared with the source of 0.28.0 and 0.33.0. It was
only ever run against a stand-in for both ends, see `tests/fake_vllm`.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import gathered, is_main
from grpo_core.trainer.rollout import Rollout, Sampling, special_tokens
from grpo_core.trainer.rollout_tensors import rollout_of
from grpo_core.trainer.vllm.common import (
    check_ends,
    dtype_name,
    request_options,
    seeds,
    version_number,
    vllm_module,
    weight_update,
)
from grpo_core.trainer.weights import Described, ModelWeights

# requests at a time; the server batches them
AT_ONCE = 128
# further attempts at a completion whose connection broke: it has a seed, and comes out the same
ATTEMPTS = 3
# seconds: of a rollout or an update; and of the end of one that has failed, where the server's
# workers may wait for weights that never come
PATIENCE, LAST_WORDS = 1800.0, 30.0


class Server:
    """A vLLM server's HTTP routes.

    Raises:
        ConnectionError: of every method; it cannot be reached, or answers with an error.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, route: str) -> Any:
        """The answer to a GET."""
        return self._ask(urllib.request.Request(f"{self.url}/{route}"), PATIENCE, ATTEMPTS)

    def post(
        self,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        patience: float = 0.0,
        attempts: int = 0,
    ) -> Any:
        """The answer to a POST; `attempts` more if the connection breaks."""
        data = json.dumps({} if body is None else body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{route}", data, head, method="POST")
        return self._ask(request, patience or PATIENCE, attempts)

    def start_weight_update(self) -> None:
        """Of `vllm_common.Client`."""
        self.post("start_weight_update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Of `vllm_common.Client`."""
        if weight_version is None:
            self.post("finish_weight_update", patience=LAST_WORDS)
        else:
            self.post("finish_weight_update", {"weight_version": weight_version})

    def _ask(self, request: urllib.request.Request, patience: float, attempts: int) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=patience) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code == 404:
                said += "; was the server started with VLLM_SERVER_DEV_MODE=1?"
            raise ConnectionError(f"{request.full_url}: status {error.code}, {said}") from error
        except OSError as error:
            if attempts:
                time.sleep(0.5)
                return self._ask(request, patience, attempts - 1)
            raise ConnectionError(f"{request.full_url}: {error}; is the server up?") from error
        return json.loads(text) if text else None


class VllmServer:
    """A vLLM server that all processes of a group share; see `rollouts.Engine`.

    Args:
        url: such as http://localhost:8000.
        model: the trainer's; names padding and end tokens.
        dtype: that weights are sent in; the server's own saves it the conversion.

    Raises:
        ModuleNotFoundError: there is no vLLM in the trainer's environment, which sends by it.
        ConnectionError: the server cannot be reached.
        ValueError: it was started without what is needed.
    """

    separate = True
    shared = True

    def __init__(
        self, url: str, model: PreTrainedModel, *, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        vllm_module()
        self.server = Server(url)
        check_server(self.server)
        self.pad, self.ends = special_tokens(model)
        self.device, self.dtype = model.device, dtype
        self.name = self.server.get("v1/models")["data"][0]["id"]
        # one for all processes
        self.session = gathered(uuid4().hex)[0]
        self.group = open_group(self.server) if is_main() else None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, each by a seed of its own from torch's generator."""
        named = request_options(sampling, self.ends) | {"model": self.name}

        def ask(prompt: Sequence[int], seed: int) -> Any:
            body = named | {"prompt": list(prompt), "seed": seed, "return_token_ids": True}
            found = self.server.post("v1/completions", body, attempts=ATTEMPTS)
            return found["choices"][0]

        before = self.server.get("weight_info")["weight_version"]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            choices = list(threads.map(ask, prompts, seeds(len(prompts))))
        after = self.server.get("weight_info")["weight_version"]
        completions = [choice["token_ids"] for choice in choices]
        check_ends(completions, [choice["finish_reason"] for choice in choices], self.ends)
        return rollout_of(
            prompts,
            completions,
            [choice["logprobs"]["token_logprobs"] for choice in choices],
            pad=self.pad,
            ends=self.ends,
            device=self.device,
            weight_version=version_number(before, after, self.session),
        )

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """By NCCL, while the server receives; in the main process."""
        weights = weights.to(self.dtype)
        coming = weights.described()
        announced = {
            "names": [each.name for each in coming],
            "dtype_names": [dtype_name(each.dtype) for each in coming],
            "shapes": [list(each.shape) for each in coming],
        }
        send = vllm_module("distributed.weight_transfer.packed_tensor")
        with weight_update(self.server, f"{self.session}/{version}"):
            threads = ThreadPoolExecutor(1)
            try:
                body = {"update_info": announced}
                received = threads.submit(self.server.post, "update_weights", body)
                send.packed_nccl_broadcast_producer(
                    iterator=as_announced(weights, coming, received),
                    group=self.group,
                    src=0,
                    post_iter_func=lambda pair: pair[1],
                )
                received.result()
            finally:
                # after an error the server may never answer
                threads.shutdown(wait=False)
        # keys and values of the weights before
        self.server.post("reset_prefix_cache")


def check_server(server: Server) -> None:
    """Raises ValueError unless the server takes weights and tells log-probabilities as drawn."""
    config = server.get("server_info?config_format=json")["vllm_config"]
    transfer = (config.get("weight_transfer_config") or {}).get("backend")
    if transfer != "nccl":
        wanted = """--weight-transfer-config '{"backend": "nccl"}'"""
        raise ValueError(f"rollout_url: expected a server with {wanted}, got {transfer!r}")
    mode = config["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            "rollout_url: expected a server with --logprobs-mode processed_logprobs, whose "
            f"log-probabilities are those at the temperature, got {mode!r}"
        )


def open_group(server: Server) -> Any:
    """The NCCL group of the trainer, rank 0, and the server's workers; they meet in it at once."""
    network = vllm_module("utils.network_utils")
    meeting = {
        "master_address": network.get_ip(),
        "master_port": network.get_open_port(),
        "world_size": server.get("get_world_size")["world_size"] + 1,
    }
    join = vllm_module("distributed.weight_transfer.nccl_common").trainer_init
    threads = ThreadPoolExecutor(1)
    try:
        body = {"init_info": {**meeting, "rank_offset": 1, "packed": True}}
        joined = threads.submit(server.post, "init_weight_transfer_engine", body)
        group = join(meeting)
        joined.result()
    finally:
        threads.shutdown(wait=False)
    return group


def as_announced(
    weights: ModelWeights, coming: Sequence[Described], received: Future[Any]
) -> Iterator[tuple[str, Tensor]]:
    """The weights, as long as they are what the server waits for and it has not given up.

    Raises:
        RuntimeError: otherwise; both ends would hang in NCCL.
    """
    for (name, tensor), each in zip(weights, coming, strict=True):
        if received.done():
            received.result()
        if (name, tensor.dtype, tuple(tensor.shape)) != (each.name, each.dtype, each.shape):
            raise RuntimeError(f"weights: expected {each}, got {name} {list(tensor.shape)}")
        yield name, tensor
