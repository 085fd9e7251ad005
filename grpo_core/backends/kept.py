"""Rows restricted to the vocabulary entries that a sampler kept: top-p, top-k, min-p."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The vocabulary ids that the sampler kept for each of N tokens, as CSR.

    Those of token n are `ids[offsets[n] : offsets[n + 1]]`, ascending, none twice. Tokens are in
    the flattened order of target; the set of a masked token may be empty.

    Args:
        ids: [M] int32 or int64, in [0, V).
        offsets: [N + 1] int64, from 0 to M.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Kept:
        """From a bool mask [..., V], true for what was kept."""
        mask = mask.reshape(-1, mask.shape[-1])
        return cls(mask.nonzero()[:, 1].int(), _offsets(mask.sum(1)))

    @classmethod
    def from_sets(cls, sets: Iterable[Iterable[int]], device: torch.device | str = "cpu") -> Kept:
        """From the ids of each token in any order, as sampling engines return them."""
        rows = [sorted(row) for row in sets]
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32, device=device)
        return cls(ids, _offsets(torch.tensor([len(row) for row in rows], device=device)))

    @classmethod
    def cat(cls, parts: Sequence[Kept]) -> Kept:
        """The sets of all tokens of the parts, one after the other."""
        sizes = torch.cat([part.offsets.diff() for part in parts])
        return cls(torch.cat([part.ids for part in parts]), _offsets(sizes))

    def select(self, rows: Tensor) -> Kept:
        """The sets of some tokens: their numbers [R], in this order, or a bool mask [N]."""
        first, sizes = self.offsets[:-1][rows], self.offsets.diff()[rows]
        offsets = _offsets(sizes)
        place = torch.arange(int(offsets[-1]), device=self.ids.device)
        return Kept(self.ids[place + (first - offsets[:-1]).repeat_interleave(sizes)], offsets)


def _offsets(sizes: Tensor) -> Tensor:
    """[N + 1] int64: where each set begins, and the end."""
    return torch.nn.functional.pad(sizes.long().cumsum(0), (1, 0))
