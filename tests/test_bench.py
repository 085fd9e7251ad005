"""The benchmarks: byte counts against counts by hand, and the refusal of wrong contenders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import conftest as bench_setup
from bench import report
from bench.batch import Batch
from bench.counted import CASES, RESULTS, case_name, count, markdown
from bench.hidden import CASES as hidden_cases
from bench.kernel_meter import VECTORS, KernelMeter, Traffic, bytes_per_logit
from bench.meter import OperandMeter, peak_extra_bytes
from bench.paths import Contender, contenders, naive, ours
from bench.table import kernel_lines, table
from bench.truth import WrongResult, find_truth, refuse_wrong
from grpo_core import RECIPES, fused_loss, token_logp
from grpo_core.kernels import launch
from grpo_core.kernels.launch import Layout
from grpo_core.kernels.records import Rows
from grpo_core.trainer.measure import LiveBytes
from tests.conftest import HAS_GPU, HAS_TRITON

interpreted = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="counts interpreted kernels")


def operand_bytes(call: Any, *args: Tensor, threshold: int = 0) -> tuple[int, int]:
    """(all, large) operand bytes of one call."""
    with OperandMeter(threshold) as meter:
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
    call = Contender("naive", naive).call(batch, "forward + backward")
    # log_softmax 1 + 1; the gradient of gather 1; that of log_softmax 2 + 1
    moved = operand_bytes(call)[0] / batch.logits.numel()
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
def test_kernel_meter_tells_tensors_kernels_and_launches_apart():
    from tests.copy_kernel import copy_twice

    source, sink = torch.randn(2, 12), torch.empty(2, 12)
    with KernelMeter() as meter, OperandMeter(0) as operands:
        copy_twice(source, sink)
        copy_twice(sink, source)
    assert [launch.kernel for launch in meter.launches] == ["_copy_twice_kernel"] * 2
    name = "_copy_twice_kernel"
    assert meter.by_tensor(smallest=96) == {
        (name, "source_ptr", False): Traffic(4 * 96, 2 * 96),
        (name, "sink_ptr", True): Traffic(2 * 96, 2 * 96),
    }
    assert {label for _, label, _ in meter.by_tensor(smallest=97)} == {VECTORS}
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


@interpreted
def test_bytes_per_logit_leave_out_what_does_not_grow():
    from tests.copy_kernel import copy_twice

    def call_at(N: int) -> Any:
        tensors = torch.randn(N, 12), torch.empty(N, 12)
        return lambda: copy_twice(*tensors)

    moved = bytes_per_logit(call_at, 12, (2, 5))
    assert set(moved.values()) == {(8.0, 4.0), (4.0, 4.0)}


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
            "old_logp": token_logp(self.logits.detach(), self.target, backend="torch").logp,
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
        return [launch.kernel.strip("_") for launch in self.meter.launches]

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


@interpreted
@pytest.mark.parametrize(
    ("name", "package", "one_pass", "two_phases"),
    [("liger", "liger_kernel", 6.0, 8.0), ("trl", "trl", 6.0, 6.0), ("ours-triton", "", 4.0, 6.0)],
)
def test_bytes_of_other_peoples_kernels(
    name: str, package: str, one_pass: float, two_phases: float
):
    if package:
        pytest.importorskip(package)
    named = {one.name: one for one in contenders("interpreter", "forward + backward")}
    for (recipe, direction), expected in zip(CASES[1:], (one_pass, two_phases), strict=True):
        figures = count(named[name], recipe, direction, torch.bfloat16)
        assert figures["distinct"] == pytest.approx(expected, abs=0.03)
        assert figures["waits"] == 0
        assert figures["peak"] == pytest.approx(2, abs=0.03)


@interpreted
def test_the_published_counts_of_ours_are_those_of_now():
    kept = json.loads((RESULTS / "counted.json").read_text())["figures"]
    assert (RESULTS / "counted.md").read_text().endswith("\n".join(markdown(kept)) + "\n")
    for recipe, direction in CASES:
        named = {one.name: one for one in contenders("interpreter", direction)}
        now = count(named["ours-triton"], recipe, direction, torch.bfloat16)
        case = case_name(recipe, direction)
        (then,) = (
            one
            for one in kept
            if (one["case"], one["contender"], one["dtype"]) == (case, "ours-triton", "bfloat16")
        )
        assert now == then, "python -m bench.counted writes bench/results/counted.md anew"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_every_contender_computes_the_same(direction: Any, dtype: torch.dtype):
    batch = Batch.draw(12, 3001, dtype, "cpu")
    for recipe in ("dapo", "gspo"):
        truth = find_truth(batch, recipe)
        for contender in contenders(
            "interpreter" if HAS_TRITON and not HAS_GPU else "cpu", direction
        ):
            if not contender.compiled:
                batch.logits.copy_(batch.pristine)
                refuse_wrong(contender.name, contender.call(batch, direction, recipe)(), truth)


@pytest.mark.parametrize(
    ("wrong", "spoil"),
    [
        ("loss", lambda out: out._replace(loss=out.loss * 1.001)),
        ("logp", lambda out: out._replace(logp=out.logp + 1e-3)),
        ("entropy", lambda out: out._replace(entropy=out.entropy * 1.001)),
        ("dlogits", lambda out: out._replace(dlogits=out.dlogits * 1.01)),
        ("dlogits", lambda out: out._replace(dlogits=out.dlogits.roll(1, 1))),
        ("dlogits", lambda out: out._replace(dlogits=out.dlogits * float("nan"))),
    ],
)
def test_a_wrong_contender_is_refused(wrong: str, spoil: Any):
    batch = Batch.draw(12, 3001, torch.float32, "cpu")
    outcome = Contender("x", partial(ours, backend="torch")).call(batch, "forward + backward")()
    with pytest.raises(WrongResult, match=f"x: {wrong}: expected"):
        refuse_wrong("x", spoil(outcome), find_truth(batch))


def test_a_gradient_without_its_softmax_is_refused():
    batch = Batch.draw(8, 20_001, torch.bfloat16, "cpu")
    outcome = Contender("x", naive).call(batch, "forward + backward")()
    at_target = torch.zeros_like(outcome.dlogits).scatter(
        1, batch.word[:, None], outcome.dlogits.gather(1, batch.word[:, None])
    )
    with pytest.raises(WrongResult, match="dlogits"):
        refuse_wrong("x", outcome._replace(dlogits=at_target), find_truth(batch))


@pytest.mark.skipif(HAS_GPU, reason="the rule for main memory")
@pytest.mark.parametrize(("gibibytes", "rows"), [(24, 512), (2, 256), (512, 512)])
def test_rows_follow_from_memory(gibibytes: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert bench_setup.fitting_rows(151_936, 512) == rows


def a_run(**changes: Any) -> dict[str, Any]:
    """A benchmark's figures as the table wants them."""
    figures = {
        "group": "forward, float32, 512 x 151,936",
        "contender": "naive",
        "median": 0.6,
        "logits_bytes": 2**30,
        "clone_seconds": 0.3,
        "copy_seconds": 0.1,
        "ratio_to_clone": 2.0,
        "ratio_to_copy": 6.0,
        "peak_extra_bytes": 2**29,
        "bytes_per_logit_issued": 24.0,
        "bytes_per_logit": 24.0,
    }
    return {**figures, **changes}


