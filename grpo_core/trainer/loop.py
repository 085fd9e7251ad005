"""The loop over the steps of a run: records, evaluations, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from grpo_core.trainer.checkpoint import checkpoints, save_trainer
from grpo_core.trainer.console import Console
from grpo_core.trainer.distributed import all_gather_object, is_main
from grpo_core.trainer.monitor import Metrics, append_json, warn
from grpo_core.trainer.signals import Interrupted, StopRequest, stop_request

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


def train(trainer: Trainer, evaluation: Callable[[], Metrics] | None) -> list[Metrics]:
    """See `Trainer.train`."""
    config, history = trainer.config, []
    saved = checkpoints(trainer.checkpoints) if trainer.checkpoints else []
    if saved and not trainer.steps_done:
        # a new run would delete them
        raise ValueError(
            f"checkpoints: expected a folder without any, found {saved[-1]}; resume it by "
            "Trainer.resume(), or use another folder"
        )
    console = trainer.console if is_main() else Console()
    console.begin(trainer.label, trainer.steps_done, config)
    trainer.watch.tell = console.note
    try:
        if not trainer.steps_done:
            history.append(record(trainer, {"step": 0}, evaluation, console))
        with stop_request() if trainer.checkpoints else nullcontext(StopRequest()) as request:
            while trainer.steps_done < config.steps:
                metrics = trainer.step()
                last = trainer.steps_done == config.steps
                due = last or trainer.steps_done % config.evaluate_every == 0
                if trainer.samples:
                    trainer.samples.step(trainer.steps_done, *trainer.drawn, keep=due)
                history.append(record(trainer, metrics, evaluation if due else None, console))
                save_or_stop(trainer, request, last)
    finally:
        trainer.ahead.close()
        trainer.watch.tell = warn
        console.end()
    return history


def record(
    trainer: Trainer,
    metrics: Metrics,
    evaluation: Callable[[], Metrics] | None,
    console: Console,
) -> Metrics:
    """Evaluates if asked to, and sends the record to the metrics file, loggers and console."""
    entry = {"stage": trainer.label, **metrics}
    if evaluation is not None:
        # rewards are called by one thread at a time, and the evaluation gets the CPU
        trainer.ahead.settle()
        entry["held_out"] = evaluation()
    if is_main():
        if trainer.metrics_path is not None:
            append_json(trainer.metrics_path, entry)
        for log in trainer.loggers:
            log(entry)
    samples, (_, _, scores) = trainer.samples, trainer.drawn
    latest = [*samples.held_out, *samples.rollout] if samples else []
    console.step(entry, list(scores.parts), latest)
    return entry


def save_or_stop(trainer: Trainer, request: StopRequest, last: bool) -> None:
    """Saves a checkpoint if one is due or a signal came.

    Raises:
        Interrupted: any rank received a signal; a checkpoint is saved.
    """
    if trainer.checkpoints is None:
        return
    number = max(all_gather_object(request.number))
    if number or last or trainer.steps_done % trainer.config.checkpoint_every == 0:
        folder = save_trainer(trainer, trainer.checkpoints)
        if number and not last:
            raise Interrupted(number, folder)
