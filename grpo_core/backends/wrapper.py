"""Wrappers of a backend: they change the rows that it gets, and the results that it returns.

A wrapper is used like a backend's module. It reads a row twice, in `row_stats` and in
`row_dlogits`; the loss is computed in between.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from grpo_core.backends.pytorch import token_loss
from grpo_core.kernels.records import (
    RowGradients,
    RowLoss,
    Rows,
    RowStats,
    SequenceTokens,
    Terms,
    TokenVectors,
)

if TYPE_CHECKING:
    from typing import Self


class WrappedBackend:
    """Base of the wrappers; a subclass has `row_stats`, `row_dlogits` and `at`."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels: Any = kernels

    def at(self, place: slice | Tensor) -> Self:
        """The wrapper for some of the rows."""
        raise NotImplementedError

    def row_stats(self, rows: Rows, target: Tensor) -> RowStats:
        raise NotImplementedError

    def row_dlogits(
        self,
        rows: Rows,
        target: Tensor,
        row_gradients: RowGradients,
        stats: RowStats | RowLoss,
        dlogits: Tensor,
    ) -> Tensor:
        raise NotImplementedError

    def row_loss(
        self, rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: Tensor | None
    ) -> RowLoss:
        return loss_in_two_readings(self, rows, tokens, terms, dlogits)

    def sequence_loss(self, stats: RowStats, tokens: SequenceTokens, terms: Terms) -> RowLoss:
        return self.kernels.sequence_loss(stats, tokens, terms)

    def row_scale(self, dlogits: Tensor, factor: Tensor) -> Tensor:
        return self.kernels.row_scale(dlogits, factor)


Kernels = ModuleType | WrappedBackend
K = TypeVar("K", bound=Kernels)


def kernels_at(kernels: K, place: slice | Tensor) -> K:
    """The row functions for some of the rows."""
    return kernels.at(place) if isinstance(kernels, WrappedBackend) else kernels


def loss_in_two_readings(
    kernels: Any, rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: Tensor | None
) -> RowLoss:
    """`row_loss` by `row_stats` and `row_dlogits`; PyTorch evaluates the formula between them."""
    target = torch.where(tokens.weight != 0, tokens.target, -1)
    stats = kernels.row_stats(rows, target)
    log_ratio = stats.logp - (stats.logp if tokens.old_logp is None else tokens.old_logp)
    token = token_loss(stats.logp, log_ratio, tokens, stats.entropy, stats.kl, terms)
    # a shard has some columns of a larger vocabulary
    read = (target >= 0) & (target < getattr(kernels, "V", rows.V))
    loss, dlogp, kl, ratio = (
        torch.where(read, vector, 0.0)
        for vector in (token.loss, token.dlogp + token.dlog_ratio, token.kl, log_ratio.exp())
    )
    dropped = token.dropped & read
    if dlogits is not None:
        exact_beta = None if stats.kl is None else terms.beta
        row_gradients = tokens.row_gradients(dlogp, dropped, exact_beta)
        kernels.row_dlogits(rows, target, row_gradients, stats, dlogits)
    return RowLoss(stats.logp, stats.entropy, ratio, kl, loss, dlogp, dropped, stats.state)
