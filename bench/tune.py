"""Finds the fastest layout of the row kernels on this card, and writes it into kernels/launch.py.

    python -m bench.tune [--json FILE] [--table FILE]   sweep here, write both as it goes
    python -m bench.tune --apply FILE [--table FILE]    write what a sweep elsewhere has found

One axis of `launch.Layout` after the other is tried, the others held at the best so far. Never
chosen is a layout whose results differ from the default's (by more than rounding, where other warps
sum in another order), or whose plans differ in a bit of a log-probability; nor one that gains less
than the timer's noise. Statistics, one pass and gradient share an entry of the table, so their
times are added. On a GPU the candidates of `bench.experiments.second_reading` are timed first.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.errors import TritonError

from bench.experiments.second_reading import time_candidates
from bench.machine import describe, median_seconds
from grpo_core import RECIPES
from grpo_core.backends import triton as triton_backend
from grpo_core.cli.options import Parser, existing_file, new_file
from grpo_core.kernels import launch
from grpo_core.kernels.launch import Layout
from grpo_core.kernels.records import RowGradients, Rows, Terms, TokenVectors

# values to try of every field of `Layout`
AXES: dict[str, tuple[Any, ...]] = {
    "warps": (4, 8, 16, 32),
    "tiles": (1, 2, 4, 8),
    "num_stages": (None, 1, 2, 4),
    "registers": (None, 64, 80),
}
V_EXPERIMENT = 151_936
VOCABULARIES = (32_000, 50_257, 128_256, 151_669, 151_936, 262_144)
DTYPES = (torch.bfloat16, torch.float32)
N, MINUTES, DRY_MINUTES = 4096, 9.0, 0.05
# of memory per row: a bucket's three vocabularies, each with its gradient and a copy of it
ROW_BYTES = 64 * VOCABULARIES[-1]
DRY_VOCABULARIES, DRY_N = (2_000, 2_001), 2
# gains below this share are the timer's
NOISE = 0.02
TABLE = Path(launch.__file__).resolve()

Key = tuple[str, str, int]
Timer = Callable[[Callable[[], object], Layout], float]


@dataclass
class Trial:
    """One layout on one vocabulary: seconds of each plan, or why not; `nbytes` of its logits."""

    key: Key
    V: int
    tuning: Layout
    nbytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def total(self) -> float:
        """Seconds of all plans."""
        return float("inf") if self.failure else sum(self.seconds.values())


class Plans:
    """The three plans over the same rows, and what each leaves behind."""

    def __init__(self, N: int, V: int, dtype: torch.dtype, device: str) -> None:
        self.logits = torch.empty(N, V, dtype=dtype, device=device)
        for row in self.logits:
            row.copy_(2 * torch.randn(V, device=device))
        self.V, self.key = V, launch.tuning_key(self.logits.device, dtype, V)
        self.default = launch.choose_layout(V, dtype.itemsize)
        self.dlogits = dlogits = torch.empty_like(self.logits)
        rows, target = Rows(self.logits), torch.randint(V, (N,), device=device)
        # every row counts and has a gradient
        weight = torch.full((N,), 1 / N, device=device)
        tokens = TokenVectors(target, weight, advantage=weight * N)
        surrogate = RECIPES["dapo"].surrogate
        terms = Terms(surrogate.function, surrogate.args, None, False, 0.0)
        stats = triton_backend.row_stats(rows, target)
        gradients = RowGradients(weight, None, None)

        def one_pass() -> tuple[Tensor, ...]:
            found = triton_backend.row_loss(rows, tokens, terms, dlogits)
            return found.logp, found.loss, found.dlogp, dlogits

        self.calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "statistics": lambda: triton_backend.row_stats(rows, target)[:2],
            "one pass": one_pass,
            "gradient": lambda: (
                triton_backend.row_dlogits(rows, target, gradients, stats, dlogits),
            ),
        }


def try_out(plans: Plans, tuning: Layout, timer: Timer) -> Trial:
    """Checks a layout against the default one, then times it."""
    trial, logp = Trial(plans.key, plans.V, tuning, plans.logits.nbytes), None
    for name, call in plans.calls.items():
        with patch.dict(launch.TUNED, clear=True):
            expected = [tensor.clone() for tensor in call()]
        with patch.dict(launch.TUNED, {plans.key: tuning}):
            plans.dlogits.fill_(float("nan"))
            try:
                found = call()
            # too many registers, too much shared memory, a compiler that gives up
            except (TritonError, RuntimeError) as failure:
                why = f"{type(failure).__name__}: {' '.join(str(failure).split())[:100]}"
                return replace(trial, failure=why)
            same = torch.equal if tuning.warps == plans.default.warps else _equal_to_rounding
            if not all(map(same, found, expected)):
                return replace(trial, failure=f"{name}: another result")
            if name != "gradient":
                logp = found[0] if logp is None else logp
                if not torch.equal(logp, found[0]):
                    return replace(trial, failure=f"{name}: logp of other bits")
            trial.seconds[name] = timer(call, tuning)
    return trial


def _equal_to_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than another order of summation makes them."""
    relative = 1e-5 + 2 * torch.finfo(expected.dtype).eps
    absolute = 1e-5 * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=relative, atol=absolute)


def totals(trials: list[Trial]) -> dict[Layout, float]:
    """Seconds of every layout over the vocabularies of a bucket; the default comes first."""
    found: dict[Layout, float] = {}
    for trial in trials:
        found[trial.tuning] = found.get(trial.tuning, 0.0) + trial.total
    return found


