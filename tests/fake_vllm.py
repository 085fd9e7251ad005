"""What the adapters touch of vLLM 0.28 to 0.33, small: modules and an engine.

Names, argument names and order of calls are the real ones; `test_vllm_names` compares them with a
vLLM that is installed, and `tests/vllm` runs the real server through the same failures. What stands
for GPU memory and NCCL is a dictionary and a queue. The worker refuses what vLLM's refuses: weights
outside an update, an end without a start, unknown fields. Like the real one on a CPU it dies of a
completion that it has to write during an update, or after one that failed.
"""

from __future__ import annotations

import base64
import json
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_core.trainer.rollout import Sampling, rollout

GPU = "GPU-0000"
# GPU memory by handle
MEMORY: dict[str, bytearray] = {}


class EngineDeadError(RuntimeError):
    """All that a dead engine says."""

    def __init__(self) -> None:
        super().__init__(
            "EngineCore encountered an issue. See stack trace (above) for the root cause."
        )


class Refused(ValueError):
    """A request that is refused: 400, or another status."""

    def __init__(self, message: str, param: str | None = None, code: int = 400) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass
class WeightTransferConfig:
    backend: str = "nccl"


class WeightTransferInitInfo:
    """Base of a backend's own."""


class WeightTransferUpdateInfo:
    """Base of a backend's own."""


class WeightTransferEngine:
    """Base of a worker's side of a backend."""

    init_info_cls: Any
    update_info_cls: Any

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.model_config = None


class WeightTransferEngineFactory:
    """The backends that plugins have added."""

    _registry: ClassVar[dict[str, type[WeightTransferEngine]]] = {}

    @classmethod
    def register_engine(cls, name: str, module_path_or_cls: Any) -> None:
        if name in cls._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        cls._registry[name] = module_path_or_cls


