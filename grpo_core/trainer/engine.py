"""Sampling engines: the trainer's own model, or an engine whose weights are kept in sync.

The version of an engine's weights is the number of steps done. An engine with another version than
the trainer gets the trainer's weights before it samples; a process that starts or resumes always
sends them. Completions carry the version they were sampled with; any other version is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from grpo_core.trainer.distributed import all_gather_object, is_main
from grpo_core.trainer.generation import check_context, ignored_fields, special_tokens
from grpo_core.trainer.monitor import MISMATCH_REFUSED, warn
from grpo_core.trainer.rollout import Rollout, Sampling, rollout
from grpo_core.trainer.weights import ModelWeights
from grpo_core.trainer.worker import Worker

T = TypeVar("T")


class Engine(Protocol):
    """Samples completions with its own copy of the weights.

    All ranks sample from it, and rank 0 updates its weights. For asynchronous rollouts it also has
    `begin`, which draws all random numbers of `generate` and returns a function that does the rest
    in another thread.
    """

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt, with log-probabilities at the sampling temperature.

        With `sampling.keeps` also the ids that the filters kept, `Rollout.kept`. All random numbers
        derive from torch's global CPU generator.
        """
        ...

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Loads new weights, under their names in a checkpoint; keeps the old version on errors."""
        ...


class EngineError(RuntimeError):
    """An engine whose completions the trainer must not use."""


class EngineSync:
    """Samples from an engine and keeps its weights in sync with the model.

    Args:
        model: the trainer's.
        engine: None for the model itself, which always has the newest weights.
        asynchronous: whether `begin` is used; without an engine it samples in a second process.

    Raises:
        ValueError: the engine cannot load the model's weights, see `weights`, or has no `begin`; or
            the model has no end token.
    """

    def __init__(
        self, model: PreTrainedModel, engine: Engine | None = None, asynchronous: bool = False
    ) -> None:
        self.model, self.engine = model, engine
        self.worker = Worker(model) if asynchronous and engine is None else None
        if asynchronous and engine is not None and not hasattr(engine, "begin"):
            got = type(engine).__name__
            raise ValueError(f"asynchronous: expected an engine with `begin`, got {got}")
        self.version: int | None = None
        self.is_checked = engine is None
        special_tokens(model)
        if ignored := ignored_fields(model):
            warn(
                f"rollouts ignore {', '.join(ignored)} of the model's generation_config and sample "
                "the policy itself, by the options of the run"
            )
        if engine is not None:
            # raises for weights that the engine could not load
            ModelWeights(model).describe()

    def forget(self) -> None:
        """Call it when the model's weights were replaced, as by those of a checkpoint."""
        self.version = None

    def draw(self, prompts: Sequence[Sequence[int]], sampling: Sampling, version: int) -> Rollout:
        """Completions sampled with the model's current weights, whose version is given.

        Raises:
            ValueError: a prompt is too long for the model, or the engine does not return what the
                filters kept.
            EngineError: the engine has other weights, or could not load these.
        """
        if self.engine is None:
            return rollout(self.model, prompts, sampling)
        return self.begin(prompts, sampling, version)()

    def begin(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, version: int
    ) -> Callable[[], Rollout]:
        """As `draw`, by a function for another thread; call neither of the two until it returns."""
        check_context(self.model.config, max(map(len, prompts), default=0), sampling.max_new_tokens)
        engine: Any = self.engine or self.worker
        if self.worker is not None:
            self.worker.update_weights(ModelWeights(self.model), version)
        elif self.version != version:
            self._push(engine, version)
        if hasattr(engine, "begin"):
            receive = engine.begin(prompts, sampling)
        else:
            receive = partial(engine.generate, prompts, sampling)
        return lambda: self._checked(receive(), sampling, version)

    def _checked(self, sampled: Rollout, sampling: Sampling, version: int) -> Rollout:
        """Completions of this version, with what the filters kept."""
        if sampled.weight_version != version:
            raise EngineError(
                f"weight_version: expected completions by the weights of step {version}, got "
                f"version {sampled.weight_version}; does another run update the same engine, or "
                "was it restarted?"
            )
        if sampling.keeps and sampled.kept is None:
            raise ValueError(
                "top_p, top_k, min_p: expected an engine that returns the ids they kept, got "
                f"{type(self.engine).__name__}; without replay any engine does"
            )
        return sampled

    def check(self, mismatch: float | None, sampling: Sampling) -> None:
        """Refuses an engine with other weights than it got, by the mismatch of its first rollout.

        Filters that are not replayed make a mismatch of their own, which tells nothing.

        Raises:
            EngineError: it is far more than rounding.
        """
        is_comparable = sampling.replay or not sampling.is_filtered
        if self.is_checked or mismatch is None or not is_comparable:
            return
        if mismatch > MISMATCH_REFUSED:
            raise EngineError(
                f"sampler_mismatch: expected at most {MISMATCH_REFUSED} nats after the engine got "
                f"the weights, got {mismatch:.2f}; does it ignore a part of them, such as the head "
                "of tied embeddings?"
            )
        self.is_checked = True

    def _push(self, engine: Engine, version: int) -> None:
        """Sends the model's weights to the engine; all ranks call it together."""
        self.version = None
        weights = ModelWeights(self.model)
        failed = True
        try:
            if is_main():
                engine.update_weights(weights, version)
            failed = False
        finally:
            # gathering a sharded weight takes all ranks, also those that send nothing
            for _ in weights:
                pass
            any_failed = any(all_gather_object(failed))
        if any_failed:
            raise EngineError("engine: rank 0 could not send the weights")
        self.version = version


def in_background(call: Callable[[], T]) -> Future[T]:
    """Calls in a daemon thread, for which the end of the program does not wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