def test_table_sets_contenders_side_by_side():
    fast = a_run(contender="ours-triton-inplace", median=0.2, bytes_per_logit=8.0)
    lines = table([a_run(), fast, a_run(contender="compiled", bytes_per_logit=None)])
    assert lines[1] == (
        "forward, float32, 512 x 151,936   logits 1,024 MiB, clone 300.0 ms, copy 100.0 ms"
    )
    shown = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    same = ["2.00", "6.0"]
    peak = ["512.0", "MiB", "0.50", "24.0"]
    assert shown["naive"] == ["600.0", "ms", *same, "1.00", *peak, "24.0"]
    assert shown["ours-triton-inplace"] == ["200.0", "ms", *same, "3.00", *peak, "8.0"]
    assert shown["compiled"][-2:] == ["24.0", "-"]
    assert max(map(len, lines)) <= 100


def test_table_starts_a_block_per_group_and_needs_no_naive():
    other = a_run(group="forward, bfloat16, 512 x 151,936", contender="ours-torch")
    lines = table([a_run(), other])
    assert sum("contender" in line for line in lines) == 2
    assert next(line for line in lines if "ours-torch" in line).split()[5] == "-"


def test_kernel_counts_are_shown_where_kernels_cannot_be_timed():
    figures = {"contender": "liger", "case": "one pass (dapo), forward", "dtype": "bfloat16"}
    moved = {"issued": 6.0, "distinct": 4.0}
    other = figures | moved | {"dtype": "float32"}
    naive = figures | moved | {"contender": "naive"}
    lines = kernel_lines([naive, figures | moved, other])
    assert lines[2:] == [
        "  one pass (dapo), forward",
        "    liger                   4.0 from memory,  6.0 issued",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_a_core_takes_a_few_rows_of_scratch(dtype: torch.dtype):
    """In float32 fewer, since exponentials are staged in the gradient."""
    batch = Batch.draw(64, 151_936, dtype, "cpu")
    named = {one.name: one for one in contenders("cpu", "forward + backward")}
    call, threads = named["ours-torch-inplace"].call(batch, "forward + backward"), 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with LiveBytes("cpu") as live:
            call()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    rows = live.peak / (151_936 * 4)
    expected = 5 if dtype == torch.float32 else 24
    assert expected <= rows < expected + 0.1


def test_a_report_says_what_it_was_taken_on_and_shows_every_figure(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from bench.figures import draw

    info = a_run(case="one pass (dapo), forward", dtype="float32", N=512, V=151_936)
    info |= {"necessary_bytes": 2**30, "copy_seconds": 2.0}
    del info["median"], info["group"]
    fast = info | {"contender": "ours-triton", "bytes_per_logit": None}
    record = {
        "datetime": "2026-11-25T02:00:00",
        "machine_info": {"device": "a card", "torch": "2.13.0", "missing_peers": ["trl (no trl)"]},
        "benchmarks": [
            {"group": "", "stats": {"median": median}, "extra_info": one}
            for median, one in ((4.0, info), (1.0, fast))
        ],
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps(record))
    found = report.Report.read(file)
    figures = draw(found, tmp_path)
    assert figures == ["time.png", "bandwidth.png", "memory.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in figures)
    text = "\n".join(report.markdown(found, figures))
    assert "Taken on a card, torch 2.13.0, triton absent, 2026-11-25." in text
    assert "Absent: trl (no trl)." in text
    assert "copied at 1 GB/s" in text
    # 1 GiB in 1 s, where a copy moves 2 GiB in 2 s
    assert "| **ours-triton** | 1,000 ms | 4.0x | 1 | 100% | 0.50 | 24.0 |" in text
    assert all(f"({name})" in text for name in figures)


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

    trials = tune.run_sweep((2000, 2001), (torch.bfloat16,), 2, "cpu", timer)
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
    rows = Rows.of(torch.empty(2, 2000, dtype=torch.bfloat16))
    eight_warps = {"THREADS": 256, "num_warps": 8}
    assert module.row_keywords(rows) == launch.row_keywords(rows) | eight_warps
    # nothing but the table differs
    before, after = tune.TABLE.read_text(), copy.read_text()
    assert tune.rewrite_table(after, {}) == tune.rewrite_table(before, {})


@interpreted
def test_a_layout_with_another_result_is_found_out(monkeypatch: pytest.MonkeyPatch):
    from bench import trials

    plans = trials.Plans(2, 2000, torch.bfloat16, "cpu")
    right = plans.calls["one pass"]
    wrong = {4: 1e-6, 8: 1e-3, 16: 1e-6}

    def wrong_by_its_warps() -> Any:
        logp, *rest = right()
        tuning = launch.TUNED.get(plans.key)
        off = wrong.get(tuning.warps, 0.0) if tuning else 0.0
        return (logp * (1 + off), *rest)

    def outcome(warps: int) -> str | float:
        trial = trials.try_out(plans, Layout(warps), lambda *_: 1.0)
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


@pytest.mark.slow
@interpreted
def test_the_command_for_a_gpu_walks_through_every_part_without_one(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        ["bash", "bench/gpu.sh", "--dry-run", "all"],
        cwd=Path(__file__).parent.parent,
        env={**alone, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    summary = (tmp_path / "summary.md").read_text()
    for part in ("tests", "ceilings", "bench", "peers", "hidden", "tune"):
        assert f"| {part} | done |" in summary
    assert re.search(r"\| trl \| (done|skipped)", summary)
    assert re.search(r"\| verify \| (done|skipped)", summary)
    assert (tmp_path / "bench" / "report.md").exists()
    assert "ours-lean" in (tmp_path / "hidden" / "report.md").read_text()
    assert json.loads((tmp_path / "tune.json").read_text())["dry_run"]
    assert "TUNED: dict" in (tmp_path / "launch.py").read_text()


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


@pytest.mark.parametrize("argument", ["", "everything"])
def test_the_command_for_a_gpu_wants_a_part_it_knows(argument: str):
    command = ["bash", "bench/gpu.sh", *argument.split()]
    root = Path(__file__).parent.parent
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 2


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
    hidden = [one for one in timed if "hidden_case" in one["extra_info"]]
    assert {one["group"] for one in hidden} == {
        f"from hidden states, {case}, float32, 8 x 3,001 x 32" for case in hidden_cases
    }
    assert all(one["extra_info"]["ratio_to_products"] > 0 for one in hidden)
    timed = [one for one in timed if one not in hidden]
    assert {one["group"] for one in timed} == {
        f"{case_name(*case)}, {dtype}, 8 x 3,001"
        for case in CASES
        for dtype in ("float32", "bfloat16")
    }
    for one in timed:
        info = one["extra_info"]
        assert one["options"]["timer"] == "clock"
        assert info["ratio_to_clone"] == one["stats"]["median"] / info["clone_seconds"]
        assert info["bytes_per_logit_issued"] >= info["bytes_per_logit"] > 0
        assert info["contender"] in run.stdout
