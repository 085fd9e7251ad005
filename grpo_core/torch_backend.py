"""The torch backend: the plans of the kernels in PyTorch operations, for tensors without a GPU.

Rows are taken a few at a time, so that everything between reading a logit and writing its gradient
stays in the processor's cache: main memory sees one read and one write, as on a GPU. Signatures
and units are those of the host functions in kernels/; see there for what the arguments mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.kernels.records import RowLoss, Rows, TokenLoss
from grpo_core.torch_formula import as_torch

# float32 scratch of one chunk, twice: small enough for the caches of two cores
CHUNK_BYTES = 2**21
LN2 = math.log(2)


def row_stats(
    rows: Rows, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, peak, rest of every row."""
    logp, entropy, peak, rest = target.new_zeros(4, rows.N, dtype=torch.float32).unbind()
    softmax = _Softmax(temperature)
    for chunk in _chunks(rows, _readable(target, rows.V)):
        at = chunk.at
        peak[at], rest[at], moment, z = softmax.read(chunk.logits, target[at])
        logp[at], entropy[at] = _token_statistics(z, rest[at], moment)
    return logp, entropy, peak, rest


def row_loss(
    rows: Rows,
    target: Tensor,
    temperature: float,
    weight: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    *,
    surrogate: Callable,
    surrogate_args: tuple[float, ...],
    kl: Callable | None,
    beta: float,
    dlogits: Tensor | None,
) -> RowLoss:
    """Loss of every row, and the gradient of every logit into `dlogits`, in one pass."""
    result = RowLoss.zeros(rows.N, weight.device)
    softmax = _Softmax(temperature)
    for chunk in _chunks(rows, (weight != 0) & _readable(target, rows.V), dlogits):
        at = chunk.at
        peak, rest, moment, z = softmax.read(chunk.logits, target[at])
        logp, entropy = _token_statistics(z, rest, moment)
        log_ratio = logp - (logp if old_logp is None else old_logp[at])
        terms = token_loss(
            logp,
            log_ratio,
            advantage[at],
            weight[at],
            None if ref_logp is None else ref_logp[at],
            surrogate=surrogate,
            surrogate_args=surrogate_args,
            kl=kl,
            beta=beta,
        )
        dlogp = terms.dpolicy + terms.dkl
        values = (logp, entropy, log_ratio.exp(), terms.kl, terms.loss, dlogp, peak, rest)
        for vector, value in zip(result, (*values, terms.dropped), strict=True):
            vector[at] = value
        if dlogits is not None:
            softmax.write_gradient(chunk, target[at], dlogp, rest, z)
    return result


def row_dlogits(
    rows: Rows,
    target: Tensor,
    temperature: float,
    dlogp: Tensor,
    peak: Tensor,
    rest: Tensor,
    dlogits: Tensor,
) -> Tensor:
    """Writes dL/dlogits into `dlogits`; `peak` and `rest` are found again, as cheaply as read."""
    softmax = _Softmax(temperature)
    for chunk in _chunks(rows, (dlogp != 0) & _readable(target, rows.V), dlogits):
        _, rest_again, _, z = softmax.read(chunk.logits, target[chunk.at])
        softmax.write_gradient(chunk, target[chunk.at], dlogp[chunk.at], rest_again, z)
    return dlogits


def row_scale(rows: Rows, factor: Tensor) -> Tensor:
    """Scales `rows` in place by the 0-dim tensor `factor`; moves nothing when it is 1."""
    return rows.logits if factor == 1 else rows.logits.mul_(factor)


def token_loss(
    logp: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ref_logp: Tensor | None,
    *,
    surrogate: Callable,
    surrogate_args: tuple[float, ...],
    kl: Callable | None,
    beta: float,
) -> TokenLoss:
    """Weighted loss of every token and its two derivatives."""
    loss, dpolicy = as_torch(surrogate)(logp, log_ratio, advantage, *surrogate_args)
    kl_value = dkl = torch.zeros_like(logp)
    if ref_logp is not None and kl is not None:
        kl_value, dkl = as_torch(kl)(logp, ref_logp, log_ratio)
        loss, dkl = loss + beta * kl_value, beta * dkl
    alive = weight != 0
    usable = logp.isfinite() & log_ratio.isfinite() & loss.isfinite() & (dpolicy + dkl).isfinite()
    kept = alive & usable
    zero = torch.zeros_like(logp)
    return TokenLoss(
        loss=torch.where(kept, weight * loss, zero),
        dpolicy=torch.where(kept, weight * dpolicy, zero),
        dkl=torch.where(kept, weight * dkl, zero),
        kl=torch.where(alive, kl_value, zero),
        dropped=alive & ~usable,
    )


