"""The softmax of a few rows in cache: statistics of their targets, then their gradient.

What `kernels/online_softmax.py` is to the kernels this is to the torch backend. The target is left
out of the sum here, too. Each block is read, and its powers kept, before the vectors of the whole
chunk are worked on: of float32 logits where their gradient will be, of others in scratch.

A row's log-probability has the same bits in every batch and on any number of threads: one thread
sums it, its scalars are computed in float64, and no logit's power is taken at the end of an array,
or of a thread's share of one, where torch may use another instruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.backends.pytorch_rows import Chunk
from grpo_core.kernels.records import Slopes

# numbers that torch's vectorised loops take at a time, or a multiple of it
STRIDE = 64
# bytes that scratch begins at a multiple of
ALIGNMENT = 64
# numbers of which torch.exp gives a thread at least so many
EXP_GRAIN = 2**11
# blocks of a chunk whose scratch is one array each, with the centred one eight rows a core; and of
# one that keeps nothing in scratch
SCRATCH_BLOCKS, FREE_BLOCKS = 7, 16
# stands for -inf at the target: finite, so that nothing times its power, which is 0, is a NaN
LOWEST = -1e30
LEAST = torch.finfo(torch.float32).min
# as in `online_softmax`
FAR, SURE = 2.0**30, 0.125


def blocks_at_once(dlogits: Tensor | None, *, bonus: bool, exact_kl: bool) -> int:
    """Blocks to a chunk: few where every block keeps arrays until its gradient is written."""
    if dlogits is None:
        return FREE_BLOCKS
    arrays = (dlogits.dtype != torch.float32) + bonus + exact_kl
    return max(1, SCRATCH_BLOCKS // arrays) if arrays else FREE_BLOCKS


@dataclass(frozen=True)
class Found:
    """What a chunk's rows are like, `[n]` float64 each; nats, those that users see as they do."""

    holes: tuple[Tensor, ...]  # [b, 1] int64, the targets of each block
    logp: Tensor
    entropy: Tensor
    z: Tensor  # log Σ_{j≠y} exp(x_j − x_y)
    kl: Tensor | None  # the exact KL; None without reference logits
    ref_z: Tensor | None


