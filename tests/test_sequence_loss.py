"""Losses over vectors: sequences longer than a block, and tokens of every ratio level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from grpo_core.kernels.launch import SEQUENCE_BLOCK
from grpo_core.kernels.records import RowStats, SequenceTokens, Terms
from tests.combinations import slow
from tests.conftest import HAS_GPU
from tests.test_fused_loss import OBJECTIVES

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ("padded", "sequence"),
        *slow(("padded", "dapo"), ("padded", "vespo"), ("padded", "sequence token")),
        *slow(("packed", "gspo"), ("mixed", "sequence"), ("mixed", "gmpo")),
    ],
)
def test_long_sequences(order: str, name: str) -> None:
    """Longer than a block, as one program finds them and as plain PyTorch does."""
    from grpo_core.backends import pytorch as torch_backend
    from grpo_core.backends import triton as triton_backend

    spec, T = OBJECTIVES[name], SEQUENCE_BLOCK + 100
    N = 2 * T

    def noise(scale: float, at: float = 0.0) -> Tensor:
        return at + scale * torch.randn(N, device=DEVICE)

    sequence_id = torch.arange(N, device=DEVICE) // T
    if order == "mixed":
        sequence_id = sequence_id[torch.randperm(N, device=DEVICE)]
    valid = torch.rand(N, device=DEVICE) < 0.9
    stats = RowStats(noise(0.3, -3), noise(0.1, 1), None, torch.empty(0, N, device=DEVICE))
    padded = order == "padded"
    tokens = SequenceTokens(
        target=torch.zeros(N, dtype=torch.int64, device=DEVICE),
        weight=torch.where(valid, 0.1, 0.0),
        advantage=torch.sign(noise(1.0)),
        # means beside the bounds of a clip, sums within reach
        old_logp=stats.logp + noise(1e-3),
        ref_logp=noise(0.3, -3),
        entropy_weight=torch.where(valid, 0.01, 0.0),
        valid=valid,
        sequence_id=None if padded else sequence_id,
        sequences=2 if padded else N,
        width=T if padded else None,
    )
    terms = Terms(
        spec.surrogate.function,
        spec.surrogate.args,
        spec.kl_function,
        spec.kl_times_ratio,
        float(spec.beta),
        spec.ratio_level,
        spec.token_clip and (5e-4, 5e-4),
    )
    ours = triton_backend.sequence_loss(stats, tokens, terms)
    plain = torch_backend.sequence_loss(stats, tokens, terms)
    assert plain.dlogp.abs().sum() > 0
    for field in ("ratio", "kl", "loss", "dlogp", "dropped"):
        a, b = getattr(ours, field).double(), getattr(plain, field).double()
        assert torch.allclose(a, b, rtol=2e-4, atol=1e-6), field
