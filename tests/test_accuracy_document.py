"""docs/accuracy.md: its rows are the script's, its claim about ours is true of its own numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.accuracy.divergences import BETAS, measure_divergences
from bench.accuracy.document import DOCUMENT, MODERATE, tables, write
from bench.accuracy.measure import MARGINS, OF_ANOTHER, OURS, QUANTITIES, Measured, measure
from grpo_core import fused_loss
from grpo_core.loss.reference import reference_loss
from grpo_core.verify.accuracy import FLOOR
from tests.conftest import HAS_GPU, HAS_TRITON

# beyond, e^−margin under the loss scale is too small for a float16 to be a normal number
FLOAT16_LIMIT = 18
EACH_OF_OURS = pytest.mark.parametrize(
    "name",
    [
        *OURS[:2],
        pytest.param(
            OURS[2],
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="is interpreted"),
            ],
        ),
    ],
)


def read(path: Path = DOCUMENT) -> dict[str, dict[str, tuple[str, ...]]]:
    """The tables that a document shows: title -> contender -> cells; "" -> columns."""
    text = path.read_text().partition("<!-- python -m bench.accuracy -->\n")[2]
    found = {}
    for block in text.partition("<!-- end -->")[0].split("### ")[1:]:
        title, _, header, _, *lines = block.strip().splitlines()
        cells = ([cell.strip() for cell in line[1:-1].split("|")] for line in (header, *lines))
        found[title] = {name.strip("*"): tuple(row) for name, *row in cells}
    return found


def number(cell: str) -> float:
    """What a cell says; infinite where everything is lost."""
    return float("inf") if cell == "lost" else float(cell)


def allowed(quantity: str, dtype: torch.dtype, margin: float) -> float:
    """Exact to float32 rounding: that of the margin, and one of a gradient to its dtype."""
    rounding = torch.finfo(dtype).eps if quantity == "dlogits" else 0.0
    # differences of two policies
    terms = 8 if any(name.lower() in quantity.lower() for name in BETAS) else 1
    return FLOOR * max(1.0, margin) * terms + rounding


def test_the_document_has_the_tables_of_the_script() -> None:
    """Titles, columns and rows; not the digits, which follow from the machine."""
    ours = {
        title: [rows[0], *(row[0].strip("*") for row in rows[1:])]
        for title, rows in tables([]).items()
    }
    assert ours == {
        title: [("", *rows[""]), *(name for name in rows if name)] for title, rows in read().items()
    }
    assert all("–" not in cells for rows in read().values() for cells in rows.values())


@pytest.mark.parametrize("title", read())
def test_ours_is_exact_to_float32_rounding(title: str) -> None:
    """In every column of every table that a float16 can express."""
    rows = read()[title]
    loses_digits = title.startswith("Gradient of the logits")
    quantity = "dlogits" if loses_digits else title
    for place, column in enumerate(rows[""]):
        by_margin = column.isdigit()
        margin = float(column) if by_margin else MODERATE
        name = title.split(", ")[1].removesuffix(" logits") if by_margin else column.split()[0]
        dtype = getattr(torch, name)
        if loses_digits and dtype == torch.float16 and margin > FLOAT16_LIMIT:
            continue
        for ours in OURS:
            assert number(rows[ours][place]) <= allowed(quantity, dtype, margin), column


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 0),
        (torch.bfloat16, -1000),
        (torch.float16, 0),
        pytest.param(torch.float32, -1000, marks=pytest.mark.rare),
        pytest.param(torch.bfloat16, 0, marks=pytest.mark.rare),
        pytest.param(torch.float16, -1000, marks=pytest.mark.rare),
    ],
)
@EACH_OF_OURS
def test_it_still_is(name: str, dtype: torch.dtype, offset: int) -> None:
    """Measured again, at a few margins."""
    for found in measure([name], [dtype], [offset], (0, 10, 18, 30)):
        assert set(found.errors) == {*QUANTITIES, OF_ANOTHER}
        margin = max(1.0, float(found.margins.abs().max()))
        for quantity, errors in found.errors.items():
            if quantity == "dlogits" and dtype == torch.float16 and margin > FLOAT16_LIMIT:
                continue
            assert float(errors.max()) <= allowed(quantity, dtype, margin), (quantity, margin)


@EACH_OF_OURS
def test_divergences_still_are(name: str) -> None:
    """Reverse, forward, Jensen-Shannon and kept ids, measured again."""
    for found in measure_divergences([name], (0, 10, 25)):
        for quantity, errors in found.errors.items():
            limit = allowed(quantity, torch.float32, found.margin)
            assert float(errors.max()) <= limit, (quantity, found.margin)


def test_plain_divergences_are_found_out() -> None:
    """PyTorch's log_softmax and kl_div, where both policies are sure of a word."""
    (found,) = measure_divergences(["PyTorch, float32"], [20])
    for quantity in ("reverse KL", "forward KL", "gradient of the reverse KL"):
        assert found.errors[quantity].max() >= 1, quantity


def test_what_is_written_is_read_again(tmp_path) -> None:
    """The text around the markers stays; a lost number is infinite."""
    path = tmp_path / "accuracy.md"
    path.write_text("before\n<!-- python -m bench.accuracy -->\nold\n<!-- end -->\nafter\n")
    one = Measured(
        OURS[0],
        torch.bfloat16,
        0,
        5,
        torch.full((2,), 5.0),
        {"logp": torch.tensor([1e-7, 2.04e-7]), "entropy": torch.tensor([0.1, 0.7])},
    )
    write([one], path)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    cells = read(path)["Log-probability, bfloat16 logits"][OURS[0]]
    assert cells[:3] == ("–", "2.0e-7", "–")
    entropy = read(path)["Entropy, bfloat16 logits"][OURS[0]]
    assert number(entropy[1]) == math.inf


def test_careless_softmax_is_found_out() -> None:
    """What the tables are for: float32 log_softmax at the margins of a trained policy."""
    errors = {
        found.margin: float(found.errors["logp"].max())
        for found in measure(["PyTorch, float32"], [torch.float32], [0], MARGINS[::10])
    }
    assert errors[0] < 1e-6
    assert 1e-4 < errors[10] < 0.5
    assert errors[20] == errors[30] == 1


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_a_factor_on_the_loss_rounds_a_second_time(
    factor: float, backend: str, device: str
) -> None:
    """Unless it is a power of two, or part of the normalizer; the figures of the document."""
    N, V = 16, 501
    logits = (2 * torch.randn(N, V, device=device)).bfloat16()
    target = torch.randint(V, (N,), device=device)
    terms = {
        "objective": "dapo",
        "advantage": torch.randn(N, device=device),
        "sequence_id": torch.arange(N, device=device),
    }

    def relative_error(normalizer: float, factor: float) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        out = fused_loss(leaf, target, **terms, normalizer=normalizer, backend=backend)
        (factor * out.loss).backward()
        assert leaf.grad is not None
        return ((leaf.grad.double() - exact) / exact).abs()

    leaf = logits.double().requires_grad_()
    reference_loss(leaf, target, **terms, normalizer=N / factor).loss.backward()
    exact = leaf.grad
    once, twice = relative_error(N / factor, 1.0), relative_error(N, factor)
    # half a last place of eight bits, and a hair for float32
    assert once.max() < 2**-8 + 1e-5 and once.mean() == pytest.approx(1.4e-3, rel=0.05)
    if factor == 0.5:
        assert torch.equal(once, twice)
    else:
        assert 5e-3 < twice.max() < 2**-7
        assert twice.mean() == pytest.approx(1.9e-3, rel=0.05)
