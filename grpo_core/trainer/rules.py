"""Built-in reward rules, `rule(completion, answer) -> float` in [0, 1], and rewards by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from grpo_core.cli.options import check_package, load_from_file
from grpo_core.trainer.answers import same_answer

Rule = Callable[[str, Any], float]
# reward(prompts, completions, **columns)
RewardFunction = Callable[..., Iterable[float | None]]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# one non-blank thought and one answer; only white space around and between them
FORMAT = re.compile(r"\s*<think>\s*\S[\s\S]*</think>\s*<answer>\s*\S[\s\S]*</answer>\s*")


def answer_text(answer: Any) -> str:
    """The correct answer as text: what follows the last "####", if any; 72.0 is "72".

    Raises:
        ValueError: the answer is blank, or neither text nor a number.
    """
    is_number = isinstance(answer, Real | Decimal) and not isinstance(answer, bool)
    if isinstance(answer, str) or (is_number and math.isfinite(answer)):
        is_whole = isinstance(answer, float) and answer.is_integer()
        text = str(int(answer) if is_whole else answer).rpartition("####")[2].strip()
        if text:
            return text
    raise ValueError(f"answer: expected text or a number, got {answer!r:.60}")


def given_answer(completion: str) -> str | None:
    """The text of the only `<answer>` outside the thought; None if there are none or several."""
    outside = completion.rpartition("</think>")[2]
    if completion.count("<answer>") != 1 or "<think>" in outside:
        return None
    given = re.findall(r"<answer>([\s\S]*?)</answer>", outside)
    return given[0].strip() if len(given) == 1 else None


def accuracy(completion: str, answer: Any) -> float:
    """1 if the completion gives exactly one answer and it is the same text as the correct one.

    Two answers score 0, an answer inside an open thought does not count, and "3.8 or 3.11" is not
    3.8.
    """
    return float(given_answer(completion) == answer_text(answer))


def math_accuracy(completion: str, answer: Any) -> float:
    """1 if the only answer equals the correct one as mathematics: 0.5, 1/2 and \\frac{1}{2}.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """
    check_package("math", "math_verify", "math-verify")
    return float(same_answer(given_answer(completion) or "", answer_text(answer)))


def strict_format(completion: str, answer: Any = None) -> float:
    """1 for `<think>..</think><answer>..</answer>` with each tag once and nothing else."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return float(once and FORMAT.fullmatch(completion) is not None)


def brevity(completion: str, answer: Any = None, target: int = 2000) -> float:
    """1 for up to `target` characters, falling linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(completion) / target))


# by the names of the command line
RULES: dict[str, Rule] = {
    "math": math_accuracy,
    "accuracy": accuracy,
    "format": strict_format,
    "brevity": brevity,
}
# rules that need the data to have answers
COMPARING = ("math", "accuracy")


def prepend_think(function: RewardFunction) -> RewardFunction:
    """Makes a reward read a `<think>` at the end of a prompt as the start of the completion."""

    def reward(completions: Sequence[str], prompt_opens: Sequence[str], **columns: Any) -> Any:
        pairs = zip(prompt_opens, completions, strict=True)
        return function(completions=[opened + text for opened, text in pairs], **columns)

    return reward


def find_reward(name: str) -> RewardFunction:
    """A reward by its name in `RULES`, or from a file as path.py:function.

    Raises:
        ValueError: there is no such rule, file or function, or the file raised an error.
    """
    if name in RULES:
        rule = RULES[name]

        @prepend_think
        def rule_reward(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
            return [rule(text, true) for text, true in zip(completions, answer, strict=True)]

        return rule_reward
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"rewards: expected {', '.join(RULES)} or path.py:function, got {name!r}")
    reward: RewardFunction = load_from_file("rewards", name)
    if not callable(reward):
        raise ValueError(f"rewards: {path} has no function {function!r}")
    return reward
