"""Rows whose vocabulary is split over the ranks of a process group.

The row functions of any backend compute the softmax over the columns of one rank. One `all_gather`
of `[k, N]` float32 gives every rank the sums of all ranks, which each adds in the same order in
float64, so all have the same bits. With p_j|r the softmax of shard r, P_r the policy's probability
of the shard and Q_r that of the reference:

    log p_j = log P_r + log p_j|r          H = Σ_r P_r·(H_r − log P_r)
    KL = Σ_r P_r·(KL_r + log P_r − log Q_r)

As in `token_statistics`, sums leave out the target, so log p_y = −softplus(z) has all its digits.
By the chain rule a shard's gradient is that of its own softmax, which the backend writes, for

    dL/dlogp·P_r + dL/dH·P_r·(log P_r + H − H_r) − dL/dKL·P_r·(log P_r − log Q_r + KL_r − KL)

instead of dL/dlogp, P_r·dL/dH instead of dL/dH, and P_r·dL/dKL instead of dL/dKL.
A backend leaves one column out of its sums. Where the target belongs to another rank, that is
column 0; the gradient of this column is written last, by its own formula.

| on the wire, for each rank and row | float32                                          |
|------------------------------------|--------------------------------------------------|
| logp, entropy                      | 4: logit of the column, anchor, sum, entropy     |
| with an exact KL                   | 8: the same of the reference, and the shard's KL |

Source: vocabulary-parallel cross-entropy: Megatron-LM (arXiv 1909.08053, sec. 3), which takes three
all-reduces of one float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.backends.wrapper import Kernels, WrappedBackend
from grpo_core.kernels.records import RowGradients, RowLoss, Rows, RowStats

# below every number that a sum of powers is relative to
LEAST = -1e300
# rows of a state before those of the backend inside
OWN_ROWS = 6
# int64 of the first exchange, the same in every call: one for each argument, and spare ones
NUMBERS = 32


@dataclass(frozen=True)
class Shards:
    """Which columns of the vocabulary every rank of a group holds."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    starts: tuple[int, ...]  # of each rank
    sizes: tuple[int, ...]

    @property
    def V(self) -> int:
        """Size of the whole vocabulary."""
        return sum(self.sizes)

    def owner(self, target: Tensor) -> Tensor:
        """[N] int64: the rank that holds each target; 0 for a target outside of [0, V)."""
        owner = torch.zeros_like(target)
        for rank, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            owner = owner.masked_fill((target >= start) & (target < start + size), rank)
        return owner

    def columns(self, target: Tensor) -> Tensor:
        """[N] int64: the target's column on this rank, 0 if another has it, −1 outside [0, V)."""
        column = torch.where(self.owner(target) == self.rank, target - self.starts[self.rank], 0)
        return torch.where((target >= 0) & (target < self.V), column, -1)

    def gather(self, vectors: Tensor) -> Tensor:
        """[k, N] of every rank: [R, k, N]."""
        return _gather(self.group, vectors)


@contextmanager
def announce_failure(group: Any, logits: Tensor) -> Iterator[None]:
    """Around checks before `find_shards`: an error is raised on the other ranks also.

    Args:
        group: as `find_shards` takes it; without one nothing happens.
        logits: anything; of a tensor the device is used.
    """
    try:
        yield
    except Exception:
        if isinstance(group, dist.ProcessGroup) and group.size() > 1:
            device = logits.device if isinstance(logits, Tensor) else torch.device("cpu")
            _gather(group, torch.full((NUMBERS,), -1, device=device))
        raise


def _gather(group: Any, tensor: Tensor) -> Tensor:
    """The tensor of every rank: [R, ...]."""
    found = tensor.new_empty(group.size(), *tensor.shape)
    if tensor.numel():
        dist.all_gather(list(found.unbind()), tensor, group=group)
    return found


