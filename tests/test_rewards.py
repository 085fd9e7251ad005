"""The reward cannot be gamed: every way of half-answering we could think of, by hand."""

from __future__ import annotations

import functools
import itertools
import math
import traceback
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from transformers import ByT5Tokenizer

from grpo_core.runs.demo.decimals import build_tokenizer
from grpo_core.trainer.rewards import (
    FunctionReward,
    RewardError,
    Scores,
    best_and_worst,
    score,
)
from grpo_core.trainer.rollout import Problem
from grpo_core.trainer.rules import accuracy, answer_text, find_reward, strict_format

# completion to the answer "3.8", accuracy, format
CASES = [
    ("<think>3=3 align 11 80 1<8</think><answer>3.8</answer>", 1, 1),
    ("<think>a</think>\n<answer> 3.8 </answer>\n", 1, 1),
    ("<think>a</think><answer>3.11</answer>", 0, 1),
    # right answer, wrong form
    ("<answer>3.8</answer>", 1, 0),
    ("<think></think><answer>3.8</answer>", 1, 0),
    ("<think> \n </think><answer>3.8</answer>", 1, 0),
    ("<think>a</think><answer>3.8</answer> or 3.11", 1, 0),
    ("well <think>a</think><answer>3.8</answer>", 1, 0),
    ("<think>a</think> so <answer>3.8</answer>", 1, 0),
    ("<think>a</think><think>b</think><answer>3.8</answer>", 1, 0),
    ("a</think><answer>3.8</answer>", 1, 0),
    # more than one answer, or none
    ("<think>a</think><answer>3.11</answer><answer>3.8</answer>", 0, 0),
    ("<think>a</think><answer>3.8</answer><answer>3.8</answer>", 0, 0),
    ("<think>a</think><answer>3.8 or 3.11</answer>", 0, 1),
    ("<think>a</think><answer></answer>", 0, 0),
    ("<think>a</think><answer>3.8<answer>3.11</answer>", 0, 0),
    ("<think>a</think><answer>3.8", 0, 0),
    ("<think>a</think>3.8</answer>", 0, 0),
    ("<think>a</think>3.8", 0, 0),
    (" the larger one is 3.8", 0, 0),
    ("", 0, 0),
    ("<think>a</think><answer>3.11</answer> no, <answer>3.8</answer>", 0, 0),
    ("<think>a</think><answer><answer>3.8</answer></answer>", 0, 0),
    ("<think>a</think><ANSWER>3.8</ANSWER>", 0, 0),
    ("<think>a</think><answer>the larger one is 3.8</answer>", 0, 1),
    # an answer inside the thought is a thought
    ("<think><answer>3.8</answer></think>", 0, 0),
    ("<think><answer>3.8</answer>", 0, 0),
    ("<think><answer>3.8</answer></think><answer>3.11</answer>", 0, 0),
    ("<answer>3.8</answer><think>a</think>", 0, 0),
    ("<think>a<answer>3.8</answer>", 0, 0),
    ("<think>a<answer>3.8</think></answer>", 0, 0),
    ("<think>a</think><answer>3.8<think></answer>", 0, 0),
    # close, but another number
    ("<think>a</think><answer>3.80</answer>", 0, 1),
    ("<think>a</think><answer>13.8</answer>", 0, 1),
]


@pytest.mark.parametrize(("completion", "accurate", "formatted"), CASES)
def test_rules(completion: str, accurate: int, formatted: int) -> None:
    assert accuracy(completion, "3.8") == accurate
    assert strict_format(completion, "3.8") == formatted


def rule_rewards(*names: str) -> dict[str, Any]:
    return {name: find_reward(name) for name in names}


def test_a_reward_decodes_drops_end_and_padding_and_adds_up_weights() -> None:
    tokenizer = build_tokenizer()
    texts = [
        "<think>3=3</think><answer>3.8</answer><eos><pad><pad>",
        "<answer>3.8</answer><eos>",
        "<think>3=3</think><answer>3.11</answer>",
    ]
    completions = tokenizer(texts)["input_ids"]
    weights = {"format": 0.25, "accuracy": 2.0}
    reward = FunctionReward(tokenizer, rule_rewards("accuracy", "format"), weights)

    scores = reward([Problem((5,), "3.8")] * 3, completions)

    assert scores.parts["accuracy"].tolist() == [1, 1, 0]
    assert scores.parts["format"].tolist() == [1, 0, 1]
    torch.testing.assert_close(scores.total, torch.tensor([2.25, 2.0, 0.25]))


