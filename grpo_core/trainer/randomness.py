"""Randomness without state: what a step draws depends on seed, step, round and process alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def randomness(
    seed: int, step: int, device: torch.device, rank: int = 0, again: int = 0
) -> Iterator[random.Random]:
    """Generators for one step; torch's global one is put back afterwards.

    The one that is handed out is the same on every rank; torch's is each rank's own. Where a step
    draws `again`, it draws anew.
    """
    place = f"{seed}/{step}/again {again}" if again else f"{seed}/{step}"
    rng = random.Random(place)
    of_torch = rng.getrandbits(63)
    if rank:
        of_torch = random.Random(f"{place}/{rank}").getrandbits(63)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(of_torch)
        yield rng


def shuffled(rewards: Tensor, rng: random.Random) -> Tensor:
    """The same rewards in another order: as good a signal as none."""
    return rewards[rng.sample(range(len(rewards)), len(rewards))]
