"""Verifiable rewards: rules that read a completion and the true answer, and nothing else.

A rule is `rule(completion, answer) -> float` in [0, 1]; `TextReward` takes rules. `FunctionReward`
takes functions `reward(prompts, completions, **columns)` of the shape that TRL has made usual. Both
decode completions and report each reward beside the weighted sum. Any other callable of the shape
of `Reward` will do: all are called through `score`, which checks what they return.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.rollout import Problem

Rule = Callable[[str, Any], float]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# One thought that is not blank, one answer, and nothing before, between (but white space) or after.
FORMAT = re.compile(r"\s*<think>\s*\S[\s\S]*</think>\s*<answer>\s*\S[\s\S]*</answer>\s*")
# at the end of a prompt: chat templates of reasoning models begin the thought themselves
OPENED = re.compile(r"<think>\s*$")
# Tokens of a prompt's end that hold such a tag, a byte each at worst, and white space after it.
LONGEST_OPENED = 32
LARGEST = torch.finfo(torch.float32).max


class RewardError(ValueError):
    """A reward raised (then that is its `__cause__`), or returned what cannot be trained on."""


class Scores(NamedTuple):
    """What a reward says of S completions: the sum that is trained on, and its parts by name."""

    total: Tensor  # [S] float32; NaN, only where a part is NaN, leaves a completion out
    parts: dict[str, Tensor]  # each [S] float32; NaN where a reward does not apply


class Reward(Protocol):
    def __call__(
        self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
    ) -> Scores: ...


def score(
    reward: Reward, problems: Sequence[Problem], completions: Sequence[Sequence[int]], where: str
) -> Scores:
    """Scores of S completions on the CPU, checked.

    Args:
        reward: what is called.
        problems: S.
        completions: S, token ids.
        where: begins every message, such as "step 3".

    Raises:
        RewardError: the reward raised, or something else came than finite numbers [S].
    """
    try:
        found = reward(problems, completions)
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error.__cause__
    except Exception as error:
        raise RewardError(f"{where}: {_name_of(reward)} raised {_shown_error(error)}") from error
    if not isinstance(found, Scores) or not isinstance(found.parts, Mapping):
        raise RewardError(f"{where}: {_name_of(reward)}: expected Scores, got {_shown(found)}")
    count = len(completions)
    parts = {name: _vector(f"{where}: {name}", part, count) for name, part in found.parts.items()}
    total = _vector(f"{where}: total", found.total, count)
    explained = torch.zeros(count, dtype=torch.bool)
    for part in parts.values():
        explained |= part.isnan()
    if (total.isnan() & ~explained).any():
        raise RewardError(f"{where}: total: expected NaN only where a part is NaN, got others")
    return Scores(total, parts)


def best_and_worst(rewards: Tensor) -> tuple[int, int]:
    """Indices of the highest and the lowest of `rewards` [S]; NaN, left out, is neither."""
    lacking = rewards.isnan()
    best = rewards.masked_fill(lacking, -math.inf).argmax()
    return int(best), int(rewards.masked_fill(lacking, math.inf).argmin())


def answer_text(answer: Any) -> str:
    """What completions are compared with: the text after the last "####", if any; 72.0 is "72".

    Raises:
        ValueError: it is neither text nor a number, or blank.
    """
    is_number = isinstance(answer, Real | Decimal) and not isinstance(answer, bool)
    if isinstance(answer, str) or (is_number and math.isfinite(answer)):
        whole = isinstance(answer, float) and answer.is_integer()
        text = str(int(answer) if whole else answer).rpartition("####")[2].strip()
        if text:
            return text
    raise ValueError(f"answer: expected text or a number, got {answer!r:.60}")


def accuracy(completion: str, answer: Any) -> float:
    """1 if the completion gives exactly one answer, outside its thought, and it is the true one.

    Two answers score 0 even when one is right, an answer inside an open thought is not an answer,
    and "3.8 or 3.11" is not 3.8.
    """
    return float(given_answer(completion) == answer_text(answer))


def given_answer(completion: str) -> str | None:
    """The text of the only `<answer>`, outside any thought, without white space around; or None."""
    outside = completion.rpartition("</think>")[2]
    if completion.count("<answer>") != 1 or "<think>" in outside:
        return None
    given = re.findall(r"<answer>([\s\S]*?)</answer>", outside)
    return given[0].strip() if len(given) == 1 else None


def strict_format(completion: str, answer: Any = None) -> float:
    """1 if it is `<think>..</think><answer>..</answer>` with each tag once and nothing else."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return float(once and FORMAT.fullmatch(completion) is not None)