class RowSoftmax:
    """Softmax of chunks without their target, over reused scratch.

    Between two rows the caches hold neither Python nor torch any more, which makes every call cost
    several microseconds: the loops over blocks call as little as possible.

    Args:
        temperature: divides the logits.
        bonus: where there is a gradient, that of the entropy is asked for, too.
    """

    def __init__(self, temperature: float, *, bonus: bool = False) -> None:
        self.bonus = bonus
        self.policy = _Others(temperature)
        self.reference = _Others(temperature)

    def read(self, chunk: Chunk, entropy: Tensor | None = None) -> Found:
        """Statistics of the rows; an `entropy` that is known is not computed again."""
        policy, reference = self.policy, self.reference
        policy.begin()
        reference.begin()
        weighs, crosses = entropy is None or self.bonus, []
        holes = chunk.target[:, None].split(chunk.sizes)
        for k, (block, hole) in enumerate(zip(chunk.blocks, holes, strict=True)):
            kept = k if block.has_gradient else 0
            policy.read(block.logits, hole, kept if self.bonus else 0, kept, block.home)
            if block.ref_logits is not None:
                reference.read(block.ref_logits, hole, 0, kept, None)
                crosses.append(policy.excess_over(reference))
            if weighs:
                policy.weigh()
        z = policy.end(chunk.mine)
        logp = logsigmoid(-z)
        if entropy is None:
            entropy = _rounded(_entropy(z, logp, policy.entropy()))
            sure = self._spread_again(chunk, z, entropy)
            if sure is not None:
                again = _rounded(_entropy(z, logp, policy.entropy()))
                entropy = torch.where(sure, again, entropy)
        elif self.bonus:
            self._spread_again(chunk, z, entropy)
        kl = ref_z = None
        if crosses:
            assert chunk.ref_mine is not None
            ref_z = reference.end(chunk.ref_mine)
            kl_others = torch.cat(crosses).double() / policy.total - (policy.lse - reference.lse)
            kl = _rounded(_exact_kl(z, ref_z, kl_others))
        return Found(holes, _rounded(logp), entropy, z, kl, ref_z)

    def _spread_again(self, chunk: Chunk, z: Tensor, entropy: Tensor) -> Tensor | None:
        """Where another word than the target is nearly certain, log Σ powers to every digit.

        Of all powers the largest, which is 1, is added last. Returns where, if anywhere.
        """
        sure = (z > 0) & (entropy < SURE)
        if not sure.any():
            return None
        excess = []
        for k, (block, some) in enumerate(zip(chunk.blocks, sure.split(chunk.sizes), strict=True)):
            if not some.any():
                excess.append(torch.zeros_like(some, dtype=torch.float64))
                continue
            powers = self.policy.powers[k]
            if not block.has_gradient:
                hole = chunk.target[:, None].split(chunk.sizes)[k]
                powers = self.policy.powers_of(block.logits, hole, 0, 0, None)[2]
            # in scratch, whose rows torch's loops treat alike
            _, rest = self.policy._array("rest", 0, powers)
            rest.copy_(powers).scatter_(1, powers.argmax(1, keepdim=True), 0.0)
            excess.append(_row_sums(rest).double())
        lse = torch.log1p(torch.cat(excess))
        self.policy.lse = torch.where(sure, lse, self.policy.lse)
        return sure

    def write_gradient(self, chunk: Chunk, slopes: Slopes, found: Found) -> None:
        """(dlogp·(δ − p) − dentropy·p·(log p + H) + dkl·p·(log p/q − KL))/T of the rows just read.

        Uses up what was kept of them.
        """
        policy, reference, z = self.policy, self.reference, found.z
        share = torch.sigmoid(z)
        # a certain target has no gradient, even where a word without probability has infinite KL
        still = ~slopes.any | (share == 0)
        at_target = slopes.dlogp * share
        factor = -at_target
        # what is added to the powers, and times what
        more: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []
        if slopes.dentropy is not None:
            slope, mine = slopes.dentropy, torch.sigmoid(-z)
            spread = torch.where(share > 0, logsigmoid(z) + found.entropy - policy.lse, 0.0)
            of_target = mine * (logsigmoid(-z) + found.entropy)
            at_target = at_target - torch.where(mine > 0, slope * of_target, 0.0)
            # q·log q of the softmax among the others, log q = `centred` − lse
            factor = factor - slope * share * spread
            of_weighted = policy.scaled(-slope * share, still)
            more.append((policy.centred, of_weighted.split(chunk.sizes)))
        if slopes.dkl is not None:
            assert found.kl is not None and found.ref_z is not None
            slope, mine = slopes.dkl, torch.sigmoid(-z)
            gap = logsigmoid(z) - logsigmoid(found.ref_z) - found.kl
            gap = gap - (policy.lse - reference.lse)
            of_target = mine * (logsigmoid(-z) - logsigmoid(-found.ref_z) - found.kl)
            at_target = at_target + torch.where(mine > 0, slope * of_target, 0.0)
            factor = factor + torch.where(share > 0, slope * share * gap, 0.0)
            of_excess = policy.scaled(slope * share, still)
            more.append((reference.powers, of_excess.split(chunk.sizes)))
        at_target = (at_target / policy.temperature).float().masked_fill_(still, 0.0)[:, None]
        factors = policy.scaled(factor, still).split(chunk.sizes)
        at_targets = at_target.split(chunk.sizes)
        # a dropped row may hold NaN, which no factor removes
        broken = still if slopes.dkl is not None else still & policy.total.isnan()
        for row in broken.nonzero().squeeze(1).tolist():
            k, inside = chunk.find(row)
            for matrices in (policy.powers, *(matrices for matrices, _ in more)):
                matrices[k][inside].zero_()

        for k, block in enumerate(chunk.blocks):
            powers = policy.powers[k].mul_(factors[k])
            for matrices, its_factors in more:
                powers.addcmul_(matrices[k], its_factors[k])
            powers.scatter_(1, found.holes[k], at_targets[k])
            block.bring_home(powers)


