"""What a trainer keeps in a checkpoint, takes out of one, and leaves behind when it gives up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grpo_core.cli.options import check_unchanged
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.checkpoint import (
    SHARDS,
    STATE,
    checkpoints,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
    step_of,
)
from grpo_core.trainer.distributed import gathered, is_main, rank, world
from grpo_core.trainer.monitor import Metrics, keep_records, writing
from grpo_core.trainer.sharding import is_sharded, load_shards, shards_of

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


def save(trainer: Trainer, directory: Path) -> Path:
    """Everything the run needs to go on, as a checkpoint under `directory`."""
    state = {
        "config": trainer.config.identity(),
        **_given(trainer),
        "random": gathered(random_states()),
        "skipped_updates": trainer.skipped_updates,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "watch": trainer.watch.state,
        # of problems that are drawn one after the other, see `data.Epochs`
        "position": getattr(trainer.draw_problems, "position", None),
    }
    shards = None
    if is_sharded(trainer.model):
        shards = shards_of(trainer.model, trainer.optimizer)
    else:
        state["optimizer"] = trainer.optimizer.state_dict()
    keep = trainer.config.keep_checkpoints
    return save_checkpoint(directory, trainer.steps_done, trainer.model, state, keep, shards)


def resume(trainer: Trainer) -> int:
    """See `Trainer.resume`."""
    found = checkpoints(trainer.checkpoints) if trainer.checkpoints else []
    if not found:
        _forget_steps(trainer, after=-1)
        return 0
    last = found[-1]
    state = torch.load(last / STATE, map_location="cpu", weights_only=True)
    check_unchanged(_given(trainer), state, last)
    check_unchanged(trainer.config.identity(), state["config"], last)
    if is_sharded(trainer.model):
        load_shards(last / SHARDS, trainer.model, trainer.optimizer)
    else:
        load_weights(last, trainer.model)
        trainer.optimizer.load_state_dict(state["optimizer"])
    set_random_states(state["random"][rank()])
    trainer.skipped_updates = state["skipped_updates"]
    trainer.skipped_in_a_row = state["skipped_in_a_row"]
    trainer.watch.state = state["watch"]
    if state["position"] is not None:
        trainer.draw_problems.position = state["position"]  # type: ignore[attr-defined]
    trainer.steps_done = step_of(last)
    trainer.rollouts.forget()
    _forget_steps(trainer, after=trainer.steps_done)
    return trainer.steps_done


def give_up(trainer: Trainer, parts: Sequence[Batch], metrics: Metrics) -> None:
    """Raises FloatingPointError; leaves the inputs of the update beside the checkpoints."""
    step, where = trainer.steps_done + 1, "there is no folder for checkpoints to save them in"
    if trainer.checkpoints:
        trainer.checkpoints.mkdir(parents=True, exist_ok=True)
        of_rank = f"-{rank()}" if world() > 1 else ""
        file = trainer.checkpoints / f"not-finite-{step:06d}{of_rank}.pt"
        where = f"they lie in {file}"
        try:
            with writing(file):
                torch.save([asdict(part) for part in parts], file)
        except OSError as error:
            where = str(error)
    raise FloatingPointError(
        f"step {step}: {trainer.skipped_in_a_row} updates in a row had a loss or gradient that is "
        f"not finite, or a ratio above e^max_log_ratio (loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}, largest ratio {metrics['ratio_max']}); as for the last one's "
        f"inputs, {where}"
    )


def _processes(trainer: Trainer) -> str:
    """How many there are, and how the model is spread over them."""
    alone = world() == 1 and trainer.config.shard == "ddp"
    return "1" if alone else f"{world()} ({trainer.config.shard})"


def _given(trainer: Trainer) -> dict[str, str | None]:
    """What a run is given besides its options, and a checkpoint does not hold."""
    # of a source that has one, such as `data.Epochs`
    data = getattr(trainer.draw_problems, "fingerprint", None)
    return {
        "processes": _processes(trainer),
        "data_fingerprint": data,
        "start_weights": _start_weights(trainer),
    }


def _start_weights(trainer: Trainer) -> str | None:
    """A hash of some elements of every weight that is not trained: reference, or beneath adapters.

    None for shards, of which each process has others.
    """
    if is_sharded(trainer.model):
        return None
    kept = [weight for weight in trainer.model.parameters() if not weight.requires_grad]
    if trainer.reference is not None and trainer.reference is not trainer.model:
        kept += trainer.reference.parameters()
    digest = hashlib.sha256()
    for weight in kept:
        digest.update(weight.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _forget_steps(trainer: Trainer, after: int) -> None:
    """Takes the records of later steps out of the metrics file, and what was written in them."""

    def wanted(record: Metrics) -> bool:
        return record["stage"] != trainer.label or record.get("step", 0) <= after

    files = (trainer.metrics_path, trainer.samples.path if trainer.samples else None)
    for file in files if is_main() else ():
        if file is not None:
            keep_records(file, wanted)
