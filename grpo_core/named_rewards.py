"""Reward functions by the names that the command line takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_core.rewards import Rule, accuracy, brevity, strict_format
from grpo_core.tasks import math_accuracy

RULES: dict[str, Rule] = {"accuracy": accuracy, "format": strict_format, "brevity": brevity}


def find_reward(name: str) -> Callable[..., Sequence[float | None]]:
    """A reward by its name, or from a file as path.py:function.

    Raises:
        ValueError: neither.
    """
    if name == "math":
        return math_accuracy
    if name in RULES:
        return _over(RULES[name])
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"rewards: expected math, {', '.join(RULES)} or path.py:function, got {name!r}"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"rewards: {path} has no function {function!r}")
    found: Callable[..., Sequence[float | None]] = getattr(module, function)
    return found


def _over(rule: Rule) -> Callable[..., list[float]]:
    """A rule as a function over columns."""

    def reward(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [rule(text, str(true)) for text, true in pairs]

    return reward
