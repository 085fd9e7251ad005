"""Surrogates and KL estimators as compiled functions, from the source that Triton reads.

A kernel gets the address of one and calls it once a row, so it is never compiled again for another.
"""

from __future__ import annotations

import dis
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
from numba import types
from numba.core.errors import NumbaError, UnsupportedBytecodeError

from grpo_core.backends.cpu import language
from grpo_core.backends.cpu.compiler import OPTIONS, compiled
from grpo_core.backends.formula import with_globals

# of any surrogate; more than any in use
MOST_PARAMETERS = 8
NUMBER, RESULTS = types.float64, types.CPointer(types.float64)
SURROGATE = types.void(*(NUMBER,) * (3 + MOST_PARAMETERS), RESULTS)
KL = types.void(NUMBER, NUMBER, RESULTS)
SCALAR_MATH = {
    name: getattr(language, name) for name in ("exp_excess", "expm1", "sigmoid", "stop_grad")
}


@lru_cache
def compile_surrogate(surrogate: Callable, count: int) -> Any:
    """(logp, log_ratio, advantage, its `count` parameters, padded, pointer to three results).

    None, after one warning that says why, for a function that Numba cannot compile.
    """
    if count > MOST_PARAMETERS:
        return _refuse(surrogate, f"it has more than {MOST_PARAMETERS} parameters")
    formula = _as_numba(surrogate)

    def bound(logp, log_ratio, advantage, a, b, c, d, e, f, g, h, results):  # type: ignore[no-untyped-def]
        parameters = (a, b, c, d, e, f, g, h)[:count]
        loss, dlogp, dlog_ratio = formula(logp, log_ratio, advantage, *parameters)
        results[0], results[1], results[2] = loss, dlogp, dlog_ratio

    return _compile(bound, SURROGATE, surrogate)


def pad(parameters: tuple[float, ...]) -> tuple[float, ...]:
    """The parameters of a surrogate as compiled surrogates take them."""
    return (*map(float, parameters), *(0.0,) * (MOST_PARAMETERS - len(parameters)))


@lru_cache
def compile_kl(kl: Callable) -> Any:
    """(logp, ref_logp, pointer to the KL, its derivative by logp, and 0); None as above."""
    formula = _as_numba(kl)

    def bound(logp, ref_logp, results):  # type: ignore[no-untyped-def]
        results[0], results[1] = formula(logp, ref_logp)
        results[2] = 0.0

    return _compile(bound, KL, kl)


def _as_numba(formula: Callable) -> Any:
    """The same code with `tl` and `scalar_math` in the language of Numba."""
    return compiled(with_globals(formula, {**SCALAR_MATH, "tl": language}))


def _compile(function: Callable, signature: Any, formula: Callable) -> Any:
    if _raises(formula):
        return _refuse(
            formula, "a function that is called by its address cannot raise an exception"
        )
    try:
        return numba.cfunc(signature, **OPTIONS)(function)
    except (NumbaError, UnsupportedBytecodeError) as error:
        return _refuse(formula, str(error))


def _refuse(formula: Callable, reason: str) -> None:
    """Warns."""
    name = getattr(formula, "__name__", repr(formula))
    warnings.warn(
        f"{name}: Numba cannot compile it, so every row is read twice: {reason}", stacklevel=2
    )


def _raises(formula: Callable) -> bool:
    """Whether the function has a `raise` or an `assert`."""
    steps = dis.get_instructions(getattr(formula, "fn", formula))
    return any(step.opname == "RAISE_VARARGS" for step in steps)
