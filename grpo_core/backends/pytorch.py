"""The torch backend: plain PyTorch in float64, short and slow, on any device.

It serves where neither Triton nor Numba is installed, and as a second reading of the same formulas.
Signatures and units are those of the host functions in kernels/; see there for what the arguments
mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.backends import sequence_ratio
from grpo_core.backends.formula import as_torch
from grpo_core.kernels.kl import times_ratio
from grpo_core.kernels.records import (
    RowGradients,
    RowLoss,
    Rows,
    RowStats,
    SequenceTokens,
    Terms,
    TokenLoss,
    TokenVectors,
)

# bytes of each of the float64 matrices that rows are worked on in
GROUP_BYTES = 2**22


def row_stats(rows: Rows, target: Tensor) -> RowStats:
    """Softmax statistics of every row at its target; the state as in `online_softmax`."""
    vectors = torch.zeros(6, rows.N, dtype=torch.float32, device=target.device)
    for at in _groups(rows, _readable(target, rows.V)):
        softmax = _Softmax.of(rows, target, at)
        vectors[:, at] = torch.stack([*softmax.statistics, *softmax.state]).float()
    logp, entropy, kl = vectors[:3]
    return RowStats(logp, entropy, None if rows.ref_logits is None else kl, vectors[3:])


def row_loss(rows: Rows, tokens: TokenVectors, terms: Terms, dlogits: Tensor | None) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`."""
    target = tokens.target
    vectors = torch.zeros(9, rows.N, dtype=torch.float32, device=target.device)
    dropped = torch.zeros_like(target, dtype=torch.bool)
    exact_beta = None if rows.ref_logits is None else terms.beta
    wanted = (tokens.weight != 0) & _readable(target, rows.V)
    if dlogits is not None:
        put_rows(dlogits, (~wanted).nonzero().squeeze(1), 0.0)
    for at in _groups(rows, wanted):
        some = tokens.at(at)
        softmax = _Softmax.of(rows, target, at)
        # as users see them, so that a ratio to what they were given is exactly 1
        logp, entropy, kl = (vector.float() for vector in softmax.statistics)
        log_ratio = logp - (logp if some.old_logp is None else some.old_logp)
        exact_kl = None if rows.ref_logits is None else kl
        token = token_loss(logp, log_ratio, some, entropy, exact_kl, terms)
        dlogp = token.dlogp + token.dlog_ratio
        values = (logp, entropy, log_ratio.exp(), token.kl, token.loss, dlogp)
        vectors[:, at] = torch.stack([*values, *softmax.state]).float()
        dropped[at] = token.dropped
        if dlogits is not None:
            row_gradients = some.row_gradients(dlogp, token.dropped, exact_beta)
            put_rows(dlogits, at, softmax.gradient(row_gradients, entropy, kl))
    logp, entropy, ratio, kl, loss, dlogp = vectors[:6]
    return RowLoss(logp, entropy, ratio, kl, loss, dlogp, dropped, vectors[6:])


def row_dlogits(
    rows: Rows,
    target: Tensor,
    row_gradients: RowGradients,
    stats: RowStats | RowLoss,
    dlogits: Tensor,
) -> Tensor:
    """Writes dL/dlogits into `dlogits`; the softmax is computed again from the logits."""
    wanted = row_gradients.any & _readable(target, rows.V)
    rows = rows.for_gradient(row_gradients)
    put_rows(dlogits, (~wanted).nonzero().squeeze(1), 0.0)
    for at in _groups(rows, wanted):
        softmax = _Softmax.of(rows, target, at)
        kl = None if stats.kl is None else stats.kl[at]
        put_rows(dlogits, at, softmax.gradient(row_gradients.at(at), stats.entropy[at], kl))
    return dlogits


