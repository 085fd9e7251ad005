"""The table of memory by loss, vocabulary and length: what is counted, and that it is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.memory import HEADS, RESULTS, SHOWN, Line, lines_of

DOCUMENT = Path(__file__).parent.parent / "docs/training.md"


def test_what_is_counted_and_what_is_published() -> None:
    """Naive: twelve bytes a bfloat16 logit; in place two; from hidden states none."""
    V, D = 6_000, 16
    lines = lines_of(V, D, "cpu", counted=(2560, 3840, 5120))
    assert lines["naive"].slope / V == pytest.approx(12, rel=0.01)
    assert lines["in place"].slope / V == pytest.approx(2, rel=0.05)
    assert lines["hidden states"].slope / V < 0.05
    table = (RESULTS / "memory.md").read_text("utf-8").partition("\n\n")[2]
    assert table.count("\n") == 2 + len(HEADS) * len(SHOWN)
    assert table in DOCUMENT.read_text("utf-8")


def test_counts_that_are_on_no_line_are_refused() -> None:
    line = Line("x", {1: 10, 2: 20, 3: 30})
    assert line(7) == 70
    with pytest.raises(ValueError, match="x: expected peaks on a line"):
        Line("x", {1: 10, 2: 25, 3: 30})
