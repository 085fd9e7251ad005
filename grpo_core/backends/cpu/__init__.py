"""The CPU backend: row functions compiled by Numba, one pass over a row while it is in cache.

Signatures and units are those of the host functions in kernels/; see there for what the arguments
mean. Read `rows.py` first, then `vectors.py`, the loops that a row's time goes to.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_core.backends.cpu.compiler import run
from grpo_core.backends.cpu.formulas import compile_kl, compile_surrogate, pad
from grpo_core.backends.cpu.rows import kernels
from grpo_core.backends.cpu.vectors import LOG2E
from grpo_core.backends.pytorch import row_scale, sequence_loss
from grpo_core.backends.wrapper import loss_in_two_readings
from grpo_core.kernels.records import (
    RowGradients,
    RowLoss,
    Rows,
    RowStats,
    Terms,
    TokenVectors,
    extent,
    place_of,
)

__all__ = ["row_dlogits", "row_loss", "row_scale", "row_stats", "sequence_loss"]

Place = tuple[int, int, int]
# as words of 16 bits, see `vectors`
WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
NOTHING = np.empty(0, np.float32)


def row_stats(rows: Rows, target: Tensor) -> RowStats:
    """Softmax statistics of every row at its target; the state as in `online_softmax`."""
    vectors = target.new_zeros(8, rows.N, dtype=torch.float32)
    arguments = (*_arguments(rows), target.numpy(), vectors.numpy())
    run(kernels().stats, rows.N, rows.V, *arguments)
    logp, entropy, kl = vectors[:3]
    return RowStats(logp, entropy, None if rows.ref_logits is None else kl, vectors[3:])


def row_loss(rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: Tensor | None) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`, in one pass."""
    surrogate = compile_surrogate(terms.surrogate, len(terms.surrogate_args))
    estimated = tokens.ref_logp is not None and terms.kl is not None
    kl_estimator = compile_kl(terms.kl) if estimated else None
    if surrogate is None or (estimated and kl_estimator is None):
        # PyTorch evaluates a formula that was not compiled
        return loss_in_two_readings(sys.modules[__name__], rows, tokens, terms, dlogits)
    if dlogits is None:
        dlogits = rows.logits.new_empty(0, rows.V)
    vectors = tokens.weight.new_zeros(11, rows.N)
    dropped = vectors.new_zeros(rows.N, dtype=torch.bool)
    run(
        kernels().loss,
        rows.N,
        rows.V,
        *_arguments(rows),
        *_array(dlogits),
        tokens.target.numpy(),
        tokens.weight.numpy(),
        tokens.advantage.numpy(),
        _vector(tokens.old_logp),
        _vector(tokens.ref_logp),
        _vector(tokens.factor),
        _vector(tokens.entropy_weight),
        vectors.numpy(),
        dropped.numpy(),
        surrogate.address,
        pad(terms.surrogate_args),
        0 if kl_estimator is None else kl_estimator.address,
        bool(terms.kl_times_ratio),
        float(terms.beta),
    )
    logp, entropy, ratio, kl, loss, dlogp = vectors[:6]
    return RowLoss(logp, entropy, ratio, kl, loss, dlogp, dropped, vectors[6:])


def row_dlogits(
    rows: Rows,
    target: Tensor,
    row_gradients: RowGradients,
    stats: RowStats | RowLoss,
    dlogits: Tensor,
) -> Tensor:
    """Writes dL/dlogits into `dlogits` from the statistics of each row; reads a row once."""
    run(
        kernels().gradient,
        rows.N,
        rows.V,
        *_arguments(rows.for_gradient(row_gradients)),
        *_array(dlogits),
        target.numpy(),
        *map(_vector, row_gradients),
        _vector(stats.entropy),
        stats.state.contiguous().numpy(),
    )
    return dlogits


def _arguments(rows: Rows) -> tuple[Any, ...]:
    """What the three kernels have in common."""
    interpolation = 1.0 if rows.ref_logits is None else float(rows.interpolation)
    scale = LOG2E / rows.temperature
    return *_array(rows.logits), *_array(rows.ref_logits), rows.V, scale, interpolation


def _array(logits: Tensor | None) -> tuple[np.ndarray | None, Place]:
    """The memory from the first logit to the last as one array, and the place of rows in it."""
    if logits is None:
        return None, (1, 0, 0)
    return _words(logits.detach().as_strided((extent(logits),), (1,))), place_of(logits)


def _words(flat: Tensor) -> np.ndarray:
    """A vector of logits as NumPy sees it."""
    return (flat.view(WORDS[flat.dtype]) if flat.dtype in WORDS else flat).numpy()


def _vector(vector: Tensor | None) -> np.ndarray:
    """A vector `[N]` float32; empty for None."""
    return NOTHING if vector is None else vector.detach().float().contiguous().numpy()