class LoadedModel:
    """A model as vLLM's: loads weights by their names in a checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def modules(self) -> Iterator[Any]:
        return self.model.modules()

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        state = dict(self.model.named_parameters())
        for name, tensor in weights:
            if name not in state:
                raise ValueError(f"There is no module or parameter named '{name}'")
            assert state[name].shape == tensor.shape
            with torch.no_grad():
                state[name].copy_(tensor)


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
    """An NCCL group of the trainer, rank 0, and workers."""

    def __init__(self, size: int) -> None:
        # for each worker, what it has not received; None once its server is closed
        self.sent: list[queue.Queue[Tensor | None]] = [queue.Queue() for _ in range(1, size)]
        self.meeting = threading.Barrier(size)


# by port
GROUPS: dict[int, Group] = {}


def join(port: int, size: int) -> Group:
    """The group at a port, once all of it are there."""
    group = GROUPS.setdefault(port, Group(size))
    group.meeting.wait(5)
    return group


PORTS = iter(range(29500, 65536))


def trainer_init(init_info: dict[str, Any], rank: int = 0) -> Group:
    """Waits for the worker."""
    assert set(init_info) == {"master_address", "master_port", "world_size"}
    return join(init_info["master_port"], init_info["world_size"])


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
        for sent in group.sent:
            sent.put(post_iter_func(pair).clone())


# global generators are one process's: workers take turns
TURN = threading.Lock()
# what `init_weight_transfer_engine` knows
INIT = {
    "ipc": {"packed"},
    "nccl": {"master_address", "master_port", "rank_offset", "world_size", "packed"},
}


@dataclass
class Worker:
    """Holds weights, and keeps vLLM's order of calls."""

    model: Any
    backend: str
    version: str = "default"
    active: bool = False
    # updates that failed since the last one that ended: layers have no weights, or parts of them
    failed: int = 0
    dead: bool = False
    paused: bool = False
    # completions that it writes or that wait
    running: int = 0
    # tokens of prompt and completion
    longest: int = 64
    calls: list[str] = field(default_factory=list)
    # raised by the next update, once
    fails: Exception | None = None
    # connections that the server drops without an answer, or with a part of one
    drops: int = 0
    name: str = "micro"
    # started with return_sampling_mask
    keeps: bool = False
    # tells no masks all the same, as batch-sharded sampling does
    maskless: bool = False
    asked: list[SamplingParams] = field(default_factory=list)
    # from the trainer, by NCCL
    sent: queue.Queue[Tensor | None] | None = None
    # packed CUDA IPC needs no more
    ready: bool = False
    # one call at a time, as in the engine's core: an update that waits for weights blocks all
    core: threading.RLock = field(default_factory=threading.RLock)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        made = WeightTransferEngineFactory._registry.get(self.backend)
        config, loaded = WeightTransferConfig(self.backend), LoadedModel(self.model)
        self.engine = made and made(config, None, torch.device("cpu"), loaded)

    def call(self, method: str, *arguments: Any) -> Any:
        """A call to the worker, with its errors told as vLLM tells them."""
        with self.core:
            if self.dead:
                raise EngineDeadError
            try:
                return getattr(self, method)(*arguments)
            except Exception as error:
                raise Exception(
                    f"Call to collective_rpc method failed: Worker failed with error '{error}', "
                    "please check the stack trace above for the root cause"
                ) from error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if self.engine is not None:
            self.engine.init_transfer_engine(parsed(self.engine.init_info_cls, init_info))
        elif set(init_info) - INIT[self.backend]:
            raise ValueError(f"Invalid init_info: {init_info}")
        elif self.backend == "nccl":
            group = join(init_info["master_port"], init_info["world_size"])
            self.sent = group.sent[init_info["rank_offset"] - 1]
        self.ready = True

    def start_weight_update(self) -> None:
        self.calls.append("start")
        if self.active:
            raise RuntimeError(
                "start_weight_update called while a weight update is already active. Call "
                "finish_weight_update first."
            )
        if self.engine is not None:
            self.engine.start_weight_update()
        self.active = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            if self.fails is not None:
                failure, self.fails = self.fails, None
                raise failure
            if not self.ready:
                raise RuntimeError("weight transfer not initialized")
            if self.failed == 1:
                raise AttributeError("'Parameter' object has no attribute 'weight_loader'")
            if self.engine is not None:
                self.engine.receive_weights(parsed(self.engine.update_info_cls, update_info))
            else:
                LoadedModel(self.model).load_weights(self.received(**update_info))
        except BaseException:
            self.active, self.failed = False, self.failed + 1
            raise

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
            assert self.sent is not None
            tensors = []
            for dtype, shape in zip(dtype_names, shapes, strict=True):
                # as long as it takes
                tensor = self.sent.get()
                if tensor is None:
                    raise RuntimeError("the server is shut down")
                assert (tensor.dtype, list(tensor.shape)) == (getattr(torch, dtype), shape)
                tensors.append(tensor)
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
            raise RuntimeError(
                "finish_weight_update called without a matching start_weight_update."
            )
        if self.engine is not None:
            self.engine.finish_weight_update()
        self.active, self.failed = False, 0
        if weight_version is not None:
            self.version = weight_version

    def get_weight_version(self) -> str:
        return self.version

    def pause(self) -> None:
        """Returns when what runs is complete; later requests wait for `resume`."""
        with self.changed:
            self.calls.append("pause")
            self.paused = True
            self.changed.wait_for(lambda: not self.running)

    def resume(self) -> None:
        with self.changed:
            self.calls.append("resume")
            self.paused = False
            self.changed.notify_all()

    def reset_prefix_cache(self) -> bool:
        """False while requests hold keys and values."""
        self.calls.append("reset")
        return not self.running

    def complete(self, prompt: list[int], params: SamplingParams, mode: str) -> CompletionOutput:
        """Waits until it is not paused, and dies where layers have no weights."""
        self.check(prompt, params)
        with self.changed:
            self.changed.wait_for(lambda: not self.paused)
            self.running += 1
        try:
            with self.core, TURN:
                self.dead = self.dead or self.active or self.failed > 0
                if self.dead:
                    raise EngineDeadError
                return self.draw(prompt, params, mode)
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises Refused for a prompt that vLLM does not take."""
        vocabulary = self.model.config.vocab_size
        if not prompt:
            raise Refused("You must pass at least one prompt")
        if len(prompt) > self.longest:
            raise Refused(
                f"This model's maximum context length is {self.longest} tokens. However, your "
                f"prompt contains {len(prompt)} input tokens, which exceeds this limit even "
                "without any output tokens.",
                "input_tokens",
            )
        if len(prompt) == self.longest:
            raise Refused("max_tokens must be at least 1, got 0.", "max_tokens")
        if max(prompt) >= vocabulary:
            raise Refused(f"Token id {max(prompt)} is out of vocabulary")
        if any(token >= vocabulary for token in params.stop_token_ids or []):
            raise Refused("stop_token_ids contain out-of-vocab token ids", "stop_token_ids")
        if self.keeps and (params.temperature <= 0 or params.top_k <= 0):
            raise Refused("sampling distribution replay requires temperature > 0, top_k > 0")

    def draw(self, prompt: list[int], params: SamplingParams, mode: str) -> CompletionOutput:
        """Draws at the temperature, by the seed; what is told of it depends on the mode."""
        assert params.seed is not None and params.logprobs == 0 and params.n == 1
        assert params.repetition_penalty == 1.0
        self.asked.append(params)
        filters = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        with torch.random.fork_rng():
            torch.manual_seed(params.seed)
            # cut without a word
            limit = min(params.max_tokens or 16, self.longest - len(prompt))
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


def parsed(kind: Any, given: dict[str, Any]) -> Any:
    """A backend's own record."""
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"Invalid {kind.__name__}: {error}") from error


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
        enforce_eager: bool = False,
    ) -> None:
        assert weight_transfer_config is not None and generation_config == "vllm"
        worker = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        backend, longest = weight_transfer_config.backend, max_model_len or 64
        self.worker = Worker(worker.eval(), backend, keeps=return_sampling_mask, longest=longest)
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
        self.worker.call("init_weight_transfer_engine", request["init_info"])

    def start_weight_update(self) -> None:
        assert not self.asleep
        self.worker.call("start_weight_update")

    def update_weights(self, request: dict[str, Any]) -> None:
        # what crosses to the engine's process without pickle
        self.worker.call("update_weights", json.loads(json.dumps(request["update_info"])))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.worker.call("finish_weight_update", weight_version)

    def get_weight_version(self) -> str:
        return self.worker.call("get_weight_version")

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.worker.reset_prefix_cache()

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
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": WeightTransferEngine,
            "WeightTransferInitInfo": WeightTransferInitInfo,
            "WeightTransferUpdateInfo": WeightTransferUpdateInfo,
        },
        "vllm.distributed.weight_transfer.factory": {
            "WeightTransferEngineFactory": WeightTransferEngineFactory
        },
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.vocab_parallel_embedding": {
            "ParallelLMHead": type("ParallelLMHead", (), {}),
            "UnquantizedEmbeddingMethod": type("UnquantizedEmbeddingMethod", (), {}),
        },
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: None,
            "finalize_layerwise_reload": lambda model, config: None,
        },
        "vllm.distributed.weight_transfer.packed_tensor": {
            "packed_ipc_producer": packed_ipc_producer,
            "packed_nccl_broadcast_producer": packed_nccl_broadcast_producer,
        },
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
        "vllm.utils": {},
        "vllm.utils.network_utils": {
            "get_ip": lambda: "127.0.0.1",
            "get_open_port": lambda: next(PORTS),
        },
    }
    found = {}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(content)
    return found
