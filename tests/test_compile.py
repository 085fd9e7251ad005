"""Every kernel compiled for cards that are not here: no spills, wide loads, quiet, short loops."""

from __future__ import annotations

from typing import Any

import pytest

from bench import predict
from tests.compiled import ROOT, Record, inspected
from tests.conftest import HAS_TRITON
from tests.test_formulas import KLS, SURROGATES

CARDS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# one vocabulary stands for all of its length: no kernel is compiled for the alignment of its rows
LAYOUTS = {
    "long": ("--vocabulary", "151669"),
    "float32": ("--vocabulary", "151669", "--dtype", "float32"),
    "formulas": ("--vocabulary", "8000", "--all"),
}
# what other cards compile differs in little
COMMON = {("sm_90", "long")}
CASES = [
    pytest.param(card, layout, marks=() if (card, layout) in COMMON else pytest.mark.rare)
    for card in CARDS
    for layout in LAYOUTS
]
# the instrument, with some of the calls that launch kernels
SOME_CALLS = """
import sys
from grpo_core.inspect import compile_ahead
from grpo_core.inspect.__main__ import main

def is_chosen(variant, call):
    return {condition}

every_call = compile_ahead._calls
compile_ahead._calls = lambda *given: (pair for pair in every_call(*given) if is_chosen(*pair))
sys.exit(main())
"""
# two rows are read at a time: of all kernels these come nearest to a spill
TIGHT = SOME_CALLS.format(condition='variant == "exact KL, entropy"')
# all of them fit into the loss of a sequence, which compiles quickly
OF_SEQUENCES = SOME_CALLS.format(
    condition='getattr(call, "args", ()) and call.args[0].ratio_level != "token"'
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
]


@pytest.mark.parametrize(("card", "layout"), CASES)
def test_no_limit_is_exceeded(card: str, layout: str) -> None:
    """Spills, registers, load widths, barriers, instructions per logit: `grpo_core.inspect`.

    All checks of one run stand in one test, since compiling takes long.
    """
    found = inspected(card, *LAYOUTS[layout], "--gate")
    assert found.status == 0, found.printed
    check_every_kernel_is_there(found.records)
    if layout == "formulas":
        check_every_formula_is_there(found.records, "row_loss", "sequence_loss")
    if card.startswith("gfx"):
        return
    check_counts_are_those_of_one_tile(found.records)
    check_table(found.printed, found.records[0])
    if (card, layout) in COMMON:
        check_counts_are_those_of_the_model(found.records)


@pytest.mark.parametrize(
    ("card", "layout"),
    [
        pytest.param("sm_80", "float32", marks=pytest.mark.rare),
        ("sm_100", "long"),
        ("gfx942", "long"),
    ],
)
def test_tight_kernels_exceed_no_limit_elsewhere(card: str, layout: str) -> None:
    found = inspected(card, *LAYOUTS[layout], "--gate", command=("-c", TIGHT))
    assert found.status == 0, found.printed
    assert {"row_loss", "row_dlogits"} <= {record["kernel"] for record in found.records}
    if not card.startswith("gfx"):
        check_counts_are_those_of_one_tile(found.records)


def test_every_formula_compiles() -> None:
    found = inspected("sm_90", *LAYOUTS["formulas"], "--gate", command=("-c", OF_SEQUENCES))
    assert found.status == 0, found.printed
    check_every_formula_is_there(found.records, "sequence_loss")


def check_every_kernel_is_there(records: list[Record]) -> None:
    """One that no public function launches would not be."""
    sources = [path.read_text("utf-8") for path in (ROOT / "kernels").glob("*.py")]
    lines = [line for source in sources for line in source.splitlines()]
    of_grid = [line for line in lines if line.startswith("def _") and line.endswith("_kernel(")]
    names = {line.removeprefix("def _").removesuffix("_kernel(") for line in of_grid}
    assert names == {record["kernel"] for record in records}


def check_every_formula_is_there(records: list[Record], *kernels: str) -> None:
    """In each of these kernels."""
    for kernel in kernels:
        constants = [r["constants"] for r in records if r["kernel"] == kernel]
        formulas = {(c["SURROGATE"], c["KL"]) for c in constants}
        assert {(surrogate, "k3") for surrogate, _ in SURROGATES} <= formulas
        assert {("clip", estimator) for estimator in KLS} <= formulas


def check_counts_are_those_of_one_tile(records: list[Record]) -> None:
    """A whole tile reads WIDTH logits a thread, and raises two to each of them, once."""
    for record in records:
        width, rows = record["constants"].get("WIDTH"), record["rows_read"]
        # of another divergence both rows are raised for the gradient
        plain = record["constants"].get("DIVERGENCE", "reverse") == "reverse"
        # the last of a role is that over whole tiles
        roles: dict[str, Any] = {loop["role"]: loop for loop in ascending(record)}
        reads = record["kernel"] in ("row_stats", "row_loss")
        assert reads == ("forward" in roles), record
        if reads:
            forward = roles["forward"]
            assert forward["logits"] % width == 0, record
            assert plain <= (forward["special_per_logit"] == rows), record
        writes = record["kernel"] == "row_dlogits" or "zeros" in roles
        assert writes == ("gradient" in roles), record
        if writes:
            assert roles["gradient"]["logits"] % width == 0, record
            assert plain <= (roles["gradient"]["special_per_logit"] == 1), record
            assert roles["zeros"]["special"] == 0, record


def check_counts_are_those_of_the_model(records: list[Record]) -> None:
    """`bench.predict`: registers to within a step of the allocation, instructions to a tenth."""
    kernels = {"row_stats": predict.STATS, "row_loss": predict.LOSS, "row_dlogits": predict.DLOGITS}
    for name, kernel in kernels.items():
        (record,) = (one for one in records if one["name"] == name)
        assert abs(record["registers"] - kernel.registers) <= 8
        roles = {loop["role"]: loop["instructions_per_logit"] for loop in ascending(record)}
        for role in ("forward", "gradient"):
            assert roles.get(role, 0) == pytest.approx(getattr(kernel, role), abs=0.1)


def ascending(record: Record) -> list[dict[str, Any]]:
    """The loops of a kernel by the bytes that an iteration loads, then by few instructions."""
    return sorted(
        record["loops"], key=lambda loop: (sum(loop["loads"]), -loop["instructions_per_logit"])
    )


def check_table(printed: str, record: Record) -> None:
    """It fits, and shows what the first record, `row_stats`, says."""
    lines = printed.splitlines()
    assert all(len(line) <= 100 for line in lines)
    row = next(line.split() for line in lines if line.startswith(f"{record['name']} "))
    loop = ascending(record)[-1]
    figures = [str(record[key]) for key in ("registers", "spills", "shared")]
    assert row[1:6] == [*figures, "forward", str(min(loop["loads"]))]
    shown = [f"{loop[key]:.2f}" for key in ("instructions_per_logit", "special_per_logit")]
    if loop["issue_share"] is not None:
        shown += [f"{loop[key]:.0%}" for key in ("issue_share", "special_share")]
    assert row[6:] == shown
