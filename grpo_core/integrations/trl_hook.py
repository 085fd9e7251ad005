"""The hook: the function of TRL that computes log-probabilities from hidden states.

TRL's trainers look up `_ChunkedLogProbFunction` in `trl.trainer.utils` at every call. `HOOKS` lists
the versions of TRL and the parameters of the function; other versions are refused.
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

from grpo_core.integrations.trl_scores import FURTHER, linear_scores
from grpo_core.linear.head import LinearHead

INSTALL = "pip install 'trl==1.16.0'"
NAME = "_ChunkedLogProbFunction"
_FIRST = ("weight", "bias", "targets", "temperature", "chunk_size")
_LAST = ("final_logit_softcapping", "logit_scale")
_SINCE_1_15 = ("ctx", "hidden", *_FIRST, *_LAST, "outputs")
_BEFORE = ("ctx", "last_hidden", *_FIRST, *_LAST)


@dataclass(frozen=True)
class Hook:
    """The hook of a version of TRL.

    Attributes:
        parameters: parameters of TRL's function.
        outputs: number of results of `apply`: logp and entropy, or these and three more.
        modules: modules besides `trl.trainer.utils` that look up the function.
        unserved: the trainers that do not call the function; "" if all do.
    """

    parameters: tuple[str, ...]
    outputs: int
    modules: tuple[str, ...] = ()
    unserved: str = ""


HOOKS = {
    "1.16": Hook(_SINCE_1_15, 5),
    "1.15": Hook(_SINCE_1_15, 5),
    "1.14": Hook(
        _BEFORE,
        2,
        tuple(f"trl.trainer.{name}_trainer" for name in ("grpo", "dpo", "kto")),
        "not RLOO and SFT; GRPO, DPO and KTO only with use_liger_kernel=True",
    ),
    "1.13": Hook(_BEFORE, 2, (), "only AsyncGRPO; the other trainers compute full logits"),
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
    utils = trl_utils()
    version = import_module("trl").__version__
    hook = HOOKS.get(".".join(version.split(".")[:2]))
    if hook is None:
        known = ", ".join(HOOKS)
        raise RuntimeError(f"trl: expected one of the versions {known}, got {version}; {INSTALL}")
    present = getattr(utils, NAME, None)
    if present is None or isinstance(present, _Replacement):
        if present is None:
            raise RuntimeError(f"trl: expected trl.trainer.utils.{NAME}, got none; {INSTALL}")
        return hook
    if not str(getattr(present, "__module__", "")).startswith("trl."):
        raise RuntimeError(
            f"trl: expected TRL's trl.trainer.utils.{NAME}, got {present!r}, which something else "
            "put there"
        )
    parameters = tuple(inspect.signature(present.forward).parameters)
    if parameters != hook.parameters:
        raise RuntimeError(
            f"trl: expected {NAME} of TRL {version} to take {hook.parameters}, got {parameters}; "
            f"{INSTALL}"
        )
    return hook


class _Replacement:
    """The object at the hook while a patch is active."""

    def __init__(self, apply: Callable[..., tuple[Tensor | None, ...]]) -> None:
        # the number of rows depends on data, which a compiled graph cannot follow
        self.apply = torch.compiler.disable(apply)


class LogProbPatch:
    """An active replacement at the hook; `undo`, or leaving the `with` block, removes it."""

    def __init__(self, apply: Callable[..., tuple[Tensor | None, ...]], hook: Hook) -> None:
        utils = trl_utils()
        self._replacement, self._before = _Replacement(apply), getattr(utils, NAME)
        modules = [import_module(name) for name in hook.modules]
        if hook.modules:
            # modules that have imported the name
            modules = [m for n, m in list(sys.modules.items()) if n.startswith("trl.")]
        self._homes = [utils, *(m for m in modules if m is not utils and self._is_home(m))]
        for home in self._homes:
            setattr(home, NAME, self._replacement)
        self._active = True

    def _is_home(self, module: Any) -> bool:
        return vars(module).get(NAME) is self._before

    def undo(self) -> None:
        """Restores the previous object; a second call does nothing.

        Raises:
            RuntimeError: a later patch is still active.
        """
        if not self._active:
            return
        for home in self._homes:
            if getattr(home, NAME) is not self._replacement:
                raise RuntimeError(
                    f"undo: expected this patch at {home.__name__}.{NAME}, got "
                    f"{getattr(home, NAME)!r}; undo patches in the reverse order"
                )
        for home in self._homes:
            setattr(home, NAME, self._before)
        self._active = False

    def __enter__(self) -> LogProbPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


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

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *FURTHER),
    ) -> tuple[Tensor | None, ...]:
        unknown = set(outputs) - {"log_probs", "entropy", *FURTHER}
        if unknown:
            raise ValueError(f"outputs: expected TRL's names, got {sorted(unknown)}")
        scores = linear_scores(
            hidden,
            LinearHead(weight, bias, final_logit_softcapping, logit_scale),
            targets,
            temperature=temperature,
            further=[name for name in FURTHER if name in outputs] if hook.outputs == 5 else (),
            memory_budget=memory_budget,
            gathered=lambda: trl_utils().maybe_gather_lm_head_ctx(weight, bias),
        )
        if hook.outputs == 2:
            return scores.logp, scores.entropy
        entropy = scores.entropy if "entropy" in outputs else None
        return scores.logp, entropy, *scores[2:]

    return LogProbPatch(apply, hook)
