"""The report of the demo run: figures of the stages, and the same questions at each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo_core.runs import report
from grpo_core.runs.demo import decimals
from grpo_core.trainer.rules import accuracy


@dataclass(frozen=True)
class Stage:
    """A model's held-out figures and its answers to the showcase."""

    name: str
    greedy: dict[str, float]
    sampled: dict[str, float]
    answers: list[str]


def markdown(stages: Sequence[Stage]) -> str:
    """The report for report.md."""
    lines = [report.markdown(table(stages))]
    for question, answers in transcripts(stages):
        lines += [f"\n**{question}**\n\n"]
        lines += [f"- {name}: `{answer}` {mark}\n" for name, answer, mark in answers]
    return "".join(lines)


def plain(stages: Sequence[Stage]) -> list[str]:
    """The report for a terminal of 80 columns."""
    lines = report.aligned(table(stages))
    for question, answers in transcripts(stages):
        lines += ["", question, *(f"  {name:8} {text} {mark}" for name, text, mark in answers)]
    return lines


def table(stages: Sequence[Stage]) -> list[list[str]]:
    """A row for each stage below a head."""
    columns = {"accuracy": "accuracy", "traps": "accuracy/trap"}
    columns |= {"format": "format", "length": "length"}
    rows = [["model", *(f"{head}, {mode}" for mode in ("greedy", "sampled") for head in columns)]]
    for stage in stages:
        cells = [
            f"{figures[name]:.1f}" if name == "length" else f"{figures[name]:.3f}"
            for figures in (stage.greedy, stage.sampled)
            for name in columns.values()
        ]
        rows.append([stage.name, *cells])
    return rows


def transcripts(stages: Sequence[Stage]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each question of the showcase; each stage's name and greedy answer, and ✓ if it is right."""
    for place, decimal_pair in enumerate(decimals.SHOWCASE):
        pair = decimals.Pair(*decimal_pair)
        answers = []
        for stage in stages:
            text = stage.answers[place]
            mark = "✓" if accuracy(text, pair.answer) == 1 else "✗"
            answers.append((stage.name, text, mark))
        yield pair.question, answers
