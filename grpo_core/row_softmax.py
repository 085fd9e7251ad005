"""The softmax of a few rows in cache: statistics of their targets, then their gradient.

What `kernels/online_softmax.py` is to the kernels this is to the torch backend. The target is left
out of the sum here, too. Torch's softmax treats every row alike wherever it stands in a chunk; its
exp does not (the last elements of an array take another instruction). So powers come from softmax,
and scalars of a row are computed in float64: a row's log-probability has the same bits in every
batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.kernels.records import Slopes
from grpo_core.row_chunks import Chunk

# more than there are threads to share a row among
ROW_PARTS = 256


@dataclass(frozen=True)
class Found:
    """What a chunk's rows are like, `[n]` each; nats; float32 but for `z` and `ref_z`."""

    target: Tensor  # int64
    logp: Tensor
    entropy: Tensor
    z: Tensor  # log Σ_{j≠y} exp(x_j − x_y), float64
    kl: Tensor | None  # the exact KL; None without reference logits
    ref_z: Tensor | None


class RowSoftmax:
    """Softmax of chunks without their target, over reused scratch."""

    def __init__(self, temperature: float) -> None:
        self.policy = _Others(temperature)
        self.reference = _Others(temperature)

    def read(self, chunk: Chunk, target: Tensor, entropy: Tensor | None = None) -> Found:
        """Statistics of the rows; an `entropy` that is known is not computed again."""
        policy, reference = self.policy, self.reference
        z = policy.read(chunk.logits, target)
        kl = ref_z = None
        if chunk.ref_logits is not None:
            ref_z = reference.read(chunk.ref_logits, target)
            kl = _exact_kl(z, ref_z, policy.divergence_from(reference))
        logp = logsigmoid(-z)
        if entropy is None:
            entropy = _entropy(z, policy.entropy())
        return Found(target, logp.float(), entropy, z, None if kl is None else kl.float(), ref_z)

    def write_gradient(self, chunk: Chunk, slopes: Slopes, found: Found) -> None:
        """(dlogp·(δ − p) − dentropy·p·(log p + H) + dkl·p·(log p/q − KL))/T of the rows just read.

        Uses up the scratch.
        """
        assert chunk.dlogits is not None
        policy, home, hole = self.policy, chunk.dlogits, found.target[:, None]
        others, z = policy.others, found.z
        still = ~slopes.any
        # a dropped row may hold NaN, which no factor removes
        others.index_fill_(0, still.nonzero().squeeze(1), 0.0)
        share, mine = torch.sigmoid(z), torch.sigmoid(-z)
        at_target = slopes.dlogp.double() * share
        factor = -at_target
        extra = None
        if slopes.dentropy is not None:
            slope = slopes.dentropy.double()
            spread = torch.where(share > 0, logsigmoid(z) + found.entropy, 0.0)
            of_target = mine * (logsigmoid(-z) + found.entropy)
            at_target = at_target - torch.where(mine > 0, slope * of_target, 0.0)
            factor = factor - slope * share * spread
            # q·log q of the softmax among the others
            extra = torch.xlogy(others, others, out=policy.centred)
            extra.mul_(policy.scaled(-slope * share, still))
        if slopes.dkl is not None:
            assert found.kl is not None and found.ref_z is not None
            slope, reference = slopes.dkl.double(), self.reference
            gap = logsigmoid(z) - logsigmoid(found.ref_z) - found.kl
            gap = gap - (policy.lse - reference.lse)
            of_target = mine * (logsigmoid(-z) - logsigmoid(-found.ref_z) - found.kl)
            at_target = at_target + torch.where(mine > 0, slope * of_target, 0.0)
            factor = factor + torch.where(share > 0, slope * share * gap, 0.0)
            excess = reference.others.mul_(policy.scaled(slope * share, still))
            excess.index_fill_(0, still.nonzero().squeeze(1), 0.0)
            extra = excess if extra is None else extra.add_(excess)
        at_target, factor = policy.scaled(at_target, still), policy.scaled(factor, still)
        if isinstance(chunk.inside, slice) and home.dtype == torch.float32 and extra is None:
            torch.mul(others, factor, out=home).scatter_(1, hole, at_target)
            return
        others.mul_(factor)
        if extra is not None:
            others.add_(extra)
        others.scatter_(1, hole, at_target)
        if isinstance(chunk.inside, slice):
            home.copy_(others)
        else:
            home.index_copy_(0, chunk.inside, others.to(home.dtype))


