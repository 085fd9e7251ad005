"""Reward functions by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_core.cli.options import UserCodeError, load_from_file
from grpo_core.trainer.math_rewards import math_accuracy
from grpo_core.trainer.rewards import (
    RewardError,
    RewardFunction,
    Rule,
    accuracy,
    answer_text,
    brevity,
    continued,
    over,
    strict_format,
)

RULES: dict[str, Rule] = {"accuracy": accuracy, "format": strict_format, "brevity": brevity}
# they compare with the data's answers
COMPARING = ("math", "accuracy")


def find_reward(name: str) -> RewardFunction:
    """A reward by its name, or from a file as path.py:function.

    Raises:
        ValueError: neither; the file cannot be run (a RewardError), or has no such function.
    """
    if name == "math":
        return continued(_math)
    if name in RULES:
        return over(RULES[name])
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"rewards: expected math, {', '.join(RULES)} or path.py:function, got {name!r}"
        )
    try:
        found = load_from_file("rewards", name)
    except UserCodeError as error:
        raise RewardError(str(error)) from error.__cause__
    if not callable(found):
        raise ValueError(f"rewards: {path} has no function {function!r}")
    reward: RewardFunction = found
    return reward


def _math(answer: Sequence[Any], **columns: Any) -> list[float]:
    """`math_accuracy` with answers that are text."""
    return math_accuracy(answer=[answer_text(true) for true in answer], **columns)
