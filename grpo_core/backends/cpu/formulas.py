"""Surrogates and KL estimators as compiled function values, from the source that Triton reads.

All surrogates have one type, and so have all KL estimators: a kernel that is handed one calls it
through a pointer, once a row, and is never compiled again for another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import numba
from numba import types
from numba.core.errors import NumbaError

from grpo_core.backends.cpu import language
from grpo_core.backends.cpu.compiler import OPTIONS, compiled

# of any surrogate; more than any in use
MOST_PARAMETERS = 8
NUMBER = types.float64
SURROGATE = types.UniTuple(NUMBER, 3)(
    NUMBER, NUMBER, NUMBER, types.UniTuple(NUMBER, MOST_PARAMETERS)
)
KL = types.UniTuple(NUMBER, 2)(NUMBER, NUMBER)
SCALAR_MATH = {
    name: getattr(language, name) for name in ("exp_excess", "expm1", "sigmoid", "stop_grad")
}


@lru_cache
def compile_surrogate(surrogate: Callable, count: int) -> Any:
    """(logp, log_ratio, advantage, its `count` parameters, padded) -> the surrogate's results.

    None, after one warning that says why, for a function that Numba cannot compile.
    """
    formula = _as_numba(surrogate)

    def bound(logp, log_ratio, advantage, parameters):  # type: ignore[no-untyped-def]
        return formula(logp, log_ratio, advantage, *parameters[:count])

    return _compile(bound, SURROGATE, surrogate)


def pad(parameters: tuple[float, ...]) -> tuple[float, ...]:
    """The parameters of a surrogate as compiled surrogates take them."""
    return (*map(float, parameters), *(0.0,) * (MOST_PARAMETERS - len(parameters)))


@lru_cache
def compile_kl(kl: Callable | None) -> Any:
    """(logp, ref_logp) -> (kl, dkl/dlogp); without an estimator (0, 0)."""
    if kl is None:
        return _compile(lambda logp, ref_logp: (0.0, 0.0), KL, None)
    formula = _as_numba(kl)
    return _compile(lambda logp, ref_logp: formula(logp, ref_logp), KL, kl)


def _as_numba(formula: Callable) -> Any:
    """The same code with `tl` and `scalar_math` in the language of Numba."""
    function = getattr(formula, "fn", formula)
    namespace = {**function.__globals__, **SCALAR_MATH, "tl": language}
    return compiled(FunctionType(function.__code__, namespace, function.__name__))


def _compile(function: Callable, signature: Any, formula: Callable | None) -> Any:
    try:
        return numba.cfunc(signature, **OPTIONS)(function)
    except NumbaError as error:
        name = getattr(formula, "__name__", repr(formula))
        warnings.warn(
            f"{name}: Numba cannot compile it, so every row is read twice: {error}", stacklevel=2
        )
        return None
