"""Checkpoints of a trainer, written atomically, and signals that wait for one.

A checkpoint is a folder `step-000040`: the model in the `transformers` format (an adapter in
peft's) and `trainer.pt` with everything else. A sharded model has `shards/` instead, weights and
optimizer as `torch.distributed.checkpoint` writes them. It is written under another name, flushed
to the disk and renamed, so that it is complete or absent, also after a power cut or `kill -9`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import PreTrainedModel

from grpo_core.cli.options import check_unchanged
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.distributed import all_gather_object, barrier, is_main, rank, world
from grpo_core.trainer.monitor import Metrics, keep_records, writing
from grpo_core.trainer.sharding import (
    find_nonfinite,
    is_sharded,
    load_sharded_state,
    sharded_state,
)

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer

STATE = "trainer.pt"
SHARDS = "shards"
NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = "unfinished-"


class Interrupted(Exception):
    """A signal stopped the run, after a checkpoint was saved.

    Attributes:
        number: of the signal.
        checkpoint: the last one.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after saving {checkpoint}")
        self.number, self.checkpoint = number, checkpoint


class StopRequest:
    """The number of the signal that asked the run to stop, or 0."""

    number = 0


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Context in which the first SIGINT or SIGTERM is recorded and the second one acts.

    The second acts as it did outside, or by default if it was ignored outside (as SIGINT is in
    background jobs of a script).
    """
    request = StopRequest()
    outside: dict[int, Any] = {}
    default: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }

    def record(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each, handler in outside.items():
            signal.signal(each, default[each] if handler == signal.SIG_IGN else handler)

    try:
        for number in default:
            handler = signal.signal(number, record)
            # None: not installed from Python
            outside[number] = default[number] if handler is None else handler
    except ValueError:
        # only the main thread may handle signals
        outside.clear()
    try:
        yield request
    finally:
        for each, handler in outside.items():
            signal.signal(each, handler)


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Context in which SIGINT raises KeyboardInterrupt even if the process started ignoring it."""
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
    """Writes a checkpoint, then removes all but the last `keep`; all ranks call it together.

    Args:
        directory: of all checkpoints of a run; created if missing.
        step: steps done.
        model: saved by its `save_pretrained`.
        state: what else is needed to resume; tensors, numbers, strings and containers of them.
        keep: at least 1.
        shards: saved instead of the model, by `torch.distributed.checkpoint`.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
        OSError: writing fails, for example on a full disk; earlier checkpoints stay.
    """
    bad = [name for name in all_gather_object(find_nonfinite(model)) if name]
    if bad:
        raise FloatingPointError(
            f"non-finite values in {bad[0]} at step {step}; checkpoint not written"
        )
    folder, unfinished = directory / f"step-{step:06d}", directory / f"{UNFINISHED}{step:06d}"
    try:
        with writing(folder):
            _write(directory, unfinished, model, state, shards)
            if is_main():
                _finish(directory, unfinished, folder, keep)
    finally:
        # left after an error
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
    """Writes a checkpoint under a temporary name."""
    if is_main():
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
    barrier()
    if shards is not None:
        # returns when all ranks have written theirs to the disk
        dcp.save(shards, checkpoint_id=unfinished / SHARDS)
    if is_main():
        if shards is None:
            model.save_pretrained(unfinished)
        torch.save(state, unfinished / STATE)


