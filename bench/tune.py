"""Finds the fastest layout of the row kernels on this card, and writes it into kernels/launch.py.

    python -m bench.tune [--json FILE] [--table FILE]   sweep here, write both
    python -m bench.tune --apply FILE [--table FILE]    write what a sweep elsewhere has found

First come the candidates of `bench.second_reading`, then one axis of `launch.Tuning` after the
other, the others held at the best so far. Never chosen is a layout whose results differ from the
default's (by more than rounding, where other warps sum in another order), or whose plans differ in
a bit of a log-probability; nor one that gains less than the timer's noise. Statistics, one pass and
gradient share an entry of the table, so their times are added.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, median_seconds
from bench.second_reading import CANDIDATES
from bench.trials import Key, Plans, Timer, Trial, fits, try_out
from grpo_core.kernels import launch
from grpo_core.kernels.launch import Tuning

# values to try of every field of `Tuning`; those of fields it does not have are left out
AXES: dict[str, tuple[Any, ...]] = {
    "warps": (4, 8, 16, 32),
    "tiles": (None, 1, 2, 4, 8),
    "num_stages": (None, 1, 2, 4),
    "registers": (None, 64, 80),
    "backwards": (False, True),
    "held": (0, 8, 16, 32, 48),
    "kept": (None, 32, 64, 128),
}
# tried first: ways to read a row again that no single axis leads to
STARTS = tuple(CANDIDATES.values())
VOCABULARIES = (32_000, 50_257, 128_256, 151_669, 151_936, 262_144)
DTYPES = (torch.bfloat16, torch.float32)
N, MINUTES, DRY_MINUTES = 4096, 9.0, 0.2
# of memory per row: a bucket's three vocabularies, each with its gradient and a copy of it
ROW_BYTES = 64 * VOCABULARIES[-1]
DRY_VOCABULARIES, DRY_N = (2_000, 2_001), 2
# gains below this share are the timer's
NOISE = 0.02
TABLE = Path(launch.__file__).resolve()


def sweep(bucket: list[Plans], timer: Timer, deadline: float) -> Iterator[Trial]:
    """Trials of a bucket's vocabularies: the default, the candidates, one axis after another."""
    tried: dict[Tuning, float] = {}

    def attempts(candidates: Iterable[Tuning]) -> Iterator[Trial]:
        for candidate in candidates:
            if candidate in tried or not fits(candidate) or time.monotonic() > deadline:
                continue
            trials = [try_out(plans, candidate, timer) for plans in bucket]
            tried[candidate] = sum(trial.total for trial in trials)
            yield from trials

    yield from attempts([launch.untuned(bucket[0].V), *STARTS])
    own = {field.name for field in fields(Tuning)}
    for axis in (name for name in AXES if name in own):
        best = min(tried, key=tried.__getitem__)
        yield from attempts([replace(best, **{axis: value}) for value in AXES[axis]])


def choose(trials: list[Trial]) -> dict[Key, Tuning]:
    """The layout of each bucket that is faster than its default, which is tried first."""
    chosen = {}
    for key in dict.fromkeys(trial.key for trial in trials):
        totals: dict[Tuning, float] = {}
        for trial in trials:
            if trial.key == key:
                totals[trial.tuning] = totals.get(trial.tuning, 0.0) + trial.total
        default, best = next(iter(totals)), min(totals, key=totals.__getitem__)
        if totals[best] < (1 - NOISE) * totals[default]:
            chosen[key] = best
    return chosen


def rewrite_table(source: str, table: dict[Key, Tuning]) -> str:
    """The text of kernels/launch.py with another `TUNED`."""
    (place,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TUNED"
    )
    assert place.value is not None and place.end_lineno is not None
    lines = source.splitlines(keepends=True)
    head = lines[place.lineno - 1].split("=")[0] + "= {"
    entries = [
        f'    ("{architecture}", "{dtype}", {bucket:_}): {tuning!r},\n'
        for (architecture, dtype, bucket), tuning in sorted(table.items())
    ]
    text = [head, "\n" if entries else "", *entries, "}\n"]
    return "".join([*lines[: place.lineno - 1], *text, *lines[place.end_lineno :]])