def group_norm(
    rewards: Tensor, group_size: int, *, scale: bool, ddof: int, epsilon: float
) -> Tensor:
    """Advantage of every completion within its group; float32, or float64 for float64 rewards."""
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    groups = rewards.view(-1, group_size)
    centred = groups - groups.amax(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / max(group_size - ddof, 1)
        centred = centred / (variance.sqrt() + epsilon)
    return centred.flatten()


@dataclass(frozen=True)
class _Chunk:
    """A few rows that are wanted: their logits `[n, V]`, places, and home of their gradient."""

    logits: Tensor
    at: slice | Tensor  # place of each row among all N
    dlogits: Tensor | None  # [m, V], m >= n: every row of the stretch the chunk was taken from
    inside: slice | Tensor  # place of each row in `dlogits`


def _chunks(rows: Rows, wanted: Tensor, dlogits: Tensor | None = None) -> Iterator[_Chunk]:
    """Takes the wanted rows a few at a time; unwanted rows of `dlogits` become 0."""
    step = max(1, CHUNK_BYTES // (4 * rows.V))
    stretches = _stretches(rows.logits, rows)
    outputs = stretches if dlogits is None else _stretches(dlogits, rows)
    first = 0
    for stretch, output in zip(stretches, outputs, strict=True):
        for start in range(0, stretch.shape[0], step):
            logits, gradient = stretch[start : start + step], output[start : start + step]
            place = slice(first + start, first + start + logits.shape[0])
            inside = wanted[place].nonzero().squeeze(1)
            home = None if dlogits is None else gradient
            if inside.numel() == logits.shape[0]:
                yield _Chunk(logits, place, home, slice(None))
                continue
            # a copy, so that zeroing the home leaves it readable when both are one
            some = logits[inside]
            if home is not None:
                home.zero_()
            if inside.numel():
                yield _Chunk(some, place.start + inside, home, inside)
        first += stretch.shape[0]


def _stretches(tensor: Tensor, rows: Rows) -> list[Tensor]:
    """`[B, T, V]` or `[N, V]` as views `[n, V]` of evenly spaced rows, as few as possible."""
    if rows.rows_per_batch >= rows.N:
        return [tensor.as_strided((rows.N, rows.V), (rows.row_stride, 1))]
    return list(tensor.unbind())


def _readable(target: Tensor, V: int) -> Tensor:
    """Where the target is a word."""
    return (target >= 0) & (target < V)


class _Softmax:
    """Softmax of chunks without their target, in base 2 as in the kernels, over reused scratch."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.centred = torch.empty(0)
        self.power = torch.empty(0)

    def read(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(peak, rest, Σ 2^c·c, z) of rows `[n, V]`; leaves 2^c, 0 at the target, in `power`."""
        if self.power.shape != logits.shape:
            self.centred = logits.new_empty(logits.shape, dtype=torch.float32)
            self.power = torch.empty_like(self.centred)
        centred, power, hole = self.centred, self.power, target[:, None]
        if logits.dtype == torch.float32:
            peak = logits.amax(1)
            torch.sub(logits, peak[:, None], out=centred)
        else:
            centred.copy_(logits)
            peak = centred.amax(1)
            centred.sub_(peak[:, None])
        centred.mul_(1 / (LN2 * self.temperature))
        gap = centred.gather(1, hole).squeeze(1)
        torch.exp2(centred, out=power)
        power.scatter_(1, hole, 0.0)
        rest = power.sum(1)
        moment = centred.mul_(power).sum(1)
        # 0·(−inf): a forbidden word has no entropy; a NaN among the logits shows in `rest`
        if moment.isnan().any():
            moment = centred.nan_to_num_(nan=0.0).sum(1)
        return peak, rest, moment, rest.log2() - gap

    def write_gradient(
        self, chunk: _Chunk, target: Tensor, dlogp: Tensor, rest: Tensor, z: Tensor
    ) -> None:
        """dlogp·(δ − p)/T of the rows just read; uses up `power`."""
        assert chunk.dlogits is not None
        at_target = dlogp / self.temperature * torch.sigmoid(z * LN2)
        factor = torch.where(rest > 0, -at_target / rest, 0.0)
        power, moving, home = self.power, dlogp != 0, chunk.dlogits
        if isinstance(chunk.inside, slice) and moving.all() and home.dtype == torch.float32:
            torch.mul(power, factor[:, None], out=home)
            home.scatter_(1, target[:, None], at_target[:, None])
            return
        power.mul_(factor[:, None]).scatter_(1, target[:, None], at_target[:, None])
        # a dropped row may hold NaN, which no factor removes
        power[~moving] = 0.0
        if isinstance(chunk.inside, slice):
            home.copy_(power)
        else:
            home.index_copy_(0, chunk.inside, power.to(home.dtype))


def _token_statistics(z: Tensor, rest: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """logp and entropy of each token, in nats, from z, S and Σ 2^c·c."""
    logp, log_others, others = logsigmoid(-z * LN2), logsigmoid(z * LN2), torch.sigmoid(z * LN2)
    entropy_others = (rest.log2() - moment / rest) * LN2
    entropy = torch.where(others > 0, others * (entropy_others - log_others), 0.0)
    return logp, entropy - torch.where(others < 1, torch.sigmoid(-z * LN2) * logp, 0.0)
