"""The experiment about a row's second reading: no bit depends on how a row is read again."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from bench.experiments.second_reading import CANDIDATES, Candidate, second_reading
from grpo_core.kernels import launch, surrogates
from grpo_core.kernels.records import Rows, Terms, TokenVectors
from tests.combinations import slow
from tests.compiled import uninterpreted
from tests.conftest import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
# four warps, as `row_loss` has at this vocabulary: a tile is 2 KiB
WAYS = {
    "plain": Candidate(4),
    "backwards": Candidate(4, backwards=True),
    "kept": Candidate(4, kept=1),
    "held": Candidate(4, held=2),
    "more than there is": Candidate(4, held=99, kept=999),
    "everything": Candidate(4, tiles=2, backwards=True, kept=1, held=1),
}
ALL = "everything"


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)])
@pytest.mark.parametrize("way", [*slow(*(way for way in WAYS if way != ALL)), ALL])
def test_no_bit_depends_on_how_a_row_is_read_again(way: str, dtype: torch.dtype) -> None:
    """Targets in the first tile, in what is held, last; beside and in place; as `row_loss`."""
    from grpo_core.kernels.row_loss import row_loss

    # eight tiles, the last one short or of one load
    V = 8136 if dtype == torch.bfloat16 else 4100
    logits = (2 * torch.randn(4, V, device=DEVICE)).to(dtype)
    target = torch.tensor([0, V // 3, V - 1, 1500], device=DEVICE)
    ones = torch.ones(4, device=DEVICE)
    tokens = TokenVectors(target, ones, advantage=ones)
    terms = Terms(surrogates.reinforce, (), None, False, 0.0)
    expected = torch.empty_like(logits)
    assert launch.choose_layout(V, dtype.itemsize).warps == 4
    loss = row_loss(Rows(logits), tokens, terms, expected)
    found = torch.full_like(logits, math.nan)
    assert torch.equal(second_reading(logits, target, found, WAYS[way]), loss.logp)
    assert torch.equal(found, expected)
    second_reading(logits, target, logits, WAYS[way])
    assert torch.equal(logits, expected)


COMPILED = """
import sys
import torch
from bench.experiments.second_reading import CANDIDATES, second_reading
from grpo_core.inspect.compile_ahead import as_if_on, examine
for name in sys.argv[1:]:
    candidate = CANDIDATES[name]
    logits = torch.zeros(2, 151_936, dtype=torch.bfloat16)
    with as_if_on("sm_90") as launches:
        second_reading(logits, torch.zeros(2, dtype=torch.int64), logits, candidate)
    print(examine("sm_90", "", torch.bfloat16, 151_936, launches[0]).spills)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    # the one with most registers to a processor, and all
    [["19 % held, backwards"], pytest.param(list(CANDIDATES), marks=pytest.mark.rare)],
    ids=len,
)
def test_candidates_compile_without_spills(names: list[str]) -> None:
    done = uninterpreted("-c", COMPILED, *names)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["0"] * len(names)
