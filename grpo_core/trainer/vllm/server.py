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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import all_gather_object, is_main
from grpo_core.trainer.generation import special_tokens
from grpo_core.trainer.rollout import Rollout, Sampling, make_rollout
from grpo_core.trainer.vllm.common import (
    check_ends,
    dtype_name,
    request_options,
    seeds,
    version_number,
    vllm_module,
    weight_update,
)
from grpo_core.trainer.weights import ModelWeights, WeightSpec

# concurrent requests; the server batches them
CONCURRENCY = 128
# retries of a request whose connection broke; completions have seeds and come out equal
RETRIES = 3
# seconds for a request, and for ending an update that failed, while workers may wait for weights
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
        return self._send(urllib.request.Request(f"{self.url}/{route}"), TIMEOUT, RETRIES)

    def post(
        self,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float = 0.0,
        retries: int = 0,
    ) -> Any:
        """The answer to a POST, repeated `retries` times if the connection breaks."""
        data = json.dumps({} if body is None else body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{route}", data, head, method="POST")
        return self._send(request, timeout or TIMEOUT, retries)

    def start_weight_update(self) -> None:
        """See `common.Client`."""
        self.post("start_weight_update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `common.Client`."""
        if weight_version is None:
            self.post("finish_weight_update", timeout=ABORT_TIMEOUT)
        else:
            self.post("finish_weight_update", {"weight_version": weight_version})

    def _send(self, request: urllib.request.Request, timeout: float, retries: int) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            if error.code == 404:
                message += "; was the server started with VLLM_SERVER_DEV_MODE=1?"
            raise ConnectionError(f"{request.full_url}: status {error.code}, {message}") from error
        except OSError as error:
            if retries:
                time.sleep(0.5)
                return self._send(request, timeout, retries - 1)
            raise ConnectionError(f"{request.full_url}: {error}; is the server up?") from error
        return json.loads(text) if text else None


class VllmServer:
    """A vLLM server that all ranks share; see `engine.Engine`.

    Args:
        url: such as http://localhost:8000.
        model: the trainer's; gives padding and end tokens.
        dtype: of the weights that are sent, ideally that of the server.

    Raises:
        ModuleNotFoundError: vLLM, whose code sends weights, is not installed beside the trainer.
        ConnectionError: the server cannot be reached.
        ValueError: the server was started with other options than needed.
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
        # equal on all ranks
        self.session = all_gather_object(uuid4().hex)[0]
        self.group = open_group(self.server) if is_main() else None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, each with a seed from torch's generator."""
        named = request_options(sampling, self.ends) | {"model": self.name}

        def complete(prompt: Sequence[int], seed: int) -> Any:
            body = named | {"prompt": list(prompt), "seed": seed, "return_token_ids": True}
            return self.server.post("v1/completions", body, retries=RETRIES)["choices"][0]

        before = self.server.get("weight_info")["weight_version"]
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            choices = list(threads.map(complete, prompts, seeds(len(prompts))))
        after = self.server.get("weight_info")["weight_version"]
        completions = [choice["token_ids"] for choice in choices]
        check_ends(completions, [choice["finish_reason"] for choice in choices], self.ends)
        return make_rollout(
            prompts,
            completions,
            [choice["logprobs"]["token_logprobs"] for choice in choices],
            pad=self.pad,
            ends=self.ends,
            device=self.device,
            weight_version=version_number(before, after, self.session),
        )

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Sends weights by NCCL from rank 0 while the server receives."""
        weights = weights.to(self.dtype)
        specs = weights.describe()
        update = {
            "names": [spec.name for spec in specs],
            "dtype_names": [dtype_name(spec.dtype) for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
        }
        send = vllm_module("distributed.weight_transfer.packed_tensor")
        with weight_update(self.server, f"{self.session}/{version}"):
            threads = ThreadPoolExecutor(1)
            try:
                body = {"update_info": update}
                received = threads.submit(self.server.post, "update_weights", body)
                send.packed_nccl_broadcast_producer(
                    iterator=check_specs(weights, specs, received),
                    group=self.group,
                    src=0,
                    post_iter_func=lambda pair: pair[1],
                )
                received.result()
            finally:
                # after an error the server may not answer
                threads.shutdown(wait=False)
        # keys and values computed with the old weights
        self.server.post("reset_prefix_cache")


def check_server(server: Server) -> None:
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


def open_group(server: Server) -> Any:
    """Opens the NCCL group of the trainer, rank 0, and the server's workers."""
    network = vllm_module("utils.network_utils")
    address = {
        "master_address": network.get_ip(),
        "master_port": network.get_open_port(),
        "world_size": server.get("get_world_size")["world_size"] + 1,
    }
    join = vllm_module("distributed.weight_transfer.nccl_common").trainer_init
    threads = ThreadPoolExecutor(1)
    try:
        body = {"init_info": {**address, "rank_offset": 1, "packed": True}}
        server_joins = threads.submit(server.post, "init_weight_transfer_engine", body)
        group = join(address)
        server_joins.result()
    finally:
        threads.shutdown(wait=False)
    return group


def check_specs(
    weights: ModelWeights, specs: Sequence[WeightSpec], received: Future[Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights while they match their specs and the server still receives.

    Raises:
        RuntimeError: a weight does not match; both sides would hang in NCCL.
    """
    for (name, tensor), spec in zip(weights, specs, strict=True):
        if received.done():
            received.result()
        if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
            raise RuntimeError(f"weights: expected {spec}, got {name} {list(tensor.shape)}")
        yield name, tensor
