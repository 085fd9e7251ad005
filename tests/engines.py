"""Engines for tests, which hold weights of their own and know names and tensors only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo_core.trainer.rollout import Rollout, Sampling, rollout
from grpo_core.trainer.weights import ModelWeights


class CopyEngine:
    """Writes with a model of its own.

    Args:
        model: of the same kind as the trainer's, without an adapter.
        version: that it claims to have.
        off: added to the log-probabilities that it tells, nats.
        deaf: takes versions and no weights.
        skips: weights with this in their names keep their values.
    """

    def __init__(
        self,
        model: Any,
        *,
        version: int | None = None,
        off: float = 0.0,
        deaf: bool = False,
        skips: str = "",
    ) -> None:
        self.model, self.version, self.off, self.deaf = model, version, off, deaf
        self.skips = skips
        self.updates: list[int] = []
        self.asked: list[Sampling] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        self.asked.append(sampling)
        drawn = rollout(self.model, prompts, sampling)
        told = torch.where(drawn.completion_mask, drawn.sampler_logp + self.off, 0.0)
        return replace(drawn, sampler_logp=told, weight_version=self.version)

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        self.updates.append(version)
        if self.deaf:
            return
        state = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                own = state.pop(name)
                if not self.skips or self.skips not in name:
                    own.copy_(tensor)
        assert not state
        self.version = version


class BegunEngine(CopyEngine):
    """Draws all random numbers as it begins, and writes then, for a thread that waits.

    Args:
        hold: called by that thread before it gets the completions.
    """

    def __init__(self, model: Any, hold: Callable[[], object] = int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.hold = hold

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Rollout]:
        drawn = self.generate(prompts, sampling)

        def receive() -> Rollout:
            self.hold()
            return drawn

        return receive


class GivenEngine:
    """Hands out completions that are given to it, step by step."""

    def __init__(self, *rollouts: Rollout) -> None:
        self.rollouts = list(rollouts)
        self.version: int | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        drawn = replace(self.rollouts.pop(0), weight_version=self.version)
        assert len(prompts) == len(drawn.completion)
        return drawn

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        self.version = version
