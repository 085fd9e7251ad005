"""The steps of a run one after the other: records, evaluations, checkpoints, signals.

What a step is stands in `trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from grpo_core.trainer import state as trainer_state
from grpo_core.trainer.checkpoint import Interrupted, Request, checkpoints, stop_request
from grpo_core.trainer.console import Console
from grpo_core.trainer.distributed import gathered, is_main
from grpo_core.trainer.monitor import Metrics, append_json, warn

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


def train(trainer: Trainer, evaluation: Callable[[], Metrics] | None) -> list[Metrics]:
    """See `Trainer.train`."""
    config, history = trainer.config, []
    if trainer.checkpoints and not trainer.steps_done:
        # a new run would soon delete them
        found = checkpoints(trainer.checkpoints)
        if found:
            raise ValueError(
                f"checkpoints: expected a folder without any, found {found[-1]}; go on from it by "
                "Trainer.resume(), or take another folder"
            )
    console = trainer.console if is_main() else Console()
    console.begin(trainer.label, trainer.steps_done, config)
    trainer.watch.tell = console.note
    try:
        if not trainer.steps_done:
            history.append(record(trainer, {"step": 0}, evaluation))
            show(trainer, console, history[-1])
        with stop_request() if trainer.checkpoints else nullcontext(Request()) as request:
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
    """A record on the console, with what the model wrote lately."""
    samples, (_, _, scores) = trainer.samples, trainer.drawn
    written = [*samples.held_out, *samples.rollout] if samples else []
    console.step(entry, list(scores.parts), written)


def save_or_stop(trainer: Trainer, request: Request, last: bool) -> None:
    """A checkpoint if one is due.

    Raises:
        Interrupted: a signal came; everything is saved.
    """
    if trainer.checkpoints is None:
        return
    if last or trainer.steps_done % trainer.config.checkpoint_every == 0:
        trainer_state.save(trainer, trainer.checkpoints)
    # a signal to any process stops them all
    number = max(gathered(request.number))
    if number and not last:
        raise Interrupted(number, trainer_state.save(trainer, trainer.checkpoints))


def record(trainer: Trainer, metrics: Metrics, evaluation: Callable[[], Metrics] | None) -> Metrics:
    """The step's record, with held-out figures if any, appended to the metrics file."""
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
