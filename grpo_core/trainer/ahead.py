"""Rollouts one step ahead: that of step k + 1 is sampled and scored while step k trains.

The weights are those after step k − 1. The main thread draws all random numbers when a rollout
begins; a thread then waits for the completions and scores them, without torch's generators and
without collectives. So nothing depends on which of the two ends first.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_core.backends.kept import Kept
from grpo_core.trainer.distributed import all_gather_object, barrier, rank, world
from grpo_core.trainer.engine import in_background
from grpo_core.trainer.groups import Round
from grpo_core.trainer.rollout import Rollout

if TYPE_CHECKING:
    from grpo_core.trainer.trainer import Trainer


class Ahead:
    """The pending round of a trainer, if there is one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.round: Future[Round] | None = None
        self._position: Any = None

    @property
    def position(self) -> int | None:
        """Position in the data without the problems of the pending round, see `data.Epochs`."""
        drawn = getattr(self.trainer.draw_problems, "position", None)
        return drawn if self.round is None else self._position

    def begin(self, step: int, sampled: Rollout | None = None) -> None:
        """Begins the round to train on after `step` steps, by the weights as they are.

        Args:
            sampled: its completions, if they come from a checkpoint.
        """
        trainer, self._position = self.trainer, self.position
        sample = partial(trainer.sampler.begin, version=trainer.steps_done)
        sampler = sample if sampled is None else lambda *_: lambda: sampled
        finish = trainer.begin_round(step, sample=sampler)
        # an error is raised by `take`
        self.round = in_background(finish)

    def take(self) -> Round:
        """Waits for the round of this step; the first step begins it here."""
        if self.round is None:
            self.begin(self.trainer.steps_done)
        assert self.round is not None
        future, self.round = self.round, None
        return future.result()

    def settle(self) -> None:
        """Waits until nothing runs in the background of any rank; all ranks call it together."""
        if self.round:
            wait([self.round])
            # rank 0 may update the engine next
            barrier()

    def close(self) -> None:
        """Ends the second process, and drops a round that is not complete."""
        if self.round and not self.round.done():
            self.round = None
        if worker := self.trainer.sampler.worker:
            worker.close()

    def state(self) -> list[dict[str, Any]] | None:
        """The completions of every rank's round, for a checkpoint; all ranks call it together.

        They are scored again. None without a round, or if one has failed, as the next step will.
        """
        self.settle()
        sampled = None
        if self.round and not self.round.exception():
            sampled = _on("cpu", asdict(self.round.result().rollout))
        states = [each for each in all_gather_object(sampled) if each is not None]
        return states if len(states) == world() else None

    def restore(self, states: list[dict[str, Any]] | None) -> None:
        """Goes on with the `state` of a checkpoint, at its step and position in the data."""
        self.settle()
        self.round = None
        if states:
            if worker := self.trainer.sampler.worker:
                # a step has as many threads as in a run that was not stopped
                worker.start()
            named = _on(self.trainer.model.device, states[rank()])
            kept = named.pop("kept")
            self.begin(self.trainer.steps_done, Rollout(**named, kept=kept and Kept(**kept)))


def _on(device: torch.device | str, tree: Any) -> Any:
    """Nested dicts with their tensors on a device."""
    if isinstance(tree, dict):
        return {name: _on(device, value) for name, value in tree.items()}
    return tree.to(device) if isinstance(tree, Tensor) else tree