def _finish(directory: Path, unfinished: Path, folder: Path, keep: int) -> None:
    """Renames a written checkpoint and removes old ones."""
    for file in [*unfinished.rglob("*"), unfinished]:
        _flush(file)
    if folder.exists():
        # of the same step; a folder that is not empty cannot be replaced
        folder.rename(directory / f"{UNFINISHED}replaced")
    unfinished.rename(folder)
    _flush(directory)
    for old in [*checkpoints(directory)[:-keep], *directory.glob(f"{UNFINISHED}*")]:
        shutil.rmtree(old)


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    folders = [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps that were done."""
    name = NAME.fullmatch(checkpoint.name)
    if name is None:
        raise ValueError(f"checkpoint: expected a folder such as step-000040, got {checkpoint}")
    return int(name[1])


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Loads the weights of a checkpoint into a model of the same kind."""
    if hasattr(model, "peft_config"):
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    else:
        saved = type(model).from_pretrained(checkpoint, dtype="auto")
        model.load_state_dict(saved.state_dict())


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_trainer(trainer: Trainer, directory: Path) -> Path:
    """Saves a checkpoint of the trainer in `directory`."""
    state = {
        "config": trainer.config.identity(),
        **_inputs(trainer),
        "skipped_updates": trainer.skipped_updates,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "watch": trainer.watch.state,
        # see `data.Epochs`
        "position": getattr(trainer.draw_problems, "position", None),
    }
    shards = None
    if is_sharded(trainer.model):
        shards = sharded_state(trainer.model, trainer.optimizer)
    else:
        state["optimizer"] = trainer.optimizer.state_dict()
    keep = trainer.config.keep_checkpoints
    return save_checkpoint(directory, trainer.steps_done, trainer.model, state, keep, shards)


def resume_trainer(trainer: Trainer) -> int:
    """See `Trainer.resume`."""
    saved = checkpoints(trainer.checkpoints) if trainer.checkpoints else []
    if not saved:
        _forget_steps(trainer, after=-1)
        return 0
    last = saved[-1]
    state = torch.load(last / STATE, map_location="cpu", weights_only=True)
    check_unchanged(_inputs(trainer), state, last)
    check_unchanged(trainer.config.identity(), state["config"], last)
    if is_sharded(trainer.model):
        load_sharded_state(last / SHARDS, trainer.model, trainer.optimizer)
    else:
        load_weights(last, trainer.model)
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.skipped_updates = state["skipped_updates"]
    trainer.skipped_in_a_row = state["skipped_in_a_row"]
    trainer.watch.state = state["watch"]
    if state["position"] is not None:
        trainer.draw_problems.position = state["position"]  # type: ignore[attr-defined]
    trainer.steps_done = step_of(last)
    trainer.sampler.forget()
    _forget_steps(trainer, after=trainer.steps_done)
    return trainer.steps_done


def give_up(trainer: Trainer, parts: Sequence[Batch], metrics: Metrics) -> None:
    """Saves the inputs of the last update beside the checkpoints; raises FloatingPointError."""
    step, where = trainer.steps_done + 1, "not saved, since there is no folder for checkpoints"
    if trainer.checkpoints:
        trainer.checkpoints.mkdir(parents=True, exist_ok=True)
        of_rank = f"-{rank()}" if world() > 1 else ""
        file = trainer.checkpoints / f"not-finite-{step:06d}{of_rank}.pt"
        where = f"saved in {file}"
        try:
            with writing(file):
                torch.save([asdict(part) for part in parts], file)
        except OSError as error:
            where = str(error)
    raise FloatingPointError(
        f"step {step}: {trainer.skipped_in_a_row} updates in a row were skipped: loss or gradient "
        f"not finite, or a ratio above e^max_log_ratio (loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}, largest ratio {metrics['ratio_max']}); inputs of the last one: "
        f"{where}"
    )


def _processes(trainer: Trainer) -> str:
    """The number of ranks and how the model is distributed over them."""
    alone = world() == 1 and trainer.config.shard == "ddp"
    return "1" if alone else f"{world()} ({trainer.config.shard})"


def _inputs(trainer: Trainer) -> dict[str, str | None]:
    """Inputs of a run that a checkpoint does not contain, besides the options."""
    # see `data.Epochs`
    data = getattr(trainer.draw_problems, "fingerprint", None)
    return {
        "processes": _processes(trainer),
        "data_fingerprint": data,
        "start_weights": _start_weights(trainer),
    }


def _start_weights(trainer: Trainer) -> str | None:
    """A hash of some elements of every frozen weight, those of the reference included.

    None for a sharded model, of which every rank has other elements.
    """
    if is_sharded(trainer.model):
        return None
    frozen = [weight for weight in trainer.model.parameters() if not weight.requires_grad]
    if trainer.reference is not None and trainer.reference is not trainer.model:
        frozen += trainer.reference.parameters()
    digest = hashlib.sha256()
    for weight in frozen:
        digest.update(weight.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _forget_steps(trainer: Trainer, after: int) -> None:
    """Removes records and samples of later steps from the files of the run."""

    def wanted(record: Metrics) -> bool:
        return record["stage"] != trainer.label or record.get("step", 0) <= after

    files = (trainer.metrics_path, trainer.samples.path if trainer.samples else None)
    for file in files if is_main() else ():
        if file is not None:
            keep_records(file, wanted)
