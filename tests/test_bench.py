"""The benchmarks: byte counts against counts by hand, and the refusal of wrong contenders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import conftest as bench_setup
from bench.batch import CASES, FROZEN, HIDDEN_CASES, LOGP, TRAINED, Batch, Case
from bench.conftest import Budget
from bench.contenders import Contender, contenders, hidden_naive, naive, ours
from bench.counted import RESULTS, count, tables
from bench.distill import distillation, kept_sets, measure
from bench.meter import KernelMeter, Meter, Traffic, one_thread, peak_extra_bytes
from bench.table import table
from bench.truth import WrongResult, find_truth, refuse_wrong
from grpo_core import RECIPES, fused_loss, token_logp
from grpo_core.kernels import launch
from grpo_core.kernels.launch import Layout
from grpo_core.loss.reference import reference_loss
from grpo_core.trainer.measure import LiveBytes
from tests.combinations import slow
from tests.conftest import CPU_BACKEND, HAS_GPU, HAS_TRITON

ONE_PASS, TWO_PHASES, FORWARD = CASES
interpreted = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="counts interpreted kernels")


def operand_bytes(call: Any, *args: Tensor, threshold: int = 0) -> tuple[int, int]:
    """(all, large) operand bytes of one call."""
    with Meter(threshold) as meter:
        call(*args)
    return meter.issued, meter.large


def test_peak_counts_what_lives_at_the_same_time():
    def call() -> Tensor:
        first = torch.empty(1000)  # 4,000 bytes
        second = first * 2  # 8,000 bytes
        del first  # 4,000 bytes
        return second.double()  # 12,000 bytes

    assert peak_extra_bytes(call, "cpu") == 12_000


def test_peak_sees_scratch_inside_an_operator_and_none_in_place():
    held = torch.randn(1000)
    assert peak_extra_bytes(lambda: held.neg_(), "cpu") == 0
    # values and the places they came from
    assert peak_extra_bytes(lambda: held.sort(), "cpu") >= 4000 + 8000


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(lambda rows: rows.exp(), 400 + 400, id="one-in-one-out"),
        pytest.param(lambda rows: rows.view(100).unsqueeze(0)[:, 1:], 0, id="views"),
        pytest.param(lambda rows: torch.empty_like(rows), 0, id="reserving"),
        pytest.param(lambda rows: torch.zeros_like(rows), 400, id="zeros"),
        pytest.param(lambda rows: rows.mul_(2), 400 + 400, id="in-place"),
        pytest.param(lambda rows: rows.zero_(), 400, id="overwritten"),
        pytest.param(lambda rows: rows.double(), 400 + 800, id="upcast"),
        pytest.param(lambda rows: rows[0].expand(10, 10).sum(), 40 + 4, id="expanded"),
        pytest.param(lambda rows: torch.exp(rows, out=rows), 400 + 400, id="out"),
    ],
)
def test_operand_bytes_by_hand(call: Any, expected: int):
    assert operand_bytes(call, torch.randn(10, 10))[0] == expected


def test_operand_bytes_of_an_indexed_read_are_those_it_touches():
    rows, index = torch.randn(10, 100), torch.zeros(10, 1, dtype=torch.int64)
    touched, indices, output = 10 * 4, 10 * 8, 10 * 4
    assert operand_bytes(lambda: rows.gather(1, index))[0] == touched + indices + output


def test_only_large_storages_count_as_large():
    rows = torch.randn(100, 100)
    # a chunk is a view of large storage, its exponential is scratch
    everything, large = operand_bytes(lambda: rows[:10].exp(), threshold=20_000)
    assert (everything, large) == (8_000, 4_000)


def test_naive_moves_what_its_operations_have_to():
    batch = Batch.draw(8, 5000, torch.float32, "cpu")
    call = Contender("naive", naive).call(batch, ONE_PASS)
    # log_softmax 1 + 1; the gradient of gather 1; that of log_softmax 2 + 1
    moved = operand_bytes(call)[0] / batch.pristine.numel()
    assert moved == pytest.approx(6 * 4, rel=0.01)


@interpreted
def test_kernel_meter_counts_lanes_and_addresses():
    from tests.copy_kernel import copy_twice

    source, sink = torch.randn(2, 12), torch.empty(2, 12)
    with KernelMeter() as meter:
        copy_twice(source, sink)
    assert torch.equal(source, sink)
    # 12 of 16 lanes, read twice by the same program
    assert meter.traffic(source) == Traffic(issued=2 * 96, distinct=96)
    assert meter.traffic(sink) == Traffic(issued=96, distinct=96)
    assert meter.traffic() == Traffic(issued=3 * 96, distinct=2 * 96)


@interpreted
def test_kernel_meter_names_every_launch():
    from tests.copy_kernel import copy_twice

    source, sink = torch.randn(2, 12), torch.empty(2, 12)
    with KernelMeter() as meter, Meter(0) as operands:
        copy_twice(source, sink)
        copy_twice(sink, source)
    assert meter.launches == ["_copy_twice_kernel"] * 2
    assert meter.traffic(source, stores=False) == Traffic(2 * 96, 96)
    assert meter.traffic(source, stores=True) == Traffic(96, 96)
    # the interpreter's own handling of tensors is nobody's operation
    assert operands.operations == 0


@interpreted
def test_an_atomic_operation_reads_and_writes():
    from tests.copy_kernel import add_up

    source, total = torch.ones(2, 12), torch.zeros(1)
    with KernelMeter() as meter:
        add_up(source, total)
    assert total.item() == 24
    assert meter.traffic(total, stores=False) == Traffic(issued=8, distinct=8)
    assert meter.traffic(total, stores=True) == Traffic(issued=8, distinct=8)


class Metered:
    """Distinct readings and writings of every row of some logits by a call of ours, in rows."""

    N, V = 5, 4099

    def __init__(self, dtype: torch.dtype, **given: Any) -> None:
        self.logits = torch.randn(self.N, self.V).to(dtype).requires_grad_()
        self.target = torch.randint(self.V, (self.N,))
        self.given: dict[str, Any] = {
            "objective": "dapo",
            "advantage": torch.randn(self.N),
            "sequence_id": torch.zeros(self.N, dtype=torch.int64),
            "old_logp": token_logp(self.logits.detach(), self.target, backend=CPU_BACKEND).logp,
            "validate": False,
            **given,
        }
        with KernelMeter() as self.meter:
            out = fused_loss(self.logits, self.target, backend="triton", **self.given)
            (self.dlogits,) = torch.autograd.grad(out.loss, self.logits)

    def read(self, tensor: Tensor) -> Tensor:
        """Distinct readings of each row."""
        return self._times(tensor, False)

    def written(self) -> Tensor:
        """Distinct writings of each row of the gradient."""
        return self._times(self.dlogits, True)

    def issued(self, tensor: Tensor) -> Tensor:
        """Readings issued of each row, but for those of the target beside its tile."""
        bytes_of_row = [self.meter.traffic(row, False).issued for row in tensor.detach()]
        return torch.tensor(bytes_of_row) // (self.V * tensor.itemsize)

    @property
    def kernels(self) -> list[str]:
        """Launched, in order."""
        return [kernel.strip("_") for kernel in self.meter.launches]

    def _times(self, tensor: Tensor, stores: bool) -> Tensor:
        rows = [self.meter.traffic(row, stores).distinct for row in tensor.detach()]
        return torch.tensor(rows) / (self.V * tensor.itemsize)


ONCE, TWICE = torch.ones(Metered.N), torch.full((Metered.N,), 2.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_pass_reads_and_writes_every_logit_once(inplace: bool, dtype: torch.dtype):
    step = Metered(dtype, inplace=inplace)
    assert torch.equal(step.read(step.logits), ONCE)
    assert torch.equal(step.written(), ONCE)
    assert (step.dlogits.data_ptr() == step.logits.data_ptr()) == inplace
    assert step.kernels == ["row_loss_kernel", "row_scale_kernel"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_read_every_logit_once_and_write_none(dtype: torch.dtype):
    logits, target = torch.randn(3, 4099).to(dtype), torch.randint(4099, (3,))
    with KernelMeter() as meter:
        token_logp(logits, target, backend="triton")
    assert meter.traffic(logits, stores=False).distinct == logits.nbytes
    assert meter.traffic(logits, stores=True).distinct == 0


@interpreted
def test_two_phases_read_twice_and_write_once():
    step = Metered(torch.bfloat16, objective=RECIPES["gspo"])
    assert torch.equal(step.read(step.logits), TWICE)
    assert torch.equal(step.written(), ONCE)


@interpreted
def test_the_exact_kl_reads_the_reference_once_more():
    ref = torch.randn(Metered.N, Metered.V).bfloat16()
    objective = RECIPES["dapo"].replace(kl="exact", beta=0.1)
    step = Metered(torch.bfloat16, objective=objective, ref_logits=ref)
    assert torch.equal(step.read(step.logits), ONCE)
    assert torch.equal(step.read(ref), ONCE)
    assert torch.equal(step.written(), ONCE)


@interpreted
@pytest.mark.parametrize("recipe", ["dapo", "gspo"])
def test_masked_rows_are_not_read(recipe: str):
    mask = torch.tensor([1, 0, 1, 1, 0])
    step = Metered(torch.bfloat16, objective=RECIPES[recipe], mask=mask)
    readings = 1 if recipe == "dapo" else 2
    assert torch.equal(step.read(step.logits), readings * mask.float())
    assert torch.equal(step.written(), ONCE)


@interpreted
@pytest.mark.parametrize("recipe", ["dapo", "gspo"])
def test_rows_without_a_gradient_are_not_read_again(recipe: str):
    advantage = torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0])
    if recipe == "gspo":
        advantage[:] = 0
    step = Metered(torch.bfloat16, objective=RECIPES[recipe], advantage=advantage)
    again = (advantage != 0).long()
    assert torch.equal(step.issued(step.logits), 1 + again)
    assert torch.equal(step.read(step.logits), ONCE)
    assert torch.equal(step.written(), ONCE)


@cache
def counted(name: str, case: Case) -> dict[str, Any]:
    """What a contender with kernels costs in bfloat16."""
    named = {one.name: one for one in contenders("interpreter", case)}
    return count(named[name], case, torch.bfloat16)


@interpreted
@pytest.mark.parametrize(
    ("name", "package", "one_pass", "two_phases"),
    [
        pytest.param("liger", "liger_kernel", 6.0, 8.0, marks=pytest.mark.slow),
        pytest.param("trl", "trl", 6.0, 6.0, marks=pytest.mark.slow),
        pytest.param("ours-triton", "", 4.0, 6.0, marks=pytest.mark.slow),
    ],
)
def test_bytes_of_other_peoples_kernels(
    name: str, package: str, one_pass: float, two_phases: float
):
    if package:
        pytest.importorskip(package)
    for case, expected in ((ONE_PASS, one_pass), (TWO_PHASES, two_phases)):
        figures = counted(name, case)
        assert figures["distinct"] == pytest.approx(expected, abs=0.03)
        assert figures["waits"] == 0
        assert figures["peak"] == pytest.approx(2, abs=0.03)


@pytest.mark.slow
@interpreted
def test_the_published_counts_of_ours_are_those_of_now():
    kept = json.loads((RESULTS / "counted.json").read_text())["figures"]
    assert tables(kept) in (RESULTS / "counted.md").read_text()
    for case in CASES:
        now = counted("ours-triton", case)
        (then,) = (
            one
            for one in kept
            if (one["case"], one["contender"], one["dtype"])
            == (case.name, "ours-triton", "bfloat16")
        )
        assert now == then, "python -m bench.counted writes bench/results/counted.md anew"


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_every_contender_computes_the_same(dtype: torch.dtype):
    batch = Batch.draw(6, 3001, dtype, "cpu")
    truths = {recipe: find_truth(batch, recipe) for recipe in ("dapo", "gspo")}
    for case in CASES:
        for contender in contenders("interpreter" if HAS_TRITON and not HAS_GPU else "cpu", case):
            if not contender.compiled:
                batch.restore()
                outcome = contender.call(batch, case)()
                refuse_wrong(contender.name, outcome, truths[case.recipe])


@pytest.mark.parametrize(
    ("wrong", "spoil"),
    [
        ("loss", lambda loss: loss * 1.001),
        ("logp", lambda logp: logp + 1e-3),
        ("entropy", lambda entropy: entropy * 1.001),
        ("dlogits", lambda dlogits: dlogits * 1.01),
        ("dlogits", lambda dlogits: dlogits.roll(1, 1)),
        ("dlogits", lambda dlogits: dlogits * float("nan")),
    ],
)
def test_a_wrong_contender_is_refused(wrong: str, spoil: Any, logits_truth: Any):
    outcome, truth = logits_truth
    assert max(refuse_wrong("x", outcome, truth).values()) < 1e-5
    spoiled = {"gradients": (spoil(outcome.gradients[0]),)}
    if wrong != "dlogits":
        spoiled = {wrong: spoil(getattr(outcome, wrong))}
    with pytest.raises(WrongResult, match=f"x: {wrong}: expected"):
        refuse_wrong("x", outcome._replace(**spoiled), truth)


@pytest.fixture(scope="module")
def logits_truth() -> Any:
    """A right outcome from logits, and the truth."""
    batch = Batch.draw(12, 3001, torch.float32, "cpu")
    outcome = Contender("x", partial(ours, backend=CPU_BACKEND)).call(batch, ONE_PASS)()
    return outcome, find_truth(batch)


def test_a_gradient_without_its_softmax_is_refused():
    batch = Batch.draw(8, 20_001, torch.bfloat16, "cpu")
    outcome = Contender("x", naive).call(batch, ONE_PASS)()
    (dlogits,) = outcome.gradients
    token = batch.token[:, None]
    at_target = torch.zeros_like(dlogits).scatter(1, token, dlogits.gather(1, token))
    with pytest.raises(WrongResult, match="dlogits"):
        refuse_wrong("x", outcome._replace(gradients=(at_target,)), find_truth(batch))


HIDDEN = {"N": 256, "V": 301, "D": 24}


def hidden_batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Two sequences of hidden states."""
    return Batch.draw(**HIDDEN, dtype=dtype, device="cpu")