def scored(function: Any, problems: list[Problem] | None = None, **more: Any) -> Scores:
    """What `function` says of two completions, in step 3."""
    tokenizer = ByT5Tokenizer()
    functions = {"mine": function, **more.pop("others", {})}
    reward = FunctionReward(tokenizer, functions, more.get("weights", {}))
    asked = problems or [Problem((5,), "a", source="p"), Problem((6,), "b", source="q")]
    return score(reward, asked, tokenizer(["x", "y"], add_special_tokens=False).input_ids, "step 3")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: [1, 0.5], [1, 0.5]),
        (lambda: (True, False), [1, 0]),
        (lambda: numpy.array([1, 0]), [1, 0]),
        (lambda: numpy.array([0.25, 0.5], dtype=numpy.float16), [0.25, 0.5]),
        (lambda: numpy.array([True, False]), [1, 0]),
        (lambda: numpy.array([None, 2.0], dtype=object), [None, 2]),
        (lambda: torch.tensor([0.25, 0.5], requires_grad=True), [0.25, 0.5]),
        (lambda: torch.tensor([0.25, 0.5], dtype=torch.bfloat16), [0.25, 0.5]),
        (lambda: torch.tensor([3, 4]), [3, 4]),
        (lambda: [torch.tensor(0.5, requires_grad=True), numpy.float32(0.25)], [0.5, 0.25]),
        (lambda: [numpy.bool_(True), numpy.int8(-3)], [1, -3]),
        (lambda: [Fraction(1, 4), None], [0.25, None]),
        (lambda: (value for value in (0.5, 1)), [0.5, 1]),
        (lambda: map(float, "12"), [1, 2]),
        (lambda: [-0.0, 3e38], [0, 3e38]),
    ],
)
def test_what_a_reward_may_return(made: Callable[[], Any], expected: list[Any]) -> None:
    scores = scored(lambda **_: made())
    numbers = [math.nan if value is None else value for value in expected]
    assert scores.total.dtype == torch.float32 and not scores.total.requires_grad
    for got in (scores.total, scores.parts["mine"]):
        torch.testing.assert_close(got, torch.tensor(numbers, dtype=torch.float32), equal_nan=True)


