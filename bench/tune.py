"""Finds the fastest layout of the row kernels on this card, and writes it into kernels/launch.py.

    python -m bench.tune [--json FILE] [--table FILE]   sweep here, write both
    python -m bench.tune --apply FILE [--table FILE]    write what a sweep elsewhere has found

One axis of `launch.Layout` after the other is tried, the others held at the best so far. Never
chosen is a layout whose results differ from the default's (by more than rounding, where other warps
sum in another order), or whose plans differ in a bit of a log-probability; nor one that gains less
than the timer's noise. Statistics, one pass and gradient share an entry of the table, so their
times are added. On a GPU the candidates of `bench.experiments.second_reading` are timed as well.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

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
from grpo_core.kernels.records import Rows, Slopes, Terms, TokenVectors

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


@dataclass(frozen=True)
class Trial:
    """One layout on one vocabulary: seconds of each plan, or why not; `nbytes` of its logits."""

    key: Key
    V: int
    tuning: Layout
    seconds: dict[str, float]
    nbytes: int
    failure: str = ""

    @property
    def terabytes(self) -> float:
        """TB/s of the one pass, counted as one reading and one writing."""
        return 2e-12 * self.nbytes / self.seconds["one pass"]

    @property
    def total(self) -> float:
        """Seconds of all plans."""
        return float("inf") if self.failure else sum(self.seconds.values())


class Plans:
    """The three plans over the same rows, and what each leaves behind."""

    def __init__(self, rows: int, V: int, dtype: torch.dtype, device: str) -> None:
        self.logits = torch.empty(rows, V, dtype=dtype, device=device)
        for row in self.logits:
            row.copy_(2 * torch.randn(V, device=device))
        self.V, self.target = V, torch.randint(V, (rows,), device=device)
        self.key = launch.tuning_key(self.logits.device, dtype, V)
        self.dlogits = torch.empty_like(self.logits)
        # every row counts and has a gradient
        weight = torch.full((rows,), 1 / rows, device=device)
        self.tokens = TokenVectors(self.target, weight, advantage=weight * rows)
        surrogate = RECIPES["dapo"].surrogate
        self.terms = Terms(surrogate.function, surrogate.args, None, False, 0.0)
        self.stats = triton_backend.row_stats(Rows.of(self.logits), self.target, 1.0)
        self.calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "statistics": self._statistics,
            "one pass": self._one_pass,
            "gradient": self._gradient,
        }

    def _statistics(self) -> tuple[Tensor, ...]:
        stats = triton_backend.row_stats(Rows.of(self.logits), self.target, 1.0)
        return stats.logp, stats.entropy

    def _one_pass(self) -> tuple[Tensor, ...]:
        rows = Rows.of(self.logits)
        found = triton_backend.row_loss(rows, self.tokens, 1.0, self.terms, self.dlogits)
        return found.logp, found.loss, found.dlogp, self.dlogits

    def _gradient(self) -> tuple[Tensor, ...]:
        slopes = Slopes(self.tokens.weight, None, None)
        rows = Rows.of(self.logits)
        triton_backend.row_dlogits(rows, self.target, 1.0, slopes, self.stats, self.dlogits)
        return (self.dlogits,)


@contextmanager
def tuned(key: Key, tuning: Layout | None) -> Iterator[None]:
    """The kernels with another entry of the table; None for the default."""
    kept = launch.TUNED.pop(key, None)
    if tuning is not None:
        launch.TUNED[key] = tuning
    try:
        yield
    finally:
        launch.TUNED.pop(key, None)
        if kept is not None:
            launch.TUNED[key] = kept


def try_out(plans: Plans, tuning: Layout, timer: Timer) -> Trial:
    """Checks a layout against the default one, then times it."""
    seconds: dict[str, float] = {}
    trial = Trial(plans.key, plans.V, tuning, seconds, plans.logits.nbytes)
    default, logp = launch.choose_layout(plans.V, plans.logits.element_size()), None
    for name, call in plans.calls.items():
        with tuned(plans.key, None):
            expected = [tensor.clone() for tensor in call()]
        with tuned(plans.key, tuning):
            plans.dlogits.fill_(float("nan"))
            try:
                found = call()
            # too many registers, too much shared memory, a compiler that gives up
            except (TritonError, RuntimeError) as failure:
                why = f"{type(failure).__name__}: {' '.join(str(failure).split())[:100]}"
                return replace(trial, failure=why)
            same = torch.equal if tuning.warps == default.warps else _equal_to_rounding
            if not all(map(same, found, expected)):
                return replace(trial, failure=f"{name}: another result")
            if name != "gradient":
                logp = found[0] if logp is None else logp
                if not torch.equal(logp, found[0]):
                    return replace(trial, failure=f"{name}: logp of other bits")
            seconds[name] = timer(call, tuning)
    return trial


def _equal_to_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than another order of summation makes them."""
    relative = 1e-5 + 2 * torch.finfo(expected.dtype).eps
    absolute = 1e-5 * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=relative, atol=absolute)


