"""Half an hour on a card: the command that measures all, and what is predicted of it.

The command runs in a bare checkout: the tracked files, no network, no pip, no package that the
card's machine lacks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import bench_loss, predict
from bench.batch import CASES, HIDDEN_CASES
from bench.contenders import contenders
from bench.table import with_table
from tests.conftest import HAS_GPU

ROOT = Path(__file__).parent.parent
# bytes that travel, and seconds of a command and of all together
MOST_BYTES, COMMAND, ALL = 64 * 2**20, 600, 25 * 60
PARTS = ("tests", "verify", "sanitize", "ceilings", "head", "hidden", "bench", "peers", "trl")
PARTS += ("tune", "profile", "compare")
BARE = """
import socket
from importlib.machinery import PathFinder
find, absent = PathFinder.find_spec, {"numba", "trl", "liger_kernel", "pip"}
class Find:
    def __call__(self, name, *rest):
        return None if name.split(".")[0] in absent else find(name, *rest)
PathFinder.find_spec = Find()
def connect(*_):
    raise OSError("no network")
socket.socket.connect = connect
"""
# takes as much of the time as a test says, and is then stopped
TIMEOUT = """#!/usr/bin/env bash
echo "$6 $3" >> "$STATE/limits"
echo $(($(cat "$STATE/clock") + ${SPENT:-$3})) > "$STATE/clock"
exit 124
"""
MACHINE = ["{", ' "device": "A card",', ' "gpu": true,', ' "folder": "a-card",', "}"]
PYTHON = f"""#!/usr/bin/env bash
[[ $* == "-m bench.machine" ]] && cat <<'END'
{chr(10).join(MACHINE)}
END
exit 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The tracked files alone, as they travel to another machine."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    copy = tmp_path / "checkout"
    copy.mkdir()
    packed = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"],
        cwd=ROOT,
        input=listed.stdout,
        capture_output=True,
        check=True,
    )
    assert len(packed.stdout) < MOST_BYTES / 4
    subprocess.run(["tar", "-x"], cwd=copy, input=packed.stdout, check=True)
    return copy