async def waiting(**_: Any) -> list[float]:
    return [1.0, 1.0]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: {"a": 1, "b": 2}, r"expected a list of 2 numbers, .* got dict \{'a': 1, 'b': 2\}"),
        (lambda: {0.5, 1.0}, "got set"),
        (lambda: {"a": 1, "b": 2}.values(), "got dict_values"),
        (lambda: 0.5, r"got float 0\.5"),
        (lambda: torch.tensor(0.5), r"got Tensor tensor\(0\.5"),
        (lambda: numpy.float64(0.5), "got float64"),
        (lambda: None, "got NoneType None"),
        (lambda: "10", "got str '10'"),
        (lambda: b"10", "got bytes"),
        (waiting, "got coroutine"),
        (lambda: [1.0], "got 1$"),
        (lambda: [1.0] * 3, "got 3$"),
        (lambda: torch.ones(3), "got 3$"),
        (lambda: [], "got 0$"),
        (itertools.count, "got 3$"),
        (lambda: [[1.0], [0.5]], r"expected finite numbers, .* got list \[1\.0\] at index 0"),
        (lambda: torch.ones(2, 1), "got list"),
        (lambda: numpy.ones((2, 2)), "got list"),
        (lambda: [torch.ones(1), 1.0], "got Tensor"),
        (lambda: [1.0, "0.5"], r"got str '0\.5' at index 1"),
        (lambda: ["one", "two"], "got str 'one' at index 0"),
        (lambda: [1.0, math.nan], "got float nan at index 1"),
        (lambda: torch.tensor([1.0, math.nan]), "got float nan at index 1"),
        (lambda: [numpy.float32("nan"), 1], "got float nan at index 0"),
        (lambda: [math.inf, 1.0], "got float inf at index 0"),
        (lambda: [1.0, -math.inf], "got float -inf at index 1"),
        (lambda: [1e39, 1.0], r"got float 1e\+39 at index 0"),
        (lambda: [1, 10**400], "got int 1000"),
        (lambda: [1j, 0], "got complex 1j at index 0"),
        (lambda: [{"reward": 1}, 0], "got dict"),
        (lambda: [(1,), 0], "got tuple"),
    ],
)
def test_what_a_reward_may_not_return(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(RewardError, match=rf"^step 3: reward 'mine': .*{message}"):
        scored(lambda **_: made())


def test_what_a_reward_raises_is_the_cause_of_the_error() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [{}[text] for text in completions]

    def late(**_: Any) -> Iterator[float]:
        yield 1.0
        raise OSError("no\nserver")

    for function, message in ((broken, "KeyError: 'x'"), (late, "OSError: no server")):
        with pytest.raises(RewardError, match=f"^step 3: reward 'mine' raised {message}$") as found:
            scored(function)
        shown = "".join(traceback.format_exception(found.value.__cause__))
        assert f"in {function.__name__}" in shown


def test_a_function_gets_what_it_names() -> None:
    seen: dict[str, Any] = {}
    columns = {"level": 1, "solution": "s"}
    problems = [Problem((5,), "a", columns=columns, source="p")] * 2

    def noted(**given: Any) -> list[float]:
        seen.clear()
        seen.update(given)
        return [1.0, 1.0]

    class Judge:
        def __call__(self, answer: list[str], level: list[int]) -> list[float]:
            return noted(answer=answer, level=level)

    completions, answer, level = ["x", "y"], ["a", "a"], [1, 1]
    everything = {"prompts": ["p", "p"], "completions": completions, "answer": answer}
    everything |= {"level": level, "solution": ["s", "s"]}
    for function, expected in [
        (lambda completions: noted(completions=completions), {"completions": completions}),
        (lambda answer, other=3: noted(answer=answer, other=other), {"answer": answer, "other": 3}),
        (Judge(), {"answer": answer, "level": level}),
        (noted, everything),
        (functools.partial(noted, extra=4), everything | {"extra": 4}),
        (lambda prompt_opens: noted(prompt_opens=prompt_opens), {"prompt_opens": ["", ""]}),
    ]:
        scored(function, problems)
        assert seen == expected


def test_a_function_that_changes_its_lists_changes_no_other_ones() -> None:
    def careless(completions: list[str], answer: list[str]) -> list[float]:
        completions[:], answer[:] = ["z", "z"], ["z"]
        return [1.0, 1.0]

    def same(completions: list[str], answer: list[str]) -> list[bool]:
        return [completions == ["x", "y"], answer == ["a", "b"]]

    assert scored(careless, others={"same": same}).parts["same"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (lambda completions, truth: [1, 1], {}, r"among \['answer', .*missing .*'truth'"),
        (lambda completions, /: [1, 1], {}, "positional only|missing"),
        (lambda **_: [1, 1], {"completions": 1}, r"expected other names than \['completions'\]"),
        (lambda **_: [1, 1], {"prompts": 1}, r"expected other names than \['prompts'\]"),
        (3, {}, "reward 'mine': expected a function, got 3"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_a_step(
    function: Any, columns: dict[str, Any], message: str
) -> None:
    problems = [Problem((5,), columns=columns)] * 2
    for call in (FunctionReward(ByT5Tokenizer(), {"mine": function}).check, None):
        with pytest.raises(RewardError, match=message):
            call(problems) if call else scored(function, problems)


def test_none_of_the_only_reward_leaves_a_completion_without_a_total() -> None:
    """One without a weight does not score, whatever it says."""
    mine, other = lambda **_: [None, 1.0], lambda **_: [2.0, None]
    for functions, weights, expected in [
        ({}, {}, [math.nan, 1.0]),
        ({"other": other}, {}, [2.0, 1.0]),
        ({"other": other}, {"other": 0.0}, [math.nan, 1.0]),
        ({"other": other}, {"mine": 3.0, "other": -0.5}, [-1.0, 3.0]),
    ]:
        scores = scored(mine, others=functions, weights=weights)
        torch.testing.assert_close(scores.total, torch.tensor(expected), equal_nan=True)
        assert scores.parts["mine"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(2), "reward 'judge': expected Scores, got Tensor"),
        (None, "reward 'judge': expected Scores, got NoneType None"),
        (Scores(torch.ones(2), None), "reward 'judge': expected Scores, got Scores"),
        ((torch.ones(2), {}), "reward 'judge': expected Scores, got tuple"),
        (Scores(torch.ones(3), {}), r"total: expected shape \[S\] = \[2\], got \[3\]"),
        (Scores(torch.ones(2), {"a": torch.ones(2, 1)}), r"a: expected shape .* got \[2, 1\]"),
        (Scores([1.0, 1.0], {}), r"total: expected shape .* got list \[1\.0, 1\.0\]"),
        (Scores(torch.tensor([1.0, math.inf]), {}), "total: expected finite numbers or NaN"),
        (Scores(torch.ones(2), {"a": torch.tensor([1, -math.inf])}), "a: expected finite numbers"),
        (Scores(torch.tensor([1.0, math.nan]), {}), "total: expected NaN only where a part is NaN"),
        (
            Scores(torch.tensor([1.0, math.nan]), {"a": torch.tensor([math.nan, 1.0])}),
            "total: expected NaN only where a part is NaN",
        ),
    ],
)
def test_scores_of_ones_own_are_checked_as_well(found: Any, message: str) -> None:
    def judge(problems: Any, completions: Any) -> Any:
        return found

    with pytest.raises(RewardError, match=f"^step 3: {message}"):
        score(judge, [Problem((5,))] * 2, [[1], [2]], "step 3")


def test_scores_become_plain_float32() -> None:
    given = Scores(
        torch.tensor([1.5, math.nan], dtype=torch.float64, requires_grad=True),
        {"a": torch.tensor([3, 4]), "b": torch.tensor([1.0, math.nan])},
    )
    got = score(lambda problems, completions: given, [Problem((5,))] * 2, [[1], [2]], "step 3")
    for vector in (got.total, *got.parts.values()):
        assert vector.dtype == torch.float32 and not vector.requires_grad
    assert got.total.isnan().tolist() == [False, True] and got.parts["a"].tolist() == [3, 4]

    def judge(problems: Any, completions: Any) -> Scores:
        raise KeyError("lost")

    with pytest.raises(RewardError, match=r"^pairs: reward 'judge' raised KeyError: 'lost'$"):
        score(judge, [Problem((5,))], [[1]], "pairs")


def test_the_best_and_the_worst_have_a_reward() -> None:
    nan = math.nan
    assert best_and_worst(torch.tensor([nan, 1.0, 3.0, nan, 2.0])) == (2, 1)
    assert best_and_worst(torch.tensor([nan, -2.0])) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("72", "72"),
        (" 72\n", "72"),
        ("48 + 24 = 72\n#### 72", "72"),
        (72, "72"),
        (72.0, "72"),
        (3.8, "3.8"),
        (0, "0"),
        (numpy.int64(7), "7"),
        (numpy.float64(0.5), "0.5"),
        (Decimal("3.80"), "3.80"),
        *((bad, None) for bad in (None, "", " \n", "so it is\n####  ", ["72"], [], {"a": 1})),
        *((bad, None) for bad in (True, math.nan, math.inf, Decimal("nan"), 1j, b"72")),
        (numpy.array(["72"]), None),
    ],
)
def test_an_answer_is_text_or_a_number(answer: Any, text: str | None) -> None:
    written = f"<answer>{text}</answer>"
    if text is None:
        with pytest.raises(ValueError, match=r"^answer: expected text or a number, got "):
            answer_text(answer)
        with pytest.raises(ValueError, match=r"^answer: expected text or a number, got "):
            accuracy("no answer", answer)
    else:
        assert answer_text(answer) == text
        assert accuracy(written, answer) == 1 and accuracy("<answer>1</answer>", answer) == 0


