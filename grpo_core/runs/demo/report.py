"""The run in words: a table of the stages, and the same questions answered at each."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from grpo_core.runs.demo import decimals
from grpo_core.runs.demo.demo import Stage
from grpo_core.trainer.rules import accuracy

COLUMNS = {"accuracy": "accuracy", "traps": "accuracy/trap", "format": "format", "length": "length"}
MODES = ("greedy", "sampled")


def header() -> list[str]:
    """`model`, then every figure greedy and every figure sampled."""
    return ["model", *(f"{column}, {mode}" for mode in MODES for column in COLUMNS)]


def table(stages: Sequence[Stage]) -> list[list[str]]:
    """One row per stage, in the order of `header`."""
    return [
        [
            stage.name,
            *(
                f"{figures[key]:.1f}" if key == "length" else f"{figures[key]:.3f}"
                for figures in (stage.greedy, stage.sampled)
                for key in COLUMNS.values()
            ),
        ]
        for stage in stages
    ]


def transcripts(stages: Sequence[Stage]) -> list[tuple[decimals.Pair, list[tuple[str, str, bool]]]]:
    """Per showcase pair, each stage's name, its greedy answer, and whether that is right."""
    shown = []
    for place, decimal_pair in enumerate(decimals.SHOWCASE):
        pair = decimals.Pair(*decimal_pair)
        answers = [(stage.name, stage.answers[place]) for stage in stages]
        shown.append(
            (pair, [(name, text, accuracy(text, pair.answer) == 1) for name, text in answers])
        )
    return shown


def markdown(stages: Sequence[Stage]) -> str:
    """The whole report, for report.md."""
    head = header()
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table(stages)]
    for pair, answers in transcripts(stages):
        lines += ["", f"**{pair.question}**", ""]
        lines += [
            f"- {name}: `{answer}` {'✓' if right else '✗'}" for name, answer, right in answers
        ]
    return "\n".join(lines) + "\n"


def plain(stages: Sequence[Stage]) -> list[str]:
    """The whole report for a terminal of 80 columns."""
    columns = [column.partition(", ") for column in header()]
    rows = [[head for head, _, _ in columns], [mode for _, _, mode in columns], *table(stages)]
    lines = [f"{name:8}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    for pair, answers in transcripts(stages):
        lines += ["", pair.question]
        lines += [f"  {name:8} {answer} {'✓' if right else '✗'}" for name, answer, right in answers]
    return lines


def show(stages: Sequence[Stage]) -> None:
    """Prints the report: in colour if `rich` is installed, else plain."""
    if importlib.util.find_spec("rich") is None:
        print("\n".join(plain(stages)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    figures = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for place, column in enumerate(header()):
        figures.add_column(column.replace(", ", "\n"), justify="right" if place else "left")
    for row in table(stages):
        figures.add_row(*row)
    console.print(figures)
    for pair, answers in transcripts(stages):
        console.print(Text(f"\n{pair.question}", style="bold"))
        for name, answer, right in answers:
            mark = Text(" ✓", style="green") if right else Text(" ✗", style="red")
            console.print(Text(f"  {name:<8} ", style="dim") + Text(answer) + mark)
