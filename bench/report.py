"""A run of the benchmarks as a page: python -m bench.report FILE.json [--folder FOLDER].

Reads what `pytest bench/ --benchmark-only --benchmark-json FILE.json` wrote, and writes report.md
with a table per case and, where matplotlib is installed, three figures: time, bandwidth, memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.table import hidden_table
from grpo_core.cli.options import Parser, existing_file

Run = Mapping[str, Any]
MIB = 2**20
LEGEND = """\
*GB/s*: bytes that have to move (one reading of the logits; one writing more for the gradient; one
reading more where the ratio of a sequence waits for all its tokens) over the median time; *of copy*
is its share of what a copy of the logits reached, before every round of the same run. *peak*: most
memory held beyond that before the call, the gradient included, over that of the logits. *bytes*:
moved per logit, counted and not sampled; see bench/README.md.
"""


@dataclass(frozen=True)
class Report:
    """The runs of one session, and what they were taken on."""

    runs: list[Run]
    taken_on: str
    absent: list[str]
    hidden: list[Run] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Report:
        """From the JSON of pytest-benchmark."""
        record = json.loads(path.read_text())
        machine = record["machine_info"]
        runs = [
            {"median": one["stats"]["median"], "group": one["group"], **one["extra_info"]}
            for one in record["benchmarks"]
        ]
        versions = f"torch {machine['torch']}, triton {machine.get('triton') or 'absent'}"
        taken_on = f"{machine['device']}, {versions}, {record['datetime'][:10]}"
        hidden = [run for run in runs if "hidden_case" in run]
        runs = [run for run in runs if "hidden_case" not in run]
        return cls(runs, taken_on, machine.get("missing_peers", []), hidden)

    def cases(self) -> list[tuple[str, str]]:
        """(case, dtype), in the order of the runs' cases."""
        order = list(dict.fromkeys(run["case"] for run in self.runs))
        pairs = dict.fromkeys((run["case"], run["dtype"]) for run in self.runs)
        return sorted(pairs, key=lambda pair: (pair[1], order.index(pair[0])))

    def of(self, case: str, dtype: str) -> list[Run]:
        """The runs of one case."""
        return [run for run in self.runs if (run["case"], run["dtype"]) == (case, dtype)]


def bandwidth(run: Run) -> float:
    """Bytes per second of what has to move."""
    return run["necessary_bytes"] / run["median"]


def copy_bandwidth(run: Run) -> float:
    """Bytes per second of copying the logits, in the rounds of this run."""
    return 2 * run["logits_bytes"] / run["copy_seconds"]


def size_name(run: Run) -> str:
    """Rows and vocabulary."""
    return f"{run['N']:,} x {run['V']:,}"


def markdown(report: Report, figures: Iterable[str]) -> list[str]:
    """The page, a line at a time."""
    taken_on = f"Taken on {report.taken_on}."
    lines = [] if report.hidden and not report.runs else ["# From logits to the loss", "", taken_on]
    lines += ["", *LEGEND.splitlines()] if lines else []
    if report.absent:
        lines += ["", f"Absent: {', '.join(report.absent)}."]
    if report.hidden:
        lines += ["# From hidden states to the loss", "", taken_on]
        lines += ["", "```", *hidden_table(report.hidden), "```"]
    for case, dtype in report.cases():
        runs = sorted(report.of(case, dtype), key=lambda run: (run["V"], run["N"]))
        lines += ["", f"## {case}, {dtype}"]
        for size, members in groupby(runs, key=size_name):
            lines += _table(size, list(members))
    shown = [f"![{name.split('.')[0]}]({name})" for name in figures]
    return [*lines, "", "## Figures", "", *shown] if shown else lines


def _table(size: str, runs: list[Run]) -> list[str]:
    """The contenders at one size."""
    naive = next((run["median"] for run in runs if run["contender"] == "naive"), None)
    copy = max(map(copy_bandwidth, runs)) / 1e9
    lines = [
        "",
        f"**{size}**, logits of {runs[0]['logits_bytes'] / MIB:,.0f} MiB, "
        f"copied at {copy:,.0f} GB/s",
        "",
        "| contender | median | vs naive | GB/s | of copy | peak | bytes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        speedup = f"{naive / run['median']:.1f}x" if naive else ""
        share = bandwidth(run) / copy_bandwidth(run)
        moved = run["bytes_per_logit"] or run["bytes_per_logit_issued"]
        name = f"**{run['contender']}**" if is_ours(run["contender"]) else run["contender"]
        lines.append(
            f"| {name} | {_milliseconds(run['median'])} | {speedup} | {bandwidth(run) / 1e9:,.0f} "
            f"| {share:.0%} | {run['peak_extra_bytes'] / run['logits_bytes']:.2f} "
            f"| {'' if moved is None else format(moved, '.1f')} |"
        )
    return lines


def is_ours(contender: str) -> bool:
    """Whether a contender is this repository's."""
    return contender.startswith("ours")


def _milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def _main() -> None:
    """Writes the page and its figures beside the JSON, in a folder of its name."""
    parser = Parser("bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=existing_file, help="of --benchmark-json")
    parser.add_argument("--folder", type=Path, help="default: FILE without .json")
    given = parser.parse_args()
    folder = given.folder or given.file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report.read(given.file)
    figures: list[str] = []
    if find_spec("matplotlib") and report.runs:
        from bench.figures import draw

        figures = draw(report, folder)
    text = "\n".join(markdown(report, figures)) + "\n"
    (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    _main()
