"""The inputs and outputs of the row functions, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The logits of N tokens: row n is at offset `(n // T)·batch_stride + (n % T)·row_stride`.

    Strides count elements; the last axis is contiguous. A padded `[B, T, V]` batch, a view of one
    such as `logits[:, :-1]`, and packed `[N, V]` rows (T = N) are all of this form.

    Rows of a reference say by `interpolation` which divergence from them is the KL, see `exact_kl`.
    """

    logits: Tensor
    N: int
    V: int
    rows_per_batch: int
    batch_stride: int
    row_stride: int
    interpolation: float = 1.0

    @classmethod
    def of(cls, logits: Tensor, interpolation: float = 1.0) -> Rows:
        """Reads the strides of `[N, V]` or `[B, T, V]`; evenly spaced rows count as packed."""
        T, V = logits.shape[-2:]
        N = logits.numel() // V
        if logits.ndim == 2:
            return cls(logits, N, V, max(N, 1), 0, logits.stride(0), interpolation)
        batch_stride, row_stride = logits.stride()[:2]
        if T == 1:
            return cls(logits, N, V, max(N, 1), 0, batch_stride, interpolation)
        if batch_stride == T * row_stride or logits.shape[0] == 1:
            return cls(logits, N, V, max(N, 1), 0, row_stride, interpolation)
        return cls(logits, N, V, max(T, 1), batch_stride, row_stride, interpolation)

    @property
    def divergence(self) -> str:
        """The divergence from these rows: "reverse" or "forward" KL, "mixture" between them."""
        return {0.0: "forward", 1.0: "reverse"}.get(self.interpolation, "mixture")

    @property
    def extent(self) -> int:
        """Elements of memory from the first logit to the last."""
        if not self.logits.numel():
            return 0
        sizes = zip(self.logits.shape, self.logits.stride(), strict=True)
        return 1 + sum((n - 1) * stride for n, stride in sizes)

    def aligned_with(self, other: Rows) -> Rows:
        """These rows, or a copy, with the same offsets from multiples of 16 bytes as `other`."""
        size = self.logits.element_size()
        width, each = 16 // size, min(self.rows_per_batch, other.rows_per_batch)

        def place(rows: Rows) -> tuple[int, int, int]:
            batch = rows.batch_stride if rows.rows_per_batch == each else each * rows.row_stride
            return rows.logits.data_ptr() // size, batch, rows.row_stride

        if all((a - b) % width == 0 for a, b in zip(place(self), place(other), strict=True)):
            return self
        shape, strides = other.logits.shape, other.logits.stride()
        memory = self.logits.new_empty(other.extent + width)
        start = (place(other)[0] - memory.data_ptr() // size) % width
        copy = memory.as_strided(shape, strides, start).copy_(self.logits)
        return Rows.of(copy, self.interpolation)


@dataclass(frozen=True)
class Terms:
    """The formulas of an objective, as the kernels take them."""

    surrogate: Callable  # of `surrogates`
    surrogate_args: tuple[float, ...]
    kl: Callable | None  # of `kl`; None without `ref_logp`
    kl_times_ratio: bool
    beta: float
    ratio_level: str = "token"  # whose ratio the surrogate sees, see `sequence_ratio`
    token_clip: tuple[float, float] | None = None


@dataclass(frozen=True)
class TokenVectors:
    """The inputs of a loss per token, beside the logits: `[N]`, float32 but for `target`.

    L = Σ_n weight_n · (factor_n · ℓ_n + beta · kl_n) − entropy_weight_n · H_n
    """

    target: Tensor  # int64; outside [0, V) means masked
    weight: Tensor  # 0 means masked
    advantage: Tensor
    old_logp: Tensor | None = None  # nats; None means on policy: ratio 1
    ref_logp: Tensor | None = None  # nats
    factor: Tensor | None = None  # of the surrogate alone; None means 1
    entropy_weight: Tensor | None = None  # None means no entropy bonus

    def at(self, place: slice | Tensor) -> TokenVectors:
        """The vectors of some tokens."""
        return self._each(lambda vector: vector[place])

    def double(self) -> TokenVectors:
        """The same in float64; targets are not converted."""
        return self._each(lambda vector: vector.double() if vector.is_floating_point() else vector)

    def _each(self, function: Callable[[Tensor], Tensor]) -> TokenVectors:
        def some(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else function(vector)

        return TokenVectors(
            function(self.target),
            function(self.weight),
            function(self.advantage),
            some(self.old_logp),
            some(self.ref_logp),
            some(self.factor),
            some(self.entropy_weight),
        )

    def row_gradients(
        self, dlogp: Tensor, dropped: Tensor, exact_beta: float | None
    ) -> RowGradients:
        """dL by each statistic of a row, 0 where dropped; `exact_beta` is None without exact KL."""
        dentropy = dkl = None
        if self.entropy_weight is not None:
            dentropy = -self.entropy_weight.masked_fill(dropped, 0.0)
        if exact_beta:
            dkl = exact_beta * self.weight.float().masked_fill(dropped, 0.0)
        return RowGradients(dlogp, dentropy, dkl)


@dataclass(frozen=True, kw_only=True)
class SequenceTokens(TokenVectors):
    """Tokens, and the sequence that each of them belongs to."""

    valid: Tensor  # [N] bool
    sequence_id: Tensor | None  # [N] integers, of packed rows; clamped to [0, sequences)
    sequences: int  # upper bound on their number
    width: int | None  # of a padded batch

    @property
    def sequence(self) -> Tensor:
        """[N] int64 in [0, sequences): the sequence of each token."""
        if self.sequence_id is not None:
            return self.sequence_id.long().clamp(0, max(self.sequences - 1, 0))
        tokens = torch.arange(self.valid.numel(), device=self.valid.device)
        return tokens // max(self.width or 1, 1)


class RowGradients(NamedTuple):
    """The derivatives of L by the statistics of a row: `[N]` float32 each."""

    dlogp: Tensor  # dL/dlogp
    dentropy: Tensor | None  # dL/dH
    dkl: Tensor | None  # dL/dKL, of the exact KL

    def times(self, grad_output: Tensor) -> RowGradients:
        """Multiplies each by a 0-dim tensor."""
        return RowGradients._make(
            None if vector is None else vector * grad_output for vector in self
        )

    def at(self, place: slice | Tensor) -> RowGradients:
        """The vectors of some rows."""
        return RowGradients._make(None if vector is None else vector[place] for vector in self)

    @property
    def any(self) -> Tensor:
        """`[N]` bool: the rows with a gradient."""
        moves = self.dlogp != 0
        for vector in (self.dentropy, self.dkl):
            if vector is not None:
                moves = moves | (vector != 0)
        return moves


class TokenLoss(NamedTuple):
    """Surrogate and KL of every token, `[N]` each; float32 but for `dropped`."""

    loss: Tensor  # times weight
    dlogp: Tensor  # dloss/dlogp, times weight
    dlog_ratio: Tensor  # dloss/dlog_ratio, times weight
    kl: Tensor  # nats, 0 where weight is 0
    dropped: Tensor  # bool, left out because a term is not finite


class RowStats(NamedTuple):
    """The results of reading the logits once, float32."""

    logp: Tensor  # [N] nats
    entropy: Tensor  # [N] nats
    kl: Tensor | None  # [N] nats, the exact KL; None without `ref_logits`
    # [k, N], from which the backend recomputes the softmax; its last row is the policy's part of a
    # mixture's divergence, see `exact_kl`
    state: Tensor

    def at(self, place: slice | Tensor) -> RowStats:
        """The vectors of some rows."""
        kl = None if self.kl is None else self.kl[place]
        state = self.state[:, place].contiguous()
        return RowStats(self.logp[place], self.entropy[place], kl, state)


class RowLoss(NamedTuple):
    """The results of one pass over the logits, `[N]` each; float32 but for `dropped`."""

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
        """Uninitialised vectors for N tokens."""
        return cls._make((*_empty_vectors(len(cls._fields) - 2, N, device), state))


def _empty_vectors(floats: int, N: int, device: torch.device) -> list[Tensor]:
    """`floats` float32 vectors in one allocation, and a bool vector."""
    vectors = torch.empty(floats, N, dtype=torch.float32, device=device)
    return [*vectors.unbind(), torch.empty(N, dtype=torch.bool, device=device)]
