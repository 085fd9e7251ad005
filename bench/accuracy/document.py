"""The measurements as tables of Markdown, between the markers of docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.accuracy.contenders import CONTENDERS, OURS, UNSAID
from bench.accuracy.measure import DTYPES, OF_ANOTHER, OFFSETS, QUANTITIES, Measured
from bench.batch import dtype_name

DOCUMENT = Path(__file__).parents[2] / "docs/accuracy.md"
START, END = "<!-- python -m bench.accuracy -->\n", "<!-- end -->"
# nats; the columns of the tables
SHOWN = (0, 5, 10, 15, 17, 20, 25, 30)
# beyond, public kernels have nothing left, with an offset or without
MODERATE = 10.5
# from here on a number is called lost
LOST = 0.5
TITLES = {
    "logp": "log-probability",
    "entropy": "entropy",
    OF_ANOTHER: "entropy where another word leads",
    "dlogits": "gradient of the logits",
    "ratio": "ratio",
    "loss": "loss",
}
BY_MARGIN = ("logp", "entropy", OF_ANOTHER, "dlogits")


class Table(NamedTuple):
    """Relative errors, a row per contender."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    def as_markdown(self) -> str:
        """As docs/accuracy.md shows it."""
        lines = [f"### {self.title}", "", f"| | {' | '.join(self.columns)} |"]
        lines.append("|---|" + "---:|" * len(self.columns))
        for name, cells in self.rows.items():
            bold = "**" if name in OURS else ""
            lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} |")
        return "\n".join(lines)


def tables(found: Sequence[Measured]) -> Iterator[Table]:
    """Every table, with the same rows and columns whatever was measured."""
    for quantity in BY_MARGIN:
        for dtype in DTYPES:
            here = [f for f in found if f.dtype == dtype and f.offset == 0]
            yield _table(
                quantity,
                f"{TITLES[quantity].capitalize()}, {dtype_name(dtype)} logits",
                {f"{m}": _of(quantity, here, lambda f, m=m: f.margin == m) for m in SHOWN},
            )
    for quantity in QUANTITIES:
        limit = f", margins up to {MODERATE:g} nats" if quantity in BY_MARGIN else ""
        columns = {}
        for dtype in DTYPES:
            for offset in OFFSETS:
                here = [f for f in found if f.dtype == dtype and f.offset == offset]
                name = f"{dtype_name(dtype)}{f' {offset:+}'.replace('-', '−') if offset else ''}"
                columns[name] = _of(quantity, here, moderate=quantity in BY_MARGIN)
        title = f"{TITLES[quantity].capitalize()}, logits with an offset{limit}"
        yield _table(quantity, title, columns)


def write(found: Sequence[Measured], path: Path = DOCUMENT) -> None:
    """Replaces what is between the markers."""
    text = path.read_text()
    before, rest = text.split(START)
    after = rest[rest.index(END) :]
    body = "\n\n".join(table.as_markdown() for table in tables(found))
    path.write_text(f"{before}{START}\n{body}\n\n{after}")


def read(path: Path = DOCUMENT) -> list[Table]:
    """The tables that a document shows."""
    text = path.read_text()
    shown = text[text.index(START) + len(START) : text.index(END)]
    found = []
    for block in shown.split("### ")[1:]:
        title, _, header, _, *lines = block.strip().splitlines()
        rows = {}
        for line in lines:
            name, *cells = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
            rows[name] = tuple(cells)
        columns = tuple(cell.strip() for cell in header.strip("|").split("|")[1:])
        found.append(Table(title, columns, rows))
    return found


def number(cell: str) -> float:
    """What a cell says; infinite where everything is lost."""
    return float("inf") if cell == "lost" else float(cell)


def _table(quantity: str, title: str, columns: dict[str, dict[str, float]]) -> Table:
    """A row per contender that says something of the quantity, in their order."""
    said = "entropy" if quantity == OF_ANOTHER else quantity
    rows = {
        name: tuple(_cell(column.get(name)) for column in columns.values())
        for name in CONTENDERS
        if said not in UNSAID.get(name, ())
    }
    return Table(title, tuple(columns), rows)


def _of(
    quantity: str,
    found: Sequence[Measured],
    where: Callable[[Measured], bool] = lambda f: True,
    *,
    moderate: bool = False,
) -> dict[str, float]:
    """The worst error of each contender that has the quantity."""
    worst: dict[str, float] = {}
    for one in found:
        if quantity not in one.errors or not where(one):
            continue
        errors = one.errors[quantity]
        if moderate:
            errors = errors[one.margins <= MODERATE]
        if errors.numel():
            worst[one.contender] = max(worst.get(one.contender, 0.0), float(errors.amax()))
    return worst


def _cell(error: float | None) -> str:
    """Two digits, "lost" where nothing is left, a dash where nothing was measured."""
    if error is None:
        return "–"
    if error >= LOST:
        return "lost"
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