THOUGHT = "so</think><answer>72</answer>"


@pytest.mark.parametrize(
    ("prompt", "completion", "formatted", "right"),
    [
        ("Q<think>", THOUGHT, 1, 1),
        ("Q<think>\n", THOUGHT, 1, 1),
        ("Q <think> \n\n", "\n" + THOUGHT, 1, 1),
        ("Q", THOUGHT, 0, 1),
        ("Q", "<think>" + THOUGHT, 1, 1),
        # a thought may not be begun twice
        ("Q<think>\n", "<think>" + THOUGHT, 0, 1),
        ("Q<think>\n", "</think><answer>72</answer>", 0, 1),
        # its end is missing, so the answer is in the thought
        ("Q<think>\n", "so <answer>72</answer>", 0, 0),
        ("Q<think>\n\n</think>\n", "<think>" + THOUGHT, 1, 1),
        # tags that a prompt only speaks of
        ("Put it between <think> and </think>. Q", THOUGHT, 0, 1),
        ("Begin with <think>. Q", THOUGHT, 0, 1),
        ("<think>" * 9 + " Q", THOUGHT, 0, 1),
    ],
)
def test_a_thought_that_the_prompt_opens_is_part_of_the_completion(
    prompt: str, completion: str, formatted: int, right: int
) -> None:
    pytest.importorskip("math_verify")
    tokenizer = ByT5Tokenizer()

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    # not alone: the next completion's prompt ends otherwise
    problems = [Problem(tuple(ids(text)), "72") for text in (prompt, "Q")]
    completions = [ids(completion), ids("<think>" + THOUGHT)]
    reward = FunctionReward(tokenizer, rule_rewards("format", "accuracy", "math"))
    parts = score(reward, problems, completions, "step 1").parts
    assert [part[0] for part in parts.values()] == [formatted, right, right]
    assert all(part[1] == 1 for part in parts.values())


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, 1j])
def test_weights_are_finite_numbers(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"weights\['mine'\]: expected a finite number, got "):
        FunctionReward(build_tokenizer(), {"mine": lambda **_: [1]}, {"mine": weight})


def test_without_a_reward_there_is_nothing_to_add_up() -> None:
    with pytest.raises(ValueError, match="functions: expected at least one, got none"):
        FunctionReward(build_tokenizer(), {})