def brevity(completion: str, answer: Any = None, target: int = 2000) -> float:
    """1 for up to `target` characters, then less and less, 0 from twice as many on."""
    return min(1.0, max(0.0, 2 - len(completion) / target))


RewardFunction = Callable[..., Iterable[float | None]]


def continued(function: RewardFunction) -> RewardFunction:
    """A reward that reads a `<think>` at the end of a prompt as the beginning of its completion."""

    def reward(completions: Sequence[str], prompt_opens: Sequence[str], **columns: Any) -> Any:
        pairs = zip(prompt_opens, completions, strict=True)
        return function(completions=[opened + text for opened, text in pairs], **columns)

    return reward


def over(rule: Rule) -> RewardFunction:
    """A rule as a function over columns."""

    @continued
    def reward(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
        return [rule(text, true) for text, true in zip(completions, answer, strict=True)]

    return reward


@dataclass(frozen=True)
class FunctionReward:
    """Weighted functions `reward(prompts, completions, **columns)` over decoded text.

    Args:
        tokenizer: decodes completions; special tokens (end, padding) are dropped, so tags must not
            be special.
        functions: each by the name it is logged under. Of these it is given what it names, or
            with `**columns` all but the last: `prompts` (strings or chat messages), `completions`
            (strings), `answer`, every other column of the data, and `prompt_opens`, the `<think>`
            that a prompt ends with, or "". It returns a finite number for each completion, or None
            where it does not apply.
        weights: each function's share of the total; a missing name weighs 1.

    A completion to which no function applies, or none with a weight but 0, has the total NaN.

    Raises:
        ValueError: no functions, weights of unknown names or that are not finite.
        RewardError: columns that only some problems have, a function that asks for others or
            raises, or a result that is not a number for every completion.
    """

    tokenizer: PreTrainedTokenizerBase
    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_weights(self.weights, self.functions)

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        ids = [list(completion) for completion in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = self._given(problems) | {"completions": texts}
        parts = {}
        for name, function in self.functions.items():
            wanted = _wanted(name, function, given)
            try:
                found = function(**wanted)
                if isinstance(found, Iterator):
                    # one too many is enough to tell
                    found = list(islice(found, len(texts) + 1))
            except Exception as error:
                raise RewardError(f"reward {name!r} raised {_shown_error(error)}") from error
            parts[name] = _checked(name, found, len(texts))
        weights = torch.tensor([float(self.weights.get(name, 1)) for name in parts])[:, None]
        scores = weights * torch.stack(list(parts.values()))
        applies = ~scores.isnan() & (weights != 0)
        return Scores(scores.nansum(0).masked_fill(~applies.any(0), math.nan), parts)

    def check(self, problems: Sequence[Problem]) -> None:
        """Raises RewardError unless every function can be called with the columns of these."""
        given = self._given(problems[:1]) | {"completions": [""]}
        _columns(problems)
        for name, function in self.functions.items():
            _wanted(name, function, given)

    def _given(self, problems: Sequence[Problem]) -> dict[str, list[Any]]:
        """All that functions may ask for but the completions."""
        ends = [tuple(problem.prompt[-LONGEST_OPENED:]) for problem in problems]
        different = list(set(ends))
        texts = self.tokenizer.batch_decode(list(map(list, different)), skip_special_tokens=True)
        found = map(OPENED.search, texts)
        opens = dict(zip(different, (tag[0] if tag else "" for tag in found), strict=True))
        return _columns(problems) | {
            "prompts": [problem.source for problem in problems],
            "prompt_opens": [opens[end] for end in ends],
        }


@dataclass(frozen=True)
class TextReward:
    """Weighted rules over decoded text, as a `FunctionReward`.

    Args:
        tokenizer: as there.
        rules: each rule by the name it is logged under. A `<think>` that a prompt ends with is the
            beginning of the completion.
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
        functions = {name: over(rule) for name, rule in self.rules.items()}
        return FunctionReward(self.tokenizer, functions, self.weights)(problems, completions)


def _checked(name: str, found: Any, count: int) -> Tensor:
    """What a reward function returned as [S] float32, NaN for None."""
    want = f"reward {name!r}: expected a list of {count} numbers, one for every completion"
    if inspect.iscoroutine(found):
        found.close()
    # a tensor or an array becomes a list, or a number
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple):
        raise RewardError(f"{want}, got {_shown(found)}")
    if len(values) != count:
        raise RewardError(f"{want}, got {len(values)}")
    numbers = []
    for at, value in enumerate(values):
        if hasattr(value, "item") and value.ndim == 0:
            value = value.item()
        if value is not None and not _is_finite(value):
            raise RewardError(
                f"reward {name!r}: expected finite numbers, or None where it does not apply, got "
                f"{_shown(value)} at index {at}"
            )
        numbers.append(math.nan if value is None else float(value))
    return torch.tensor(numbers, dtype=torch.float32)


def _vector(name: str, found: Any, count: int) -> Tensor:
    """A vector of scores as [S] float32 on the CPU."""
    shape = list(found.shape) if isinstance(found, Tensor) else _shown(found)
    if shape != [count]:
        raise RewardError(f"{name}: expected shape [S] = [{count}], got {shape}")
    vector: Tensor = found.detach().float().cpu()
    if vector.isinf().any():
        raise RewardError(f"{name}: expected finite numbers or NaN, got infinity")
    return vector


def _wanted(name: str, function: RewardFunction, given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of those of the given columns that a function takes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name!r}: expected a function, got {function!r}") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    everything = given.keys() - {"prompt_opens"} if takes_all else set()
    named = everything | signature.parameters.keys()
    # copies, since a function may change its lists in place
    wanted = {key: list(values) for key, values in given.items() if key in named}
    try:
        signature.bind(**wanted)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r}: expected arguments among {sorted(given)}, got a function with "
            f"{error}"
        ) from None
    return wanted


def _columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """What the problems carry, each name with a list; `answer` among them."""
    names = {name for problem in problems for name in problem.columns}
    for name in sorted(names):
        lacking = sum(name not in problem.columns for problem in problems)
        if lacking:
            raise RewardError(
                f"columns: expected every problem to have {name!r}, {lacking} of {len(problems)} "
                "lack it"
            )
    if taken := names & {"prompts", "completions", "prompt_opens"}:
        raise RewardError(
            f"columns: expected other names than {sorted(taken)}, which rewards are given anyway"
        )
    columns = {name: [problem.columns[name] for problem in problems] for name in names}
    return {"answer": [problem.answer for problem in problems]} | columns


def shown_name(name: str) -> str:
    """What a reward's figures are called: of path.py:function the function."""
    return name.rpartition(":")[2]


def _is_finite(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, Real) and bool(abs(value) <= LARGEST)  # type: ignore[operator]


def _name_of(reward: Reward) -> str:
    """A function's name, or an object's class."""
    return f"reward {getattr(reward, '__name__', type(reward).__name__)!r}"


def _shown(value: Any) -> str:
    """A value's type and the beginning of its text, in one line."""
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def _shown_error(error: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _check_weights(weights: Mapping[str, float], names: Mapping[str, Any]) -> None:
    """Raises ValueError for a weight of something that is not there, or that is no number."""
    if not names:
        raise ValueError("functions: expected at least one, got none")
    unknown = set(weights) - set(names)
    if unknown:
        raise ValueError(f"weights: expected names among {list(names)}, got {sorted(unknown)}")
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise ValueError(f"weights[{name!r}]: expected a finite number, got {weight!r}")
