"""The hook: the function of TRL that computes log-probabilities from hidden states.

TRL's trainers look up `_ChunkedLogProbFunction` in `trl.trainer.utils` at every call. `HOOKS` lists
the versions of TRL that are known; others are refused. A patch holds for the whole process: threads
that train at the same time must share it.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.trl_scores import FURTHER, LinearScores, linear_scores
from grpo_core.linear.head import LinearHead

INSTALL = "pip install 'trl==1.16.0'"
NAME = "_ChunkedLogProbFunction"
_FIRST = ("weight", "bias", "targets", "temperature", "chunk_size")
_SHARED = (*_FIRST, "final_logit_softcapping", "logit_scale")


@dataclass(frozen=True)
class Hook:
    """The hook of a version of TRL.

    Attributes:
        parameters: parameters of TRL's function.
        outputs: what it returns after the log-probabilities.
        unserved: the trainers that do not call the function; "" if all do.
    """

    parameters: tuple[str, ...] = ("ctx", "hidden", *_SHARED, "outputs")
    outputs: tuple[str, ...] = ("entropy", *FURTHER)
    unserved: str = ""


_BEFORE_1_15 = ("ctx", "last_hidden", *_SHARED), ("entropy",)
HOOKS = {
    "1.16": Hook(),
    "1.15": Hook(),
    "1.14": Hook(
        *_BEFORE_1_15,
        unserved="not RLOO and SFT; GRPO, DPO and KTO only with use_liger_kernel=True",
    ),
    "1.13": Hook(*_BEFORE_1_15, unserved="only AsyncGRPO; the other trainers compute full logits"),
}


def trl_utils() -> Any:
    """`trl.trainer.utils`.

    Raises:
        ImportError: without TRL.
    """
    try:
        return import_module("trl.trainer.utils")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "trl":
            raise
        raise ImportError(f"trl: expected TRL 1.16, got none; {INSTALL}") from missing


def known_hook() -> Hook:
    """The hook of the installed TRL.

    Raises:
        ImportError: without TRL.
        RuntimeError: an unknown version, or a function with other parameters.
    """
    present, version = getattr(trl_utils(), NAME, None), import_module("trl").__version__

    def refuse(expected: str, got: object) -> RuntimeError:
        return RuntimeError(f"trl: expected {expected}, got {got}; {INSTALL}")

    hook = HOOKS.get(".".join(version.split(".")[:2]))
    if hook is None:
        raise refuse(f"one of the versions {', '.join(HOOKS)}", version)
    if isinstance(present, LogProbPatch):
        return hook
    home = f"trl.trainer.utils.{NAME}"
    if present is None:
        raise refuse(home, "none")
    if not str(getattr(present, "__module__", "")).startswith("trl."):
        raise refuse(f"TRL's {home}", f"{present!r}, which something else put there")
    parameters = tuple(inspect.signature(present.forward).parameters)
    if parameters != hook.parameters:
        raise refuse(f"{home} of TRL {version} to take {hook.parameters}", parameters)
    return hook


class LogProbPatch:
    """A replacement of TRL's function until `undo`, or the end of the `with` block.

    Args:
        compute: (hidden [N, D], head, target [N], temperature, outputs) -> log-probabilities and
            the optional outputs, as in `LinearScores`.
        hook: of the installed TRL.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor | None, ...]], hook: Hook) -> None:
        self._compute, self._hook = compute, hook
        # the number of rows depends on data, which a compiled graph cannot follow
        self.apply = torch.compiler.disable(self._apply)
        self._before, self._active = getattr(trl_utils(), NAME), True
        _replace(self._before, self)

    def _apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:
        head = LinearHead(weight, bias, final_logit_softcapping, logit_scale)
        outputs = self._hook.outputs if outputs is None else outputs
        results = self._compute(hidden, head, targets, temperature, outputs)
        return results[: 1 + len(self._hook.outputs)]

    def undo(self) -> None:
        """Restores the previous object; a second call does nothing.

        Raises:
            RuntimeError: a later patch is still active.
        """
        if not self._active:
            return
        found = getattr(trl_utils(), NAME)
        if found is not self:
            raise RuntimeError(
                f"undo: expected this patch at trl.trainer.utils.{NAME}, got {found!r}; undo "
                "patches in the reverse order"
            )
        _replace(self, self._before)
        self._active = False

    def __enter__(self) -> LogProbPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _replace(old: object, new: object) -> None:
    """Replaces an object at the hook, also in the modules of TRL that have imported it by name."""
    for name, module in list(sys.modules.items()):
        # an entry may be None; a lazy module would import for getattr
        if name.startswith("trl.") and module and vars(module).get(NAME) is old:
            setattr(module, NAME, new)


def patch_log_probs(*, memory_budget: int | None = None) -> LogProbPatch:
    """Replaces TRL's log-probabilities from hidden states by `linear_scores`.

    Outputs and gradients are the same; TRL computes the loss. This affects GRPO, RLOO, DPO, KTO,
    SFT and AsyncGRPO in TRL 1.15 and 1.16; for 1.13 and 1.14 a warning names the exceptions.

        with patch_log_probs():
            trainer.train()

    or `patch = patch_log_probs()` and later `patch.undo()`. Results may be differentiated after
    the patch is removed.

    Args:
        memory_budget: bytes for the logits of a chunk, as in `fused_linear_loss`.

    Raises:
        ImportError: without TRL.
        RuntimeError: an unknown TRL, or a hook that something else has changed.
    """
    hook = known_hook()
    if hook.unserved:
        version = import_module("trl").__version__
        warnings.warn(
            f"patch_log_probs: TRL {version} calls the function in few trainers: {hook.unserved}; "
            f"{INSTALL} for all trainers",
            stacklevel=2,
        )

    def compute(
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        temperature: float,
        outputs: tuple[str, ...],
    ) -> LinearScores:
        unknown = set(outputs) - {"log_probs", "entropy", *FURTHER}
        if unknown:
            raise ValueError(f"outputs: expected TRL's names, got {sorted(unknown)}")
        scores = linear_scores(
            hidden,
            head,
            target,
            temperature=temperature,
            further=[name for name in FURTHER if name in outputs],
            memory_budget=memory_budget,
            gathered=lambda: trl_utils().maybe_gather_lm_head_ctx(head.weight, head.bias),
        )
        return scores if "entropy" in outputs else scores._replace(entropy=None)

    return LogProbPatch(compute, hook)
