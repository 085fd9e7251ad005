"""vLLM's side of weights that come as files: the weight transfer backend `grpo_folder`.

The entry point `grpo_core` of `vllm.general_plugins` registers it in every process of vLLM. The
trainer's side is `files`. Base class and names are those of vLLM 0.28.0, 0.30.0 and 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from grpo_core.trainer.vllm import FOLDER_BACKEND


@dataclass
class FolderInit(WeightTransferInitInfo):
    """Where the files are, as a path on this machine."""

    folder: str


@dataclass
class FolderUpdate(WeightTransferUpdateInfo):
    """The name of a safetensors file in the folder."""

    file: str


class FolderEngine(WeightTransferEngine):
    """Loads weights from safetensors files, several to an update, on a CPU or a GPU."""

    init_info_cls = FolderInit
    update_info_cls = FolderUpdate
    folder: Path | None = None

    def init_transfer_engine(self, init_info: FolderInit) -> None:
        """Sets the folder; raises ValueError where there is none."""
        folder = Path(init_info.folder).resolve()
        if not folder.is_dir():
            raise ValueError(f"rollout_folder: expected one that vLLM shares, found no {folder}")
        self.folder = folder

    def start_weight_update(self) -> None:
        """Prepares the layers for weights in the format of a checkpoint."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FolderUpdate) -> None:
        """Loads the weights of a file; raises ValueError if it is not in the folder."""
        file = self.folder and (self.folder / update_info.file).resolve()
        if file is None or file.parent != self.folder:
            raise ValueError(f"file: expected one in {self.folder}, got {update_info.file!r}")
        # not mapped: layers keep weights beyond this call, the file may not exist by then
        self.model.load_weights(list(load(file.read_bytes()).items()))

    def finish_weight_update(self) -> None:
        """Finishes the layers, those included that are tied to others."""
        finalize_layerwise_reload(self.model, self.model_config)
        for head in self.model.modules():
            method = getattr(head, "quant_method", None)
            if isinstance(head, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
                # on a CPU it multiplies by a packed copy, which nothing else renews if it is tied
                method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Makes the backend known to vLLM."""
    WeightTransferEngineFactory.register_engine(FOLDER_BACKEND, FolderEngine)