def test_products_by_hand() -> None:
    """Every spelling of a product, forward and backward."""
    a, b, c = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
    once = 2 * 3 * 4 * 5
    with Meter() as meter, one_thread():
        a @ b.detach()
        torch.addmm(c, a, b.detach())
        c.addmm_(a, b.detach())
        torch.bmm(a[None], b.detach()[None])
        (a @ b).sum().backward()
        a + a
    assert meter.products == 6 * once


# products of each in the order of HIDDEN_CASES; without the weights' gradient one fewer
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_from_hidden_is_right_in_its_products(dtype: torch.dtype) -> None:
    batch = hidden_batch(dtype)
    truth, scored = find_truth(batch), int(batch.valid.sum())
    for nth, case in enumerate(HIDDEN_CASES):
        for contender in contenders("cpu", case):
            if dtype not in contender.dtypes:
                continue
            with Meter() as meter, one_thread():
                outcome = contender.call(batch, case)()
            refuse_wrong(contender.name, outcome, truth)
            assert len(outcome.gradients) == case.gradients
            if dtype == torch.float32:
                rows = HIDDEN["N"] if contender.name in ("naive", "torch") else scored
                found = meter.products / (2 * rows * HIDDEN["V"] * HIDDEN["D"])
                expected = COUNTED[contender.name][nth]
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), contender


