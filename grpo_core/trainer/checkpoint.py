"""Checkpoints of a trainer: each is complete or absent, also after a power cut or `kill -9`.

A checkpoint is a folder `step-000040`: the model in the `transformers` format (an adapter in
peft's) and `trainer.pt` with everything else. A sharded model has `shards/` instead, weights and
optimizer as `torch.distributed.checkpoint` writes them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo_core.cli.options import check_unchanged
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.distributed import all_gather_object, barrier, is_main, rank, world
from grpo_core.trainer.monitor import Metrics, keep_records, writing
from grpo_core.trainer.sharding import is_sharded, load_sharded_state, sharded_state

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer

STATE = "trainer.pt"
SHARDS = "shards"
STEP = "step-"
UNFINISHED = "unfinished-"


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    folders = directory.glob(f"{STEP}*")
    return sorted((f for f in folders if f.name.removeprefix(STEP).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps that were done."""
    return int(checkpoint.name.removeprefix(STEP))


def save_trainer(trainer: Trainer, directory: Path) -> Path:
    """Saves a checkpoint in `directory` and removes old ones; all ranks call it together.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
        OSError: writing fails, for example on a full disk; earlier checkpoints stay.
    """
    model, optimizer, step = trainer.model, trainer.optimizer, trainer.steps_done
    check_finite(model, step)
    state = {
        "identity": _identity(trainer),
        "skipped_updates": trainer.skipped_updates,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "watch": trainer.watch.state,
        "ahead": trainer.ahead.state(),
        "position": trainer.ahead.position,
    }
    folder = directory / f"{STEP}{step:06d}"
    with new_folder(folder) as unfinished:
        if is_sharded(model):
            # returns when all ranks have written theirs to the disk
            dcp.save(sharded_state(model, optimizer), checkpoint_id=unfinished / SHARDS)
        elif is_main():
            model.save_pretrained(unfinished)
            state["optimizer"] = optimizer.state_dict()
        if is_main():
            torch.save(state, unfinished / STATE)
    if is_main():
        for old in checkpoints(directory)[: -trainer.config.keep_checkpoints]:
            shutil.rmtree(old)
    return folder


def resume_trainer(trainer: Trainer) -> int:
    """See `Trainer.resume`."""
    saved = checkpoints(trainer.checkpoints) if trainer.checkpoints else []
    if not saved:
        _remove_records(trainer, after=-1)
        return 0
    last = saved[-1]
    state = torch.load(last / STATE, map_location="cpu", weights_only=True)
    check_unchanged(_identity(trainer), state["identity"], last)
    if is_sharded(trainer.model):
        load_sharded_state(last / SHARDS, trainer.model, trainer.optimizer)
    else:
        _load_weights(last, trainer.model)
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.skipped_updates = state["skipped_updates"]
    trainer.skipped_in_a_row = state["skipped_in_a_row"]
    trainer.watch.state = state["watch"]
    if state["position"] is not None:
        trainer.draw_problems.position = state["position"]  # type: ignore[attr-defined]
    trainer.steps_done = step_of(last)
    trainer.sampler.forget()
    trainer.ahead.restore(state.get("ahead"))
    _remove_records(trainer, after=trainer.steps_done)
    return trainer.steps_done


def give_up(trainer: Trainer, parts: Sequence[Batch], metrics: Metrics) -> None:
    """Saves the inputs of the last update beside the checkpoints; raises FloatingPointError."""
    step, where = trainer.steps_done + 1, "not saved, since there is no folder for checkpoints"
    if trainer.checkpoints:
        trainer.checkpoints.mkdir(parents=True, exist_ok=True)
        of_rank = f"-{rank()}" if world() > 1 else ""
        file = trainer.checkpoints / f"not-finite-{step:06d}{of_rank}.pt"
        where = f"saved in {file}"
        with writing(file):
            torch.save([asdict(part) for part in parts], file)
    raise FloatingPointError(
        f"step {step}: {trainer.skipped_in_a_row} updates in a row were skipped: loss or gradient "
        f"not finite, or a ratio above e^max_log_ratio (loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}, largest ratio {metrics['ratio_max']}); inputs of the last one: "
        f"{where}"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Context for writing a folder: it is written under another name, flushed and renamed.

    All ranks enter together. A folder of the same name is replaced; after an error it stays.
    """
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    try:
        with writing(folder):
            if is_main():
                _remove_unfinished(folder.parent)
                unfinished.mkdir(parents=True)
            barrier()
            yield unfinished
            if is_main():
                for path in [*unfinished.rglob("*"), unfinished]:
                    _flush(path)
                if folder.exists():
                    # a folder that is not empty cannot be replaced
                    folder.rename(folder.with_name(f"{UNFINISHED}replaced"))
                unfinished.rename(folder)
                _flush(folder.parent)
    finally:
        if is_main():
            _remove_unfinished(folder.parent)
    barrier()


def check_finite(model: PreTrainedModel, step: int) -> None:
    """Raises FloatingPointError on all ranks if a weight of any rank is not finite."""
    bad = []
    for name, weight in model.named_parameters():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if not local.detach().isfinite().all():
            bad.append(name)
    for names in all_gather_object(bad):
        if names:
            raise FloatingPointError(
                f"non-finite values in {names[0]} at step {step}; checkpoint not written"
            )


def _remove_unfinished(directory: Path) -> None:
    for leftover in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def _load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Loads the weights of a checkpoint into a model of the same kind."""
    if hasattr(model, "peft_config"):
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    else:
        saved = type(model).from_pretrained(checkpoint, dtype="auto")
        model.load_state_dict(saved.state_dict())


def _identity(trainer: Trainer) -> dict[str, str | None]:
    """What must be equal when a run is resumed."""
    return {
        "processes": f"{world()} ({trainer.config.shard})",
        # see `data.Epochs`
        "data_fingerprint": getattr(trainer.draw_problems, "fingerprint", None),
        "start_weights": _start_weights(trainer),
        **trainer.config.identity(),
    }


def _start_weights(trainer: Trainer) -> str | None:
    """A hash of some elements of the frozen weights and the reference, which are not saved.

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


def _remove_records(trainer: Trainer, after: int) -> None:
    """Removes records and samples of later steps from the files of the run."""

    def is_kept(record: Metrics) -> bool:
        return record["stage"] != trainer.label or record.get("step", 0) <= after

    for file in (trainer.metrics_path, trainer.samples and trainer.samples.path):
        if file and is_main():
            keep_records(file, is_kept)
