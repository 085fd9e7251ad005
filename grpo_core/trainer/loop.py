"""The loop over the steps of a run: records, evaluations, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from grpo_core.trainer.checkpoint import (
    Interrupted,
    StopRequest,
    checkpoints,
    save_trainer,
    stop_request,
)
from grpo_core.trainer.console import Console
from grpo_core.trainer.distributed import all_gather_object, is_main
from grpo_core.trainer.monitor import Metrics, append_json, warn

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


def train(trainer: Trainer, evaluation: Callable[[], Metrics] | None) -> list[Metrics]:
    """See `Trainer.train`."""
    config, history = trainer.config, []
    if trainer.checkpoints and not trainer.steps_done:
        # a new run would delete them
        saved = checkpoints(trainer.checkpoints)
        if saved:
            raise ValueError(
                f"checkpoints: expected a folder without any, found {saved[-1]}; resume it by "
                "Trainer.resume(), or use another folder"
            )
    console = trainer.console if is_main() else Console()
    console.begin(trainer.label, trainer.steps_done, config)
    trainer.watch.tell = console.note
    try:
        if not trainer.steps_done:
            history.append(record(trainer, {"step": 0}, evaluation))
            show(trainer, console, history[-1])
        with stop_request() if trainer.checkpoints else nullcontext(StopRequest()) as request:
            while trainer.steps_done < config.steps:
                metrics = trainer.step()
                last = trainer.steps_done == config.steps
                due = last or trainer.steps_done % config.evaluate_every == 0
                if trainer.samples:
                    trainer.samples.step(trainer.steps_done, *trainer.drawn, keep=due)
                history.append(record(trainer, metrics, evaluation if due else None))
                show(trainer, console, history[-1])
                save_or_stop(trainer, request, last)
    finally:
        trainer.watch.tell = warn
        console.end()
    return history


def show(trainer: Trainer, console: Console, entry: Metrics) -> None:
    """Shows a record and the latest samples on the console."""
    samples, (_, _, scores) = trainer.samples, trainer.drawn
    latest = [*samples.held_out, *samples.rollout] if samples else []
    console.step(entry, list(scores.parts), latest)


def save_or_stop(trainer: Trainer, request: StopRequest, last: bool) -> None:
    """Saves a checkpoint if one is due.

    Raises:
        Interrupted: any rank received a signal; a checkpoint is saved.
    """
    if trainer.checkpoints is None:
        return
    if last or trainer.steps_done % trainer.config.checkpoint_every == 0:
        save_trainer(trainer, trainer.checkpoints)
    number = max(all_gather_object(request.number))
    if number and not last:
        raise Interrupted(number, save_trainer(trainer, trainer.checkpoints))


def record(trainer: Trainer, metrics: Metrics, evaluation: Callable[[], Metrics] | None) -> Metrics:
    """Evaluates if asked to, and writes the record to the metrics file and the loggers."""
    entry = {"stage": trainer.label, **metrics}
    if evaluation is not None:
        entry["held_out"] = evaluation()
    if not is_main():
        return entry
    if trainer.metrics_path is not None:
        append_json(trainer.metrics_path, entry)
    for log in trainer.loggers:
        log(entry)
    return entry
