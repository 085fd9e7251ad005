"""Where TRL looks up its log-probabilities from hidden states, and what we put there.

TRL's trainers call `_ChunkedLogProbFunction.apply` by a name of `trl.trainer.utils`, anew each
time. Which TRL does so, and with which arguments, is written down in `HOOKS`; another one is
refused, as nothing is known of what it does.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

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


class LogProbs(Protocol):
    """What can stand at the hook."""

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]: ...


@dataclass(frozen=True)
class Hook:
    """The hook of one TRL.

    Attributes:
        parameters: of TRL's own function there.
        outputs: what `apply` returns: 5 tensors or Nones, or logp and entropy.
        modules: that look the name up, beside `trl.trainer.utils`.
        unserved: which trainers do not, and when; "" if all do.
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
        "RLOO and SFT not at all, and GRPO, DPO and KTO only with use_liger_kernel=True",
    ),
    "1.13": Hook(_BEFORE, 2, (), "no trainer but AsyncGRPO: all others make full logits"),
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
    """The hook of the installed TRL, once it is one we know.

    Raises:
        ImportError: without TRL.
        RuntimeError: another version, or one whose function has other parameters.
    """
    utils = trl_utils()
    version = import_module("trl").__version__
    hook = HOOKS.get(".".join(version.split(".")[:2]))
    if hook is None:
        known = ", ".join(HOOKS)
        raise RuntimeError(f"trl: expected one of the versions {known}, got {version}; {INSTALL}")
    present = getattr(utils, NAME, None)
    if present is None or isinstance(present, _Ours):
        if present is None:
            raise RuntimeError(f"trl: expected trl.trainer.utils.{NAME}, got none; {INSTALL}")
        return hook
    if not str(getattr(present, "__module__", "")).startswith("trl."):
        raise RuntimeError(
            f"trl: expected TRL's own trl.trainer.utils.{NAME}, got {present!r}, which something "
            "else put there"
        )
    parameters = tuple(inspect.signature(present.forward).parameters)
    if parameters != hook.parameters:
        raise RuntimeError(
            f"trl: expected {NAME} of TRL {version} to take {hook.parameters}, got {parameters}; "
            f"{INSTALL}"
        )
    return hook


class _Ours:
    """Something of ours that stands at the hook."""

    def __init__(self, apply: Callable[..., tuple[Tensor | None, ...]]) -> None:
        # the host decides how many rows to make, which no graph can
        self.apply = torch.compiler.disable(apply)


class LogProbPatch:
    """A replacement in place; `undo`, or leaving the `with` block, takes it back."""

    def __init__(self, apply: Callable[..., tuple[Tensor | None, ...]], hook: Hook) -> None:
        utils = trl_utils()
        self._ours, self._before = _Ours(apply), getattr(utils, NAME)
        modules = [import_module(name) for name in hook.modules]
        if hook.modules:
            # whoever has imported the name from there
            modules = [m for n, m in list(sys.modules.items()) if n.startswith("trl.")]
        self._homes = [utils, *(m for m in modules if m is not utils and self._is_home(m))]
        for home in self._homes:
            setattr(home, NAME, self._ours)
        self._active = True

    def _is_home(self, module: Any) -> bool:
        return vars(module).get(NAME) is self._before

    def undo(self) -> None:
        """Puts back what was there before; a second time does nothing.

        Raises:
            RuntimeError: something else has been put there since.
        """
        if not self._active:
            return
        for home in self._homes:
            if getattr(home, NAME) is not self._ours:
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
    """Puts our log-probabilities from hidden states where TRL looks its own up.

    Same outputs and gradients; the loss stays TRL's. GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO of
    TRL 1.15 and 1.16 then use it, in 1.13 and 1.14 those that ask there (a warning names the rest).

        with patch_log_probs():
            trainer.train()

    or `patch = patch_log_probs()` and later `patch.undo()`. What was computed inside may be
    differentiated outside.

    Args:
        memory_budget: bytes for the logits of a chunk, as in `fused_linear_loss`.

    Raises:
        ImportError: without TRL.
        RuntimeError: a TRL that we do not know, or one that something else has changed.
    """
    hook = known_hook()
    if hook.unserved:
        version = import_module("trl").__version__
        warnings.warn(
            f"patch_log_probs: TRL {version} asks the function in few places: {hook.unserved}; "
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
        found = linear_scores(
            hidden,
            LinearHead(weight, bias, final_logit_softcapping, logit_scale),
            targets,
            temperature=temperature,
            further=[name for name in FURTHER if name in outputs] if hook.outputs == 5 else (),
            memory_budget=memory_budget,
            gathered=lambda: trl_utils().maybe_gather_lm_head_ctx(weight, bias),
        )
        if hook.outputs == 2:
            return found.logp, found.entropy
        entropy = found.entropy if "entropy" in outputs else None
        return found.logp, entropy, *found[2:]

    return LogProbPatch(apply, hook)
