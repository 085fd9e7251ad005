"""The benchmark from hidden states: contenders are right, or refused; products by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench.hidden import CASES, Case, Floor, HiddenBatch, HiddenContender, contenders, naive
from bench.hidden_truth import errors, find_truth, refuse_wrong
from bench.meter import ProductMeter, one_thread
from bench.report import Report, markdown
from bench.table import hidden_table
from bench.truth import WrongResult
from grpo_core.loss.reference import reference_loss

N, V, D = 256, 301, 24
# products of each in the order of CASES; where the weights' gradient is not wanted, one fewer
COUNTED = {
    "naive": (3, 2, 1),
    "liger": (4, 3),
    "trl": (4, 3, 1),
    # without a gradient its product is inside one operation, which the meter does not see
    "torch": (3, 2, 0),
    "ours-fast": (3,),
    "ours-lean": (4,),
    "ours": (None, 2, 1),
}


def test_products_by_hand() -> None:
    """Every spelling of a product, forward and backward."""
    a, b, c = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
    once = 2 * 3 * 4 * 5
    with ProductMeter() as meter, one_thread():
        a @ b.detach()
        torch.addmm(c, a, b.detach())
        c.addmm_(a, b.detach())
        torch.bmm(a[None], b.detach()[None])
        (a @ b).sum().backward()
        a + a
    assert meter.operations == 6 * once


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_is_right_and_takes_the_products_it_says(dtype: torch.dtype) -> None:
    batch = HiddenBatch.draw(N, V, D, dtype, "cpu")
    truth = find_truth(batch)
    for nth, case in enumerate(CASES):
        for contender in contenders(case):
            if dtype not in contender.dtypes:
                continue
            with ProductMeter() as meter, one_thread():
                outcome = contender.call(batch, case)()
            refuse_wrong(contender.name, errors(batch, outcome, truth), dtype)
            assert (outcome.dweight is not None) is (case == "trained head")
            assert (outcome.dhidden is not None) is (case != "logp")
            if dtype == torch.float32:
                rows = N if contender.name in ("naive", "torch") else int(batch.tokens.valid.sum())
                found = meter.operations / (2 * rows * V * D)
                assert found == pytest.approx(COUNTED[contender.name][nth], rel=1e-3, abs=1e-9), (
                    contender
                )


def test_the_truth_is_that_of_the_whole_batch() -> None:
    """At once and with autograd through the product, not a sequence at a time."""
    batch = HiddenBatch.draw(N, V, D, torch.float32, "cpu")
    truth, tokens = find_truth(batch), batch.tokens
    hidden, lm_head = (x.double().requires_grad_() for x in (batch.hidden, batch.lm_head))
    out = reference_loss(
        hidden @ lm_head.t(),
        tokens.target,
        objective="dapo",
        advantage=tokens.advantage,
        old_logp=tokens.old_logp,
        sequence_id=tokens.sequence_id,
    )
    out.loss.backward()
    assert torch.allclose(truth.loss, out.loss)
    assert torch.allclose(truth.dhidden, hidden.grad)
    assert torch.allclose(truth.dweight, lm_head.grad[truth.words])


@pytest.mark.parametrize("spoiled", ["loss", "logp", "dhidden", "dweight"])
def test_a_wrong_contender_is_refused(spoiled: str) -> None:
    batch = HiddenBatch.draw(N, V, D, torch.float32, "cpu")
    truth = find_truth(batch)
    outcome = HiddenContender("naive", naive).call(batch, "trained head")()
    refuse_wrong("naive", errors(batch, outcome, truth), torch.float32)
    wrong = outcome._replace(**{spoiled: getattr(outcome, spoiled) * 1.001})
    with pytest.raises(WrongResult, match=f"naive: {spoiled}: expected the float64"):
        refuse_wrong("naive", errors(batch, wrong, truth), torch.float32)


@pytest.mark.parametrize(
    ("case", "products"), [("trained head", 3), ("frozen head", 2), ("logp", 1)]
)
def test_the_floor_is_the_products_alone(case: Case, products: int) -> None:
    batch = HiddenBatch.draw(N, V, D, torch.float32, "cpu")
    floor = Floor(batch, case)
    with ProductMeter() as meter:
        floor()
    assert meter.operations == products * 2 * int(batch.tokens.valid.sum()) * V * D
    right = floor.hidden @ batch.lm_head.t()
    assert torch.equal(floor.logits, right)
    if products == 3:
        assert torch.equal(floor.dweight, right.t() @ floor.hidden)


def test_a_table_and_a_page_of_it() -> None:
    run: dict[str, Any] = {
        "group": "from hidden states, logp, float32, 8 x 9 x 4",
        "hidden_case": "logp",
        "products_seconds": 0.5,
        "returned_bytes": 2**21,
        "peak_extra_bytes": 2**20,
        "ratio_of_best": 1.1,
        "loss_error": 1e-7,
        "logp_error": 3e-7,
    }
    line = partial(dict, run)
    runs = [
        line(contender="naive", median=2.0, ratio_to_products=4.0, products=1.0),
        line(contender="ours", median=0.6, ratio_to_products=1.2, products=1.0),
    ]
    lines = hidden_table(runs)
    assert "products 500.0 ms, returned 2 MiB" in lines[1]
    ours = next(one for one in lines if one.startswith("  ours"))
    assert " ".join(ours.split()) == "ours 600.0 ms 1.20 1.10 3.33 1.0 MiB 1.00 3e-07"
    assert max(map(len, lines)) <= 100
    page = markdown(Report([], "a card", [], runs), [])
    assert page[0] == "# From hidden states to the loss" and lines[1] in page
