"""Who writes the completions: the trainer's own model, or an engine that has to follow it.

An engine holds weights of its own, with a version. Before completions are asked of it, it gets the
trainer's weights if it has others; what it writes says which it was written with, and another
version than the trainer's is an error, not a slightly older policy. The version is the number of
steps that are done. At the start of a process, resumed or not, an engine gets the weights whatever
it claims to have.

`OwnModel` is the default. For vLLM see `vllm_engine` and `vllm_server`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import gathered, is_main, world
from grpo_core.trainer.monitor import warn
from grpo_core.trainer.rollout import (
    Rollout,
    Sampling,
    check_context,
    ignored_fields,
    rollout,
    special_tokens,
)
from grpo_core.trainer.weights import ModelWeights


class Engine(Protocol):
    """What writes completions.

    Attributes:
        separate: it holds weights of its own, which may differ from the trainer's.
        shared: one serves all processes of a group, and gets its weights from the main one.
    """

    separate: bool
    shared: bool

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, with log-probabilities at the temperature they are drawn at.

        What is random comes from torch's global generator of the CPU alone.
        """
        ...

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Takes new weights, under the names of a checkpoint; those of an error are no version."""
        ...


class OwnModel:
    """The trainer's own model, by `model.generate`: its weights are always the newest."""

    separate = False
    shared = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.version: int | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """See `rollout.rollout`."""
        return replace(rollout(self.model, prompts, sampling), weight_version=self.version)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Has them already; keeps the version."""
        self.version = version


class Rollouts:
    """An engine and the model that it follows.

    Args:
        model: the trainer's.
        engine: None for the model itself.

    Raises:
        ValueError: an engine of this process alone, and there are several; a model whose weights
            an engine cannot take, see `checkpoint_format`; or one without an end token.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine | None = None) -> None:
        self.model = model
        special_tokens(model)
        if ignored := ignored_fields(model):
            warn(
                f"rollouts ignore {', '.join(ignored)} of the model's generation_config: the "
                "policy itself is sampled, as the options of the run say"
            )
        self.engine: Engine = OwnModel(model) if engine is None else engine
        if self.engine.separate and not self.engine.shared and world() > 1:
            raise ValueError(
                f"engine: expected one that all {world()} processes share, such as a vLLM server, "
                f"got {type(self.engine).__name__}"
            )
        if self.engine.separate:
            # names that cannot be translated are an error before anything is trained
            ModelWeights(model).described()
        self.version: int | None = None

    def forget(self) -> None:
        """The model's weights are others than they were: those of a checkpoint."""
        self.version = None

    def draw(self, prompts: Sequence[Sequence[int]], sampling: Sampling, version: int) -> Rollout:
        """Completions written with the model's weights of now.

        Args:
            prompts: S lists of token ids.
            sampling: length limit and temperature.
            version: of the model's weights.

        Raises:
            ValueError: a prompt is too long for the model, see `check_context`.
            RuntimeError: they were written with other weights, or the engine did not get them.
        """
        check_context(self.model.config, max(map(len, prompts), default=0), sampling.max_new_tokens)
        if self.version != version:
            self.push(version)
        drawn = self.engine.generate(prompts, sampling)
        if drawn.weight_version != version:
            raise RuntimeError(
                f"weight_version: expected completions by the trainer's weights of step {version}, "
                f"got some by {drawn.weight_version}; does another run update the same engine?"
            )
        return drawn

    def push(self, version: int) -> None:
        """Brings the model's weights to the engine; all processes of a group call it together."""
        self.version = None
        weights = ModelWeights(self.model)
        failed = True
        try:
            if is_main() or not self.engine.shared:
                self.engine.update_weights(weights, version)
            failed = False
        finally:
            if self.engine.separate:
                # of shards every weight is put together by all processes, so all of them go on
                for _ in weights:
                    pass
            someone_failed = any(gathered(failed))
        if someone_failed:
            raise RuntimeError("engine: the main process could not bring the weights to it")
        self.version = version
