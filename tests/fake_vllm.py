"""What the adapters touch of vLLM 0.28 to 0.33, small: modules, an engine and a server.

Names, argument names and order of calls are the real ones; `test_vllm_names` compares them with a
vLLM that is installed. What stands for GPU memory and NCCL is a dictionary and a queue. The worker
refuses what vLLM's refuses: weights outside an update, an end without a start, unknown fields.
"""

from __future__ import annotations

import base64
import json
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_core.trainer.rollout import Sampling, rollout

GPU = "GPU-0000"
# GPU memory by handle, and what rank 0 has sent
MEMORY: dict[str, bytearray] = {}


@dataclass
class WeightTransferConfig:
    backend: str = "nccl"


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class SamplingMask:
    token_ids: list[list[int]]


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    sampling_mask: SamplingMask | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


@dataclass
class PackedIpcChunk:
    names: list[str]
    shapes: list[list[int]]
    dtype_names: list[str]
    tensor_sizes: list[int]
    ipc_handle: dict[str, tuple]


def packed_ipc_producer(
    iterator: Iterator[tuple[str, Tensor]],
    gpu_uuid: str,
    post_iter_func: Callable[[tuple[str, Tensor]], Tensor],
    buffer_size_bytes: int = 1 << 30,
) -> Iterator[PackedIpcChunk]:
    """One buffer, written over for every piece."""
    handle = f"buffer {len(MEMORY)}"
    MEMORY[handle] = bytearray()
    waiting = [post(pair, post_iter_func) for pair in iterator]
    while waiting:
        piece, size = [], 0
        while waiting and size + len(waiting[0][1]) <= buffer_size_bytes:
            piece.append(waiting.pop(0))
            size += len(piece[-1][1])
        if not piece:
            raise ValueError("tensor exceeds the buffer")
        MEMORY[handle][:] = b"".join(content for _, content, _, _ in piece)
        yield PackedIpcChunk(
            [name for name, *_ in piece],
            [shape for *_, shape in piece],
            [dtype for _, _, dtype, _ in piece],
            [len(content) for _, content, *_ in piece],
            {gpu_uuid: (handle,)},
        )


def post(pair: tuple[str, Tensor], post_iter_func: Any) -> tuple[str, bytes, str, list[int]]:
    """Name, bytes, dtype and shape."""
    tensor = post_iter_func(pair).detach().contiguous()
    content = tensor.view(torch.uint8).numpy().tobytes()
    return pair[0], content, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


class Group:
    """An NCCL group of trainer and worker."""

    def __init__(self) -> None:
        self.sent: queue.Queue[Tensor] = queue.Queue()
        self.meeting = threading.Barrier(2)


GROUP = Group()


def trainer_init(init_info: dict[str, Any], rank: int = 0) -> Group:
    """Waits for the worker."""
    assert set(init_info) == {"master_address", "master_port", "world_size"}
    GROUP.meeting.wait(5)
    return GROUP


def packed_nccl_broadcast_producer(
    iterator: Iterator[tuple[str, Tensor]],
    group: Any,
    src: int,
    post_iter_func: Callable[[tuple[str, Tensor]], Tensor],
    buffer_size_bytes: int = 1 << 30,
    num_buffers: int = 2,
) -> None:
    """Sends all."""
    assert src == 0
    while (pair := next(iterator, None)) is not None:
        group.sent.put(post_iter_func(pair).clone())


