"""What the trainer tells a console; its own is a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.monitor import Metrics, warn
from grpo_core.trainer.samples import Sample


class Console:
    """Shows nothing; what goes wrong becomes a warning of Python's."""

    def begin(self, label: str, done: int, config: TrainerConfig) -> None:
        """A run sets out, or goes on after `done` steps."""

    def step(self, record: Metrics, parts: Sequence[str], samples: Sequence[Sample]) -> None:
        """A step was taken, or the model looked at before the first.

        Args:
            record: the step's, as in the metrics file.
            parts: the rewards' names in it.
            samples: what the model wrote lately.
        """

    def note(self, message: str) -> None:
        """Something to know of."""
        warn(message)

    def end(self) -> None:
        """The run is over, or interrupted."""


class Bar(Console):
    """A progress bar with a few figures."""

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
