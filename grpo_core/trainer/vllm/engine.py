"""Rollouts by vLLM in another process on the trainer's GPU.

vLLM reads the trainer's weights from a buffer of shared GPU memory (CUDA IPC), piece by piece, or
from files, on a CPU as well, see `files`.

Names are those of vLLM 0.28.0, 0.30.0 and 0.32.0; 0.32.0 was run on a CPU. CUDA IPC was not run,
only a stand-in for the package, see `tests/fake_vllm`.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import world
from grpo_core.trainer.rollout import Rollout, Sampling
from grpo_core.trainer.vllm.common import Completion, Vllm, dtype_name, vllm_module
from grpo_core.trainer.vllm.files import Folder
from grpo_core.trainer.weights import ModelWeights

# the shared buffer, unless a weight is larger; vLLM's default is 1 GiB
BUFFER_BYTES = 256 << 20


class VllmEngine(Vllm):
    """vLLM on the trainer's device, for one rank; see `engine.Engine`.

    Args:
        path: folder or hub name of the checkpoint that vLLM loads first.
        model: the trainer's; gives padding and end tokens.
        memory: share of the GPU's memory for vLLM's weights and cache.
        longest: tokens of prompt and completion; None for the model's limit.
        dtype: of vLLM's weights. Default: bfloat16 on a GPU, float32 on a CPU.
        folder: folder for weights as files; None for CUDA IPC.
        sleep: between rollouts free the cache and move vLLM's weights to CPU memory.
        keeps: completions come with the ids that top-p, top-k and min-p kept.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: there are several ranks, vLLM is too old, or model or environment do not support
            CUDA IPC.
    """

    def __init__(
        self,
        path: str,
        model: PreTrainedModel,
        *,
        memory: float = 0.4,
        longest: int | None = None,
        dtype: torch.dtype | None = None,
        folder: str | None = None,
        sleep: bool = False,
        keeps: bool = False,
    ) -> None:
        if not 0 < memory < 1:
            raise ValueError(f"memory: expected a share between 0 and 1, got {memory}")
        if world() > 1:
            raise ValueError(
                f"engine: expected one that all {world()} ranks share, such as a vLLM server, got "
                "VllmEngine"
            )
        vllm = vllm_module()
        self.transfer = Ipc(model) if folder is None else Folder(folder)
        on_cpu = model.device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        super().__init__(model, dtype, keeps)
        self.sleep = sleep
        self.parameters = vllm.SamplingParams
        self.client = vllm.LLM(
            model=path,
            dtype=dtype_name(dtype),
            gpu_memory_utilization=memory,
            max_model_len=longest,
            enable_sleep_mode=sleep,
            # log-probabilities at the sampling temperature
            logprobs_mode="processed_logprobs",
            return_sampling_mask=keeps,
            # compiling takes minutes on a CPU
            enforce_eager=on_cpu,
            # no defaults from the checkpoint
            generation_config="vllm",
            weight_transfer_config=vllm_module("config").WeightTransferConfig(
                backend=self.transfer.backend
            ),
        )
        self.transfer.open(self.client)
        self.resume()

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout:
        """One completion per prompt and seed."""
        self.pause()
        drawn = super().sample(prompts, sampling, seeds)
        self.resume()
        return drawn

    def complete(
        self, prompts: Sequence[Sequence[int]], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[Completion]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        settings = [self.parameters(**options, detokenize=False, seed=seed) for seed in seeds]
        completions = []
        for request in self.client.generate(inputs, settings, use_tqdm=False):
            (out,) = request.outputs
            ids = list(out.token_ids)
            logp = [scores[token].logprob for token, scores in zip(ids, out.logprobs, strict=True)]
            kept = out.sampling_mask and out.sampling_mask.token_ids
            completions.append(Completion(ids, logp, out.finish_reason, kept))
        return completions

    def pause(self) -> None:
        """Wakes vLLM, which is idle: completions come from this process."""
        if self.sleep:
            self.client.wake_up()

    def resume(self) -> None:
        """Lets vLLM sleep."""
        if self.sleep:
            # level 2 would discard the weights
            self.client.sleep(level=1)


class Ipc:
    """Weights through a buffer of shared GPU memory; the client is vLLM's `LLM`."""

    backend = "ipc"

    def __init__(self, model: PreTrainedModel) -> None:
        self.gpu = sending_gpu(model)

    def open(self, client: Any) -> None:
        """Tells vLLM that a buffer holds many weights."""
        client.init_weight_transfer_engine({"init_info": {"packed": True}})

    def send(self, client: Any, weights: ModelWeights) -> None:
        """Sends weights through the buffer."""
        largest = max(spec.bytes for spec in weights.describe())
        pieces = vllm_module("distributed.weight_transfer.packed_tensor").packed_ipc_producer(
            iterator=weights,
            gpu_uuid=self.gpu,
            post_iter_func=lambda pair: pair[1],
            buffer_size_bytes=max(BUFFER_BYTES, largest),
        )
        for piece in pieces:
            update = {
                "names": piece.names,
                "dtype_names": piece.dtype_names,
                "shapes": piece.shapes,
                "tensor_sizes": piece.tensor_sizes,
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(piece.ipc_handle)).decode(),
            }
            client.update_weights({"update_info": update})


def sending_gpu(model: PreTrainedModel) -> str:
    """The UUID of the model's GPU.

    Raises:
        ValueError: the model is not on a GPU, or vLLM may not read the trainer's memory.
    """
    if model.device.type != "cuda":
        raise ValueError(f"model: expected a model on a GPU, which vLLM shares, got {model.device}")
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION") != "1":
        raise ValueError(
            "VLLM_ALLOW_INSECURE_SERIALIZATION: expected 1 in the environment, since handles of "
            "GPU memory are sent to vLLM as pickles"
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise ValueError(
            "VLLM_ENABLE_V1_MULTIPROCESSING: expected vLLM in another process, got 0; CUDA opens "
            "no handle in the process that made it"
        )
    return str(torch.cuda.get_device_properties(model.device).uuid)
