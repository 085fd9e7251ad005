"""The door's kernel against its plain PyTorch form, bit for bit; and ratios of long sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from grpo_core.backends import token_weights as weights
from grpo_core.kernels.launch import SEQUENCE_BLOCK, SUM_BLOCK, TOKENS_BLOCK
from grpo_core.kernels.records import GivenTokens, Level, RowStats, Terms, TokenVectors
from tests.conftest import HAS_GPU
from tests.test_fused_loss import OBJECTIVES
from tests.test_weights import AGGREGATIONS

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if HAS_GPU else "cpu"
V = 50


def padded(B: int, T: int, **changes: Any) -> GivenTokens:
    """Targets in a view, some masked, some no words; the last sequence is empty."""
    ids = torch.randint(-1, V + 1, (B, T + 1), device=DEVICE)
    target = ids[:, 1:]
    target[torch.rand(B, T, device=DEVICE) < 0.2] = -100
    target[-1] = -100
    return GivenTokens(
        **{
            "target": target,
            "V": V,
            "ignore": -100,
            "mask": torch.rand(T, B, device=DEVICE).T < 0.8,
            "sequence_id": None,
            "sequences": B,
            "advantage": torch.randn(B, device=DEVICE),
            "advantage_of_sequence": True,
            "aggregation": "token_mean",
            "normalizer": None,
            "entropy_coef": 0.3,
            "wants_spans": False,
        }
        | changes
    )


def packed(N: int, **changes: Any) -> GivenTokens:
    """Rows of nine sequences in any order; two ids are none."""
    sequence_id = torch.randint(0, min(9, N), (N,), device=DEVICE)
    sequence_id[0], sequence_id[-1] = -1, N
    flat = padded(N, 1)
    assert flat.mask is not None
    return replace(
        flat,
        **{
            "target": flat.target.flatten(),
            "mask": flat.mask.flatten().to(torch.int32),
            "sequence_id": sequence_id,
            "sequences": N,
            "advantage": torch.randn(7, device=DEVICE),
            "wants_spans": True,
        }
        | changes,
    )


def assert_laid_alike(given: GivenTokens) -> None:
    from grpo_core.kernels.token_weights import lay_out

    ours, plain = lay_out(given), weights.lay_out(given)
    for name in ("target", "valid", "bad_target", "weight", "entropy_weight"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert torch.equal(ours.advantage * ours.valid, plain.advantage * plain.valid)
    assert ours.ticket == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 7, 7.3, torch.tensor(7.3), torch.tensor(7)])
def test_every_aggregation(aggregation: str, normalizer: Any) -> None:
    """Of padded and packed tokens, with a divisor of its own or a given one."""
    changes = {"aggregation": aggregation, "normalizer": normalizer}
    assert_laid_alike(padded(5, 7, **changes))
    if aggregation != "constant_length" or normalizer is not None:
        assert_laid_alike(packed(40, **changes))


@pytest.mark.parametrize("B", [1, 3, TOKENS_BLOCK + 5])
def test_more_tokens_than_a_block(B: int) -> None:
    assert_laid_alike(padded(B, 3, aggregation="sequence_mean"))
    assert_laid_alike(packed(B + 2, aggregation="sequence_mean"))


def test_other_types_of_argument() -> None:
    given = padded(4, 5)
    advantage = torch.randn(20, device=DEVICE)
    assert_laid_alike(replace(given, mask=None, advantage=advantage, advantage_of_sequence=False))
    for dtype in (torch.int16, torch.int32, torch.uint8):
        target = torch.randint(0, V, (4, 5), device=DEVICE).to(dtype)
        mask = torch.rand(4, 5, device=DEVICE).round()
        assert_laid_alike(replace(given, target=target, mask=mask))


def test_spans_hold_every_token_of_a_sequence() -> None:
    from grpo_core.kernels.token_weights import lay_out

    given = packed(40)
    laid = lay_out(given)
    assert laid.spans is not None
    found = Level("sequence", None, laid.valid, given.sequence_id, 40, None).find_spans()
    assert torch.equal(laid.spans.first, found.first)
    assert torch.equal(laid.spans.last, found.last)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "sequence", "sequence token"])
@pytest.mark.parametrize("order", ["padded", "packed", "mixed"])
def test_long_sequences(name: str, order: str) -> None:
    """Longer than a block, as one program finds them and as plain PyTorch does."""
    from grpo_core.backends import pytorch as torch_backend
    from grpo_core.backends import triton as triton_backend

    spec, T = OBJECTIVES[name], SEQUENCE_BLOCK + 100
    N = 2 * T
    assert N > SUM_BLOCK

    def noise(scale: float, at: float = 0.0) -> Tensor:
        return at + scale * torch.randn(N, device=DEVICE)

    sequence_id = torch.arange(N, device=DEVICE) // T
    if order == "mixed":
        sequence_id = sequence_id[torch.randperm(N, device=DEVICE)]
    valid = torch.rand(N, device=DEVICE) < 0.9
    stats = RowStats(noise(0.3, -3), noise(0.1, 1), None, torch.empty(0, N, device=DEVICE))
    tokens = TokenVectors(
        target=torch.zeros(N, dtype=torch.int64, device=DEVICE),
        weight=torch.where(valid, 0.1, 0.0),
        advantage=torch.sign(noise(1.0)),
        # means beside the bounds of a clip, sums within reach
        old_logp=stats.logp + noise(1e-3),
        ref_logp=noise(0.3, -3),
        entropy_weight=torch.where(valid, 0.01, 0.0),
    )
    padded = order == "padded"
    level = Level(
        spec.ratio_level,
        spec.token_clip and (5e-4, 5e-4),
        valid,
        None if padded else sequence_id,
        2 if padded else N,
        T if padded else None,
    )
    terms = Terms(
        spec.surrogate.function,
        spec.surrogate.args,
        spec.kl_function,
        spec.kl_times_ratio,
        float(spec.beta),
    )
    ours = triton_backend.sequence_loss(stats, tokens, level, terms)
    plain = torch_backend.sequence_loss(stats, tokens, level, terms)
    assert plain.dlogp.abs().sum() > 0
    for field in ("ratio", "kl", "loss", "dlogp", "dropped"):
        a, b = getattr(ours, field).double(), getattr(plain, field).double()
        assert torch.allclose(a, b, rtol=2e-4, atol=1e-6), field
    assert torch.allclose(ours.total, plain.total, rtol=1e-4, atol=1e-4)
