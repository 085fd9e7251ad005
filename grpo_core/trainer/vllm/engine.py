"""Rollouts by vLLM in another process on the trainer's GPU.

vLLM reads the trainer's weights from a buffer of shared GPU memory (CUDA IPC), piece by piece, by
its own weight transfer: `init_weight_transfer_engine` once; then `start_weight_update`,
`update_weights` for every piece, and `finish_weight_update` with the version, also after an error
(then without a version).

For vLLM 0.28 to 0.33: names were compared with the source of 0.28.0 and 0.33.0. Tested only with a
stand-in for the package, see `tests/fake_vllm`.
"""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch
from transformers import PreTrainedModel

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
from grpo_core.trainer.weights import ModelWeights

# the shared buffer, unless a weight is larger; vLLM's default is 1 GiB
BUFFER_BYTES = 256 << 20


class VllmEngine:
    """vLLM on the trainer's GPU, for one rank; see `engine.Engine`.

    Args:
        path: folder or hub name of the checkpoint that vLLM loads first.
        model: the trainer's; gives padding and end tokens.
        memory: share of the GPU's memory for vLLM's weights and cache.
        longest: tokens of prompt and completion; None for the model's limit.
        dtype: of vLLM's weights.
        sleep: between rollouts free the cache and move vLLM's weights to CPU memory.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: vLLM is too old, or model or environment do not support CUDA IPC.
    """

    separate = True
    shared = False

    def __init__(
        self,
        path: str,
        model: PreTrainedModel,
        *,
        memory: float = 0.4,
        longest: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        sleep: bool = False,
    ) -> None:
        if not 0 < memory < 1:
            raise ValueError(f"memory: expected a share between 0 and 1, got {memory}")
        vllm = vllm_module()
        self.gpu = sending_gpu(model)
        self.pad, self.ends = special_tokens(model)
        self.device, self.dtype, self.sleep = model.device, dtype, sleep
        self.session = uuid4().hex
        self.parameters = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=path,
            dtype=dtype_name(dtype),
            gpu_memory_utilization=memory,
            max_model_len=longest,
            enable_sleep_mode=sleep,
            # log-probabilities at the sampling temperature
            logprobs_mode="processed_logprobs",
            # no defaults from the checkpoint
            generation_config="vllm",
            weight_transfer_config=vllm_module("config").WeightTransferConfig(backend="ipc"),
        )
        self.llm.init_weight_transfer_engine({"init_info": {"packed": True}})
        self._release()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, each with a seed from torch's generator."""
        self._wake()
        before = self.llm.get_weight_version()
        named = request_options(sampling, self.ends)
        settings = [
            self.parameters(**named, detokenize=False, seed=seed) for seed in seeds(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [out.outputs[0] for out in self.llm.generate(inputs, settings, use_tqdm=False)]
        after = self.llm.get_weight_version()
        self._release()
        completions = [list(out.token_ids) for out in outputs]
        check_ends(completions, [out.finish_reason for out in outputs], self.ends)
        return make_rollout(
            prompts,
            completions,
            [
                [scores[token].logprob for token, scores in zip(ids, out.logprobs, strict=True)]
                for ids, out in zip(completions, outputs, strict=True)
            ],
            pad=self.pad,
            ends=self.ends,
            device=self.device,
            weight_version=version_number(before, after, self.session),
        )

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Sends weights through the shared buffer."""
        self._wake()
        weights = weights.to(self.dtype)
        largest = max(spec.bytes for spec in weights.describe())
        pieces = vllm_module("distributed.weight_transfer.packed_tensor").packed_ipc_producer(
            iterator=weights,
            gpu_uuid=self.gpu,
            post_iter_func=lambda pair: pair[1],
            buffer_size_bytes=max(BUFFER_BYTES, largest),
        )
        with weight_update(self.llm, f"{self.session}/{version}"):
            for piece in pieces:
                self.llm.update_weights({"update_info": update_info(piece)})
        # keys and values computed with the old weights
        self.llm.reset_prefix_cache()
        self._release()

    def _wake(self) -> None:
        if self.sleep:
            self.llm.wake_up()

    def _release(self) -> None:
        if self.sleep:
            # level 2 would discard the weights
            self.llm.sleep(level=1)


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


def update_info(piece: Any) -> dict[str, Any]:
    """The message to vLLM's workers about a piece."""
    return {
        "names": piece.names,
        "dtype_names": piece.dtype_names,
        "shapes": piece.shapes,
        "tensor_sizes": piece.tensor_sizes,
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(piece.ipc_handle)).decode(),
    }