@dataclass
class Worker:
    """Holds weights, and keeps vLLM's order of calls."""

    model: Any
    backend: str
    version: str = "default"
    active: bool = False
    ready: bool = False
    calls: list[str] = field(default_factory=list)
    # raised by the next update, once
    fails: Exception | None = None
    # connections that the server drops without an answer
    drops: int = 0
    # started with return_sampling_mask
    keeps: bool = False
    # tells no masks all the same, as batch-sharded sampling does
    maskless: bool = False
    asked: list[SamplingParams] = field(default_factory=list)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        known = {
            "ipc": {"packed"},
            "nccl": {"master_address", "master_port", "rank_offset", "world_size", "packed"},
        }
        if set(init_info) - known[self.backend]:
            raise ValueError(f"Invalid init_info: {init_info}")
        assert init_info["packed"]
        if self.backend == "nccl":
            assert (init_info["rank_offset"], init_info["world_size"]) == (1, 2)
            GROUP.meeting.wait(5)
        self.ready = True

    def start_weight_update(self) -> None:
        self.calls.append("start")
        if self.active or not self.ready:
            raise RuntimeError("start_weight_update")
        self.active = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            if self.fails is not None:
                failure, self.fails = self.fails, None
                raise failure
            received = self.received(**update_info)
        except BaseException:
            self.active = False
            raise
        state = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in received:
                state[name].copy_(tensor)

    def received(
        self,
        *,
        names: list[str],
        dtype_names: list[str],
        shapes: list[list[int]],
        tensor_sizes: list[int] | None = None,
        ipc_handles_pickled: str | None = None,
    ) -> list[tuple[str, Tensor]]:
        if self.backend == "nccl":
            tensors = [GROUP.sent.get(timeout=5) for _ in names]
            for tensor, dtype, shape in zip(tensors, dtype_names, shapes, strict=True):
                assert (tensor.dtype, list(tensor.shape)) == (getattr(torch, dtype), shape)
            return list(zip(names, tensors, strict=True))
        assert ipc_handles_pickled is not None and tensor_sizes is not None
        (handle,) = pickle.loads(base64.b64decode(ipc_handles_pickled))[GPU]
        content, found = MEMORY[handle], []
        for name, dtype, shape, size in zip(names, dtype_names, shapes, tensor_sizes, strict=True):
            piece, content = content[:size], content[size:]
            flat = torch.frombuffer(bytearray(piece), dtype=getattr(torch, dtype))
            found.append((name, flat.view(shape)))
        return found

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(f"finish {weight_version and weight_version.partition('/')[2]}")
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start.")
        self.active = False
        if weight_version is not None:
            self.version = weight_version

    def complete(self, prompt: list[int], params: SamplingParams, mode: str) -> CompletionOutput:
        """Draws at the temperature, by the seed; what is told of it depends on the mode."""
        assert params.seed is not None and params.logprobs == 0 and params.n == 1
        assert params.repetition_penalty == 1.0
        self.asked.append(params)
        if self.keeps and (params.temperature <= 0 or params.top_k <= 0):
            raise ValueError("sampling distribution replay requires temperature > 0, top_k > 0")
        filters = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        with torch.random.fork_rng():
            torch.manual_seed(params.seed)
            limit = params.max_tokens or 16
            sampling = Sampling(limit, params.temperature, **filters)  # type: ignore[arg-type]
            drawn = rollout(self.model, [prompt], sampling)
        (ids,) = drawn.completions()
        logp = drawn.sampler_logp[0].tolist()
        if mode == "raw_logprobs":
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
        ended = ids[-1] in (params.stop_token_ids or [])
        scores = [{token: Logprob(value, 1)} for token, value in zip(ids, logp, strict=False)]
        reason = "stop" if ended else "length"
        mask = None
        if self.keeps and not self.maskless:
            assert drawn.kept is not None
            sets = drawn.kept.ids.tensor_split(drawn.kept.offsets[1:-1])
            mask = SamplingMask([each.tolist() for each in sets])
        return CompletionOutput(0, "", ids, None, scores, reason, mask)


class LLM:
    """vLLM in the trainer's process, as it seems."""

    made: LLM

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        weight_transfer_config: WeightTransferConfig | None = None,
        return_sampling_mask: bool = False,
    ) -> None:
        assert weight_transfer_config is not None and generation_config == "vllm"
        worker = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        backend = weight_transfer_config.backend
        self.worker = Worker(worker.eval(), backend, keeps=return_sampling_mask)
        self.mode, self.asleep, self.slept, self.resets = logprobs_mode, False, 0, 0
        LLM.made = self

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert not self.asleep
        asked = zip(prompts, sampling_params, strict=True)
        return [
            RequestOutput([self.worker.complete(each["prompt_token_ids"], params, self.mode)])
            for each, params in asked
        ]

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.worker.init_weight_transfer_engine(request["init_info"])

    def start_weight_update(self) -> None:
        assert not self.asleep
        self.worker.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        # what crosses to the engine's process without pickle
        self.worker.update_weights(json.loads(json.dumps(request["update_info"])))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.worker.finish_weight_update(weight_version)

    def get_weight_version(self) -> str:
        return self.worker.version

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert level == 1, "level 2 drops the weights"
        self.asleep, self.slept = True, self.slept + 1

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.asleep = False


