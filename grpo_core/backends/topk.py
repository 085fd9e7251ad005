"""The KL to the likeliest tokens of a teacher, as servers return them, around any backend.

A row has K outcomes, the teacher's tokens, and with a tail one more, all other tokens together.
With p_i and q_i the student's and the teacher's probability of an outcome, g as in `divergence`,
u_i = p_i·∂g/∂p_i and U = Σ_i u_i,

    KL = Σ_i g(p_i, q_i)
    dKL/dx_k = (u_k − p_k·U) / T             of the K tokens
    dKL/dx_j = p_j·(u_tail/p_tail − U) / T   of the others; without a tail u_tail = 0

The last line is that of a dlogp, so the backend writes it together with the policy gradient. The K
tokens and the target are written over it afterwards, from whole gradients that are rounded once.
A row is read twice and written once; N·K logits are gathered each time, and computed in float64.

Source: TRL 1.16, `distillation_add_tail`; verl's `forward_kl_topk` is kl="topk", interpolation 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.backends.wrapper import Kernels, WrappedBackend, kernels_at
from grpo_core.kernels.records import RowGradients, RowLoss, Rows, RowStats

# a teacher's tail of less is what rounding left of 1 − Σ q_k; TRL has the same bound
LEAST_REF_TAIL = 1e-7
# the student's: the last digit of a float32 sum over the other tokens, and never 0
TAIL_ROUNDING, LEAST_TAIL = 2.0**-23, 1e-30


class TopK(WrappedBackend):
    """Row functions whose KL is that to K tokens of a teacher.

    Args:
        kernels: the row functions inside.
        ids: [N, K] int64; outside [0, V) means that a row has fewer.
        log_q: [N, K] float32, nats; −inf means the same.
        interpolation: see `divergence`.
        tail: whether all other tokens are one more outcome.
    """

    def __init__(
        self, kernels: Kernels, ids: Tensor, log_q: Tensor, interpolation: float, tail: bool
    ) -> None:
        super().__init__(kernels)
        self.ids, self.log_q, self.interpolation, self.tail = ids, log_q, interpolation, tail

    def at(self, place: slice | Tensor) -> TopK:
        kernels = kernels_at(self.kernels, place)
        return TopK(kernels, self.ids[place], self.log_q[place], self.interpolation, self.tail)

    def row_stats(
        self, rows: Rows, target: Tensor, temperature: float, ref_rows: Rows | None = None
    ) -> RowStats:
        stats = self.kernels.row_stats(rows, target, temperature)
        value, _ = divergence(*self._outcomes(rows, target, temperature, stats), self.interpolation)
        return stats._replace(kl=torch.where(_is_read(rows, target), value.sum(1), 0.0).float())

    def row_dlogits(
        self,
        rows: Rows,
        target: Tensor,
        temperature: float,
        row_gradients: RowGradients,
        stats: RowStats | RowLoss,
        dlogits: Tensor,
        ref_rows: Rows | None = None,
    ) -> Tensor:
        T, (dlogp, dentropy, dkl) = temperature, row_gradients
        if dkl is None:
            return self.kernels.row_dlogits(rows, target, T, row_gradients, stats, dlogits)
        # before the gradient overwrites the logits
        log_p, log_q, present = self._outcomes(rows, target, T, stats)
        _, u = divergence(log_p, log_q, present, self.interpolation)
        total, y = u.sum(1), target.clamp(0, rows.V - 1)[:, None]
        of_others = torch.where(present[:, -1], u[:, -1] * (-log_p[:, -1]).exp(), 0.0) - total
        added = torch.where(dkl != 0, dkl * of_others, 0.0).float()
        alone = RowGradients(dlogp - added, dentropy, None)
        self.kernels.row_dlogits(rows, target, T, alone, stats, dlogits)

        # the K tokens, and the target, which may be one of them
        present, u = present[:, :-1], u[:, :-1]
        hit = present & (self.ids == y)
        logp = stats.logp.double()[:, None]
        log_p = torch.cat([log_p[:, :-1], logp], 1)
        p, of_target = log_p.exp(), torch.where(hit, u, 0.0).sum(1)
        of_kl = torch.cat([u, of_target[:, None]], 1) - p * total[:, None]
        of_kl[:, -1] = torch.where(hit.any(1), of_kl[:, -1], p[:, -1] * of_others)
        of_logp = torch.cat([-p[:, :-1], -torch.expm1(logp)], 1)
        values = dlogp[:, None] * of_logp + dkl[:, None] * of_kl
        if dentropy is not None:
            surprise = times(p, log_p + stats.entropy[:, None])
            values -= dentropy[:, None] * surprise
        moves = row_gradients.any & _is_read(rows, target)
        values = torch.where(moves[:, None], values / T, 0.0)
        # an absent token and the target itself write what is written at the target
        other = torch.cat([present & ~hit, torch.zeros_like(y, dtype=torch.bool)], 1)
        columns = torch.where(other, torch.cat([self.ids, y], 1), y)
        values = torch.where(other, values, values[:, -1:]).to(dlogits.dtype)
        shape = (*dlogits.shape[:-1], -1)
        return dlogits.scatter_(-1, columns.view(shape), values.view(shape))

    def _outcomes(
        self, rows: Rows, target: Tensor, temperature: float, stats: RowStats | RowLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log p, log q, present) of the outcomes `[N, K + 1]`, float64; see `add_tail`."""
        y = target.clamp(0, rows.V - 1)[:, None]
        present = (self.ids >= 0) & (self.ids < rows.V) & (self.log_q > -math.inf)
        columns = torch.cat([torch.where(present, self.ids, y), y], 1)
        shape = (*rows.logits.shape[:-1], -1)
        logits = rows.logits.gather(-1, columns.view(shape)).view(columns.shape).double()
        anchor, log_sum = log_normaliser(stats.state, logits[:, -1], temperature)
        logp = stats.logp.double()
        log_p = logits[:, :-1] / temperature - anchor[:, None] - log_sum[:, None]
        hit = columns[:, :-1] == y
        # exact also where the target is certain
        log_p = torch.where(hit, logp[:, None], log_p)
        share = -torch.expm1(logp)
        rest = share - torch.where(present & ~hit, log_p.exp(), 0.0).sum(1)
        rest = torch.maximum(rest, share * TAIL_ROUNDING).clamp(min=LEAST_TAIL)
        p_tail = rest + torch.where((present & hit).any(1), 0.0, logp.exp())
        has_tail = (present.sum(1) < rows.V) & self.tail
        return add_tail(log_p, self.log_q.double(), present, p_tail, has_tail)