def find_shards(
    group: Any, start: int | None, logits: Tensor, same: dict[str, Any]
) -> Shards | None:
    """The shards of a group, by one small exchange; None without a group, and for one rank.

    Args:
        group: a `ProcessGroup`, or None.
        start: the first column of this rank; None on all ranks means in the order of the ranks.
        logits: [..., V_r], of which only shape and device are used.
        same: tensors, numbers, None and what has a `repr`, which all ranks must have alike, by
            their names.

    Raises:
        ValueError: on every rank, if ranks disagree, one of them failed in `announce_failure`, or
            their columns do not tile [0, V).
    """
    if group is None:
        if start is not None:
            raise ValueError(f"vocabulary_start: expected None without a group, got {start!r}")
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a ProcessGroup that this rank is in, got {group!r}")
    R, device, V = group.size(), logits.device, logits.shape[-1]
    if R == 1:
        if start:
            raise ValueError(f"vocabulary_start: expected 0 or None for one rank, got {start!r}")
        return None
    with announce_failure(group, logits):
        if start is not None and not isinstance(start, int):
            raise ValueError(f"vocabulary_start: expected an int or None, got {start!r}")
        layout = [-1 if start is None else start, V, *(*logits.shape[:-1], -1)[:2]]
        digests = [_digest(value, device) for value in same.values()]
        numbers = torch.stack([*torch.tensor(layout, device=device), *digests])
        numbers = torch.cat([numbers, numbers.new_zeros(NUMBERS - len(numbers))])
    found = _gather(group, numbers)
    starts, sizes, *shape = found[:, :4].T.tolist()
    if -1 in sizes:
        failed = [rank for rank, size in enumerate(sizes) if size == -1]
        raise ValueError(f"group: expected valid arguments on all ranks, got errors on {failed}")
    if (found[:, 2:4] != found[0, 2:4]).any():
        shapes = list(zip(*shape, strict=True))
        # a second size of −1 stands for packed rows
        raise ValueError(f"group: expected as many rows on all ranks, got [B, T] = {shapes}")
    for name, differs in zip(same, (found[:, 4:] != found[0, 4:]).any(0).tolist(), strict=False):
        if differs:
            raise ValueError(f"{name}: expected the same on all ranks of the group")
    if set(starts) == {-1}:
        starts = [sum(sizes[:rank]) for rank in range(R)]
    end = 0
    for first, size in sorted(zip(starts, sizes, strict=True)):
        if first != end:
            raise ValueError(
                "vocabulary_start: expected shards without gap or overlap, or None on all ranks, "
                f"got starts {starts} of {sizes} columns"
            )
        end += size
    return Shards(group, group.rank(), tuple(starts), tuple(sizes))


def check_unsharded(shards: Shards | None, **arguments: object) -> None:
    """Raises ValueError for an argument that cannot be combined with a group."""
    for name, value in arguments.items():
        if shards is not None and value is not None:
            raise ValueError(f"{name}: expected None with a group, got {type(value).__name__}")


def _digest(value: object, device: torch.device) -> Tensor:
    """A hash as 0-dim int64; an integer sum has the same bits in any order."""
    if value is None:
        return torch.tensor(-1, device=device)
    if not isinstance(value, (Tensor, int, float)):
        return torch.tensor(zlib.crc32(repr(value).encode()), device=device)
    given = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    kind = zlib.crc32(repr((tuple(given.shape), given.is_floating_point())).encode())
    bits = given.to(device).reshape(-1).double().view(torch.int64)
    place = torch.arange(1, 2 * len(bits) + 1, 2, device=device)
    return ((bits ^ (bits >> 29)) * (place * 0x9E3779B97F4A7C1)).sum() + kind


def whole_logits(logits: Tensor, shards: Shards | None) -> Tensor:
    """The logits, or a tensor of the shape of those of all shards, which takes no memory."""
    if shards is None:
        return logits
    return logits.detach().new_zeros(()).expand(*logits.shape[:-1], shards.V)


def over_shards(kernels: Kernels, shards: Shards | None, reduce_dhidden: bool = True) -> Kernels:
    """The row functions for a shard; `kernels` themselves for None."""
    return kernels if shards is None else ShardedBackend(kernels, shards, reduce_dhidden)


def sum_over_shards(kernels: Kernels, dhidden: Tensor | None, dlora_A: Tensor | None) -> None:
    """Adds up the gradients to which every shard contributes, in place; nothing without shards."""
    if isinstance(kernels, ShardedBackend):
        for gradient in (dhidden if kernels.reduce_dhidden else None, dlora_A):
            if gradient is not None and gradient.numel():
                dist.all_reduce(gradient, group=kernels.shards.group)


