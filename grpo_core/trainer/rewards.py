"""Rewards: score completions of problems, check the scores.

`FunctionReward` calls functions `reward(prompts, completions, **columns)`, the signature that TRL
uses, and `TextReward` calls rules, see `rules`. Both decode completions and report each reward
beside the weighted sum. Any callable with the signature of `Reward` works: `score` checks what it
returns.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.cli.options import UserCodeError, load_from_file
from grpo_core.trainer.rollout import Problem
from grpo_core.trainer.rules import RULES, Rule, accuracy, strict_format

# at the end of a prompt: some chat templates open the thought
THINK_AT_END = re.compile(r"<think>\s*$")
# tokens at the end of a prompt that contain such a tag even with one byte per token
THINK_TOKENS = 32
LARGEST = torch.finfo(torch.float32).max


class RewardError(ValueError):
    """A reward raised an error (its `__cause__`), or returned something else than scores."""


class Scores(NamedTuple):
    """Scores of S completions: the total to train on, and the single rewards by name."""

    total: Tensor  # [S] float32; NaN, allowed only where a part is NaN, excludes a completion
    parts: dict[str, Tensor]  # each [S] float32; NaN where a reward does not apply


class Reward(Protocol):
    def __call__(
        self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
    ) -> Scores: ...


RewardFunction = Callable[..., Iterable[float | None]]


def score(
    reward: Reward, problems: Sequence[Problem], completions: Sequence[Sequence[int]], where: str
) -> Scores:
    """Calls a reward and checks its scores; returns them on the CPU.

    Args:
        reward: scores the completions.
        problems: S.
        completions: S, token ids.
        where: start of every message, such as "step 3".

    Raises:
        RewardError: the reward raised an error, or returned something else than finite numbers [S].
    """
    name = f"reward {getattr(reward, '__name__', type(reward).__name__)!r}"
    try:
        scores = reward(problems, completions)
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error.__cause__
    except Exception as error:
        raise RewardError(f"{where}: {name} raised {_one_line(error)}") from error
    if not isinstance(scores, Scores) or not isinstance(scores.parts, Mapping):
        raise RewardError(f"{where}: {name}: expected Scores, got {_type_and_value(scores)}")
    count = len(completions)
    parts = {name: _vector(f"{where}: {name}", part, count) for name, part in scores.parts.items()}
    total = _vector(f"{where}: total", scores.total, count)
    may_be_nan = torch.zeros(count, dtype=torch.bool)
    for part in parts.values():
        may_be_nan |= part.isnan()
    if (total.isnan() & ~may_be_nan).any():
        raise RewardError(f"{where}: total: expected NaN only where a part is NaN, got others")
    return Scores(total, parts)


def mean_scores(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of every reward over the completions it applies to, if there are any."""
    return {name: part.nanmean().item() for name, part in parts.items() if not part.isnan().all()}


def best_and_worst(rewards: Tensor) -> tuple[int, int]:
    """Indices of the highest and the lowest of `rewards` [S]; NaN is neither."""
    missing = rewards.isnan()
    best = rewards.masked_fill(missing, -math.inf).argmax()
    return int(best), int(rewards.masked_fill(missing, math.inf).argmin())


def prepend_think(function: RewardFunction) -> RewardFunction:
    """Makes a reward read a `<think>` at the end of a prompt as the start of the completion."""

    def reward(completions: Sequence[str], prompt_opens: Sequence[str], **columns: Any) -> Any:
        pairs = zip(prompt_opens, completions, strict=True)
        return function(completions=[opened + text for opened, text in pairs], **columns)

    return reward


def rule_reward(rule: Rule) -> RewardFunction:
    """A rule as a reward function."""

    @prepend_think
    def reward(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
        return [rule(text, true) for text, true in zip(completions, answer, strict=True)]

    return reward


def find_reward(name: str) -> RewardFunction:
    """A reward by its name in `RULES`, or from a file as path.py:function.

    Raises:
        ValueError: there is no such rule, file or function.
        RewardError: the file raised an error.
    """
    if name in RULES:
        return rule_reward(RULES[name])
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"rewards: expected {', '.join(RULES)} or path.py:function, got {name!r}")
    try:
        reward: RewardFunction = load_from_file("rewards", name)
    except UserCodeError as error:
        raise RewardError(str(error)) from error.__cause__
    if not callable(reward):
        raise ValueError(f"rewards: {path} has no function {function!r}")
    return reward