def command(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """bench/gpu.sh in a checkout."""
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments],
        cwd=checkout,
        env={**alone, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# each part takes seconds to begin with: four of them, and all
@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="the walk without one")
@pytest.mark.parametrize(
    "given",
    ["sanitize trl tune compare", pytest.param("all", marks=pytest.mark.rare)],
)
def test_it_walks_through_its_parts_in_a_bare_checkout(given: str, checkout: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    bare, out = checkout.parent / "bare", checkout.parent / "out"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    run = command(checkout, "--dry-run", *given.split(), PYTHONPATH=str(bare), OUT=str(out))
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    # the limits of what comes back: eight files, in no folder
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz", "summary.md"]
    with tarfile.open(out / "results.tar.gz") as packed:
        packed.extractall(out / "all", filter="data")
    summary = (out / "summary.md").read_text()
    for part in PARTS if given == "all" else given.split():
        outcome = "skipped: trl" if part == "trl" else "done"
        assert f"| {part} | {outcome} |" in summary, summary
    assert json.loads((out / "all/tune.json").read_text())["dry_run"]
    assert "TUNED: dict" in (out / "all/launch.py").read_text()
    # nothing that was measured without a card passes for a card's
    assert "| forward | " in run.stdout and "outside |" not in run.stdout
    if given == "all":
        assert "ours-fast" in summary and "ours-cpu-inplace" in summary


@pytest.mark.parametrize("spent", ["", "600", "1"])
def test_its_time_ends_whatever_its_parts_take(spent: str, checkout: Path) -> None:
    """By a stand-in clock: all of its time, more than it has (unstoppable), nearly none."""
    programs = checkout.parent / "programs"
    programs.mkdir()
    for name, text in (("timeout", TIMEOUT), ("python", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    taken = {}
    for given in ("all", "first", "second", "third"):
        state = checkout.parent / given
        state.mkdir()
        (state / "clock").write_text("1000")
        run = command(
            checkout,
            given,
            PATH=f"{programs}:{os.environ['PATH']}",
            PYTHON=str(programs / "python"),
            CLOCK=f"cat {state}/clock",
            STATE=str(state),
            SPENT=spent,
        )
        assert run.returncode == 1, run.stderr
        taken[given] = int((state / "clock").read_text()) - 1000
        limits = dict(line.split() for line in (state / "limits").read_text().splitlines())
        if given == "all":
            assert list(limits) == [f"part_{part}" for part in PARTS]
        assert run.stdout.count("stopped after") == len(limits)
        if spent == "1":
            # what earlier parts leave is there for later ones
            assert int(limits[[*limits][-1]]) > 0.9 * sum(planned_seconds(limits))
    if not spent:
        assert taken["all"] <= ALL
        assert max(taken[third] for third in ("first", "second", "third")) <= COMMAND - 60
        assert sum(taken.values()) == 2 * taken["all"]


def planned_seconds(parts: dict[str, str]) -> list[int]:
    """The seconds of parts by the plan of the command."""
    plan = (ROOT / "bench/gpu.sh").read_text()
    found = (re.search(rf"^(?:PLAN=')?{part[5:]} +\w+ +(\d+) ", plan, re.M) for part in parts)
    return [int(match[1]) for match in found if match]


@pytest.mark.parametrize("argument", ["", "everything"])
def test_it_wants_a_part_that_it_knows(argument: str) -> None:
    assert command(ROOT, *argument.split()).returncode == 2


@pytest.mark.parametrize("path", predict.PLACES, ids=lambda path: path.name)
def test_the_published_predictions_are_those_of_the_model(path: Path) -> None:
    table = predict.PLACES[path]()
    now = with_table(path, predict.COMMAND, table)
    assert path.read_text() == now, "python -m bench.predict --write"


def test_every_prediction_can_fail() -> None:
    """A range is neither a point nor everything, and holds what is expected."""
    for figure in predict.FIGURES:
        cautious, expected, hopeful = (
            figure.value(predict.Model(predict.H200, likely)) for likely in range(3)
        )
        low, high = sorted((cautious, hopeful))
        assert 0 < low < expected < high < 3 * low, figure.name
        assert (high == hopeful) == (figure.unit == "TB/s"), figure.name


def test_the_model_gives_what_others_have_measured() -> None:
    """One H100, 8,192 x 151,936 x 4,096 bfloat16 (trl#7244), milliseconds."""
    all_rows = {"n": predict.N, "V": predict.V, "D": predict.D}
    models = [predict.Model(predict.H100, likely) for likely in range(3)]
    for published, milliseconds in (
        (42, [model.products(3, **all_rows) for model in models]),
        (59, [model.head(predict.NAIVE, **all_rows) for model in models]),
        # its forward by one Triton kernel, not ours
        (0.89, [1e3 * model.row_kernel(predict.STATS) for model in models]),
    ):
        assert 0.95 * min(milliseconds) <= published <= 1.1 * max(milliseconds)
        assert milliseconds[1] == pytest.approx(published, rel=0.1)


def test_what_is_predicted_is_measured() -> None:
    """Its contender, case and vocabulary are among those of a card."""
    cases = {case.name: case for case in (*CASES, *HIDDEN_CASES)}
    for figure in predict.FIGURES:
        if figure.part in ("head", "hidden", "bench", "peers"):
            name, case, V, _ = figure.key
            named = {one.name for one in contenders("cuda", cases[case])}
            assert name in named or find_spec({"liger": "liger_kernel"}.get(name, name)) is None
            assert V in bench_loss.VOCABULARIES


def test_what_was_measured_is_set_beside(tmp_path: Path) -> None:
    """By hand: 8,192 x 151,936 bfloat16 read and written in 2 ms are 2.49 TB/s."""
    info = {"contender": "ours-triton", "case": predict.ONE_PASS.name, "V": predict.V, "D": 0}
    runs = [
        {"extra_info": {**info, "D": 0, "N": 8192, "case": "another"}, "stats": {"median": 1.0}},
        {"extra_info": {**info, "D": 0, "N": 8192}, "stats": {"median": 2e-3}},
    ]
    (tmp_path / "head.json").write_text(json.dumps({"benchmarks": runs}))
    speeds = [{"name": "torch copy_", "moved_bytes": 8.6e9, "seconds": 1e-3}]
    (tmp_path / "ceilings.json").write_text(json.dumps({"ceilings": speeds}))
    ways = {"second_reading": {"plain": {"TB/s": 2.75}}}
    (tmp_path / "tune.json").write_text(json.dumps(ways))
    lines = predict.predictions(folder=tmp_path).splitlines()
    shown = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines}
    assert shown["both"] == "2.49"
    assert shown["copying"] == "8.60 outside"
    assert shown["again: plain"] == "2.75"
    assert shown["forward"] == shown["reading"] == "-"
