"""The torch backend: the plans of the kernels in PyTorch operations, for tensors without a GPU.

Rows are taken a few at a time, so that everything between reading a logit and writing its gradient
stays in the processor's cache: main memory sees one read and one write, as on a GPU. Signatures
and units are those of the host functions in kernels/; see there for what the arguments mean.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.kernels.kl import times_ratio
from grpo_core.kernels.records import RowLoss, Rows, RowStats, Terms, TokenLoss
from grpo_core.row_chunks import Chunk, for_each_chunk
from grpo_core.torch_formula import as_torch

# more than there are threads to share a row among
ROW_PARTS = 256


def row_stats(rows: Rows, target: Tensor, temperature: float) -> RowStats:
    """Softmax statistics of every row at its target; without `state`."""
    logp, entropy = target.new_zeros(2, rows.N, dtype=torch.float32).unbind()

    def read(chunk: Chunk, softmax: _Softmax) -> None:
        z = softmax.read(chunk.logits, target[chunk.at])
        logp[chunk.at], entropy[chunk.at] = _token_statistics(z, softmax.entropy_of_others())

    for_each_chunk(read, partial(_Softmax, temperature), rows, _readable(target, rows.V))
    return RowStats(logp, entropy, state=logp.new_empty(0, rows.N))


def row_loss(
    rows: Rows,
    target: Tensor,
    temperature: float,
    weight: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    terms: Terms,
    dlogits: Tensor | None,
) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`, in one pass."""
    result = RowLoss.empty(rows.N, weight.device, state=weight.new_empty(0, rows.N))
    for vector in result:
        vector.zero_()

    def pass_over(chunk: Chunk, softmax: _Softmax) -> None:
        at = chunk.at
        z = softmax.read(chunk.logits, target[at])
        logp, entropy = _token_statistics(z, softmax.entropy_of_others())
        log_ratio = logp - (logp if old_logp is None else old_logp[at])
        given_ref = None if ref_logp is None else ref_logp[at]
        bonus = entropy if terms.entropy_coef else None
        token = token_loss(logp, log_ratio, advantage[at], weight[at], given_ref, bonus, terms)
        dlogp = token.dlogp + token.dlog_ratio
        ratio = log_ratio.double().exp().float()
        values = (logp, entropy, ratio, token.kl, token.loss, dlogp, token.dropped)
        for vector, value in zip(result[:-1], values, strict=True):
            vector[at] = value
        if dlogits is not None:
            dentropy = terms.dentropy(weight[at], token.dropped)
            softmax.write_gradient(chunk, target[at], dlogp, z, dentropy, entropy)

    wanted = (weight != 0) & _readable(target, rows.V)
    for_each_chunk(pass_over, partial(_Softmax, temperature), rows, wanted, dlogits)
    return result


def row_dlogits(
    rows: Rows,
    target: Tensor,
    temperature: float,
    dlogp: Tensor,
    dentropy: Tensor | None,
    stats: RowStats | RowLoss,
    dlogits: Tensor,
) -> Tensor:
    """Writes dL/dlogits into `dlogits`; the softmax is found again from the logits alone."""

    def write(chunk: Chunk, softmax: _Softmax) -> None:
        at = chunk.at
        z = softmax.read(chunk.logits, target[at])
        slope = None if dentropy is None else dentropy[at]
        softmax.write_gradient(chunk, target[at], dlogp[at], z, slope, stats.entropy[at])

    moves = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
    wanted = moves & _readable(target, rows.V)
    for_each_chunk(write, partial(_Softmax, temperature), rows, wanted, dlogits)
    return dlogits


def lies_aligned(logits: Tensor) -> bool:
    """Always: here the order of summation does not follow from the alignment of a row."""
    return True


def row_scale(rows: Rows, factor: Tensor) -> Tensor:
    """Scales `rows` in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    return rows.logits if factor == 1 else rows.logits.mul_(factor)


def token_loss(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    terms: Terms,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives; computed in float64."""
    given = (logp, log_ratio, advantage, weight)
    logp, log_ratio, advantage, weight = (vector.double() for vector in given)
    loss, dlogp, dlog_ratio = as_torch(terms.surrogate)(
        logp, log_ratio, advantage, *terms.surrogate_args
    )
    kl_value = torch.zeros_like(logp)
    if ref_logp is not None and terms.kl is not None:
        kl_value, dkl = as_torch(terms.kl)(logp, ref_logp.double())
        dkl_ratio = torch.zeros_like(logp)
        if terms.kl_times_ratio:
            kl_value, dkl, dkl_ratio = as_torch(times_ratio)(kl_value, dkl, log_ratio)
        # with beta 0 the KL is only looked at: an infinite one must not spoil the loss
        if terms.beta:
            loss = loss + terms.beta * kl_value
            dlogp, dlog_ratio = dlogp + terms.beta * dkl, dlog_ratio + terms.beta * dkl_ratio
    if entropy is not None:
        loss = loss - terms.entropy_coef * entropy.double()
    weighted = [(weight * part).float() for part in (loss, dlogp, dlog_ratio)]
    alive = weight != 0
    usable = logp.isfinite() & log_ratio.isfinite() & log_ratio.exp().float().isfinite()
    for part in weighted:
        usable &= part.isfinite()
    loss, dlogp, dlog_ratio = (torch.where(alive & usable, part, 0.0) for part in weighted)
    kl_value = torch.where(alive, kl_value.float(), 0.0)
    return TokenLoss(loss, dlogp, dlog_ratio, kl_value, dropped=alive & ~usable)