def sweep(bucket: list[Plans], timer: Timer, deadline: float) -> list[Trial]:
    """Trials of a bucket's vocabularies: the default, then one axis after another."""
    default, trials = bucket[0].default, []
    # the default's warps are tried before all else
    for axis, values in [("warps", (default.warps,)), *AXES.items()]:
        tried = totals(trials)
        best = min(tried, key=tried.__getitem__, default=default)
        for candidate in (replace(best, **{axis: value}) for value in values):
            if candidate in tried:
                continue
            if trials and time.monotonic() > deadline:
                print(f"{bucket[0].key}: out of time, some layouts were not tried")
                return trials
            trials += [try_out(plans, candidate, timer) for plans in bucket]
            for trial, first in zip(trials[-len(bucket) :], trials, strict=False):
                print(_line(trial, first.total), flush=True)
    return trials


def choose(trials: list[Trial]) -> dict[Key, Layout]:
    """The layout of a bucket that is faster than its default, which is tried first."""
    found = totals(trials)
    default, best = next(iter(found)), min(found, key=found.__getitem__)
    return {trials[0].key: best} if found[best] < (1 - NOISE) * found[default] else {}


def rewrite_table(source: str, table: dict[Key, Layout]) -> str:
    """The text of kernels/launch.py with another `TUNED`."""
    entries = "".join(
        f'    ("{architecture}", "{dtype}", {bucket:_}): {tuning!r},\n'
        for (architecture, dtype, bucket), tuning in sorted(table.items())
    )
    text = f"{{\n{entries}}}" if entries else "{}"
    place = re.compile(r"^(TUNED: [^\n]* = )(\{\}|\{\n.*?^\})$", re.M | re.S)
    written, count = place.subn(lambda found: found[1] + text, source)
    assert count == 1
    return written


def _line(trial: Trial, default: float) -> str:
    """One line of the table of trials; TB/s of the one pass, one reading and one writing."""
    given = {name: value for name, value in vars(trial.tuning).items() if value is not None}
    options = ", ".join(f"{name} {value}" for name, value in given.items())
    head = f"{trial.key[0]:<8}{trial.key[1]:<10}{trial.V:>9,}  {options:<50}"
    if trial.failure:
        return f"{head}{trial.failure}"
    times = "".join(f"{name} {1e3 * s:.3f} ms  " for name, s in trial.seconds.items())
    terabytes = 2e-12 * trial.nbytes / trial.seconds["one pass"]
    return f"{head}{times}{terabytes:.2f} TB/s  {default / trial.total:.3f}x"


def run_sweep(
    vocabularies: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    rows: int,
    device: str,
    timer: Timer,
    minutes: float = MINUTES,
) -> Iterator[list[Trial]]:
    """Trials of every bucket and dtype in turn; each has its share of the minutes."""
    end = time.monotonic() + 60 * minutes
    # the largest first: what it compiles the others find compiled
    buckets = [
        (dtype, [*members])
        for dtype in dtypes
        for _, members in groupby(sorted(vocabularies, reverse=True), key=launch.tuning_bucket)
    ]
    for index, (dtype, members) in enumerate(buckets):
        bucket, now = [Plans(rows, V, dtype, device) for V in members], time.monotonic()
        yield sweep(bucket, timer, now + (end - now) / (len(buckets) - index))


def _seconds(call: Callable[[], object], tuning: Layout) -> float:
    return median_seconds(call)


def _measure(dry_run: bool, minutes: float) -> Iterator[dict[str, Any]]:
    """The record so far: on a GPU the ways to read a row a second time, then bucket by bucket."""
    record: dict[str, Any] = {"machine": describe(), "dry_run": dry_run, "trials": [], "chosen": []}
    if dry_run:
        sweeps = run_sweep(DRY_VOCABULARIES, DTYPES[:1], DRY_N, "cpu", _seconds, DRY_MINUTES)
    else:
        end = time.monotonic() + 60 * minutes
        rows = min(N, torch.cuda.mem_get_info()[1] // ROW_BYTES)
        record["second_reading"] = time_candidates(rows, V_EXPERIMENT, torch.bfloat16)
        yield record
        left = (end - time.monotonic()) / 60
        sweeps = run_sweep(VOCABULARIES, DTYPES, rows, "cuda", _seconds, left)
    for trials in sweeps:
        record["trials"] += map(asdict, trials)
        record["chosen"] += [[*key, asdict(tuning)] for key, tuning in choose(trials).items()]
        yield record


def _apply(record: dict[str, Any], path: Path) -> int:
    """Writes what was chosen into a copy of kernels/launch.py; returns how many entries."""
    chosen = {tuple(key): Layout(**tuning) for *key, tuning in record["chosen"]}
    swept = {tuple(trial["key"]) for trial in record["trials"]}
    kept = {key: tuning for key, tuning in launch.TUNED.items() if key not in swept}
    path.write_text(rewrite_table(TABLE.read_text(), kept | chosen))
    return len(chosen)


def _main() -> None:
    parser = Parser("bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=new_file, help="write every trial there")
    parser.add_argument("--table", type=Path, default=TABLE, help="the launch.py to rewrite")
    parser.add_argument("--apply", type=existing_file, help="take the choice from such a JSON file")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all trials together")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, untimed")
    given = parser.parse_args()
    if given.dry_run and given.table.resolve() == TABLE:
        parser.error("--dry-run writes only into a copy: give it as --table")
    entries = _apply(json.loads(given.apply.read_text()), given.table) if given.apply else 0
    for record in () if given.apply else _measure(given.dry_run, given.minutes):
        if given.json:
            given.json.write_text(json.dumps(record, indent=1) + "\n")
        entries = _apply(record, given.table)
    print(f"{entries} entries of TUNED written to {given.table}")


if __name__ == "__main__":
    _main()
