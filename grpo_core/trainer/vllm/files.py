"""Weights for vLLM as files in a folder that both sides see; vLLM's side is `folder`.

A file holds a piece of the weights in the format of safetensors, which has no code in it. It gets
its name when it is complete, and is deleted once vLLM has read it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor

from grpo_core.trainer.monitor import writing
from grpo_core.trainer.vllm import FOLDER_BACKEND
from grpo_core.trainer.weights import ModelWeights

# of a piece, unless a weight is larger
PIECE_BYTES = 256 << 20
# seconds after which nothing reads a file; a request of `server` ends earlier
OLD_AGE = 3600.0
# unique names, since a client of a network file system may know an old file by its name
NAME = "grpo_core-{}-{}.safetensors"


class Folder:
    """Weights as files; the client is vLLM's `LLM` or `server.Servers`, with the same path."""

    backend = FOLDER_BACKEND

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)

    def open(self, client: Any) -> None:
        """Tells vLLM of the folder."""
        client.init_weight_transfer_engine({"init_info": {"folder": str(self.path)}})

    def send(self, client: Any, weights: ModelWeights) -> None:
        """Writes weights, and has vLLM read them, piece by piece."""
        # what updates that failed have left; newer files may be those of another run
        for old in self.path.glob(NAME.format("*", "*") + "*"):
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > OLD_AGE:
                    old.unlink()
        update = uuid4().hex
        for number, piece in enumerate(pieces(weights)):
            file = self.path / NAME.format(update, number)
            write(piece, file)
            client.update_weights({"update_info": {"file": file.name}})
            file.unlink()


def pieces(weights: ModelWeights) -> Iterator[dict[str, Tensor]]:
    """Copies of the weights on the CPU, at most PIECE_BYTES or one weight at a time."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if piece and size + weight.nbytes > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += weight.nbytes
    yield piece


def write(piece: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is complete, and on the disk, once it has its name."""
    part = file.with_name(f"{file.name}.part")
    with writing(file):
        save_file(piece, part)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(file)