@dataclass(frozen=True)
class FunctionReward:
    """Weighted sum of functions `reward(prompts, completions, **columns)` of decoded text.

    Args:
        tokenizer: decodes completions; special tokens are removed, so tags must not be special.
        functions: by the name they are logged under. A function gets the arguments that it names,
            or with `**columns` all but `prompt_opens`: `prompts` (strings or chat messages),
            `completions` (strings), `answer`, the other columns of the data, and `prompt_opens`,
            the `<think>` that a prompt ends with or "". It returns a finite number for each
            completion, or None where it does not apply.
        weights: of the functions in the sum; 1 by default.

    The total is NaN for a completion to which no function with a weight applies.

    Raises:
        ValueError: no functions, unknown names in `weights`, or a weight that is not finite.
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
        available = self._available(problems) | {"completions": texts}
        parts = {}
        for name, function in self.functions.items():
            arguments = _arguments(name, function, available)
            try:
                values = function(**arguments)
                if isinstance(values, Iterator):
                    # one more than expected shows that there are too many
                    values = list(islice(values, len(texts) + 1))
            except Exception as error:
                raise RewardError(f"reward {name!r} raised {_one_line(error)}") from error
            parts[name] = _check_values(name, values, len(texts))
        weights = torch.tensor([float(self.weights.get(name, 1)) for name in parts])[:, None]
        scores = weights * torch.stack(list(parts.values()))
        applies = ~scores.isnan() & (weights != 0)
        return Scores(scores.nansum(0).masked_fill(~applies.any(0), math.nan), parts)

    def check(self, problems: Sequence[Problem]) -> None:
        """Raises RewardError unless every function can be called with the columns of these."""
        available = self._available(problems[:1]) | {"completions": [""]}
        _columns(problems)
        for name, function in self.functions.items():
            _arguments(name, function, available)

    def _available(self, problems: Sequence[Problem]) -> dict[str, list[Any]]:
        """All arguments that functions may name, except the completions."""
        ends = [tuple(problem.prompt[-THINK_TOKENS:]) for problem in problems]
        unique = list(set(ends))
        texts = self.tokenizer.batch_decode(list(map(list, unique)), skip_special_tokens=True)
        tags = map(THINK_AT_END.search, texts)
        opens = dict(zip(unique, (tag[0] if tag else "" for tag in tags), strict=True))
        return _columns(problems) | {
            "prompts": [problem.source for problem in problems],
            "prompt_opens": [opens[end] for end in ends],
        }


@dataclass(frozen=True)
class TextReward:
    """Weighted sum of rules, evaluated as a `FunctionReward`.

    Args:
        tokenizer: decodes completions.
        rules: by the name they are logged under. A `<think>` that a prompt ends with is read as the
            start of the completion.
        weights: of the rules in the sum; 1 by default.
    """

    tokenizer: PreTrainedTokenizerBase
    rules: Mapping[str, Rule] = field(
        default_factory=lambda: {"accuracy": accuracy, "format": strict_format}
    )
    weights: Mapping[str, float] = field(default_factory=lambda: {"format": 0.2})

    def __post_init__(self) -> None:
        _check_weights(self.weights, self.rules)

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        functions = {name: rule_reward(rule) for name, rule in self.rules.items()}
        return FunctionReward(self.tokenizer, functions, self.weights)(problems, completions)


def shown_name(name: str) -> str:
    """The name of a reward's metrics: of path.py:function the function."""
    return name.rpartition(":")[2]


def _check_values(name: str, result: Any, count: int) -> Tensor:
    """The result of a reward function as [S] float32, NaN for None."""
    want = f"reward {name!r}: expected a list of {count} numbers, one for every completion"
    if inspect.iscoroutine(result):
        result.close()
    # a tensor or an array becomes a list, or a number
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardError(f"{want}, got {_type_and_value(result)}")
    if len(values) != count:
        raise RewardError(f"{want}, got {len(values)}")
    numbers = []
    for index, value in enumerate(values):
        if hasattr(value, "item") and value.ndim == 0:
            value = value.item()
        if value is not None and not _is_finite(value):
            raise RewardError(
                f"reward {name!r}: expected finite numbers, or None where it does not apply, got "
                f"{_type_and_value(value)} at index {index}"
            )
        numbers.append(math.nan if value is None else float(value))
    return torch.tensor(numbers, dtype=torch.float32)


def _vector(name: str, scores: Any, count: int) -> Tensor:
    """A vector of scores as [S] float32 on the CPU."""
    shape = list(scores.shape) if isinstance(scores, Tensor) else _type_and_value(scores)
    if shape != [count]:
        raise RewardError(f"{name}: expected shape [S] = [{count}], got {shape}")
    vector: Tensor = scores.detach().float().cpu()
    if vector.isinf().any():
        raise RewardError(f"{name}: expected finite numbers or NaN, got infinity")
    return vector


def _arguments(
    name: str, function: RewardFunction, available: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Copies of the available arguments that a function takes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name!r}: expected a function, got {function!r}") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    everything = available.keys() - {"prompt_opens"} if takes_all else set()
    named = everything | signature.parameters.keys()
    # a function may change its lists
    arguments = {key: list(values) for key, values in available.items() if key in named}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r}: expected arguments among {sorted(available)}, got a function with "
            f"{error}"
        ) from None
    return arguments


def _columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The columns of the problems, each as a list, and `answer`."""
    names = {name for problem in problems for name in problem.columns}
    for name in sorted(names):
        missing = sum(name not in problem.columns for problem in problems)
        if missing:
            raise RewardError(
                f"columns: expected every problem to have {name!r}, {missing} of {len(problems)} "
                "lack it"
            )
    if reserved := names & {"prompts", "completions", "prompt_opens"}:
        raise RewardError(
            f"columns: expected other names than {sorted(reserved)}, which are arguments of every "
            "reward"
        )
    columns = {name: [problem.columns[name] for problem in problems] for name in names}
    return {"answer": [problem.answer for problem in problems]} | columns


def _is_finite(value: Any) -> bool:
    """Whether a value is a number within the range of float32."""
    return isinstance(value, Real) and bool(abs(value) <= LARGEST)  # type: ignore[operator]


def _type_and_value(value: Any) -> str:
    """Type and beginning of the text of a value, in one line."""
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def _one_line(error: Exception) -> str:
    """Type and message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _check_weights(weights: Mapping[str, float], names: Mapping[str, Any]) -> None:
    """Raises ValueError for the weight of an unknown name, or one that is not a finite number."""
    if not names:
        raise ValueError("functions: expected at least one, got none")
    unknown = set(weights) - set(names)
    if unknown:
        raise ValueError(f"weights: expected names among {list(names)}, got {sorted(unknown)}")
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise ValueError(f"weights[{name!r}]: expected a finite number, got {weight!r}")
