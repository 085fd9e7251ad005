"""The Triton names the scalar formulas are written in, present even where Triton is missing.

Surrogates and KL estimators are read by Triton kernels and, through `backends.formula`, by plain
PyTorch. Only the first reading needs Triton, so its absence must not stop the import.
"""

from __future__ import annotations

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function)  # type: ignore[assignment]
    tl = SimpleNamespace()  # type: ignore[assignment]

__all__ = ["tl", "triton"]
