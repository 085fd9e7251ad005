"""Rollouts by vLLM in a process beside the trainer, on the same GPU.

vLLM runs its engine in a process of its own. The trainer's weights reach it through CUDA IPC: it
reads them from the trainer's memory, in pieces of a buffer that both share. That is vLLM's own
weight transfer: `init_weight_transfer_engine` once; then `start_weight_update`, `update_weights`
for every piece, and `finish_weight_update` with the version, which is called after an error, too
(without a version, see `vllm_common.weight_update`).

For vLLM 0.28 to 0.33: the names used here were compared with the source of 0.28.0 and 0.33.0. It
was only ever run against a stand-in for the package, see `tests/fake_vllm`.
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
from grpo_core.trainer.weights import ModelWeights

# of the shared buffer, unless a weight is larger; vLLM's own default is 1 GiB
BUFFER_BYTES = 256 << 20


class VllmEngine:
    """vLLM on the trainer's GPU, in one process; see `rollouts.Engine`.

    Args:
        path: what vLLM loads at first; a folder or hub name of the model's checkpoint.
        model: the trainer's; names padding and end tokens.
        memory: share of the GPU's memory that vLLM takes for weights and cache.
        longest: tokens of a prompt and its completion; None: as the model allows.
        dtype: of vLLM's weights.
        sleep: between rollouts the cache is given up and vLLM's weights wait in the CPU's memory.

    Raises:
        ModuleNotFoundError: there is no vLLM.
        ValueError: it is too old, or the model, or the environment, does not allow for CUDA IPC.
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
            # log-probabilities of what is drawn from: after the temperature
            logprobs_mode="processed_logprobs",
            # no defaults of the checkpoint's: all that bends the distribution is spelt out
            generation_config="vllm",
            weight_transfer_config=vllm_module("config").WeightTransferConfig(backend="ipc"),
        )
        self.llm.init_weight_transfer_engine({"init_info": {"packed": True}})
        self._rest()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, each by a seed of its own from torch's generator."""
        self._wake()
        before = self.llm.get_weight_version()
        named = request_options(sampling, self.ends)
        settings = [
            self.parameters(**named, detokenize=False, seed=seed) for seed in seeds(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [out.outputs[0] for out in self.llm.generate(asked, settings, use_tqdm=False)]
        after = self.llm.get_weight_version()
        self._rest()
        completions = [list(out.token_ids) for out in outputs]
        check_ends(completions, [out.finish_reason for out in outputs], self.ends)
        return rollout_of(
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
        """Through a buffer of shared GPU memory, piece by piece."""
        self._wake()
        weights = weights.to(self.dtype)
        largest = max(described.bytes for described in weights.described())
        pieces = vllm_module("distributed.weight_transfer.packed_tensor").packed_ipc_producer(
            iterator=weights,
            gpu_uuid=self.gpu,
            post_iter_func=lambda pair: pair[1],
            buffer_size_bytes=max(BUFFER_BYTES, largest),
        )
        with weight_update(self.llm, f"{self.session}/{version}"):
            for piece in pieces:
                self.llm.update_weights({"update_info": update_info(piece)})
        # keys and values of the weights before
        self.llm.reset_prefix_cache()
        self._rest()

    def _wake(self) -> None:
        if self.sleep:
            self.llm.wake_up()

    def _rest(self) -> None:
        if self.sleep:
            # level 2 would drop the weights
            self.llm.sleep(level=1)


def sending_gpu(model: PreTrainedModel) -> str:
    """The name that a GPU has in every process, of the one that the model is on.

    Raises:
        ValueError: it is on none, or vLLM is not allowed to read from the trainer's memory.
    """
    if model.device.type != "cuda":
        raise ValueError(f"model: expected one on a GPU, which vLLM shares, got {model.device}")
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION") != "1":
        raise ValueError(
            "VLLM_ALLOW_INSECURE_SERIALIZATION: expected 1 in the environment, without which vLLM "
            "takes no handles of GPU memory (they travel as pickles between the two processes)"
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise ValueError(
            "VLLM_ENABLE_V1_MULTIPROCESSING: expected vLLM in a process of its own, got 0; CUDA "
            "opens no handle in the process that made it"
        )
    return str(torch.cuda.get_device_properties(model.device).uuid)


def update_info(piece: Any) -> dict[str, Any]:
    """What vLLM's worker is told of a piece, in plain types but for the pickled handle."""
    return {
        "names": piece.names,
        "dtype_names": piece.dtype_names,
        "shapes": piece.shapes,
        "tensor_sizes": piece.tensor_sizes,
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(piece.ipc_handle)).decode(),
    }
