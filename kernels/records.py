"""What goes into the row functions of a backend and what comes out: the same for both backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Logits of N tokens where they lie: row n is at `(n // T)·batch_stride + (n % T)·row_stride`.

    Strides count elements; the last axis is contiguous. A padded `[B, T, V]` batch, a view of one
    such as `logits[:, :-1]`, and packed `[N, V]` rows (T = N) are all of this form.
    """

    logits: Tensor
    N: int
    V: int
    rows_per_batch: int
    batch_stride: int
    row_stride: int

    @classmethod
    def of(cls, logits: Tensor) -> Rows:
        """Reads the strides of `[N, V]` or `[B, T, V]`; evenly spaced rows count as packed."""
        T, V = logits.shape[-2:]
        N = logits.numel() // V
        if logits.ndim == 2:
            return cls(logits, N, V, max(N, 1), 0, logits.stride(0))
        batch_stride, row_stride = logits.stride()[:2]
        if T == 1:
            return cls(logits, N, V, max(N, 1), 0, batch_stride)
        if batch_stride == T * row_stride or logits.shape[0] == 1:
            return cls(logits, N, V, max(N, 1), 0, row_stride)
        return cls(logits, N, V, max(T, 1), batch_stride, row_stride)


@dataclass(frozen=True)
class Terms:
    """The formulas of an objective, as the kernels take them."""

    surrogate: Callable  # of `surrogates`
    surrogate_args: tuple[float, ...]
    kl: Callable | None  # of `kl`; None without a reference policy
    kl_times_ratio: bool
    beta: float
    entropy_coef: float = 0.0

    def dentropy(self, weight: Tensor, dropped: Tensor) -> Tensor | None:
        """dL/dH of every token, −entropy_coef · weight; None without an entropy bonus."""
        if not self.entropy_coef:
            return None
        return -self.entropy_coef * weight.masked_fill(dropped, 0.0)


class TokenLoss(NamedTuple):
    """Surrogate and KL of every token, `[N]` each; float32 but for `dropped`."""

    loss: Tensor  # times weight
    dlogp: Tensor  # dloss/dlogp, times weight
    dlog_ratio: Tensor  # dloss/dlog_ratio, times weight
    kl: Tensor  # nats, 0 where weight is 0
    dropped: Tensor  # bool, left out because a term is not finite

    @classmethod
    def empty(cls, N: int, device: torch.device) -> TokenLoss:
        """Room for N tokens."""
        return cls._make(_empty_vectors(len(cls._fields) - 1, N, device))


class RowStats(NamedTuple):
    """What a read of the logits leaves behind, float32."""

    logp: Tensor  # [N] nats
    entropy: Tensor  # [N] nats
    state: Tensor  # [k, N], from which the backend finds the softmax again


class RowLoss(NamedTuple):
    """What one pass over the logits leaves behind, `[N]` each; float32 but for `dropped`."""

    logp: Tensor  # nats
    entropy: Tensor  # nats
    ratio: Tensor
    kl: Tensor  # nats
    loss: Tensor  # times weight
    dlogp: Tensor  # dL/dlogp, times weight
    dropped: Tensor  # bool, left out because a term is not finite
    state: Tensor  # [k, N], as in RowStats

    @classmethod
    def empty(cls, N: int, device: torch.device, state: Tensor) -> RowLoss:
        """Room for N tokens."""
        return cls._make((*_empty_vectors(len(cls._fields) - 2, N, device), state))


def _empty_vectors(floats: int, N: int, device: torch.device) -> list[Tensor]:
    """`floats` float32 vectors in one allocation, and a bool vector."""
    vectors = torch.empty(floats, N, dtype=torch.float32, device=device)
    return [*vectors.unbind(), torch.empty(N, dtype=torch.bool, device=device)]
