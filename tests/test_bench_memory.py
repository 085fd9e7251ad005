"""The table of memory by loss, vocabulary and length: what is counted, and that it is published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.hidden import HiddenBatch, HiddenContender
from bench.memory import PATHS, RESULTS, Line
from bench.meter import peak_extra_bytes

DOCUMENT = Path(__file__).parent.parent / "docs/training.md"


def test_plain_pytorch_holds_twelve_bytes_a_logit() -> None:
    """Of logits in bfloat16, and not fourteen, as long as nobody else holds them."""
    V, found = 3_000, []
    for tokens in (128, 256):
        batch = HiddenBatch.draw(tokens, V, 16, torch.bfloat16, "cpu")
        call = HiddenContender("naive", PATHS["naive"]).call(batch, "trained head")
        found.append(peak_extra_bytes(call, "cpu"))
    assert (found[1] - found[0]) / (128 * V) == pytest.approx(12, rel=0.02)


def test_the_published_table_is_the_documents() -> None:
    table = (RESULTS / "memory.md").read_text("utf-8").partition("\n\n")[2]
    assert table.count("\n") > 4
    assert table in DOCUMENT.read_text("utf-8")


def test_counts_that_are_on_no_line_are_refused() -> None:
    line = Line("x", {1: 10, 2: 20, 3: 30})
    assert line(7) == 70
    with pytest.raises(ValueError, match="x: expected peaks on a line"):
        Line("x", {1: 10, 2: 25, 3: 30})
