"""Verifiable rewards: rules that read a completion and the true answer, and nothing else.

A rule is `rule(completion, answer) -> float` in [0, 1]. `TextReward` decodes completions, applies
weighted rules and reports each one beside their sum. `FunctionReward` does the same with functions
`reward(prompts, completions, **columns)` of the shape that TRL has made usual. Anything with the
shape of `Reward` will do in their place: the trainer only calls it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.rollout import Problem

Rule = Callable[[str, str], float]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# One thought that is not blank, one answer, and nothing before, between (but white space) or after.
FORMAT = re.compile(r"\s*<think>\s*\S[\s\S]*</think>\s*<answer>\s*\S[\s\S]*</answer>\s*")


class Scores(NamedTuple):
    """What a reward says of S completions: the sum that is trained on, and its parts by name."""

    total: Tensor  # [S] float32
    parts: dict[str, Tensor]  # each [S] float32; NaN where a reward does not apply


class Reward(Protocol):
    def __call__(
        self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
    ) -> Scores: ...


def accuracy(completion: str, answer: str) -> float:
    """1 if the completion gives exactly one answer, outside its thought, and it is the true one.

    Two answers score 0 even when one is right, an answer inside an open thought is not an answer,
    and "3.8 or 3.11" is not 3.8.
    """
    return float(given_answer(completion) == answer)


def given_answer(completion: str) -> str | None:
    """The text of the only `<answer>`, outside any thought, without white space around; or None."""
    outside = completion.rpartition("</think>")[2]
    if completion.count("<answer>") != 1 or "<think>" in outside:
        return None
    given = re.findall(r"<answer>([\s\S]*?)</answer>", outside)
    return given[0].strip() if len(given) == 1 else None


def strict_format(completion: str, answer: str) -> float:
    """1 if it is `<think>..</think><answer>..</answer>` with each tag once and nothing else."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return float(once and FORMAT.fullmatch(completion) is not None)


def brevity(completion: str, answer: str, target: int = 2000) -> float:
    """1 for up to `target` characters, then less and less, 0 from twice as many on."""
    return min(1.0, max(0.0, 2 - len(completion) / target))


@dataclass(frozen=True)
class TextReward:
    """Weighted rules over decoded text.

    Args:
        tokenizer: decodes completions; special tokens (end, padding) are dropped, so the tags must
            not be special.
        rules: each rule by the name it is logged under.
        weights: each rule's share of the total; a missing name weighs 1.
    """

    tokenizer: PreTrainedTokenizerBase
    rules: Mapping[str, Rule] = field(
        default_factory=lambda: {"accuracy": accuracy, "format": strict_format}
    )
    weights: Mapping[str, float] = field(default_factory=lambda: {"format": 0.2})

    def __post_init__(self) -> None:
        _check_weights(self.weights, self.rules)

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        ids = [list(completion) for completion in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts = {
            name: torch.tensor(
                [rule(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
            )
            for name, rule in self.rules.items()
        }
        total = torch.stack([self.weights.get(name, 1.0) * part for name, part in parts.items()])
        return Scores(total.sum(0), parts)


RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class FunctionReward:
    """Weighted functions `reward(prompts, completions, **columns)` over decoded text.

    Args:
        tokenizer: decodes completions; special tokens are dropped.
        functions: each by the name it is logged under. It is called with `prompts` (as they were
            given: strings or chat messages), `completions` (strings), and every other column of the
            data as a list, and returns a float for each, or None where it does not apply.
        weights: each function's share of the total; a missing name weighs 1.

    Raises:
        ValueError: weights of unknown names, columns that only some problems have, results of
            another number, or a completion to which no function applies.
    """

    tokenizer: PreTrainedTokenizerBase
    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_weights(self.weights, self.functions)

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        ids = [list(completion) for completion in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = _columns(problems)
        prompts = [problem.source for problem in problems]
        parts = {}
        for name, function in self.functions.items():
            given = list(function(prompts=prompts, completions=texts, **columns))
            if len(given) != len(texts):
                raise ValueError(
                    f"{name}: expected {len(texts)} rewards, one for every completion, got "
                    f"{len(given)}"
                )
            numbers = [math.nan if reward is None else float(reward) for reward in given]
            parts[name] = torch.tensor(numbers, dtype=torch.float32)
        scores = torch.stack([self.weights.get(name, 1.0) * part for name, part in parts.items()])
        applies = ~scores.isnan().all(0)
        if not applies.all():
            raise ValueError(
                f"rewards: expected at least one that applies to every completion, none of "
                f"{list(self.functions)} does to {int((~applies).sum())} of them"
            )
        return Scores(scores.nansum(0), parts)


def _columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """What the problems carry, each name with a list; `answer` among them."""
    names = {name for problem in problems for name in problem.columns}
    for name in sorted(names):
        lacking = sum(name not in problem.columns for problem in problems)
        if lacking:
            raise ValueError(
                f"columns: expected every problem to have {name!r}, {lacking} of {len(problems)} "
                "lack it"
            )
    columns = {name: [problem.columns[name] for problem in problems] for name in names}
    return {"answer": [problem.answer for problem in problems]} | columns


def shown_name(name: str) -> str:
    """What a reward's figures are called: of path.py:function the function."""
    return name.rpartition(":")[2]


def _check_weights(weights: Mapping[str, float], names: Mapping[str, Any]) -> None:
    """Raises ValueError for a weight of something that is not there."""
    unknown = set(weights) - set(names)
    if unknown:
        raise ValueError(f"weights: expected names among {list(names)}, got {sorted(unknown)}")