@dataclass(frozen=True)
class _Softmax:
    """The softmax of n rows, float64: the target's and the others' log-probabilities apart.

    Attributes:
        target: [n, 1] int64.
        temperature: T.
        log_p: [n, V] nats, exact for confident targets: log p_y = −softplus(z) with
            z = log Σ_{j≠y} exp(x_j/T) − x_y/T.
        log_q: the same of the reference, or None.
        log_others: [n, 1] nats, log(1 − p_y).
        state: anchor and sum of `online_softmax`, the sum negative: the anchor is not scaled; and
            the policy's part of a mixture's divergence, without the target.
        ref_log_others: [n, 1] nats, log(1 − q_y); 0 without a reference.
        interpolation: of the exact KL.
    """

    target: Tensor
    temperature: float
    log_p: Tensor
    log_q: Tensor | None
    log_others: Tensor
    state: tuple[Tensor, Tensor, Tensor]
    ref_log_others: Tensor
    interpolation: float

    @classmethod
    def of(cls, rows: Rows, target: Tensor, at: Tensor) -> _Softmax:
        """The softmax of the rows `at` [n]."""
        y, temperature, interpolation = target[at, None], rows.temperature, 1.0
        log_p, log_others, state = _log_softmax(_take(rows.logits, at), y, temperature)
        log_q, ref_log_others = None, torch.zeros_like(log_others)
        of_policy = torch.zeros_like(state[0])
        if rows.ref_logits is not None:
            log_q, ref_log_others, _ = _log_softmax(_take(rows.ref_logits, at), y, temperature)
            interpolation = rows.interpolation
            if rows.divergence == "mixture":
                to_mixture = log_to_mixture(log_p, log_q, interpolation)
                of_policy = weigh(log_p, to_mixture).scatter_(1, y, 0.0).sum(1)
        return cls(
            *(y, temperature, log_p, log_q, log_others),
            (*state, of_policy),
            ref_log_others,
            interpolation,
        )

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """(logp, entropy, exact KL) of each row, nats `[n]`; the KL is 0 without a reference."""
        logp = self.log_p.gather(1, self.target).squeeze(1)
        entropy = -weigh(self.log_p, self.log_p).sum(1)
        if self.log_q is None:
            return logp, entropy, torch.zeros_like(logp)
        beta = self.interpolation
        if beta == 1:
            kl = weigh(self.log_p, self.log_p - self.log_q)
        elif beta == 0:
            kl = weigh(self.log_q, self.log_q - self.log_p)
        else:
            of_p = log_to_mixture(self.log_p, self.log_q, beta)
            of_q = log_to_mixture(self.log_q, self.log_p, 1 - beta)
            kl = (1 - beta) * weigh(self.log_p, of_p) + beta * weigh(self.log_q, of_q)
        return logp, entropy, kl.sum(1)

    def gradient(self, row_gradients: RowGradients, entropy: Tensor, kl: Tensor | None) -> Tensor:
        """dL/dlogits `[n, V]`; 0 in rows without a gradient and where the target is certain."""
        share, dlogp = self.log_others.exp(), row_gradients.dlogp.double()[:, None]
        dlogits = (-dlogp * self.log_p.exp()).scatter_(1, self.target, dlogp * share)
        if row_gradients.dentropy is not None:
            surprise = weigh(self.log_p, self.log_p + entropy[:, None])
            dlogits -= row_gradients.dentropy.double()[:, None] * surprise
        if row_gradients.dkl is not None and self.log_q is not None and kl is not None:
            dkl = row_gradients.dkl.double()[:, None]
            # a KL that has no part in the gradient may be infinite or NaN
            dlogits += torch.where(dkl == 0, 0.0, dkl * self._dkl(self.log_q, kl))
        still = ~row_gradients.any[:, None]
        if self.interpolation != 0:
            # a token that the policy all but forbids has a gradient of the forward KL
            still = still | (share == 0)
        return dlogits.div_(self.temperature).masked_fill_(still, 0.0)

    def _dkl(self, log_q: Tensor, kl: Tensor) -> Tensor:
        """The gradient of the exact KL, times T."""
        log_p, beta = self.log_p, self.interpolation
        if beta == 1:
            return weigh(log_p, log_p - log_q - kl[:, None])
        if beta == 0:
            # of likely targets the small difference of what they leave to the others
            p, q = log_p.exp(), log_q.exp()
            p_y, q_y = p.gather(1, self.target), q.gather(1, self.target)
            left = self.ref_log_others.exp() - self.log_others.exp()
            at_target = torch.where(torch.minimum(p_y, q_y) > 0.5, left, p_y - q_y)
            return (p - q).scatter_(1, self.target, at_target)
        to_mixture, of_others = log_to_mixture(log_p, log_q, beta), self.state[2][:, None]
        of_target = weigh(log_p, to_mixture).gather(1, self.target)
        at_target = (
            of_target * self.log_others.exp() - log_p.gather(1, self.target).exp() * of_others
        )
        gradient = weigh(log_p, to_mixture - of_target - of_others)
        return (1 - beta) * gradient.scatter_(1, self.target, at_target)


