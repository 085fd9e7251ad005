"""Checkpoints that are whole or not there, and signals that wait for one.

A checkpoint is a folder `step-000040`: the model in the `transformers` format (or peft's, for an
adapter) and `trainer.pt`, which holds everything else. Of a sharded model it has `shards/`, with
weights and optimizer as `torch.distributed.checkpoint` writes them. It is written under another
name, brought to the disk and then renamed, which file systems do in one go: whoever looks finds all
of it or nothing, also after a power cut or `kill -9` in the middle.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
import torch.distributed.checkpoint as dcp
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import barrier, gathered, is_main
from grpo_core.trainer.monitor import writing
from grpo_core.trainer.sharding import not_finite

STATE = "trainer.pt"
SHARDS = "shards"
NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = "unfinished-"


class Interrupted(Exception):
    """A signal asked for the end; what was done is in `checkpoint`.

    Attributes:
        number: of the signal.
        checkpoint: where to go on from.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after saving {checkpoint}")
        self.number, self.checkpoint = number, checkpoint


class Request:
    """Which signal has asked to stop, 0 as long as none has."""

    number = 0


@contextmanager
def stop_request() -> Iterator[Request]:
    """Within it the first SIGINT or SIGTERM is only noted, and the second stops the process.

    The second does what it did before; where it was ignored, as SIGINT is in a background job of a
    script, it does what it does by default.
    """
    request = Request()
    before: dict[int, Any] = {}
    stopping: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each, handler in before.items():
            signal.signal(each, stopping[each] if handler == signal.SIG_IGN else handler)

    try:
        for number in stopping:
            handler = signal.signal(number, note)
            # None was not installed from Python
            before[number] = stopping[number] if handler is None else handler
    except ValueError:
        # not the main thread: signals are somebody else's affair
        before.clear()
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt also where the process began with it ignored."""
    main = threading.current_thread() is threading.main_thread()
    ignored = main and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def save_checkpoint(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    state: dict[str, Any],
    keep: int,
    shards: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and then removes all but the last `keep`.

    Several processes call it together; the main one writes, and each its part of the shards.

    Args:
        directory: of all checkpoints of a run; made if missing.
        step: how many steps are done.
        model: saved by its own `save_pretrained`.
        state: what else is needed to go on; tensors, numbers, strings and containers of them.
        keep: at least 1.
        shards: what to save in the place of the model, by `torch.distributed.checkpoint`.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written then.
        OSError: it cannot be written, such as on a full disk; the checkpoints before it stay.
    """
    bad = [name for name in gathered(not_finite(model)) if name]
    if bad:
        raise FloatingPointError(
            f"model: expected finite weights at step {step}, {bad[0]} has others; not saved"
        )
    folder, unfinished = directory / f"step-{step:06d}", directory / f"{UNFINISHED}{step:06d}"
    try:
        with writing(folder):
            _write(directory, unfinished, model, state, shards)
            if is_main():
                _finish(directory, unfinished, folder, keep)
    finally:
        # of one that could not be written
        if is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    return folder


def _write(
    directory: Path,
    unfinished: Path,
    model: PreTrainedModel,
    state: dict[str, Any],
    shards: dict[str, Any] | None,
) -> None:
    """All of a checkpoint, under another name."""
    if is_main():
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
    barrier()
    if shards is not None:
        # waits until all have written theirs, to the disk
        dcp.save(shards, checkpoint_id=unfinished / SHARDS)
    if is_main():
        if shards is None:
            model.save_pretrained(unfinished)
        torch.save(state, unfinished / STATE)


def _finish(directory: Path, unfinished: Path, folder: Path, keep: int) -> None:
    """Gives a written checkpoint its name, and takes those away that are too many."""
    for file in [*unfinished.rglob("*"), unfinished]:
        _bring_to_disk(file)
    if folder.exists():
        # of the same step once more: moved out of the way, since a full folder cannot be replaced
        folder.rename(directory / f"{UNFINISHED}replaced")
    unfinished.rename(folder)
    _bring_to_disk(directory)
    for old in [*checkpoints(directory)[:-keep], *directory.glob(f"{UNFINISHED}*")]:
        shutil.rmtree(old)


def checkpoints(directory: Path) -> list[Path]:
    """All of a run, oldest first."""
    folders = [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps were done."""
    name = NAME.fullmatch(checkpoint.name)
    if name is None:
        raise ValueError(f"checkpoint: expected a folder such as step-000040, got {checkpoint}")
    return int(name[1])


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Puts a checkpoint's weights into a model of the same kind, bit for bit."""
    if hasattr(model, "peft_config"):
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    else:
        saved = type(model).from_pretrained(checkpoint, dtype="auto")
        model.load_state_dict(saved.state_dict())


def random_states() -> dict[str, Any]:
    """Every generator that belongs to the process: Python's, numpy's, torch's on every device."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(numpy.asarray(keys).astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` has returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _bring_to_disk(path: Path) -> None:
    """Waits until a file or a folder's entries have left the operating system's caches."""
    if os.name == "nt" and path.is_dir():
        # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