def _line(trial: Trial, default: float) -> str:
    """One line of the table of trials."""
    given = {"warps": trial.tuning.warps} | {
        field.name: value
        for field in fields(Tuning)
        if (value := getattr(trial.tuning, field.name)) != field.default
    }
    options = ", ".join(f"{name} {value}" for name, value in given.items())
    head = f"{trial.key[0]:<8}{trial.key[1]:<10}{trial.V:>9,}  {options:<50}"
    if trial.failure:
        return f"{head}{trial.failure}"
    times = "".join(f"{name} {1e3 * s:.3f} ms  " for name, s in trial.seconds.items())
    return f"{head}{times}{trial.terabytes:.2f} TB/s  {default / trial.total:.3f}x"


def run_sweep(
    vocabularies: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    rows: int,
    device: str,
    timer: Timer,
    minutes: float = MINUTES,
) -> list[Trial]:
    """Every bucket and dtype in turn, printed as it goes; each has its share of the minutes."""
    end = time.monotonic() + 60 * minutes
    # the largest first: what it compiles the others find compiled
    buckets = [
        (dtype, [*members])
        for dtype in dtypes
        for _, members in groupby(sorted(vocabularies, reverse=True), key=launch.tuning_bucket)
    ]
    trials = []
    for index, (dtype, members) in enumerate(buckets):
        bucket = [Plans(rows, V, dtype, device) for V in members]
        defaults: dict[int, float] = {}
        now = time.monotonic()
        deadline = now + (end - now) / (len(buckets) - index)
        for trial in sweep(bucket, timer, deadline):
            print(_line(trial, defaults.setdefault(trial.V, trial.total)), flush=True)
            trials.append(trial)
        if time.monotonic() > deadline:
            print(f"{dtype}, {members}: out of time, some layouts were not tried")
    return trials


def _seconds(call: Callable[[], object], _: Tuning) -> float:
    """The timer of a GPU."""
    return median_seconds(call, "cuda")


def _pretend(call: Callable[[], object], tuning: Tuning) -> float:
    """A timer for machines that cannot time: eight warps are fastest."""
    return 1e-3 * (1 + abs(tuning.warps - 8) / 8 + (tuning.num_stages or 3) / 100)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every trial there")
    parser.add_argument("--table", type=Path, default=TABLE, help="the launch.py to rewrite")
    parser.add_argument("--apply", type=Path, help="take the choice from such a JSON file")
    parser.add_argument("--minutes", type=float, help=f"default: {MINUTES}")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, untimed")
    given = parser.parse_args()
    if given.dry_run and given.table.resolve() == TABLE:
        parser.error("--dry-run writes only into a copy: give it as --table")
    if given.apply:
        record = json.loads(given.apply.read_text())
    else:
        if given.dry_run:
            shape: Any = (DRY_VOCABULARIES, DTYPES[:1], DRY_N, "cpu", _pretend)
        else:
            rows = min(N, torch.cuda.mem_get_info()[1] // ROW_BYTES)
            shape = (VOCABULARIES, DTYPES, rows, "cuda", _seconds)
        usual = DRY_MINUTES if given.dry_run else MINUTES
        trials = run_sweep(*shape, minutes=usual if given.minutes is None else given.minutes)
        record = {"machine": describe(), "dry_run": given.dry_run}
        record["trials"] = [asdict(trial) for trial in trials]
        record["chosen"] = [[*key, asdict(tuning)] for key, tuning in choose(trials).items()]
        if given.json:
            given.json.write_text(json.dumps(record, indent=1) + "\n")
    chosen = {tuple(key): Tuning(**tuning) for *key, tuning in record["chosen"]}
    source = given.table.read_text() if given.table.exists() else TABLE.read_text()
    swept = {tuple(trial["key"]) for trial in record["trials"]}
    kept = {key: tuning for key, tuning in launch.TUNED.items() if key not in swept}
    given.table.write_text(rewrite_table(source, kept | chosen))
    print(f"{len(chosen)} entries of TUNED written to {given.table}")


if __name__ == "__main__":
    _main()