class ShardedBackend(WrappedBackend):
    """The row functions for rows `[N, V_r]` of a shard; targets are those of the whole vocabulary.

    Args:
        reduce_dhidden: whether the gradient of hidden states is summed over the ranks.
    """

    def __init__(self, kernels: Kernels, shards: Shards, reduce_dhidden: bool = True) -> None:
        super().__init__(kernels)
        self.shards, self.V, self.reduce_dhidden = shards, shards.V, reduce_dhidden

    def at(self, place: slice | Tensor) -> ShardedBackend:
        return self

    def row_stats(self, rows: Rows, target: Tensor) -> RowStats:
        """As of the whole rows; `OWN_ROWS` of the state are what `row_dlogits` reads of them."""
        column, rank = self.shards.columns(target), self.shards.rank
        local, ref_logits = self.kernels.row_stats(rows, column), rows.ref_logits
        vectors = [*_sums(rows.logits, column, local), local.entropy]
        if ref_logits is not None:
            ref = self.kernels.row_stats(Rows(ref_logits, rows.temperature), column)
            vectors += [*_sums(ref_logits, column, ref), local.kl]
        found = self.shards.gather(torch.stack(vectors)).double().unbind(1)
        owner, read = self.shards.owner(target), column >= 0
        log_p, log_share = _combine(rows.temperature, *found[:3])
        share = log_share.exp()
        entropy = _sum(torch.where(share == 0, 0.0, share * (found[3] - log_share)))
        kl, of_reference = None, torch.zeros(3, *target.shape, device=target.device)
        if ref_logits is not None:
            log_q, ref_share = _combine(rows.temperature, *found[4:7])
            gap = torch.where(ref_share == -math.inf, math.inf, found[7] + log_share - ref_share)
            kl = _sum(torch.where(share == 0, 0.0, share * gap)).float().where(read, 0.0)
            of_reference = torch.stack([found[7][rank], ref_share[rank], log_q[rank]])
        own = torch.stack([log_p[rank], found[3][rank], log_share[rank], *of_reference]).float()
        logp = log_p.gather(0, owner[None])[0]
        logp, entropy = (vector.float().where(read, 0.0) for vector in (logp, entropy))
        return RowStats(logp, entropy, kl, torch.cat([own, local.state]))

    def row_dlogits(
        self,
        rows: Rows,
        target: Tensor,
        row_gradients: RowGradients,
        stats: RowStats | RowLoss,
        dlogits: Tensor,
    ) -> Tensor:
        """This rank's columns of the gradient; no collective."""
        column, own, state = self.shards.columns(target), stats.state[:OWN_ROWS], stats.state
        log_p, entropy, log_share, kl, ref_share, log_q = own.double()
        dlogp, dentropy, dkl = (None if d is None else d.double() for d in row_gradients)
        assert dlogp is not None
        p, share, of_share = log_p.exp(), log_share.exp(), dlogp
        is_owner = (column >= 0) & (self.shards.owner(target) == self.shards.rank)
        at_column = dlogp * torch.where(is_owner, -torch.expm1(log_p), -p)
        if dentropy is not None:
            at_column = at_column - torch.where(p == 0, 0.0, dentropy * p * (log_p + stats.entropy))
            of_share = of_share + dentropy * (log_share + stats.entropy - entropy)
        if dkl is not None and stats.kl is not None:
            # a KL that has no part in the gradient may be infinite or NaN
            gap = torch.where(dkl == 0, 0.0, log_p - log_q - stats.kl)
            at_column += torch.where(p == 0, 0.0, dkl * p * gap)
            of_share = of_share - dkl * torch.where(
                dkl == 0, 0.0, log_share - ref_share + kl - stats.kl
            )
        moves = row_gradients.any & (column >= 0)
        here = moves & (share != 0)
        local = RowGradients._make(
            None if d is None else torch.where(here, share * d, 0.0).float()
            for d in (of_share, dentropy, dkl)
        )
        inside = RowStats(stats.logp, own[1], own[3], state[OWN_ROWS:].contiguous())
        self.kernels.row_dlogits(rows, column, local, inside, dlogits)
        value = torch.where(moves, at_column / rows.temperature, 0.0).to(dlogits.dtype)
        shape = (*dlogits.shape[:-1], 1)
        dlogits.scatter_(-1, column.clamp(min=0).view(shape), value.view(shape))
        return dlogits


def _sums(logits: Tensor, column: Tensor, stats: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    """[N] float32: the logit of each row's column, and anchor and sum of the others."""
    at = column.clamp(min=0).view(*logits.shape[:-1], 1)
    return logits.gather(-1, at).reshape(-1).float(), stats.state[0], stats.state[1]


def _combine(
    temperature: float, column: Tensor, anchor: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """(log p of the column of each rank, log P_r), nats, from the `_sums` of all; [R, N] float64.

    All logarithms are relative to the largest of a row, which may be too large to add them to.
    """
    # Triton's sums are positive, relative to a scaled logit, see `online_softmax`
    scaled, log2 = total > 0, math.log(2)
    scale = torch.tensor(1 / log2 / temperature, dtype=torch.float32).item()
    unit = torch.full_like(total[0], 1 / temperature).masked_fill(scaled.any(0), scale * log2)
    anchor = anchor * torch.where(scaled, log2, unit)
    column, known = unit * column, anchor.masked_fill(total == 0, -math.inf)
    # an infinite logit makes NaN of its row
    base = torch.maximum(known, column).amax(0).clamp(min=LEAST)
    others, column = total.abs().log() + (anchor - base), column - base
    shard = _log_sum(torch.stack([others, column]))
    R = len(shard)
    itself = torch.eye(R, dtype=torch.bool, device=shard.device)[:, :, None]
    other_shards = _log_sum(shard[:, None].expand(R, R, -1).masked_fill(itself, -math.inf))
    z = _log_sum(torch.stack([others, other_shards])) - column
    return -_softplus(z), -_softplus(other_shards - shard)


def _log_sum(logs: Tensor) -> Tensor:
    """log Σ exp over the first axis."""
    base = logs.amax(0).clamp(min=LEAST)
    return base + _sum((logs - base).exp()).log()


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis in order, whatever the number of rows."""
    return sum(parts.unbind(), start=torch.zeros_like(parts[0]))


def _softplus(z: Tensor) -> Tensor:
    """log(1 + eᶻ), with full relative precision."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