def modules(version: str = "0.33.0") -> dict[str, ModuleType]:
    """For `sys.modules`."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version, "LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.config": {"WeightTransferConfig": WeightTransferConfig},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.packed_tensor": {
            "packed_ipc_producer": packed_ipc_producer,
            "packed_nccl_broadcast_producer": packed_nccl_broadcast_producer,
        },
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
        "vllm.utils": {},
        "vllm.utils.network_utils": {
            "get_ip": lambda: "127.0.0.1",
            "get_open_port": lambda: 29500,
        },
    }
    found = {}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(content)
    return found


@contextmanager
def server(
    worker: Worker, logprobs_mode: str = "processed_logprobs", backend: str | None = "nccl"
) -> Iterator[str]:
    """`vllm serve`, at the address it yields."""
    config = {
        "model_config": {"logprobs_mode": logprobs_mode, "return_sampling_mask": worker.keeps},
        "weight_transfer_config": backend and {"backend": backend},
    }
    gets = {
        "/server_info": lambda: {"vllm_config": config},
        "/v1/models": lambda: {"data": [{"id": "micro"}]},
        "/weight_info": lambda: {"weight_version": worker.version},
        "/get_world_size": lambda: {"world_size": 1},
    }
    posts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "/init_weight_transfer_engine": lambda b: worker.init_weight_transfer_engine(
            b["init_info"]
        ),
        "/start_weight_update": lambda _: worker.start_weight_update(),
        "/update_weights": lambda b: worker.update_weights(b["update_info"]),
        "/finish_weight_update": lambda b: worker.finish_weight_update(b.get("weight_version")),
        "/reset_prefix_cache": lambda _: worker.calls.append("reset"),
        "/v1/completions": lambda b: completions(worker, b, logprobs_mode),
        "/inference/v1/generate": lambda b: generate(worker, b, logprobs_mode),
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self, act: Callable[[], Any] | None) -> None:
            try:
                status, said = (404, None) if act is None else (200, act())
            except Exception as error:
                status, said = 500, {"error": str(error)}
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(gets.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if worker.drops and "completions" in self.path:
                worker.drops -= 1
                return
            act = posts.get(self.path)
            self.answer(act and (lambda: act(body)))

        def log_message(self, *_: Any) -> None:
            pass

    found = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()
        thread.join()


class Listener(ThreadingHTTPServer):
    """As many connections may wait as a rollout opens."""

    request_queue_size = 128


# global generators are one process's: requests take turns
TURN = threading.Lock()


def completions(worker: Worker, body: dict[str, Any], mode: str) -> dict[str, Any]:
    """`/v1/completions` of one prompt of token ids."""
    assert body.pop("model") == "micro" and body.pop("return_token_ids")
    prompt = body.pop("prompt")
    with TURN:
        out = worker.complete(prompt, SamplingParams(**body), mode)
    assert out.logprobs is not None
    told = [next(iter(scores.values())).logprob for scores in out.logprobs]
    choice = {
        "index": 0,
        "text": "",
        "token_ids": out.token_ids,
        "logprobs": {"token_logprobs": told},
        "finish_reason": out.finish_reason,
    }
    return {"choices": [choice]}


def generate(worker: Worker, body: dict[str, Any], mode: str) -> dict[str, Any]:
    """`/inference/v1/generate` of one prompt of token ids, the route that tells sampling masks."""
    assert set(body) == {"model", "token_ids", "sampling_params"} and body["model"] == "micro"
    with TURN:
        out = worker.complete(body["token_ids"], SamplingParams(**body["sampling_params"]), mode)
    assert out.logprobs is not None
    told = [next(iter(scores.values())).logprob for scores in out.logprobs]
    choice = {
        "index": 0,
        "token_ids": out.token_ids,
        "logprobs": {"content": [{"logprob": each} for each in told]},
        "finish_reason": out.finish_reason,
        "sampling_mask": out.sampling_mask and out.sampling_mask.token_ids,
    }
    return {"choices": [choice]}
