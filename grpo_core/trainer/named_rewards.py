"""Reward functions by the names that the command line takes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    if not Path(path).is_file():
        raise ValueError(f"rewards: expected a file, found no {path}")
    spec = importlib.util.spec_from_file_location(f"rewards {Path(path).resolve()}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their module there
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"rewards: {path} raised {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"rewards: {path} has no function {function!r}")
    reward: RewardFunction = found
    return reward


def _math(answer: Sequence[Any], **columns: Any) -> list[float]:
    """`math_accuracy` with answers that are text."""
    return math_accuracy(answer=[answer_text(true) for true in answer], **columns)
