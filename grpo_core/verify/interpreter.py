"""Makes the Triton interpreter round as a GPU does, and twice as fast.

Three things differ. A fused multiply-add rounds once on a GPU and twice in the interpreter. A cast
from float32 to bfloat16 rounds to nearest on a GPU and truncates in the interpreter. Minimum and
maximum ignore a NaN on a GPU by default.

Products of float32 are exact in float64, so a float64 addition and a cast equal a fused
multiply-add, except for a double rounding of probability 2⁻²⁹.

At every call of a function within a kernel the interpreter replaces the builtins of Triton's
language again; here it does so once for a launch. It also computes whether sums of integers
overflow, and then makes no use of that.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare_interpreter() -> None:
    """Changes the interpreter in this process, before its first launch."""
    _round_as_hardware_does()
    _patch_once_for_a_launch()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    # numpy warns about results that IEEE arithmetic defines
    warnings.filterwarnings("ignore", ".*encountered in.*", RuntimeWarning, "triton")


def _patch_once_for_a_launch() -> None:
    patch_lang = interpreter._patch_lang

    @cache
    def languages(function: Any) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch(function: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch_lang(function)
        # a kernel's functions are called after it has replaced all
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _round_as_hardware_does() -> None:
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = source.data.view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            quiet_nan = np.where(np.isnan(source.data), np.uint32(0x7FC0), nearest)
            return interpreter.TensorHandle(quiet_nan.astype(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_fma = create_fma
    builder.cast_impl = cast_impl
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
