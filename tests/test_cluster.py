"""Past one machine: counted bytes of FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.ranks import FLOAT32, MODELS, Size, memory, report, size_of, wire
from grpo_core.trainer.sharding import shard_model
from tests.tiny_models import tiny


@pytest.fixture
def eight_ranks() -> Iterator[int]:
    """A process group of eight ranks, of which this process is the first; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield 8
    dist.destroy_process_group()


def test_the_wire_of_a_step_is_what_fsdp_sends(
    eight_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives of one forward and backward, in bytes."""
    received = {"gather": 0, "scatter": 0}
    # torch 2.13 has other names
    new = hasattr(dist, "all_gather_single")
    names = (
        ("all_gather_single", "reduce_scatter_single")
        if new
        else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    for key, name in zip(received, names, strict=True):
        original = getattr(dist, name)

        def counted(*args, key=key, original=original, **options):
            out, given = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            received[key] += abs(out.nbytes - given.nbytes)
            return original(*args, **options)

        monkeypatch.setattr(dist, name, counted)
    # sizes that eight ranks divide: FSDP2 pads others
    model = tiny("Qwen2", num_hidden_layers=3, hidden_size=64, intermediate_size=128, vocab_size=64)
    size = Size.of(model)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    shard_model(model)
    logits = model(torch.randint(0, 16, (1, 8))).logits
    expected = wire(size, eight_ranks, backwards=1, forwards=0)
    logits.sum().backward()
    assert received["gather"] == expected["weights, forward and backward"]
    assert received["scatter"] == expected["gradients"]
    # a forward pass alone gathers every weight once
    received["gather"] = 0
    with torch.no_grad():
        model(torch.randint(0, 16, (1, 8)))
    others = wire(size, eight_ranks, backwards=0, forwards=1)
    assert received["gather"] == others["weights, log-probabilities"]


def test_shards_are_a_part_each() -> None:
    """16 bytes a parameter over the ranks; what is gathered does not shrink."""
    size = size_of("7b")
    assert size.parameters == 7_615_616_512
    one, many = memory(size, 1, 1024, reference=False), memory(size, 64, 1024, reference=False)
    assert one["weights, gradients, AdamW"] == 16 * size.parameters
    assert many["weights, gradients, AdamW"] == 16 * size.parameters / 64
    assert one["gathered"] == many["gathered"] > FLOAT32 * size.rest


@pytest.mark.parametrize("name", MODELS)
def test_the_report(name: str) -> None:
    """A column for a node and one for the cluster."""
    text = report(name, 64)
    assert "8 ranks | 64 ranks" in text and text.count("**sum**") == 2
    assert max(map(len, text.splitlines())) <= 100
