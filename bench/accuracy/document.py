"""The measurements as tables between the markers of docs/accuracy.md, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.accuracy.divergences import DIVERGENCES, KEPT, MEASURED, OVER_KEPT
from bench.accuracy.measure import (
    CONTENDERS,
    DTYPES,
    OF_ANOTHER,
    OFFSETS,
    OURS,
    QUANTITIES,
    UNSAID,
    Measured,
)
from bench.table import with_table
from grpo_core.runs.plots import INK, QUIET, STYLE
from grpo_core.runs.report import Rows, markdown
from grpo_core.verify.report import dtype_name

DOCUMENT = Path(__file__).parents[2] / "docs/accuracy.md"
PICTURE = DOCUMENT.parent / "images/accuracy.png"
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
# the chunked contenders would lie on the lines of their libraries
LINES = {
    "ours, Triton": ("ours, Triton", "#d1495b", "-", 2.4),
    "ours, CPU": ("ours, CPU", "#e39aa4", "-", 2.0),
    "PyTorch, float32": ("PyTorch, float32 softmax", "#2e6f95", "-", 1.6),
    "PyTorch, logits' dtype": ("PyTorch, bfloat16 softmax", "#7fa8c2", "-", 1.6),
    "Liger, Triton": ("Liger", "#5b9279", "-", 1.6),
    "TRL, Triton": ("TRL", "#c58b2a", (0, (4, 2)), 1.6),
}


def tables(found: Sequence[Measured]) -> dict[str, Rows]:
    """Title -> header and a row per contender, the same whatever was measured."""
    shown = {}
    for quantity in BY_MARGIN:
        for dtype in DTYPES:
            columns = {str(m): _some(found, dtype, 0, m) for m in SHOWN}
            title = f"{TITLES[quantity].capitalize()}, {dtype_name(dtype)} logits"
            shown[title] = _rows(quantity, columns)
    for quantity in QUANTITIES:
        columns = {
            f"{dtype_name(dtype)}{f' {offset:+}'.replace('-', '−') if offset else ''}": _some(
                found, dtype, offset
            )
            for dtype in DTYPES
            for offset in OFFSETS
        }
        by_margin = quantity in BY_MARGIN
        limit = f", margins up to {MODERATE:g} nats" if by_margin else ""
        title = f"{TITLES[quantity].capitalize()}, logits with an offset{limit}"
        shown[title] = _rows(quantity, columns, MODERATE if by_margin else float("inf"))
    columns = {f"{m}": _some(found, torch.float32, 0, m) for m in SHOWN}
    for quantity in MEASURED:
        names = OVER_KEPT if quantity == KEPT else DIVERGENCES
        for key in (quantity, f"gradient of the {quantity}"):
            title = f"{key[0].upper()}{key[1:]}, float32 logits"
            shown[title] = _rows(key, columns, names=names)
    return shown


def write(found: Sequence[Measured], path: Path = DOCUMENT) -> None:
    """Replaces what is between the markers."""
    shown = (f"### {title}\n\n{markdown(rows)}\n" for title, rows in tables(found).items())
    path.write_text(with_table(path, "bench.accuracy", "\n" + "".join(shown)))


def _some(
    found: Sequence[Measured], dtype: torch.dtype, offset: int, margin: int | None = None
) -> list[Measured]:
    """The measurements of a column."""
    here = [f for f in found if (f.dtype, f.offset) == (dtype, offset)]
    return [f for f in here if margin in (None, f.margin)]


def _rows(
    quantity: str,
    columns: dict[str, list[Measured]],
    limit: float = float("inf"),
    names: Iterable[str] = tuple(CONTENDERS),
) -> Rows:
    """A row per contender that returns the quantity: its worst error up to a margin."""

    def cell(name: str, some: list[Measured]) -> str:
        errors = [
            float(error)
            for f in some
            if f.contender == name and quantity in f.errors
            for error, margin in zip(f.errors[quantity], f.margins, strict=False)
            if margin <= limit
        ]
        # "lost" where nothing is left, a dash where nothing was measured
        if not errors or max(errors) >= LOST:
            return "lost" if errors else "–"
        mantissa, _, exponent = f"{max(errors):.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"

    returned = "entropy" if quantity == OF_ANOTHER else quantity
    rows = [("", *columns)]
    for name in names:
        if returned not in UNSAID.get(name, ()):
            bold = "**" if name in OURS else ""
            cells = (cell(name, some) for some in columns.values())
            rows.append((f"{bold}{name}{bold}", *cells))
    return rows


def plot(found: Sequence[Measured], path: Path = PICTURE) -> None:
    """Relative error of the gradient over the margin, float32 and bfloat16 logits side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, dtype in zip(panels, (torch.float32, torch.bfloat16), strict=True):
            for name, (label, colour, dashes, width) in LINES.items():
                if dtype == torch.float32 and name == "PyTorch, logits' dtype":
                    continue
                curve = [
                    (f.margin, float(f.errors["dlogits"].amax()))
                    for f in found
                    if (f.contender, f.dtype, f.offset) == (name, dtype, 0)
                    and "dlogits" in f.errors
                ]
                front = 3 if name.startswith("ours") else 2
                style = {"color": colour, "linestyle": dashes, "linewidth": width}
                axes.plot(*zip(*curve, strict=True), label=label, zorder=front, **style)
            axes.set(yscale="log", ylim=(3e-8, 3.0), xlim=(0, 30))
            axes.minorticks_off()
            axes.set_title(f"{dtype_name(dtype)} logits", loc="left", fontsize=10.5, color=INK)
            axes.set_xlabel("nats that the target lies above all other tokens together")
            axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.text(0.4, 1.15, "no gradient left", color=QUIET, fontsize=8.5, va="bottom")
        panels[0].set_ylabel("relative error of dloss/dlogits")
        panels[1].legend(frameon=False, loc="lower right")
        figure.suptitle(
            "How wrong the gradient of a confident token is: worst of eight rows of 2,501 logits, "
            "against float64",
            fontsize=11,
            color=INK,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
