"""Rewards: score completions of problems, check the scores.

`FunctionReward` calls functions `reward(prompts, completions, **columns)`, the signature that TRL
uses, on decoded text, and reports each beside the weighted sum. Any callable with the signature of
`Reward` works: `score` checks what it returns.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.rollout import Problem
from grpo_core.trainer.rules import RewardFunction

# at the end of a prompt: some chat templates open the thought
THINK_AT_END = re.compile(r"<think>\s*$")
# tokens at the end of a prompt that contain such a tag even with one byte per token
THINK_TOKENS = 32
# arguments of every reward, beside the columns of the data
ARGUMENTS = {"prompts", "completions", "prompt_opens"}
LARGEST = torch.finfo(torch.float32).max
# the part of the scores that an environment gave
ENVIRONMENT = "environment"


class RewardError(ValueError):
    """A reward raised an error (its `__cause__`), or returned something else than scores."""


class Scores(NamedTuple):
    """Scores of S completions: the total to train on, and the single rewards by name."""

    total: Tensor  # [S] float32; NaN, allowed only where a part is NaN, excludes a completion
    parts: dict[str, Tensor]  # each [S] float32; NaN where a reward does not apply


# scores S completions (token ids) of S problems
Reward = Callable[[Sequence[Problem], Sequence[Sequence[int]]], Scores]


def no_reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
    """0 for every completion: all is learnt from a teacher or an environment."""
    return Scores(torch.zeros(len(completions)), {})


def score(
    reward: Reward,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    where: str,
    earned: Tensor | None = None,
) -> Scores:
    """Calls a reward and checks its scores; returns them on the CPU.

    Args:
        where: start of every message, such as "step 3".
        earned: [S] rewards of an environment; a part of that name, with weight 1 in the total.

    Raises:
        RewardError: the reward raised an error, or returned something else than finite numbers [S].
    """
    name = f"reward {getattr(reward, '__name__', type(reward).__name__)!r}"
    try:
        scores = reward(problems, completions)
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error.__cause__
    except Exception as error:
        raise RewardError(f"{where}: {name} raised {one_line(error)}") from error
    if not isinstance(scores, Scores) or not isinstance(scores.parts, Mapping):
        raise RewardError(f"{where}: {name}: expected Scores, got {type_and_value(scores)}")
    count = len(completions)
    parts = {
        name: _check_vector(f"{where}: {name}", part, count) for name, part in scores.parts.items()
    }
    total = _check_vector(f"{where}: total", scores.total, count)
    may_be_nan = torch.stack([torch.zeros(count), *parts.values()]).isnan().any(0)
    if (total.isnan() & ~may_be_nan).any():
        raise RewardError(f"{where}: total: expected NaN only where a part is NaN, got others")
    if earned is None:
        return Scores(total, parts)
    if ENVIRONMENT in parts:
        raise RewardError(f"{where}: {name}: expected another name than {ENVIRONMENT!r} of a part")
    earned = earned.float().cpu()
    return Scores(total.nan_to_num(nan=0.0) + earned, {ENVIRONMENT: earned, **parts})


def mean_scores(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of every reward over the completions it applies to, if there are any."""
    return {name: part.nanmean().item() for name, part in parts.items() if not part.isnan().all()}


def best_and_worst(rewards: Tensor) -> tuple[int, int]:
    """Indices of the highest and the lowest of `rewards` [S]; NaN is neither."""
    best = rewards.nan_to_num(nan=-math.inf).argmax()
    return int(best), int(rewards.nan_to_num(nan=math.inf).argmin())


