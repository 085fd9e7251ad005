"""The table of memory by loss, vocabulary and length: what is counted, and that it is published."""

from __future__ import annotations

import pytest
import torch

from bench.batch import TRAINED, Batch
from bench.contenders import Contender, hidden_naive
from bench.memory import DOCUMENT, HEADS, SHOWN, on_line
from bench.meter import peak_extra_bytes
from bench.table import with_table


def test_plain_pytorch_holds_twelve_bytes_a_logit() -> None:
    """Of logits in bfloat16, and not fourteen, as long as nobody else holds them."""
    V, found = 3_000, []
    for tokens in (128, 256):
        batch = Batch.draw(tokens, V, torch.bfloat16, "cpu", D=16)
        call = Contender("naive", hidden_naive).call(batch, TRAINED)
        found.append(peak_extra_bytes(call, "cpu"))
    assert (found[1] - found[0]) / (128 * V) == pytest.approx(12, rel=0.02)


def test_the_document_has_the_table_of_the_script() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert text == with_table(
        DOCUMENT, "bench.memory", text[text.index("| vocabulary") : text.index("<!-- end")]
    )
    for (V, D), name in HEADS.items():
        assert f"| {name}: {V:,} x {D:,} | {SHOWN[0]:,} | {2 * SHOWN[0] * V / 2**30:.2f} | " in text


def test_counts_that_are_on_no_line_are_refused() -> None:
    assert on_line("x", {1: 10, 2: 20, 3: 30}, 7) == 70
    with pytest.raises(ValueError, match="x: expected 20 at 2 of a line"):
        on_line("x", {1: 10, 2: 25, 3: 30}, 7)