def test_the_truth_from_hidden_is_that_of_the_whole_batch() -> None:
    """At once and with autograd through the product, not a sequence at a time."""
    batch = hidden_batch()
    truth = find_truth(batch)
    hidden, lm_head = (x.double().requires_grad_() for x in batch.inputs)
    out = reference_loss(
        hidden @ lm_head.t(),
        batch.target,
        objective="dapo",
        advantage=batch.advantage,
        old_logp=batch.old_logp,
        sequence_id=batch.sequence_id,
    )
    out.loss.backward()
    assert torch.allclose(truth.values["loss"], out.loss)
    assert torch.allclose(truth.values["dhidden"], hidden.grad)
    assert torch.allclose(truth.values["dweight"], lm_head.grad[truth.tokens])


@pytest.fixture(scope="module")
def hidden_truth() -> Any:
    """A right outcome from hidden states, and the truth."""
    batch = hidden_batch()
    return Contender("naive", hidden_naive).call(batch, TRAINED)(), find_truth(batch)


@pytest.mark.parametrize("wrong", ["loss", "logp", "dhidden", "dweight"])
def test_a_wrong_contender_from_hidden_is_refused(wrong: str, hidden_truth: Any) -> None:
    outcome, truth = hidden_truth
    refuse_wrong("naive", outcome, truth)
    names = ("dhidden", "dweight")
    if wrong in names:
        pairs = zip(names, outcome.gradients, strict=True)
        scaled = [x * (1.001 if name == wrong else 1) for name, x in pairs]
        spoiled = outcome._replace(gradients=tuple(scaled))
    else:
        spoiled = outcome._replace(**{wrong: getattr(outcome, wrong) * 1.001})
    with pytest.raises(WrongResult, match=f"naive: {wrong}: expected the float64"):
        refuse_wrong("naive", spoiled, truth)


