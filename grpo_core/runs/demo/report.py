"""The report of the embedded run: figures of the stages, and the same questions at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_core.runs.demo import decimals
from grpo_core.trainer.rules import accuracy

# heads of the table, and the figures below them
COLUMNS = {"accuracy": "accuracy", "traps": "accuracy/trap", "format": "format", "length": "length"}
HEADER = ["model", *(f"{head}, {mode}" for mode in ("greedy", "sampled") for head in COLUMNS)]


@dataclass(frozen=True)
class Stage:
    """A model's held-out figures and its answers to the showcase."""

    name: str
    greedy: dict[str, float]
    sampled: dict[str, float]
    answers: list[str]


def row(stage: Stage) -> list[str]:
    """The cells of a stage, in the order of `HEADER`."""
    return [stage.name] + [
        f"{figures[name]:.1f}" if name == "length" else f"{figures[name]:.3f}"
        for figures in (stage.greedy, stage.sampled)
        for name in COLUMNS.values()
    ]


def transcripts(stages: Sequence[Stage]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each question of the showcase; each stage's name and greedy answer, and ✓ if it is right."""
    shown = []
    for place, decimal_pair in enumerate(decimals.SHOWCASE):
        pair = decimals.Pair(*decimal_pair)
        answers = [(stage.name, stage.answers[place]) for stage in stages]
        marked = [
            (name, text, "✓" if accuracy(text, pair.answer) == 1 else "✗") for name, text in answers
        ]
        shown.append((pair.question, marked))
    return shown


def markdown(stages: Sequence[Stage]) -> str:
    """The report for report.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(row(stage)) + " |" for stage in stages]
    for question, answers in transcripts(stages):
        lines += ["", f"**{question}**", ""]
        lines += [f"- {name}: `{answer}` {mark}" for name, answer, mark in answers]
    return "\n".join(lines) + "\n"


def plain(stages: Sequence[Stage]) -> list[str]:
    """The report for a terminal of 80 columns."""
    columns = [column.partition(", ") for column in HEADER]
    table = [[head for head, _, _ in columns], [mode for _, _, mode in columns], *map(row, stages)]
    lines = [f"{name:8}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in table]
    for question, answers in transcripts(stages):
        lines += ["", question, *(f"  {name:8} {text} {mark}" for name, text, mark in answers)]
    return lines
