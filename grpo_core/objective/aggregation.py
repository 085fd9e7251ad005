"""Aggregation as a vector of weights: the loss is Σ_n weight_n · ℓ_n, the only sum in the kernels.

| aggregation     | weight of a token of sequence i | divisor when `normalizer` is None    |
|-----------------|---------------------------------|--------------------------------------|
| sequence_mean   | 1 / (|o_i| · divisor)           | sequences with a token               |
| prompt_mean     | 1 / (Σ_{j∈group} |o_j| · divisor)| groups with a token                 |
| token_mean      | 1 / divisor                     | tokens                               |
| constant_length | 1 / divisor                     | sequences with a token · padded width|
| sequence_sum    | 1 / divisor                     | sequences with a token               |
| token_sum       | 1 / divisor                     | 1                                    |

A masked token has weight 0. With the global count as `normalizer`, the sum over micro-batches and
over data-parallel ranks is the loss of the whole batch; for prompt_mean only if no group is split.
Groups are split by token_sum with a normalizer [N]: tokens of the token's group · number of groups.

Source: sequence_mean: GRPO (arXiv 2402.03300); token_mean: DAPO (2503.14476); constant_length:
Dr. GRPO (2503.20783); prompt_mean: ScaleRL (2510.13786).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal[
    "sequence_mean", "prompt_mean", "token_mean", "constant_length", "sequence_sum", "token_sum"
]


def token_weights(
    valid: Tensor,
    sequence: Tensor,
    aggregation: str,
    *,
    sequences: int,
    width: int | None = None,
    normalizer: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of every token; without synchronising with the device.

    Args:
        valid: [N] bool, False for masked tokens.
        sequence: [N] int64 in [0, sequences), the sequence of each token; its group for
            prompt_mean.
        aggregation: a row of the table above.
        sequences: upper bound on the number of sequences.
        width: padded length of a sequence, tokens; the default length of constant_length.
        normalizer: the divisor, a number or [N]; None means the table's.
        dtype: of the result.

    Returns:
        [N] of `dtype`.
    """
    weight = valid.to(dtype)
    lengths = weight.new_zeros(sequences).scatter_add_(0, sequence, weight)
    if normalizer is None:
        present = (lengths > 0).sum()
        normalizer = {
            "sequence_mean": present,
            "prompt_mean": present,
            "token_mean": weight.sum(),
            "constant_length": present * (width or 0),
            "sequence_sum": present,
            "token_sum": torch.ones_like(present),
        }[aggregation].clamp(min=1)
    if aggregation in ("sequence_mean", "prompt_mean"):
        weight = weight / lengths.clamp(min=1)[sequence]
    return weight / normalizer