@pytest.mark.parametrize(("case", "products"), [(TRAINED, 3), (FROZEN, 2), (LOGP, 1)])
def test_the_floor_is_the_products_alone(case: Case, products: int) -> None:
    from bench import bench_loss

    batch = hidden_batch()
    floor = bench_loss.products(batch, case)
    with Meter() as meter:
        logits, *gradients = floor()
    scored = int(batch.valid.sum())
    assert meter.products == products * 2 * scored * HIDDEN["V"] * HIDDEN["D"]
    hidden, lm_head = batch.inputs[0][batch.valid], batch.inputs[1]
    right = hidden @ lm_head.t()
    assert torch.equal(logits, right)
    wanted = (right @ lm_head, right.t() @ hidden)[: products - 1]
    assert all(map(torch.equal, gradients, wanted)) and len(gradients) == len(wanted)


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_run_is_shared_out_over_its_cases_and_ends_in_time():
    """Ten cases of 5 s of checks and 2 s a round in 100 s: each has 10 s, so 2 rounds."""
    clock = Clock()
    budget = Budget(100.0, 10, clock)
    rounds = []
    for _ in range(10):
        assert budget.start("x")
        clock.now += 5 + 2
        rounds.append(budget.rounds("x", 2.0, wanted=5))
        clock.now += 2 * rounds[-1]
    # 10 - 7 = 3 s: one round; what it leaves goes to the later cases
    assert rounds[0] == 1 and sum(rounds) == 15
    assert clock.now == 100


