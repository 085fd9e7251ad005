"""A wrapper of any backend: the KL to a teacher's most likely tokens, as servers return them.

A row has K outcomes, the teacher's tokens, and with a tail one more: all other tokens together.
With p_i and q_i the student's and the teacher's probability of an outcome, g as in `divergence`,
u_i = p_i·∂g/∂p_i and U = Σ_i u_i,

    KL = Σ_i g(p_i, q_i)
    dKL/dx_k = (u_k − p_k·U) / T             of the K tokens
    dKL/dx_j = p_j·(u_tail/p_tail − U) / T   of the others; without a tail u_tail = 0

The last line has the form of a policy gradient, so the backend writes it as a part of dL/dlogp. The
K tokens and the target are then overwritten by their whole gradient, rounded once. A row is read
twice and written once; N·(K + 1) logits are gathered from it and computed with in float64. A row in
which p > 1/2 for one of the K tokens, and not for the target, is read twice more.

Source: TRL 1.16, `distillation_add_tail`; verl's `forward_kl_topk` is kl="topk", interpolation 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.backends.pytorch import natural_sums, weigh
from grpo_core.backends.wrapper import Kernels, WrappedBackend, kernels_at
from grpo_core.kernels.records import RowGradients, RowLoss, Rows, RowStats

# a teacher's tail below it is rounding of 1 − Σ q_k; TRL has the same bound
LEAST_REF_TAIL = 1e-7
# a student's tail: rounding of the float32 sum that it is a part of; a logarithm that stays finite
TAIL_ROUNDING, LEAST_TAIL = 2.0**-23, 1e-30


class TopK(WrappedBackend):
    """Row functions whose KL is that to K tokens of a teacher.

    Args:
        kernels: the row functions inside.
        ids: [N, K] int64; outside [0, V) means that a row has fewer.
        log_q: [N, K] float32, nats; −inf means the same.
        tail: whether all other tokens are one more outcome.
        interpolation: see `divergence`.
    """

    def __init__(
        self, kernels: Kernels, ids: Tensor, log_q: Tensor, tail: bool, interpolation: float
    ) -> None:
        super().__init__(kernels)
        self.ids, self.log_q, self.tail, self.interpolation = ids, log_q, tail, interpolation

    def at(self, place: slice | Tensor) -> TopK:
        kernels = kernels_at(self.kernels, place)
        return TopK(kernels, self.ids[place], self.log_q[place], self.tail, self.interpolation)

    def row_stats(self, rows: Rows, target: Tensor) -> RowStats:
        stats = self.kernels.row_stats(rows, target)
        read, _, log_p, log_q, present = self._read(rows, target, stats)
        value, _ = divergence(log_p, log_q, present, self.interpolation)
        return stats._replace(kl=torch.where(read, value.sum(1), 0.0).float())

    def row_dlogits(
        self,
        rows: Rows,
        target: Tensor,
        row_gradients: RowGradients,
        stats: RowStats | RowLoss,
        dlogits: Tensor,
    ) -> Tensor:
        dlogp, dentropy, dkl = row_gradients
        if dkl is None:
            return self.kernels.row_dlogits(rows, target, row_gradients, stats, dlogits)
        # before the gradient overwrites the logits
        read, columns, log_p, log_q, present = self._read(rows, target, stats)
        _, u = divergence(log_p, log_q, present, self.interpolation)
        # a tail at its bound is a constant of the value
        u[:, -1:] *= log_p[:, -1:] > math.log(LEAST_TAIL) + 1e-9
        total = u.sum(1, keepdim=True)
        of_others = torch.where(present[:, -1:], u[:, -1:] * (-log_p[:, -1:]).exp(), 0.0) - total
        log_p, present, u = log_p[:, :-1], present[:, :-1], u[:, :-1]
        p, moves = log_p.exp(), (read & row_gradients.any)[:, None]
        of_kl = torch.where(present, u - p * total, p * of_others)
        of_logp = torch.cat([-p[:, :-1], -torch.expm1(log_p[:, -1:])], 1)
        values = dlogp[:, None] * of_logp + dkl[:, None] * of_kl
        if dentropy is not None:
            values -= dentropy[:, None] * weigh(log_p, log_p + stats.entropy[:, None])
        # a column that repeats the target's gets the target's gradient
        values = torch.where(columns == columns[:, -1:], values[:, -1:], values)
        values = torch.where(moves, values / rows.temperature, 0.0).to(dlogits.dtype)

        added = torch.where(moves[:, 0], dkl * of_others[:, 0], 0.0).float()
        others = RowGradients(dlogp - added, dentropy, None)
        self.kernels.row_dlogits(rows, target, others, stats, dlogits)
        shape = (*dlogits.shape[:-1], columns.shape[1])
        return dlogits.scatter_(-1, columns.view(shape), values.view(shape))

    def _read(
        self, rows: Rows, target: Tensor, stats: RowStats | RowLoss
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(rows that are read, columns [N, K + 1], log p, log q, present [N, K + 2]).

        The target is the last column whether it is one of the K tokens or not, and the target's
        column also stands for an outcome that is not present. The last outcome is the tail.
        """
        read = (target >= 0) & (target < rows.V)
        y = torch.where(read, target, 0)[:, None]
        given = (self.ids >= 0) & (self.ids < rows.V) & (self.log_q > -math.inf)
        is_target, others = given & (self.ids == y), given & (self.ids != y)
        columns = torch.cat([torch.where(others, self.ids, y), y], 1)
        shape = (*rows.logits.shape[:-1], columns.shape[1])
        logits = rows.logits.gather(-1, columns.view(shape)).view(columns.shape)
        scaled, logp = logits.double() / rows.temperature, stats.logp.double()[:, None]
        anchor, total = natural_sums(stats.state, rows.temperature)
        lse = torch.logaddexp(anchor + total.log(), scaled[:, -1])[:, None]
        log_p = torch.cat([scaled[:, :-1] - lse, logp], 1)
        # where one of the other tokens leads, the sums without it have the digits
        top, place = torch.where(others, log_p[:, :-1], -math.inf).max(1, keepdim=True)
        leads = read[:, None] & (top > -math.log(2))
        leader = torch.where(leads, columns.gather(1, place), -1)[:, 0]
        exact = self.kernels.row_stats(rows, leader).logp.double()[:, None]
        log_p[:, :-1] += torch.where(leads, exact - top, 0.0)
        counted = others.scatter(1, place, others.gather(1, place) & ~leads)
        known, share = is_target.any(1, keepdim=True), -torch.expm1(torch.where(leads, exact, logp))
        p_others = share - torch.where(counted, log_p[:, :-1].exp(), 0.0).sum(1, keepdim=True)
        p_others -= torch.where(leads, logp.exp(), 0.0)
        p_others = torch.maximum(p_others, share * TAIL_ROUNDING).clamp(min=LEAST_TAIL)
        p_tail = p_others + torch.where(known, 0.0, logp.exp())
        log_q = torch.where(is_target, self.log_q, -math.inf).amax(1, keepdim=True)
        log_q, present = torch.cat([self.log_q, log_q], 1), torch.cat([others, known], 1)
        has_tail = (present.sum(1) < rows.V) & self.tail
        return read, columns, *add_tail(log_p, log_q.double(), present, p_tail, has_tail)


