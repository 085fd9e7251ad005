"""Two processes are one: losses and gradients of a fused head under DDP and FSDP2, over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import CASES, HALVES, alone, run
from tests.test_head import assert_close
from tests.tiny_models import V

# one worker starts the two processes
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in every case; they are started once."""
    return run(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks: list[dict[str, Any]], name: str) -> None:
    one = alone(CASES[name])
    for rank, found in enumerate(each[name] for each in ranks):
        assert torch.allclose(found["loss"], one["loss"], rtol=1e-5, atol=1e-7)
        assert_close(found["gradients"], one["gradients"], tolerance=1e-5)
        assert torch.allclose(found["logp"], one["logp"][HALVES[rank]], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 outputs"])
def test_mixed_precision_rounds_nothing_of_a_request(
    ranks: list[dict[str, Any]], name: str
) -> None:
    """old_logp in bfloat16 would be off by up to 0.016 nats; the outputs stay float32, too."""
    for found in (rank["mixed"][name] for rank in ranks):
        assert found["ratio_error"] < 1e-6
        assert found["gradient"]
        assert found["loss"] == (torch.float32 if name == "bfloat16" else torch.bfloat16)
        assert float(torch.tensor(found["metrics"]).bfloat16()) != found["metrics"]


def test_a_sharded_matrix_is_refused_outside_of_the_wrapper(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["outside"].startswith("lm_head: expected a whole matrix, got a sharded one")


def test_a_head_can_be_taken_off_under_shards(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["undone"] for rank in ranks):
        assert found["logits"] == (4, 9, V)
        assert found["error"].startswith("model: expected one with a fused head")
        assert torch.equal(found["again"], found["loss"])