def add_tail(
    log_p: Tensor, log_q: Tensor, present: Tensor, p_tail: Tensor, has_tail: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outcomes `[N, K]` and one more, all other tokens, of probability `p_tail` [N]."""
    log_q = torch.where(present, log_q, 0.0)
    q_tail = 1 - torch.where(present, log_q.exp(), 0.0).sum(1)
    q_tail = q_tail.clamp(min=LEAST_REF_TAIL)
    return (
        torch.cat([log_p, p_tail.log()[:, None]], 1),
        torch.cat([log_q, q_tail.log()[:, None]], 1),
        torch.cat([present, has_tail[:, None]], 1),
    )


def divergence(
    log_p: Tensor, log_q: Tensor, present: Tensor, interpolation: float
) -> tuple[Tensor, Tensor]:
    """(g, p·∂g/∂p) of every outcome, nats; 0 where it is not present.

    interpolation 1: g = p·log(p/q), the reverse KL; 0: g = q·log(q/p), the forward KL; t between:
    g = t·q·log(q/m) + (1 − t)·p·log(p/m) with m = t·q + (1 − t)·p (TRL's generalised JSD).
    """
    p, q, t = log_p.exp(), log_q.exp(), interpolation
    if t == 1:
        value = times(p, log_p - log_q)
        u = value + p
    elif t == 0:
        value, u = times(q, log_q - log_p), -q
    else:
        log_m = torch.logaddexp(log_p + math.log1p(-t), log_q + math.log(t))
        u = (1 - t) * times(p, log_p - log_m)
        value = t * times(q, log_q - log_m) + u
    return torch.where(present, value, 0.0), torch.where(present, u, 0.0)


def times(weight: Tensor, values: Tensor) -> Tensor:
    """weight·values; 0 where the weight is 0, whatever the value."""
    return weight * torch.where(weight == 0, 0.0, values)


def log_normaliser(
    state: Tensor, target_logit: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(M, log Σ_j exp(x_j/T − M)) of rows, float64, from the state of their softmax."""
    anchor, others = state[0].double(), state[1].double()
    # unscaled where the sum is negative
    anchor = torch.where(others < 0, anchor / temperature, anchor * math.log(2))
    return anchor, torch.logaddexp(others.abs().log(), target_logit / temperature - anchor)


def _is_read(rows: Rows, target: Tensor) -> Tensor:
    return (target >= 0) & (target < rows.V)
