"""Verifiable rewards: rules that read a completion and the true answer, and nothing else.

A rule is `rule(completion, answer) -> float` in [0, 1]. `TextReward` decodes completions, applies
weighted rules and reports each one beside their sum. Anything with the shape of `Reward` will do in
its place: the trainer only calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
    parts: dict[str, Tensor]  # each [S] float32


class Reward(Protocol):
    def __call__(
        self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
    ) -> Scores: ...


def accuracy(completion: str, answer: str) -> float:
    """1 if the completion gives exactly one answer, outside its thought, and it is the true one.

    Two answers score 0 even when one is right, an answer inside an open thought is not an answer,
    and "3.8 or 3.11" is not 3.8.
    """
    outside = completion.rpartition("</think>")[2]
    if completion.count("<answer>") != 1 or "<think>" in outside:
        return 0.0
    given = re.findall(r"<answer>([\s\S]*?)</answer>", outside)
    return float(len(given) == 1 and given[0].strip() == answer)


def strict_format(completion: str, answer: str) -> float:
    """1 if it is `<think>..</think><answer>..</answer>` with each tag once and nothing else."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return float(once and FORMAT.fullmatch(completion) is not None)


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
        unknown = set(self.weights) - set(self.rules)
        if unknown:
            raise ValueError(
                f"weights: expected names among {list(self.rules)}, got {sorted(unknown)}"
            )

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