def weigh(log_p: Tensor, values: Tensor) -> Tensor:
    """p·values; 0 where p is 0, whatever the value."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * values)


def natural_sums(state: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(anchor in nats, sum relative to it) [N] float64, of a state as in `online_softmax`."""
    anchor, total = state[:2].double()
    # unscaled where the sum is negative
    return torch.where(total < 0, anchor / temperature, anchor * math.log(2)), total.abs()


def log_to_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log p/m for m = (1 − β)·p + β·q, exact for p near q and where one is 0."""
    gap = (log_q - log_p).nan_to_num_(0.0, math.inf, -math.inf)
    weight = torch.where(gap > 0, 1 - beta, beta)
    rest = torch.where(gap > 0, beta, 1 - beta)
    # of m, relative to the larger of p and q
    missing = -weight * torch.expm1(-gap.abs())
    log_m = torch.where(
        missing < 0.5, torch.log1p(-missing), (rest + weight * (-gap.abs()).exp()).log()
    )
    return -log_m - gap.clamp(min=0)


def _log_softmax(
    logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(log p, log(1 − p_y), state) of rows `[n, V]`, see `_Softmax`."""
    logits = logits.double()
    target_logit = logits.gather(1, target)
    # an infinite target would pass for a certain one
    target_logit = target_logit.masked_fill(target_logit == math.inf, math.nan)
    others = logits.scatter(1, target, -math.inf)
    # finite, so that a row of −inf gives no NaN
    anchor = others.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    others.sub_(anchor).div_(temperature)
    powers = others.exp()
    # of all powers the largest, 1, apart: log total has all its digits where it is nearly alone
    largest = powers.amax(1, keepdim=True)
    rest = powers.scatter_(1, powers.argmax(1, keepdim=True), 0.0).sum(1, keepdim=True)
    total = largest + rest
    log_total = torch.where(largest == 1, rest.log1p(), total.log())
    z = log_total - (target_logit - anchor) / temperature
    log_others = logsigmoid(z)
    log_p = others.add_(log_others - torch.where(total > 0, log_total, 0.0))
    log_p.scatter_(1, target, logsigmoid(-z))
    return log_p, log_others, (anchor.squeeze(1), -total.squeeze(1))