class _Others:
    """The softmax over every word but the target, of one policy."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.centred = torch.empty(0)  # [n, V], logits over T less the row's largest; 0 at y
        self.others = torch.empty(0)  # [n, V], the softmax; 0 at y
        self.lse = torch.empty(0)  # [n] float64, of `centred` without y
        self.largest = torch.empty(0)  # [n], of the logits

    def read(self, logits: Tensor, target: Tensor) -> Tensor:
        """z = log Σ_{j≠y} exp(x_j − x_y) of rows `[n, V]`, float64 `[n]`."""
        if self.others.shape != logits.shape:
            self.centred = logits.new_empty(logits.shape, dtype=torch.float32)
            self.others = torch.empty_like(self.centred)
        centred, others, hole = self.centred, self.others, target[:, None]
        if logits.dtype == torch.float32:
            largest = logits.amax(1, keepdim=True)
            torch.sub(logits, largest, out=centred)
        else:
            centred.copy_(logits)
            largest = centred.amax(1, keepdim=True)
            centred.sub_(largest)
        self.largest = largest.squeeze(1)
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
        self.lse = peak + log_rest
        return torch.where(alone & ~gap.isnan(), -math.inf, self.lse - gap)

    def state(self) -> Tensor:
        """M and S of `online_softmax` of every row, float32 `[2, n]`."""
        exact = self.largest.double() / self.temperature
        peak = (exact / math.log(2)).float()
        rest = torch.exp(self.lse + exact - peak.double() * math.log(2))
        return torch.stack([peak, rest.float()])

    def entropy(self) -> Tensor:
        """Entropy of the softmax over the other words, nats, float64 `[n]`; uses up `centred`."""
        moment = _row_sums(self.centred.mul_(self.others))
        # 0·(−inf): a forbidden word has no entropy; a NaN among the logits shows in z
        if moment.isnan().any():
            moment = _row_sums(self.centred.nan_to_num_(nan=0.0))
        return self.lse - moment.double()

    def divergence_from(self, reference: _Others) -> Tensor:
        """KL between the two softmaxes over the other words, nats, float64 `[n]`.

        Leaves its integrand, Σ of which this is but for the two sums, in `reference.others`.
        """
        excess = torch.sub(self.centred, reference.centred, out=reference.others)
        excess.mul_(self.others)
        cross = _row_sums(excess)
        if cross.isnan().any():
            # what π forbids adds nothing, whatever π_ref says of it
            excess.masked_fill_(self.others == 0, 0.0)
            cross = _row_sums(excess)
        return cross.double() - (self.lse - reference.lse)

    def scaled(self, vector: Tensor, still: Tensor) -> Tensor:
        """A row's derivative over T, float32 `[n, 1]`, 0 where nothing moves."""
        return (vector / self.temperature).float().masked_fill(still, 0.0)[:, None]


def _row_sums(matrix: Tensor) -> Tensor:
    """Σ over each row `[n, V]`, in parts: a single long row would be shared out among threads."""
    even = matrix.shape[1] // ROW_PARTS * ROW_PARTS
    parts = matrix[:, :even].unflatten(1, (ROW_PARTS, -1)).sum(2)
    return parts.sum(1) + matrix[:, even:].sum(1)


def _entropy(z: Tensor, entropy_others: Tensor) -> Tensor:
    """Entropy of each row, nats, float32 `[n]`, from that among the others."""
    logp, log_others = logsigmoid(-z), logsigmoid(z)
    inner = torch.where(z > -math.inf, log_others.exp() * (entropy_others - log_others), 0.0)
    outer = torch.where(z < math.inf, logp.exp() * logp, 0.0)
    return (inner - outer).float()


def _exact_kl(z: Tensor, ref_z: Tensor, kl_others: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each row, nats, float64 `[n]`, from that among the others."""
    logp, log_others = logsigmoid(-z), logsigmoid(z)
    gap_others = log_others - logsigmoid(ref_z) + kl_others
    inner = torch.where(z > -math.inf, log_others.exp() * gap_others, 0.0)
    return inner + torch.where(z < math.inf, logp.exp() * (logp - logsigmoid(-ref_z)), 0.0)
