"""Aggregations as weights: against plain arithmetic, and the invariances that make them safe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_core.objective.aggregation import token_weights

AGGREGATIONS = [
    *("sequence_mean", "prompt_mean", "token_mean"),
    *("constant_length", "sequence_sum", "token_sum"),
]
VALID = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def weights(valid: torch.Tensor, aggregation: str, **options: object) -> torch.Tensor:
    """`token_weights` of a padded [B, T] mask, back in [B, T]."""
    B, T = valid.shape
    sequence = torch.arange(B).repeat_interleave(T)
    flat = token_weights(
        valid.reshape(-1),
        sequence,
        aggregation,  # type: ignore[arg-type]
        sequences=B,
        width=T,
        **options,  # type: ignore[arg-type]
    )
    return flat.view(B, T)


@pytest.mark.parametrize(
    ("aggregation", "rows"),
    [
        ("sequence_mean", [1 / 9, 1 / 3, 0, 1 / 12]),
        ("token_mean", [1 / 8, 1 / 8, 0, 1 / 8]),
        ("constant_length", [1 / 12, 1 / 12, 0, 1 / 12]),
        ("sequence_sum", [1 / 3, 1 / 3, 0, 1 / 3]),
        ("token_sum", [1, 1, 0, 1]),
    ],
)
def test_weight_of_every_aggregation(aggregation: str, rows: list[float]) -> None:
    """Three of four sequences have a token: 3, 1 and 4 of them, in a width of 4."""
    expected = torch.tensor(rows, dtype=torch.float32)[:, None] * VALID
    assert torch.allclose(weights(VALID, aggregation), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7.0), torch.tensor(7)])
def test_normalizer_replaces_the_divisor(aggregation: str, normalizer: object) -> None:
    lengths = VALID.sum(1, keepdim=True).clamp(min=1)
    of_means = aggregation in ("sequence_mean", "prompt_mean")
    share = VALID / lengths if of_means else VALID.float()
    assert torch.allclose(weights(VALID, aggregation, normalizer=normalizer), share / 7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_masked_is_all_zero(aggregation: str) -> None:
    assert torch.equal(weights(torch.zeros(2, 3, dtype=torch.bool), aggregation), torch.zeros(2, 3))
    assert weights(torch.zeros(0, 3, dtype=torch.bool), aggregation).shape == (0, 3)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6),
    split=st.integers(1, 5),
    padding=st.integers(0, 3),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_micro_batches_and_padding_change_nothing(
    lengths: list[int], split: int, padding: int, aggregation: str
) -> None:
    """With one normalizer, any split into micro-batches and any padded width give one weight."""
    whole = torch.arange(6 + padding)[None] < torch.tensor(lengths)[:, None]
    together = weights(whole, aggregation, normalizer=11.0)
    apart = [weights(part[:, :6], aggregation, normalizer=11.0) for part in whole.split(split)]
    assert torch.equal(together[:, :6], torch.cat(apart))