def _groups(rows: Rows, wanted: Tensor) -> Iterator[Tensor]:
    """Indices of a few wanted rows at a time.

    A row that is left alone comes twice: torch would share the sum of one row among its threads,
    and the bits would depend on how many there are.
    """
    for at in wanted.nonzero().squeeze(1).split(max(2, GROUP_BYTES // (8 * rows.V))):
        if len(at):
            yield at if len(at) > 1 else at.repeat(2)


def _take(logits: Tensor, at: Tensor) -> Tensor:
    """A copy of the rows `at`, `[n, V]`, of logits `[N, V]` or `[B, T, V]`."""
    return logits[at] if logits.ndim == 2 else logits[at // logits.shape[1], at % logits.shape[1]]


def put_rows(logits: Tensor, at: Tensor, values: Tensor | float) -> None:
    """Writes the rows `at`."""
    values = values.to(logits.dtype) if isinstance(values, Tensor) else values
    if logits.ndim == 2:
        logits[at] = values
    else:
        logits[at // logits.shape[1], at % logits.shape[1]] = values


def row_scale(dlogits: Tensor, factor: Tensor) -> Tensor:
    """Scales the rows in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    return dlogits if factor == 1 else dlogits.mul_(factor)


def token_loss(
    logp: Tensor,
    log_ratio: Tensor,
    tokens: TokenVectors,
    entropy: Tensor,
    exact_kl: Tensor | None,
    terms: Terms,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives; computed in float64."""
    given = (logp, log_ratio, tokens.advantage, tokens.weight)
    logp, log_ratio, advantage, weight = (vector.double() for vector in given)
    policy = as_torch(terms.surrogate)(logp, log_ratio, advantage, *terms.surrogate_args)
    if tokens.factor is not None:
        policy = tuple(tokens.factor.double() * part for part in policy)
    loss, dlogp, dlog_ratio = policy
    kl_value = dkl = dkl_ratio = torch.zeros_like(logp)
    if exact_kl is not None:
        kl_value = exact_kl.double()
    if tokens.ref_logp is not None and terms.kl is not None:
        kl_value, dkl = as_torch(terms.kl)(logp, tokens.ref_logp.double())
        if terms.kl_times_ratio:
            kl_value, dkl, dkl_ratio = as_torch(times_ratio)(kl_value, dkl, log_ratio)
    # with beta 0 the KL is only looked at: an infinite one must not spoil the loss
    if terms.beta:
        loss = loss + terms.beta * kl_value
        dlogp, dlog_ratio = dlogp + terms.beta * dkl, dlog_ratio + terms.beta * dkl_ratio
    # at once, as a chunk has few rows and many operations
    weighted = torch.stack([loss, dlogp, dlog_ratio]) * weight
    if tokens.entropy_weight is not None:
        weighted[0] -= tokens.entropy_weight.double() * entropy.double()
    ratio = log_ratio.exp()
    checked = torch.cat([weighted, torch.stack([logp, log_ratio, ratio])]).float()
    alive, usable = weight != 0, checked.isfinite().all(0)
    unused = ~(alive & usable)
    loss, dlogp, dlog_ratio = checked[:3].masked_fill_(unused, 0.0)
    kl_value = kl_value.float().masked_fill_(~alive, 0.0)
    return TokenLoss(loss, dlogp, dlog_ratio, kl_value, dropped=alive & unused)


def sequence_loss(stats: RowStats, tokens: SequenceTokens, terms: Terms) -> RowLoss:
    """Loss of every token and its derivative by logp, at the ratio level of `terms`."""
    logp, entropy, exact_kl, state = stats
    d = logp - (logp if tokens.old_logp is None else tokens.old_logp)
    log_ratio = sequence_ratio.forward(d, tokens, terms)
    token = token_loss(logp, log_ratio, tokens, entropy, exact_kl, terms)
    dlogp = token.dlogp + sequence_ratio.backward(d, token.dlog_ratio, tokens, terms)
    dropped = sequence_ratio.spread(token.dropped, tokens, terms)
    dlogp, loss = (vector.masked_fill(dropped, 0.0) for vector in (dlogp, token.loss))
    dropped = dropped & tokens.valid & (tokens.weight != 0)
    ratio = torch.where(tokens.valid, log_ratio.exp(), 0.0)
    return RowLoss(logp, entropy, ratio, token.kl, loss, dlogp, dropped, state)


def _readable(target: Tensor, V: int) -> Tensor:
    """Where the target is a column of the logits."""
    return (target >= 0) & (target < V)
