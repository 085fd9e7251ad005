"""The softmax of a few rows in cache: statistics of their targets, then their gradient.

What `kernels/online_softmax.py` is to the kernels this is to the torch backend. The target is left
out of the sum here, too. A row's log-probability has the same bits in every batch: sums run over a
row's own parts, its scalars are computed in float64, and no logit's power is taken at the end of an
array, where torch may use another instruction.
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
# numbers that torch's vectorised loops take at a time, or a divisor of it
STRIDE = 64
# a sum of powers below this says that the target outweighs all others: they are centred anew
LEAST_SUM = 1e-20


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
        powers, z = policy.powers, found.z
        still = ~slopes.any
        # a dropped row may hold NaN, which no factor removes
        dropped = still.nonzero().squeeze(1)
        powers.index_fill_(0, dropped, 0.0)
        share, mine = torch.sigmoid(z), torch.sigmoid(-z)
        at_target = slopes.dlogp.double() * share
        factor = -at_target
        extra = None
        if slopes.dentropy is not None:
            slope = slopes.dentropy.double()
            spread = torch.where(share > 0, logsigmoid(z) + found.entropy - policy.lse, 0.0)
            of_target = mine * (logsigmoid(-z) + found.entropy)
            at_target = at_target - torch.where(mine > 0, slope * of_target, 0.0)
            # q·log q of the softmax among the others, log q = `centred` − lse
            factor = factor - slope * share * spread
            extra = policy.weighted()[0].index_fill_(0, dropped, 0.0)
            extra.mul_(policy.scaled(-slope * share, still))
        if slopes.dkl is not None:
            assert found.kl is not None and found.ref_z is not None
            slope, reference = slopes.dkl.double(), self.reference
            gap = logsigmoid(z) - logsigmoid(found.ref_z) - found.kl
            gap = gap - (policy.lse - reference.lse)
            of_target = mine * (logsigmoid(-z) - logsigmoid(-found.ref_z) - found.kl)
            at_target = at_target + torch.where(mine > 0, slope * of_target, 0.0)
            factor = factor + torch.where(share > 0, slope * share * gap, 0.0)
            excess = reference.powers.mul_(policy.scaled(slope * share, still))
            excess.index_fill_(0, dropped, 0.0)
            extra = excess if extra is None else extra.add_(excess)
        at_target = (at_target / policy.temperature).float().masked_fill(still, 0.0)[:, None]
        factor = policy.scaled(factor, still)
        if isinstance(chunk.inside, slice) and home.dtype == torch.float32 and extra is None:
            torch.mul(powers, factor, out=home).scatter_(1, hole, at_target)
            return
        powers.mul_(factor)
        if extra is not None:
            powers.add_(extra)
        powers.scatter_(1, hole, at_target)
        if isinstance(chunk.inside, slice):
            home.copy_(powers)
        else:
            home.index_copy_(0, chunk.inside, powers.to(home.dtype))


class _Others:
    """The softmax over every word but the target, of one policy: `powers` over their sum."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.arrays = torch.empty(0), torch.empty(0)  # what the next two are views of
        self.centred = torch.empty(0)  # [n, V], logits over T less the row's centre; 0 at y
        self.powers = torch.empty(0)  # [n, V], exp of `centred`; 0 at y
        self.total = torch.empty(0)  # [n] float64, Σ of `powers`
        self.lse = torch.empty(0)  # [n] float64, its logarithm
        self.centre = torch.empty(0)  # [n] float64, nats
        self.moment: Tensor | None = None  # [n], Σ of `centred` times `powers`, once it is known

    def read(self, logits: Tensor, target: Tensor) -> Tensor:
        """z = log Σ_{j≠y} exp(x_j − x_y) of rows `[n, V]`, float64 `[n]`."""
        self._make_room(logits)
        centred, hole = self.centred, target[:, None]
        if logits.dtype == torch.float32:
            largest = logits.amax(1, keepdim=True)
            torch.sub(logits, largest, out=centred)
        else:
            centred.copy_(logits)
            largest = centred.amax(1, keepdim=True)
            centred.sub_(largest)
        if self.temperature != 1:
            centred.mul_(1 / self.temperature)
        # in float64, since `centred` is rounded where it is large
        mine = logits.gather(1, hole).squeeze(1).double() / self.temperature
        self.centre = largest.squeeze(1).double() / self.temperature
        centred.scatter_(1, hole, -math.inf)
        self._sum_powers()
        if (self.total < LEAST_SUM).any():
            self._centre_anew()
        self.moment = None
        # powers at the hole are 0 and stay so; no other product with them is to be NaN
        centred.scatter_(1, hole, 0.0)
        self.lse = self.total.log()
        gap = mine - self.centre
        return torch.where((self.total == 0) & ~gap.isnan(), -math.inf, self.lse - gap)

    def state(self) -> Tensor:
        """M and S of `online_softmax` of every row, float32 `[2, n]`."""
        peak = (self.centre / math.log(2)).float()
        rest = torch.exp(self.lse + self.centre - peak.double() * math.log(2))
        return torch.stack([peak, rest.float()])

    def entropy(self) -> Tensor:
        """Entropy of the softmax over the other words, nats, float64 `[n]`; uses up `centred`."""
        return self.lse - self.weighted()[1].double() / self.total

    def divergence_from(self, reference: _Others) -> Tensor:
        """KL between the two softmaxes over the other words, nats, float64 `[n]`.

        Leaves its integrand, Σ of which over `total` this is but for the two sums, in
        `reference.powers`.
        """
        excess = torch.sub(self.centred, reference.centred, out=reference.powers)
        excess.mul_(self.powers)
        cross = _row_sums(excess)
        if cross.isnan().any():
            # what π forbids adds nothing, whatever π_ref says of it
            excess.masked_fill_(self.powers == 0, 0.0)
            cross = _row_sums(excess)
        return cross.double() / self.total - (self.lse - reference.lse)

    def weighted(self) -> tuple[Tensor, Tensor]:
        """`centred` times `powers`, in the place of `centred`, and its row sums `[n]`."""
        if self.moment is None:
            self.moment = _row_sums(self.centred.mul_(self.powers))
            # 0·(−inf): a forbidden word has no entropy; a NaN among the logits shows in z
            if self.moment.isnan().any():
                self.moment = _row_sums(self.centred.nan_to_num_(nan=0.0))
        return self.centred, self.moment

    def scaled(self, vector: Tensor, still: Tensor) -> Tensor:
        """A row's derivative by T over the sum, float32 `[n, 1]`, 0 where nothing moves."""
        still = still | (self.total == 0)
        return (vector / (self.temperature * self.total)).float().masked_fill(still, 0.0)[:, None]

    def _make_room(self, logits: Tensor) -> None:
        """Scratch for such rows, and for powers behind them that nobody reads."""
        if self.powers.shape != logits.shape:
            numbers = logits.numel()
            room = -(-numbers // STRIDE) * STRIDE
            self.arrays = (
                torch.zeros(room, dtype=torch.float32, device=logits.device),
                torch.empty(room, dtype=torch.float32, device=logits.device),
            )
            self.centred, self.powers = (
                array[:numbers].view(logits.shape) for array in self.arrays
            )

    def _sum_powers(self) -> None:
        torch.exp(self.arrays[0], out=self.arrays[1])
        self.total = _row_sums(self.powers).double()

    def _centre_anew(self) -> None:
        """Moves the centre of rows whose sum is too small to the likeliest of the others."""
        peak = self.centred.amax(1)
        small = (self.total < LEAST_SUM) & (peak > -math.inf)
        moved = torch.where(small, peak, 0.0)
        self.centred.sub_(moved[:, None])
        self.centre = self.centre + moved.double()
        self._sum_powers()


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