def group_norm(
    rewards: Tensor, group_size: int, *, scale: bool, ddof: int, epsilon: float
) -> Tensor:
    """Advantage of every completion within its group; float64 for float64 rewards, else float32."""
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    groups = rewards.view(-1, group_size)
    centred = groups - groups.amax(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / max(group_size - ddof, 1)
        centred = centred / (variance.sqrt() + epsilon)
    return centred.flatten()


def _readable(target: Tensor, V: int) -> Tensor:
    """Where the target is a word."""
    return (target >= 0) & (target < V)


class _Softmax:
    """Softmax of chunks without their target, over reused scratch.

    Torch's softmax treats every row alike wherever it stands in a chunk; its exp does not (the last
    elements of an array take another instruction). So powers come from softmax, and scalars of a
    row are computed in float64: a row's log-probability has the same bits in every batch.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.centred = torch.empty(0)
        self.others = torch.empty(0)
        self.lse_others = torch.empty(0)

    def read(self, logits: Tensor, target: Tensor) -> Tensor:
        """z = log Σ_{j≠y} exp(x_j − x_y) of rows `[n, V]`, float64 `[n]`.

        Leaves the softmax over the other words, 0 at the target, in `others`.
        """
        if self.others.shape != logits.shape:
            self.centred = logits.new_empty(logits.shape, dtype=torch.float32)
            self.others = torch.empty_like(self.centred)
        centred, others, hole = self.centred, self.others, target[:, None]
        if logits.dtype == torch.float32:
            torch.sub(logits, logits.amax(1, keepdim=True), out=centred)
        else:
            centred.copy_(logits)
            centred.sub_(centred.amax(1, keepdim=True))
        if self.temperature != 1:
            centred.mul_(1 / self.temperature)
        gap = centred.gather(1, hole).squeeze(1).double()
        centred.scatter_(1, hole, -math.inf)
        peak = centred.amax(1).double()
        alone = peak == -math.inf
        torch.softmax(centred, 1, out=others)
        others.index_fill_(0, alone.nonzero().squeeze(1), 0.0)
        # the likeliest of the others has probability 1/S
        log_rest = -others.amax(1).double().log()
        centred.scatter_(1, hole, 0.0)
        self.lse_others = peak + log_rest
        return torch.where(alone & ~gap.isnan(), -math.inf, self.lse_others - gap)

    def entropy_of_others(self) -> Tensor:
        """Entropy of the softmax over the other words of the rows just read, nats, float64."""
        moment = _row_sums(self.centred.mul_(self.others))
        # 0·(−inf): a forbidden word has no entropy; a NaN among the logits shows in z
        if moment.isnan().any():
            moment = _row_sums(self.centred.nan_to_num_(nan=0.0))
        return self.lse_others - moment.double()

    def write_gradient(
        self,
        chunk: Chunk,
        target: Tensor,
        dlogp: Tensor,
        z: Tensor,
        dentropy: Tensor | None,
        entropy: Tensor,
    ) -> None:
        """(dlogp·(δ − p) − dentropy·p·(log p + H))/T of the rows just read; uses up `others`."""
        assert chunk.dlogits is not None
        others, home, hole = self.others, chunk.dlogits, target[:, None]
        still = dlogp == 0 if dentropy is None else (dlogp == 0) & (dentropy == 0)
        # a dropped row may hold NaN, which no factor removes
        others.index_fill_(0, still.nonzero().squeeze(1), 0.0)
        share, at_target = torch.sigmoid(z), dlogp.double() * torch.sigmoid(z)
        factor = -at_target
        if dentropy is not None:
            logp, mine, slope = logsigmoid(-z), torch.sigmoid(-z), dentropy.double()
            at_target = at_target - torch.where(mine > 0, slope * mine * (logp + entropy), 0.0)
            spread = torch.where(share > 0, logsigmoid(z) + entropy, 0.0)
            factor = factor - slope * share * spread
            # q·log q of the softmax among the others
            torch.xlogy(others, others, out=self.centred)
            self.centred.mul_(self._scaled(-slope * share, still))
        at_target, factor = self._scaled(at_target, still), self._scaled(factor, still)
        if isinstance(chunk.inside, slice) and home.dtype == torch.float32 and dentropy is None:
            torch.mul(others, factor, out=home).scatter_(1, hole, at_target)
            return
        others.mul_(factor)
        if dentropy is not None:
            others.add_(self.centred)
        others.scatter_(1, hole, at_target)
        if isinstance(chunk.inside, slice):
            home.copy_(others)
        else:
            home.index_copy_(0, chunk.inside, others.to(home.dtype))

    def _scaled(self, vector: Tensor, still: Tensor) -> Tensor:
        """A row's derivative over T, float32 `[n, 1]`, 0 where nothing moves."""
        return (vector / self.temperature).float().masked_fill(still, 0.0)[:, None]


def _row_sums(matrix: Tensor) -> Tensor:
    """Σ over each row `[n, V]`, in parts: a single long row would be shared out among threads."""
    even = matrix.shape[1] // ROW_PARTS * ROW_PARTS
    parts = matrix[:, :even].unflatten(1, (ROW_PARTS, -1)).sum(2)
    return parts.sum(1) + matrix[:, even:].sum(1)


def _token_statistics(z: Tensor, entropy_others: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of each token, nats, float32 `[n]`, from what `_Softmax.read` found."""
    logp, log_others = logsigmoid(-z), logsigmoid(z)
    inner = torch.where(z > -math.inf, log_others.exp() * (entropy_others - log_others), 0.0)
    outer = torch.where(z < math.inf, logp.exp() * logp, 0.0)
    return logp.float(), (inner - outer).float()
