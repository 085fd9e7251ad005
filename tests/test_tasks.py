"""Rewards by mathematics and by reasoning-gym, and functions of the usual shape."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from grpo_core.runs.demo.decimals import build_tokenizer
from grpo_core.trainer.data import problems_of
from grpo_core.trainer.rewards import FunctionReward
from grpo_core.trainer.rules import brevity, math_accuracy
from grpo_core.trainer.tasks import reasoning_gym_task

GSM8K = "She sold 48/2 = 24 in May and 48 + 24 = 72 in all.\n#### 72"

# (what stands in <answer>, the true answer, equal)
ANSWERS = [
    ("72", GSM8K, True),
    (" 72 ", GSM8K, True),
    ("72.0", GSM8K, True),
    ("$72", GSM8K, True),
    ("\\boxed{72}", GSM8K, True),
    ("1,234", "1234", True),
    ("0.5", "\\frac{1}{2}", True),
    ("1/2", "0.5", True),
    ("-4", "-4", True),
    ("1+\\sqrt{2}", "\\sqrt{2} + 1", True),
    ("24", GSM8K, False),
    ("72 or 73", GSM8K, False),
    ("71, 72", GSM8K, False),
    ("24+48", GSM8K, False),
    ("48+24=72", GSM8K, False),
    ("70 2", GSM8K, False),
    ("144/2/1", GSM8K, False),
    ("73 - 1", GSM8K, False),
    ("2^3*9", GSM8K, False),
    ("8 \\cdot 9", GSM8K, False),
    ("seventy-two", GSM8K, False),
    ("the answer is 72", GSM8K, True),
    ("72.", GSM8K, True),
    ("$-4$", "-4", True),
    ("\\frac12", "0.5", True),
    # a percentage is its number
    ("20%", "20", True),
    ("2000%", "20", False),
    # what leaves the work to the one who compares
    ("\\max(3.11, 3.8)", "3.8", False),
    ("\\min(72, 73)", GSM8K, False),
    ("\\sqrt{5184}", GSM8K, False),
    ("\\binom{9}{2} 2", GSM8K, False),
    ("\\gcd(144, 72)", GSM8K, False),
    ("\\lim_{x\\to 72} x", GSM8K, False),
    ("144/2", GSM8K, False),
    ("\\frac{144}{2}", GSM8K, False),
    ("2(36)", GSM8K, False),
    ("|-72|", GSM8K, False),
    ("72 \\pm 0", GSM8K, False),
    # more than one number, or a choice
    ("72, 72", GSM8K, False),
    ("\\{72, 73\\}", GSM8K, False),
    ("\\boxed{72} or \\boxed{73}", GSM8K, False),
    ("not 71 but 72", GSM8K, False),
    ("3.8 or 3.11", "3.8", False),
    ("3.11, 3.8", "3.8", False),
    ("", GSM8K, False),
    ("4", "-4", False),
]


def scored(text: str, answer: str) -> list[float]:
    return [math_accuracy(text, answer)]


@pytest.mark.parametrize(("given", "answer", "equal"), ANSWERS)
def test_answers_are_compared_as_mathematics(given: str, answer: str, equal: bool) -> None:
    pytest.importorskip("math_verify")
    assert scored(f"<think>a</think><answer>{given}</answer>", answer) == [float(equal)]


@pytest.mark.parametrize(
    "text",
    [
        "72",
        "<think><answer>72</answer></think>",
        "<answer>72</answer><answer>72</answer>",
        "<answer>71</answer><answer>72</answer>",
        "<think>a</think><answer>72",
        "<answer>72</answer><think>a</think>",
    ],
)
def test_only_the_one_answer_counts(text: str) -> None:
    assert scored(text, GSM8K) == [0.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_off_the_main_thread_as_well() -> None:
    pytest.importorskip("math_verify")
    found: list[Any] = []
    work = threading.Thread(target=lambda: found.append(scored("<answer>0.5</answer>", "1/2")))
    work.start()
    work.join()
    assert found == [[1.0]]


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install math-verify"):
        scored("<answer>0.5</answer>", "1/2")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match="pip install reasoning-gym"):
        reasoning_gym_task("chain_sum", build_tokenizer(), size=1)


def test_a_data_set_of_reasoning_gym() -> None:
    """The full score alone counts: it gives a quarter of it to some wrong answers."""
    pytest.importorskip("reasoning_gym")
    tokenizer = ByT5Tokenizer()
    problems, reward = reasoning_gym_task("chain_sum", tokenizer, size=3, seed=1)
    assert [problem.answer for problem in problems] == ["-4", *[p.answer for p in problems[1:]]]
    texts = [f"<answer>{problem.answer}</answer>" for problem in problems]
    texts[1] = "<answer>0</answer>"
    texts[2] = str(problems[2].answer)
    assert "<answer>" in problems[0].source
    scores = reward(problems, tokenizer(texts)["input_ids"])
    assert scores.parts["accuracy"].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="expected a data set of reasoning-gym, got 'no such'"):
        reasoning_gym_task("no such", tokenizer, size=1)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>-4</answer>", 1),
        # the format's affair
        ("<think></think><answer>-4</answer>", 1),
        ("<think>a</think><answer>-4</answer> or 4", 1),
        ("<think>a</think><answer>-4</answer><answer>4</answer>", 0),
        ("<think><answer>-4</answer></think>", 0),
        ("<think><answer>-4</answer>", 0),
        ("<think>a</think><answer>-4", 0),
        ("<think>a</think><answer>-4 or 4</answer>", 0),
        ("<think>a</think><answer>-5+1</answer>", 0),
        ("-4", 0),
    ],
)
def test_the_score_of_reasoning_gym_cannot_be_gamed(text: str, score: int) -> None:
    pytest.importorskip("reasoning_gym")
    tokenizer = ByT5Tokenizer()
    problems, reward = reasoning_gym_task("chain_sum", tokenizer, size=1, seed=1)
    assert problems[0].answer == "-4"
    assert reward(problems, tokenizer([text])["input_ids"]).total.tolist() == [score]


def test_functions_see_prompts_completions_and_columns() -> None:
    tokenizer = build_tokenizer()
    records = [{"prompt": "3.8", "answer": "3.8", "level": 1}, {"prompt": "9.9", "level": 2}]
    seen: dict[str, Any] = {}

    def first(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, None]

    def level(level: list[int], **_: Any) -> list[float]:
        return [float(number) for number in level]

    reward = FunctionReward(tokenizer, {"first": first, "level": level}, {"level": 0.5})
    scores = reward(problems_of(records, tokenizer), tokenizer(["3", "4"])["input_ids"])
    assert seen == {
        "prompts": ["3.8", "9.9"],
        "completions": ["3", "4"],
        "answer": ["3.8", None],
        "level": [1, 2],
    }
    assert scores.total.tolist() == [1.5, 1.0]
    assert scores.parts["first"][0] == 1 and scores.parts["first"][1].isnan()
    assert scores.parts["level"].tolist() == [1, 2]


def test_bad_functions_and_columns_are_named() -> None:
    tokenizer = build_tokenizer()
    problems = problems_of([{"prompt": "3", "level": 1}, {"prompt": "4"}], tokenizer)
    ids = tokenizer(["3", "4"])["input_ids"]
    with pytest.raises(ValueError, match="every problem to have 'level', 1 of 2 lack it"):
        FunctionReward(tokenizer, {"one": lambda **_: [1, 1]})(problems, ids)
    problems = problems_of([{"prompt": "3"}, {"prompt": "4"}], tokenizer)
    with pytest.raises(ValueError, match=r"'short': expected a list of 2 numbers, .* got 1"):
        FunctionReward(tokenizer, {"short": lambda **_: [1]})(problems, ids)
    with pytest.raises(ValueError, match="weights: expected names among"):
        FunctionReward(tokenizer, {"never": lambda **_: [None]}, {"other": 1.0})


def test_brevity_falls_off_beyond_its_target() -> None:
    lengths = (0, 100, 150, 200, 500)
    found = [brevity("a" * length, "", target=100) for length in lengths]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]))
