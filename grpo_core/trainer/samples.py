"""Samples of what the model writes, in a JSON-lines file and for the console.

They are completions of a few fixed held-out prompts, and the best and worst of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.distributed import is_main
from grpo_core.trainer.evaluate import Evaluation
from grpo_core.trainer.monitor import append_json
from grpo_core.trainer.rewards import Scores, best_and_worst
from grpo_core.trainer.rollout import Observed, Problem

Kind = Literal["held out", "best", "worst"]


@dataclass(frozen=True)
class Sample:
    """A completion and its rewards.

    Attributes:
        prompt: a string or chat messages; decoded if the problem has tokens only.
        completion: without special tokens; an environment's observations in ⟦ ⟧.
        answer: the correct answer, if the problem has one.
        reward: the total.
        parts: each reward that applies, by name.
    """

    kind: Kind
    step: int
    prompt: Any
    completion: str
    answer: Any
    reward: float
    parts: dict[str, float]

    @property
    def question(self) -> str:
        """The prompt as text: the last of several chat messages."""
        if isinstance(self.prompt, str):
            return self.prompt
        return str(self.prompt[-1]["content"])


class Samples:
    """Keeps the latest samples of a run, on rank 0 only.

    Args:
        tokenizer: decodes completions.
        path: JSON-lines file to append to.
        label: name of the run in the file.
        count: held-out problems to keep, the first ones.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, path: Path, label: str = "grpo", count: int = 4
    ) -> None:
        self.tokenizer = tokenizer
        self.path = path
        self.label = label
        self.count = count
        self.held_out: list[Sample] = []
        self.rollout: list[Sample] = []

    def look(self, step: int, problems: Sequence[Problem], evaluation: Evaluation) -> None:
        """Keeps and writes the completions of the first held-out problems."""
        completions, scores = evaluation.completions, evaluation.scores
        chosen: list[tuple[Kind, int]] = [("held out", n) for n, _ in enumerate(problems)]
        self.held_out = self._samples(step, problems, completions, scores, chosen[: self.count])
        self._write(self.held_out)

    def step(
        self,
        step: int,
        problems: Sequence[Problem],
        completions: Sequence[Sequence[int]],
        scores: Scores,
        *,
        keep: bool,
    ) -> None:
        """Keeps the best and the worst completion of a rollout, or one if all rewards are equal.

        `problems` has one entry per completion; with `keep` the samples go to the file as well.
        """
        best, worst = best_and_worst(scores.total)
        chosen: list[tuple[Kind, int]] = [("best", best), ("worst", worst)]
        if scores.total[best] == scores.total[worst]:
            chosen = chosen[:1]
        if scores.total[best].isnan():
            chosen = []
        self.rollout = self._samples(step, problems, completions, scores, chosen)
        if keep:
            self._write(self.rollout)

    def _samples(
        self,
        step: int,
        problems: Sequence[Problem],
        completions: Sequence[Sequence[int]],
        scores: Scores,
        chosen: Sequence[tuple[Kind, int]],
    ) -> list[Sample]:
        """The samples of the chosen indices; none on other ranks than 0."""
        if not is_main():
            return []
        return [
            Sample(
                kind=kind,
                step=step,
                prompt=problems[n].source or self._text(problems[n].prompt),
                completion=self._text(completions[n]),
                answer=problems[n].answer,
                reward=float(scores.total[n]),
                parts={k: float(v[n]) for k, v in scores.parts.items() if not v[n].isnan()},
            )
            for kind, n in chosen
        ]

    def _text(self, ids: Sequence[int]) -> str:
        pieces = []
        for kind, piece in groupby(ids, type):
            text = str(self.tokenizer.decode(list(piece), skip_special_tokens=True))
            pieces.append(f" ⟦{text}⟧ " if kind is Observed else text)
        return "".join(pieces)

    def _write(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            append_json(self.path, {"stage": self.label, **asdict(sample)})


def shortened(text: str, limit: int) -> str:
    """A text in one line of at most `limit` characters: its beginning and its end."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    head = (limit - 3) // 2
    return f"{line[:head]} … {line[len(line) - (limit - 3 - head) :]}"
