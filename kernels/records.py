"""The inputs and outputs of the row functions, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The logits of N tokens, and what their softmax is taken and compared with.

    Logits are a padded `[B, T, V]` batch, a view of one such as `logits[:, :-1]`, or packed
    `[N, V]` rows; the last axis is contiguous.
    """

    logits: Tensor
    temperature: float = 1.0  # T, the logits are divided by it
    ref_logits: Tensor | None = None  # of a reference policy, of the same shape: for the exact KL
    interpolation: float = 1.0  # which divergence from the reference is the KL, see `exact_kl`

    @property
    def V(self) -> int:
        """Size of the vocabulary."""
        return self.logits.shape[-1]

    @property
    def N(self) -> int:
        """Number of rows."""
        return self.logits.shape[:-1].numel()

    @property
    def divergence(self) -> str:
        """The divergence from the reference: "reverse" or "forward" KL, "mixture" between them."""
        return {0.0: "forward", 1.0: "reverse"}.get(self.interpolation, "mixture")

    def for_gradient(self, row_gradients: RowGradients) -> Rows:
        """The rows that a gradient is computed from: without reference where no KL is in it."""
        return self if row_gradients.dkl is not None else replace(self, ref_logits=None)


def place_of(logits: Tensor) -> tuple[int, int, int]:
    """(T, stride of batches, stride of rows) of logits, counted in elements.

    Row n is at offset `(n // T)·batch_stride + (n % T)·row_stride`; T = N where rows are packed.
    """
    batch_stride, row_stride = (0, *logits.stride())[-3:-1]
    return max(logits.shape[-2], 1), batch_stride, row_stride


def extent(logits: Tensor) -> int:
    """Elements of memory from the first logit to the last."""
    if not logits.numel():
        return 0
    sizes = zip(logits.shape, logits.stride(), strict=True)
    return 1 + sum((n - 1) * stride for n, stride in sizes)


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
        vectors = (getattr(self, field.name) for field in fields(TokenVectors))
        some: list[Any] = [None if vector is None else function(vector) for vector in vectors]
        return TokenVectors(*some)

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
    # [k, N], from which the backend recomputes the softmax; its last row is what the gradient needs
    # of the exact KL: itself, or `of_policy` of a mixture, see `exact_kl`
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