def shown_name(name: str) -> str:
    """The name of a reward's metrics: of path.py:function the function."""
    return name.rpartition(":")[2]


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
        names = list(self.functions)
        if not names:
            raise ValueError("functions: expected at least one, got none")
        if unknown := set(self.weights) - set(names):
            raise ValueError(f"weights: expected names among {names}, got {sorted(unknown)}")
        for name, weight in self.weights.items():
            if not is_finite(weight):
                raise ValueError(f"weights[{name!r}]: expected a finite number, got {weight!r}")

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        ends = [problem.prompt[-THINK_TOKENS:] for problem in problems]
        tags = [THINK_AT_END.search(text) for text in self._decode(ends)]
        available = _columns(problems) | {
            "prompts": [problem.source for problem in problems],
            "completions": self._decode(completions),
            "prompt_opens": [tag[0] if tag else "" for tag in tags],
        }
        parts = {
            name: _call(name, function, available, len(completions))
            for name, function in self.functions.items()
        }
        weights = torch.tensor([float(self.weights.get(name, 1)) for name in parts])[:, None]
        scores = weights * torch.stack(list(parts.values()))
        applies = ~scores.isnan() & (weights != 0)
        return Scores(scores.nansum(0).masked_fill(~applies.any(0), math.nan), parts)

    def check(self, problems: Sequence[Problem]) -> None:
        """Raises RewardError unless every function can be called with the columns of these."""
        available = _columns(problems).keys() | ARGUMENTS
        for name, function in self.functions.items():
            _named_arguments(name, function, available)

    def _decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        lists = [list(each) for each in ids]
        texts: list[str] = self.tokenizer.batch_decode(lists, skip_special_tokens=True)
        return texts


def _columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The columns of the problems, each as a list, and `answer`."""
    names = {name for problem in problems for name in problem.columns}
    if reserved := names & ARGUMENTS:
        raise RewardError(
            f"columns: expected other names than {sorted(reserved)}, which are arguments of every "
            "reward"
        )
    columns = {"answer": [problem.answer for problem in problems]}
    for name in sorted(names):
        columns[name] = [each.columns[name] for each in problems if name in each.columns]
        if missing := len(problems) - len(columns[name]):
            got = f"{missing} of {len(problems)} lack it"
            raise RewardError(f"columns: expected every problem to have {name!r}, {got}")
    return columns


def _named_arguments(name: str, function: RewardFunction, available: Collection[str]) -> set[str]:
    """The available arguments that a function takes; raises RewardError if it needs others."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name!r}: expected a function, got {function!r}") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    named = signature.parameters.keys() & set(available)
    if takes_all:
        named |= set(available) - {"prompt_opens"}
    try:
        signature.bind(**dict.fromkeys(named))
    except TypeError as error:
        raise RewardError(
            f"reward {name!r}: expected arguments among {sorted(available)}, got a function with "
            f"{error}"
        ) from None
    return named


def _call(
    name: str, function: RewardFunction, available: Mapping[str, list[Any]], count: int
) -> Tensor:
    """The numbers that a reward function returns as [S] float32, NaN for None."""
    named = _named_arguments(name, function, available)
    try:
        # a function may change its lists
        result: Any = function(**{each: list(available[each]) for each in named})
        if isinstance(result, Iterator):
            # one more than expected shows that there are too many
            result = list(islice(result, count + 1))
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {one_line(error)}") from error
    if inspect.iscoroutine(result):
        result.close()
    # a tensor or an array becomes a list, or a number
    values = result.tolist() if hasattr(result, "tolist") else result
    is_list = isinstance(values, list | tuple)
    if not is_list or len(values) != count:
        raise RewardError(
            f"reward {name!r}: expected a list of {count} numbers, one for every completion, got "
            f"{len(values) if is_list else type_and_value(result)}"
        )
    numbers = []
    for index, value in enumerate(values):
        if hasattr(value, "item") and value.ndim == 0:
            value = value.item()
        if value is not None and not is_finite(value):
            raise RewardError(
                f"reward {name!r}: expected finite numbers, or None where it does not apply, got "
                f"{type_and_value(value)} at index {index}"
            )
        numbers.append(math.nan if value is None else float(value))
    return torch.tensor(numbers, dtype=torch.float32)


def _check_vector(name: str, scores: Any, count: int) -> Tensor:
    """A vector of scores as [S] float32 on the CPU."""
    shape = list(scores.shape) if isinstance(scores, Tensor) else type_and_value(scores)
    if shape != [count]:
        raise RewardError(f"{name}: expected shape [S] = [{count}], got {shape}")
    vector: Tensor = scores.detach().float().cpu()
    if vector.isinf().any():
        raise RewardError(f"{name}: expected finite numbers or NaN, got infinity")
    return vector


def is_finite(value: Any) -> bool:
    """Whether a value is a number within the range of float32."""
    return isinstance(value, Real) and bool(abs(value) <= LARGEST)  # type: ignore[operator]


def type_and_value(value: Any) -> str:
    """Type and beginning of the text of a value, in one line."""
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def one_line(error: Exception) -> str:
    """Type and message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
