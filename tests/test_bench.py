"""The benchmarks: byte counts against counts by hand, and the refusal of wrong contenders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import conftest as bench_setup
from bench.kernel_meter import KernelMeter, Traffic
from bench.meter import OperandMeter, one_thread, peak_extra_bytes
from bench.paths import Batch, Contender, contenders, naive, ours
from bench.report import kernel_lines, table
from bench.truth import WrongResult, find_truth, refuse_wrong
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernel_reads_and_writes_every_logit_once(dtype: torch.dtype):
    batch = Batch.draw(3, 4099, dtype, "cpu")
    kernels = Contender("ours", partial(ours, backend="triton", inplace=True))
    with KernelMeter() as forward:
        kernels.call(batch, "forward")()
    with KernelMeter() as both:
        kernels.call(batch, "forward + backward")()
    assert forward.traffic(batch.logits).distinct == batch.logits.nbytes
    assert both.traffic(batch.logits).distinct == 2 * batch.logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_every_contender_computes_the_same(direction: Any, dtype: torch.dtype):
    batch = Batch.draw(12, 3001, dtype, "cpu")
    truth = find_truth(batch)
    for contender in contenders("cpu", direction):
        if not contender.compiled:
            batch.logits.copy_(batch.pristine)
            refuse_wrong(contender.name, contender.call(batch, direction)(), truth)


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
        1, batch.target[:, None], outcome.dlogits.gather(1, batch.target[:, None])
    )
    with pytest.raises(WrongResult, match="dlogits"):
        refuse_wrong("x", outcome._replace(dlogits=at_target), find_truth(batch))


@pytest.mark.skipif(HAS_GPU, reason="the rule for main memory")
@pytest.mark.parametrize(("gibibytes", "rows"), [(24, 512), (2, 256), (512, 512)])
def test_rows_follow_from_memory(gibibytes: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert bench_setup.twelfth_of_memory(151_936) == rows


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
    lines = kernel_lines({"bfloat16, forward + backward": (6.0, 4.0)})
    assert lines[-1].split(maxsplit=4)[-1] == "6.0 bytes per logit, 4.0 if rows stay in a cache"


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
def test_what_other_threads_do_is_counted():
    """The torch backend hands chunks to threads of its own, which no meter sees."""
    batch = Batch.draw(64, 151_936, torch.float32, "cpu")
    named = {one.name: one for one in contenders("cpu", "forward + backward")}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call = named["ours-torch-inplace"].call(batch, "forward + backward")
        assert peak_extra_bytes(call, "cpu") >= 4 * 151_936 * 4
        batch.logits.copy_(batch.pristine)
        with one_thread(), OperandMeter(batch.logits.nbytes // 2) as meter:
            call()
        assert meter.large >= 2 * batch.logits.nbytes
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_small_run_from_start_to_end(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    found = tmp_path / "figures.json"
    command = (
        f"{sys.executable} -m pytest bench/ --benchmark-only --benchmark-json {found} "
        "--rows 8 --vocabulary 3001 -p no:cacheprovider"
    )
    # a worker of the suite passes on that it is one, and workers do not time
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        # compiling takes most of a minute and adds nothing here
        [*command.split(), "-k", "not compiled"],
        cwd=Path(__file__).parent.parent,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    timed = json.loads(found.read_text())["benchmarks"]
    assert {one["group"] for one in timed} == {
        f"{direction}, {dtype}, 8 x 3,001"
        for direction in ("forward", "forward + backward")
        for dtype in ("float32", "bfloat16")
    }
    for one in timed:
        info = one["extra_info"]
        assert one["options"]["timer"] == "clock"
        assert info["ratio_to_clone"] == one["stats"]["median"] / info["clone_seconds"]
        assert info["bytes_per_logit_issued"] >= info["bytes_per_logit"] > 0
        assert info["contender"] in run.stdout
