"""Consoles of the trainer: one without output, and a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.monitor import Metrics, warn
from grpo_core.trainer.samples import Sample


class Console:
    """Shows nothing, and turns notes into Python warnings."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        """A run starts, or resumes after `done` steps."""

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        """A step was made, or the model evaluated before the first one (step 0).

        `record` is the step's line in the metrics file, `parts` the names of the rewards in it.
        """

    def note(self, message: str) -> None:
        """Shows a warning."""
        warn(message)

    def end(self) -> None:
        """The run has ended or was interrupted."""


class Bar(Console):
    """A progress bar with reward, length and KL."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        self.bar = tqdm(total=config.steps, initial=done, desc=label, unit="step")

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        if not record["step"]:
            return
        shown = {name: record[name] for name in ("reward", "length", "kl")}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def end(self) -> None:
        self.bar.close()
