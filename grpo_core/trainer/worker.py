"""A second process with a copy of the model, which samples while the trainer computes.

Trained weights go through shared memory, everything else through a pipe.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from transformers import PreTrainedModel

from grpo_core.trainer.distributed import world
from grpo_core.trainer.rollout import Rollout, Sampling, rollout
from grpo_core.trainer.sharding import is_sharded
from grpo_core.trainer.weights import ModelWeights

SHARED_MEMORY = Path("/dev/shm")


class Worker:
    """Samples in another process, started by "spawn" at the first use; see `engine.Engine`.

    Completions are bitwise those of `rollout` here, with as many threads. The process ends with
    this object and with this process. It imports the main module, which must not train on import.

    Raises:
        ValueError: the model is sharded, or there are several ranks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if world() > 1 or is_sharded(model):
            raise ValueError(
                "asynchronous: expected 0, or an engine that all ranks share, such as rollout "
                f"vllm-server, got the model itself, on {world()} ranks or sharded"
            )
        self.model = model
        self.version: int | None = None
        self._end: util.Finalize | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion per prompt."""
        return self.begin(prompts, sampling)()

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Rollout]:
        """Sends a request with the state of torch's generators; the result receives the answer.

        Raises:
            ConnectionError: the process has ended, or could not sample.
        """
        self.start()
        version, device = self.version, self.model.device
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        with self._connected():
            self._connection.send_bytes(pickle.dumps((list(prompts), sampling, states)))

        def receive() -> Rollout:
            with self._connected():
                answer = pickle.loads(self._connection.recv_bytes())
            if isinstance(answer, str):
                raise ConnectionError(f"the process that samples raised {answer}")
            return replace(answer, weight_version=version)

        return receive

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Shares the weights of the trainer's model as they are, with an adapter unmerged."""
        self.start()
        for weight, view in _places(self.model, self._shared):
            view.copy_(weight)
        self.version = version

    def close(self) -> None:
        """Ends the process at once; the next use starts another one."""
        if self._end is not None:
            self._end()

    def start(self) -> None:
        """Starts the process, unless it was started."""
        if self._end is not None and self._end.still_active():
            return
        weights = [w.detach().flatten() for w in self.model.parameters() if w.requires_grad]
        size = sum(weight.nbytes for weight in weights)
        if SHARED_MEMORY.exists() and size > (free := shutil.disk_usage(SHARED_MEMORY).free):
            expected = f"{size >> 20} MiB in {SHARED_MEMORY} for the weights (docker: --shm-size)"
            raise ValueError(f"asynchronous: expected {expected}, got {free >> 20} MiB")
        self._shared = torch.cat(weights).cpu().share_memory_()
        threads = torch.get_num_threads()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        trainers, workers = _shares(threads)
        settings = (theirs, self._shared, _pickled(self.model), workers)
        self._process = context.Process(target=_serve, args=settings, daemon=True)
        self._process.start()
        theirs.close()
        self._end = util.Finalize(
            self, _kill, (self._process, self._connection, threads), exitpriority=10
        )
        torch.set_num_threads(trainers)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Context in which a broken pipe is an error that says how the process has ended."""
        try:
            yield
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ConnectionError(
                f"the process that samples has ended with exit code {self._process.exitcode}; -9 "
                "is a kill, perhaps for lack of memory"
            ) from error


def _shares(threads: int) -> tuple[int, int]:
    """Threads of the trainer and of the second process, which gets half of them.

    A single one takes turns with the trainer's, so the trainer keeps all; several would wait for
    each other. Measured on two cores, seconds of a step of the demo: 0.60 with 2 and 1 threads,
    0.74 with 1 and 1, 2.7 with 2 and 2.
    """
    workers = max(1, threads // 2)
    return threads - workers if workers > 1 else threads, workers


def _serve(connection: Any, shared: Tensor, pickled: bytes, threads: int) -> None:
    """The second process: answers until the trainer has ended."""
    # they come to both processes, and the trainer stops after its step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    model = pickle.loads(pickled)
    with suppress(EOFError, OSError):
        while True:
            prompts, sampling, states = pickle.loads(connection.recv_bytes())
            for weight, view in _places(model, shared):
                weight.copy_(view)
            torch.set_rng_state(states[0])
            for state in states[1:]:
                torch.cuda.set_rng_state(state, model.device)
            try:
                answer: Rollout | str = rollout(model, prompts, sampling)
            # the trainer raises it
            except Exception:
                answer = traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))


def _places(model: PreTrainedModel, shared: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The trained weights, detached, and their places in shared memory."""
    weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    parts = shared.split([weight.numel() for weight in weights])
    return [(weight, part.view_as(weight)) for weight, part in zip(weights, parts, strict=True)]


class _Pickler(pickle.Pickler):
    """Leaves out the hook for gradients beneath an adapter, a function that pickle cannot name."""

    def reducer_override(self, obj: Any) -> Any:
        is_hook = getattr(obj, "__name__", None) == "make_inputs_require_grads"
        return (partial, (_leave,)) if is_hook else NotImplemented


def _leave(*call: Any) -> None:
    """A hook that changes nothing."""


def _pickled(model: PreTrainedModel) -> bytes:
    """The model in bytes."""
    file = BytesIO()
    try:
        _Pickler(file).dump(model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"asynchronous: expected a model for pickle, got {error}") from error
    return file.getvalue()


def _kill(process: Any, connection: Any, threads: int) -> None:
    process.kill()
    process.join()
    connection.close()
    torch.set_num_threads(threads)