class _Others:
    """The softmax over every word but the target, of one policy: `powers` over their sum.

    Attributes:
        centred: of each block `[b, V]`: logits over T less the row's centre; finite at the target.
        powers: of each block `[b, V]`, exp of `centred`; 0 at the target.
        total: `[n]` float64, Σ of `powers`, once all blocks are read; so are:
        lse: `[n]` float64, its logarithm.
        centre: `[n]` float64, nats: the largest of the others.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.threads = torch.get_num_threads()
        self.arrays: dict[tuple[str, int], Tensor] = {}
        self.views: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Forgets the last chunk."""
        self.centred: list[Tensor] = []
        self.powers: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.totals: list[Tensor] = []
        self.moments: list[Tensor] = []

    def read(
        self, logits: Tensor, hole: Tensor, centred_in: int, powers_in: int, home: Tensor | None
    ) -> None:
        """Powers of a block `[b, V]`, and their sums; arguments as `powers_of`."""
        largest, centred, powers, total = self.powers_of(logits, hole, centred_in, powers_in, home)
        self.largest.append(largest)
        self.totals.append(total)
        self.centred.append(centred)
        self.powers.append(powers)

    def powers_of(
        self, logits: Tensor, hole: Tensor, centred_in: int, powers_in: int, home: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(largest, centred, powers, sum of the powers) of a block `[b, V]`.

        Args:
            hole: [b, 1] int64, the targets.
            centred_in, powers_in: which of the scratch arrays take them.
            home: [b, V] float32, takes the powers instead; may be `logits`.
        """
        from_all, centred = self._array("centred", centred_in, logits)
        centred.copy_(logits)
        centred.scatter_(1, hole, -math.inf)
        # finite, so that a row of −inf gives no NaN
        largest = centred.amax(1, keepdim=True).clamp_(min=LEAST)
        centred.sub_(largest).scatter_(1, hole, LOWEST)
        if self.temperature != 1:
            centred.mul_(1 / self.temperature)
        if home is not None and _like_scratch(home, self.threads):
            powers = torch.exp(centred, out=home)
            total = powers.sum(1)
        else:
            to_all, powers = self._array("powers", powers_in if home is None else 0, logits)
            torch.exp(from_all, out=to_all)
            total = _row_sums(powers)
            powers = powers if home is None else home.copy_(powers)
        return largest, centred, powers, total

    def end(self, mine: Tensor) -> Tensor:
        """z = log Σ_{j≠y} exp(x_j − x_y) of all rows read, float64 `[n]`.

        Args:
            mine: [n] float64, the targets' logits.
        """
        self.total = torch.cat(self.totals).double()
        self.lse = self.total.log()
        self.centre = torch.cat(self.largest).squeeze(1).double() / self.temperature
        return self.lse - (mine / self.temperature - self.centre)

    def state(self) -> Tensor:
        """M and S of `online_softmax` of every row, float32 `[2, n]`."""
        scaled = self.centre / math.log(2)
        far = (scaled.abs() >= FAR) & (self.total > 0)
        peak = torch.where(far, self.centre * self.temperature, scaled.clamp(min=LOWEST)).float()
        rest = torch.exp(self.lse + self.centre - peak.double() * math.log(2))
        return torch.stack([peak, torch.where(far, -self.total, rest).float()])

    def entropy(self) -> Tensor:
        """Entropy of the softmax over the other words, nats, float64 `[n]`."""
        return self.lse - torch.cat(self.moments).double() / self.total

    def weigh(self) -> None:
        """Makes `centred` of the last block its product with the powers, and sums that."""
        centred = self.centred[-1].mul_(self.powers[-1])
        moment = _row_sums(centred)
        # 0·(−inf): a forbidden word has no entropy; a NaN among the logits shows in z
        if moment.isnan().any():
            moment = _row_sums(centred.nan_to_num_(nan=0.0))
        self.moments.append(moment)

    def excess_over(self, reference: _Others) -> Tensor:
        """Σ_{j≠y} powers·(centred − the reference's) of the last block, `[b]`.

        Leaves what is summed in the place of the reference's powers.
        """
        excess = torch.sub(self.centred[-1], reference.centred[-1], out=reference.powers[-1])
        excess.mul_(self.powers[-1])
        cross = _row_sums(excess)
        if cross.isnan().any():
            # what π forbids adds nothing, whatever π_ref says of it
            cross = _row_sums(excess.masked_fill_(self.powers[-1] == 0, 0.0))
        return cross

    def scaled(self, vector: Tensor, still: Tensor) -> Tensor:
        """A row's derivative by T over the sum, float32 `[n, 1]`, 0 where nothing moves."""
        still = still | (self.total == 0)
        return (vector / (self.temperature * self.total)).float().masked_fill_(still, 0.0)[:, None]

    def _array(self, name: str, number: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scratch for a block, flat, and the block's view of it.

        The rows are longer than V, and there is at least one more than b. The flat one ends where
        torch.exp gives every thread an even share.
        """
        b, V = logits.shape
        found = self.views.get((name, number, b))
        if found is None:
            array, width = self.arrays.get((name, number)), -(-V // STRIDE) * STRIDE
            share = self.threads * EXP_GRAIN
            rows = b + -(-share // width)
            if array is None or len(array) < rows:
                array = logits.new_zeros((rows, width), dtype=torch.float32)
                self.arrays[name, number] = array
                for key in [key for key in self.views if key[:2] == (name, number)]:
                    del self.views[key]
            flat = array.view(-1)[: -(-b * width // share) * share]
            found = self.views[name, number, b] = flat, array[:b, :V]
        return found


def _like_scratch(matrix: Tensor, threads: int) -> bool:
    """Whether torch's loops treat every row of it as they treat scratch, to the bit."""
    b, V = matrix.shape
    even = V % STRIDE == 0 and matrix.data_ptr() % ALIGNMENT == 0
    shared = b * V % (threads * STRIDE) == 0 and b * V >= threads * EXP_GRAIN
    return even and b > 1 and matrix.stride(0) == V and (threads == 1 or shared)


def _row_sums(scratch: Tensor) -> Tensor:
    """Sum of each row, `[b]`; with the row behind it where there is but one.

    A single sum would be shared among the threads, and so depend on how many there are.
    """
    if len(scratch) > 1:
        return scratch.sum(1)
    return scratch.as_strided((2, scratch.shape[1]), scratch.stride()).sum(1)[:1]


def _rounded(vector: Tensor) -> Tensor:
    """To float32, as it is given to users: a ratio to what they were given is then exactly 1."""
    return vector.float().double()


def _entropy(z: Tensor, logp: Tensor, entropy_others: Tensor) -> Tensor:
    """Entropy of each row, nats, float64 `[n]`, from that among the others."""
    log_others = logsigmoid(z)
    inner = torch.where(z > -math.inf, log_others.exp() * (entropy_others - log_others), 0.0)
    outer = torch.where(z < math.inf, logp.exp() * logp, 0.0)
    return inner - outer


def _exact_kl(z: Tensor, ref_z: Tensor, kl_others: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each row, nats, float64 `[n]`, from that among the others."""
    logp, log_others, share = logsigmoid(-z), logsigmoid(z), torch.sigmoid(z)
    gap_others = log_others - logsigmoid(ref_z) + kl_others
    # where the reference knows no other word, inf − inf
    gap_others = gap_others.masked_fill(ref_z == -math.inf, math.inf)
    inner = torch.where(share > 0, share * gap_others, 0.0)
    return inner + torch.where(z < math.inf, logp.exp() * (logp - logsigmoid(-ref_z)), 0.0)