def add_tail(
    log_p: Tensor, log_q: Tensor, present: Tensor, p_tail: Tensor, has_tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outcomes with one more, all other tokens, of probability `p_tail` [N, 1]."""
    log_q = torch.where(present, log_q, 0.0)
    q_tail = 1 - torch.where(present, log_q.exp(), 0.0).sum(1, keepdim=True)
    log_q = torch.cat([log_q, q_tail.clamp(min=LEAST_REF_TAIL).log()], 1)
    return torch.cat([log_p, p_tail.log()], 1), log_q, torch.cat([present, has_tail[:, None]], 1)


def divergence(
    log_p: Tensor, log_q: Tensor, present: Tensor, interpolation: float
) -> tuple[Tensor, Tensor]:
    """(g, p·∂g/∂p) of every outcome, nats; 0 where it is not present.

    interpolation 1: g = p·log(p/q), the reverse KL; 0: g = q·log(q/p), the forward KL; t between:
    g = t·q·log(q/m) + (1 − t)·p·log(p/m) with m = t·q + (1 − t)·p (TRL's generalised JSD).
    """
    p, q, t = log_p.exp(), log_q.exp(), interpolation
    if t == 1:
        value = weigh(log_p, log_p - log_q)
        u = value + p
    elif t == 0:
        value, u = weigh(log_q, log_q - log_p), -q
    else:
        log_m = torch.logaddexp(log_p + math.log1p(-t), log_q + math.log(t))
        u = (1 - t) * weigh(log_p, log_p - log_m)
        value = t * weigh(log_q, log_q - log_m) + u
    return torch.where(present, value, 0.0), torch.where(present, u, 0.0)