def sweep(bucket: list[Plans], timer: Timer, deadline: float) -> Iterator[Trial]:
    """Trials of a bucket's vocabularies: the default, then one axis after another."""
    tried: dict[Layout, float] = {}

    def attempts(candidates: Iterable[Layout]) -> Iterator[Trial]:
        for candidate in candidates:
            if candidate in tried or time.monotonic() > deadline:
                continue
            trials = [try_out(plans, candidate, timer) for plans in bucket]
            tried[candidate] = sum(trial.total for trial in trials)
            yield from trials

    yield from attempts([launch.choose_layout(bucket[0].V, bucket[0].logits.element_size())])
    for axis in AXES:
        best = min(tried, key=tried.__getitem__)
        yield from attempts([replace(best, **{axis: value}) for value in AXES[axis]])


def choose(trials: list[Trial]) -> dict[Key, Layout]:
    """The layout of each bucket that is faster than its default, which is tried first."""
    chosen = {}
    for key in dict.fromkeys(trial.key for trial in trials):
        totals: dict[Layout, float] = {}
        for trial in trials:
            if trial.key == key:
                totals[trial.tuning] = totals.get(trial.tuning, 0.0) + trial.total
        default, best = next(iter(totals)), min(totals, key=totals.__getitem__)
        if totals[best] < (1 - NOISE) * totals[default]:
            chosen[key] = best
    return chosen


def rewrite_table(source: str, table: dict[Key, Layout]) -> str:
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
        for field in fields(Layout)
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


def _pretend(call: Callable[[], object], tuning: Layout) -> float:
    """A timer for machines that cannot time: eight warps are fastest."""
    return 1e-3 * (1 + abs(tuning.warps - 8) / 8 + (tuning.num_stages or 3) / 100)


def _main() -> None:
    parser = Parser("bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=new_file, help="write every trial there")
    parser.add_argument("--table", type=Path, default=TABLE, help="the launch.py to rewrite")
    parser.add_argument("--apply", type=existing_file, help="take the choice from such a JSON file")
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
            shape = (
                VOCABULARIES,
                DTYPES,
                rows,
                "cuda",
                lambda call, _: median_seconds(call, "cuda"),
            )
        trials = run_sweep(*shape, minutes=DRY_MINUTES if given.dry_run else MINUTES)
        record = {"machine": describe(), "dry_run": given.dry_run}
        if not given.dry_run:
            record["second_reading"] = time_candidates(rows, V_EXPERIMENT, torch.bfloat16)
        record["trials"] = [asdict(trial) for trial in trials]
        record["chosen"] = [[*key, asdict(tuning)] for key, tuning in choose(trials).items()]
        if given.json:
            given.json.write_text(json.dumps(record, indent=1) + "\n")
    chosen = {tuple(key): Layout(**tuning) for *key, tuning in record["chosen"]}
    source = given.table.read_text() if given.table.exists() else TABLE.read_text()
    swept = {tuple(trial["key"]) for trial in record["trials"]}
    kept = {key: tuning for key, tuning in launch.TUNED.items() if key not in swept}
    given.table.write_text(rewrite_table(source, kept | chosen))
    print(f"{len(chosen)} entries of TUNED written to {given.table}")


if __name__ == "__main__":
    _main()