def test_quick_cases_get_the_rounds_that_are_wanted():
    clock = Clock()
    budget = Budget(100.0, 2, clock)
    assert budget.start("x")
    assert budget.rounds("x", 0.01, wanted=5) == 5


def test_a_case_that_cannot_end_in_time_does_not_start():
    clock = Clock()
    budget = Budget(30.0, 5, clock)
    for kind, checks in (("quick", 3.0), ("slow", 15.0)):
        assert budget.start(kind)
        clock.now += checks
        # a case that has started is measured, even when its share is over
        assert budget.rounds(kind, 1.0, wanted=5) >= 1
        clock.now += 1.0
    # 10 s are left: another slow one takes 16, a quick one 4, one never seen perhaps 16
    assert clock.now == 20
    assert not budget.start("slow") and not budget.start("unknown")
    assert budget.start("quick")


@pytest.mark.skipif(HAS_GPU, reason="the rule for main memory")
@pytest.mark.parametrize(("gibibytes", "rows"), [(24, 512), (2, 256), (512, 512)])
def test_rows_follow_from_memory(gibibytes: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    from bench.bench_loss import fitting_rows

    assert fitting_rows(151_936, 512) == rows


def a_run(**changes: Any) -> dict[str, Any]:
    """A benchmark's figures as the table wants them."""
    figures = {
        "group": "forward, float32, 512 x 151,936",
        "contender": "naive",
        "dtype": "float32",
        "from_hidden": False,
        "median": 0.6,
        "rounds": 5,
        "logits_bytes": 2**30,
        "returned_bytes": 2**21,
        "clone_seconds": 0.3,
        "copy_seconds": 0.1,
        "ratio_to_floor": 12.0,
        "peak_extra_bytes": 2**29,
        "bytes_per_logit_issued": 24.0,
        "bytes_per_logit": 24.0,
        "loss_error": 1e-7,
        "logp_error": 3e-7,
    }
    return {**figures, **changes}


def test_one_table_sets_contenders_side_by_side():
    products = {"products_seconds": 0.5, "products": 3.0, "ratio_to_floor": 1.2}
    hidden = {"from_hidden": True, "group": "from hidden states, logp", "contender": "ours"}
    fast = {"contender": "ours-triton-inplace", "median": 0.2, "ratio_to_floor": 4.0}
    from_hidden = a_run(**products, **hidden, median=0.6, peak_extra_bytes=2**20)
    del from_hidden["clone_seconds"], from_hidden["copy_seconds"]
    lines = table(
        [
            from_hidden,
            a_run(dtype="bfloat16", group="forward, bfloat16", contender="ours-cpu"),
            a_run(),
            a_run(**fast, bytes_per_logit=8.0),
            a_run(contender="compiled", bytes_per_logit=None, bytes_per_logit_issued=None),
        ]
    )
    assert sum("contender" in line for line in lines) == 1
    assert lines[2:4] == [
        "forward, float32, 512 x 151,936",
        "  logits of 1,024 MiB, clone 300.0 ms, copy 100.0 ms",
    ]
    shown = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    peak = ["512.0", "0.50"]
    assert shown["naive"] == ["600.0", "5", "1.00", "2.00", "12.00", *peak, "24.00", "3e-07"]
    assert shown["ours-triton-inplace"][:5] == ["200.0", "5", "3.00", "0.67", "4.00"]
    assert shown["compiled"][-2] == "-"
    # a block without naive
    assert shown["ours-cpu"][2] == "-"
    assert lines[-2] == "  gradients of 2 MiB, products 500.0 ms"
    assert shown["ours"] == ["600.0", "5", "-", "-", "1.20", "1.0", "0.00", "3.00", "3e-07"]
    assert max(map(len, lines)) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_nothing_as_long_as_a_row_is_held(dtype: torch.dtype):
    """A CPU kernel computes in blocks of 4 KiB, two on each thread."""
    batch = Batch.draw(64, 151_936, dtype, "cpu")
    named = {one.name: one for one in contenders("cpu", ONE_PASS)}
    call, threads = named["ours-cpu-inplace"].call(batch, ONE_PASS), 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with LiveBytes("cpu") as live:
            call()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    # vectors of 64 tokens
    assert live.peak < 64 * 8 * 100 < 151_936


@pytest.mark.slow
@interpreted
def test_a_sweep_chooses_the_fastest_right_layout_and_writes_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from bench import tune

    try_out = tune.try_out

    def spoil_the_fastest(plans: Any, tuning: Layout, timer: Any) -> Any:
        trial = try_out(plans, tuning, timer)
        return replace(trial, failure="another result") if tuning.warps == 32 else trial

    monkeypatch.setattr(tune, "try_out", spoil_the_fastest)
    # of every axis the least that shows it is walked along
    axes = {name: values[:2] for name, values in tune.AXES.items()}
    monkeypatch.setattr(tune, "AXES", axes | {"warps": (4, 8, 32)})
    seconds = {32: 0.1, 8: 0.5}

    def timer(_: Any, tuning: Layout) -> float:
        return seconds.get(tuning.warps, 1.0) + (tuning.tiles != 4) / 100

    (trials,) = tune.run_sweep((2000, 2001), (torch.bfloat16,), 2, "cpu", timer)
    tried = {trial.tuning for trial in trials}
    for axis, values in tune.AXES.items():
        assert {getattr(tuning, axis) for tuning in tried} >= set(values), axis
    assert {trial.V for trial in trials} == {2000, 2001}
    chosen = tune.choose(trials)
    assert chosen == {("cpu", "bfloat16", 2048): Layout(warps=8)}
    table = chosen | {("sm_90", "float32", 2**18): Layout(warps=16, num_stages=2)}
    copy = tmp_path / "launch_copy.py"
    copy.write_text(tune.rewrite_table(tune.TABLE.read_text(), table))
    spec = spec_from_file_location("grpo_core.kernels.launch_copy", copy)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    written = {key: vars(tuning) for key, tuning in module.TUNED.items()}
    assert written == {key: vars(tuning) for key, tuning in table.items()}
    logits = torch.empty(2, 2000, dtype=torch.bfloat16)
    eight_warps = {"THREADS": 256, "num_warps": 8}
    assert module.row_layout(logits) == launch.row_layout(logits) | eight_warps
    # nothing but the table differs
    before, after = tune.TABLE.read_text(), copy.read_text()
    assert tune.rewrite_table(after, {}) == tune.rewrite_table(before, {})


@interpreted
def test_a_layout_with_another_result_is_found_out(monkeypatch: pytest.MonkeyPatch):
    from bench import tune

    plans = tune.Plans(2, 2000, torch.bfloat16, "cpu")
    right = plans.calls["one pass"]
    wrong = {4: 1e-6, 8: 1e-3, 16: 1e-6}

    def wrong_by_its_warps() -> Any:
        logp, *rest = right()
        tuning = launch.TUNED.get(plans.key)
        off = wrong.get(tuning.warps, 0.0) if tuning else 0.0
        return (logp * (1 + off), *rest)

    def outcome(warps: int) -> str | float:
        trial = tune.try_out(plans, Layout(warps), lambda *_: 1.0)
        return trial.failure or trial.total

    monkeypatch.setitem(plans.calls, "one pass", wrong_by_its_warps)
    # of the default's warps, so every bit counts; of others, then rounding; beside the statistics
    assert outcome(4) == outcome(8) == "one pass: another result"
    assert outcome(16) == "one pass: logp of other bits"
    assert outcome(32) == 3.0
    assert plans.key not in launch.TUNED


@pytest.mark.parametrize("V", [1, 2, 4096, 4097, 151_669, 262_144])
def test_vocabularies_share_an_entry_up_to_the_next_power_of_two(V: int):
    bucket = launch.tuning_bucket(V)
    assert V <= bucket < 2 * V
    assert bucket & (bucket - 1) == 0


def test_a_benchmark_in_a_background_job_can_be_stopped():
    """What it has measured is written on SIGINT, which such a job inherits as ignored."""
    option = SimpleNamespace(benchmark_quiet=False)
    config = SimpleNamespace(addinivalue_line=lambda *line: None, option=option)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        bench_setup.pytest_configure(config)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_distillation_and_kept_sets_are_measured_side_by_side() -> None:
    """Right results, 3 products of the student and 1 of the teacher, 100 columns."""
    lines = measure("opd", distillation(16, 500, 0.5), 2 * 16 * 500 * 256)
    lines += measure("kept", kept_sets(8, 64, 20), 0)
    shown = {line.split("  ")[1]: line.split() for line in lines if line.startswith("  ")}
    assert shown["ours"][-1] == "-" and "ours, no kept" in shown
    assert next(line for line in lines if line.startswith("  ours ")).split()[-2] == "4.00"
    assert max(map(len, lines)) <= 100
    ways = kept_sets(8, 64, 20)
    ways["ours"] = ways["ours, no kept"]
    with pytest.raises(ValueError, match="kept: ours: expected torch's result"):
        measure("kept", ways, 0)


@pytest.mark.slow
def test_a_small_run_from_start_to_end(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    found = tmp_path / "figures.json"
    sizes = "--rows 8 --vocabulary 3001 --hidden 32 -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", *sizes.split()]
    # a worker of the suite passes on that it is one, and workers do not time
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        # compiling takes most of a minute and adds nothing here; nor do peers, imported slowly
        [
            *(*command, "--benchmark-json", str(found)),
            *("-k", "not compiled and not liger and not trl"),
        ],
        cwd=Path(__file__).parent.parent,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    timed = json.loads(found.read_text())["benchmarks"]
    assert {one["group"] for one in timed} == {
        f"{case.name}, {dtype}, 8 x 3,001" for case in CASES for dtype in ("float32", "bfloat16")
    } | {f"from hidden states, {case.name}, float32, 8 x 3,001 x 32" for case in HIDDEN_CASES}
    for one in timed:
        info = one["extra_info"]
        assert one["options"]["timer"] == "clock"
        assert info["ratio_to_floor"] > 0
        # PyTorch does not see what kernels of Numba move
        if not info["from_hidden"] and not info["contender"].startswith("ours-cpu"):
            assert info["bytes_per_logit_issued"] >= info["bytes_per_logit"] > 0
        # said while it runs
        named = f"{one['group']}: {info['contender']}".replace(" ", "-")
        assert run.stdout.count(f"{named}] PASSED") == 1
    # ours and naive come first
    first = [one["extra_info"]["contender"] for one in timed]
    assert first == sorted(first, key=lambda name: not name.startswith(("ours", "naive")))
    lines = run.stdout.splitlines()
    assert sum(line.startswith("contender ") for line in lines) == 1
    start = next(n for n, line in enumerate(lines) if line.startswith("contender "))
    assert max(map(len, lines[start:])) <= 100
