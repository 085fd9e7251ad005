"""What the model writes: answers to the same few prompts, and a rollout's best and worst.

They go to a JSON-lines file of the run, and to whoever shows it, see `console`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.distributed import is_main
from grpo_core.trainer.evaluate import Evaluation
from grpo_core.trainer.monitor import append_json
from grpo_core.trainer.rewards import Scores, best_and_worst
from grpo_core.trainer.rollout import Problem

Kind = Literal["held out", "best", "worst"]


@dataclass(frozen=True)
class Sample:
    """A completion and what it earned.

    Attributes:
        prompt: as it was given, a string or chat messages; decoded where only tokens were.
        completion: without its special tokens.
        answer: what a right completion says, if the problem has one.
        reward: the sum that is trained on.
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
        """The prompt as one text: of chat messages the last."""
        if isinstance(self.prompt, str):
            return self.prompt
        return str(self.prompt[-1]["content"])


class Samples:
    """Keeps samples as a run goes; only the main process does.

    Args:
        tokenizer: decodes.
        path: JSON-lines file to append to.
        label: the run's name in its lines.
        count: held-out answers kept at a look, the first ones.
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

    def look(self, step: int, problems: Sequence[Problem], found: Evaluation) -> None:
        """Keeps the first held-out answers."""
        if not is_main():
            return
        places = range(min(self.count, len(problems)))
        self.held_out = [
            self._sample("held out", step, problems[n], found.completions[n], found.scores, n)
            for n in places
        ]
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
        """The best and the worst completion of a rollout; one of them where all earned the same.

        Args:
            step: that it was drawn for.
            problems: of this process, one for each completion.
            completions: their token ids.
            scores: what they earned.
            keep: in the file as well.
        """
        if not is_main():
            return
        best, worst = best_and_worst(scores.total)
        chosen: list[tuple[Kind, int]] = []
        if not scores.total[best].isnan():
            chosen.append(("best", best))
            if scores.total[best] != scores.total[worst]:
                chosen.append(("worst", worst))
        self.rollout = [
            self._sample(kind, step, problems[n], completions[n], scores, n) for kind, n in chosen
        ]
        if keep:
            self._write(self.rollout)

    def _sample(
        self,
        kind: Kind,
        step: int,
        problem: Problem,
        ids: Sequence[int],
        scores: Scores,
        place: int,
    ) -> Sample:
        prompt = problem.source
        if prompt is None:
            prompt = self._text(problem.prompt)
        parts = {name: float(part[place]) for name, part in scores.parts.items()}
        return Sample(
            kind=kind,
            step=step,
            prompt=prompt,
            completion=self._text(ids),
            answer=problem.answer,
            reward=float(scores.total[place]),
            parts={name: value for name, value in parts.items() if value == value},
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _write(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            append_json(self.path, {"stage": self.label, **asdict(sample)})


def shortened(text: str, limit: int) -> str:
    """A text in one line: its beginning and its end, where the answer stands."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    head = (limit - 3) // 2
    return f"{line[:head]} … {line[len(line) - (limit - 3 - head) :]}"
