"""Weights for vLLM servers by NCCL, packed, in a group whose rank 0 is the trainer's.

The servers get the list of weights first, then receive while the trainer sends. Servers and trainer
cannot share a GPU, since NCCL allows one rank per GPU. Not run, see `tests/fake_vllm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import accumulate
from typing import Any

from torch import Tensor

from grpo_core.trainer.engine import in_background
from grpo_core.trainer.vllm.common import dtype_name, vllm_module
from grpo_core.trainer.weights import ModelWeights


class Nccl:
    """Weights by NCCL; the client is `server.Servers`. Needs vLLM, whose code sends."""

    backend = "nccl"

    def __init__(self) -> None:
        vllm_module()

    def open(self, client: Any) -> None:
        """Opens the group of the trainer, rank 0, and all workers of the servers."""
        network = vllm_module("utils.network_utils")
        sizes = client.each(lambda server: server.get("get_world_size")["world_size"])
        address = {
            "master_address": network.get_ip(),
            "master_port": network.get_open_port(),
            "world_size": 1 + sum(sizes),
        }
        # the first rank of each server
        offsets = list(accumulate(sizes, initial=1))[:-1]

        def init(server: Any, offset: int) -> None:
            info = {**address, "rank_offset": offset, "packed": True}
            server.post("init_weight_transfer_engine", {"init_info": info})

        join = vllm_module("distributed.weight_transfer.nccl_common").trainer_init
        self.group = both_sides(lambda: client.each(init, offsets), lambda joined: join(address))

    def send(self, client: Any, weights: ModelWeights) -> None:
        """Sends weights while the servers receive."""
        specs = weights.describe()
        update = {
            "names": [spec.name for spec in specs],
            "dtype_names": [dtype_name(spec.dtype) for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
        }
        transfer = vllm_module("distributed.weight_transfer.packed_tensor")
        both_sides(
            lambda: client.update_weights({"update_info": update}),
            lambda received: transfer.packed_nccl_broadcast_producer(
                iterator=while_receiving(weights, received),
                group=self.group,
                src=0,
                post_iter_func=lambda pair: pair[1],
            ),
        )


def both_sides(request: Callable[[], Any], act: Callable[[Future[Any]], Any]) -> Any:
    """The result of `act` in this thread, during a request to the server in another one."""
    # after an error the server may not answer
    answer = in_background(request)
    result = act(answer)
    answer.result()
    return result


def while_receiving(weights: ModelWeights, received: Future[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights; raises the server's error if it has one, since sending would hang."""
    for weight in weights:
        if received.done():
            received.result()
        yield weight
