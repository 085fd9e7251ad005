"""The reward cannot be gamed: every way of half-answering we could think of, by hand."""

from __future__ import annotations

import pytest
import torch

from grpo_core.decimals import build_tokenizer
from grpo_core.rewards import TextReward, accuracy, strict_format
from grpo_core.rollout import Problem

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


def test_text_reward_decodes_drops_end_and_padding_and_adds_up_weights() -> None:
    tokenizer = build_tokenizer()
    texts = [
        "<think>3=3</think><answer>3.8</answer><eos><pad><pad>",
        "<answer>3.8</answer><eos>",
        "<think>3=3</think><answer>3.11</answer>",
    ]
    completions = tokenizer(texts)["input_ids"]
    reward = TextReward(tokenizer, weights={"format": 0.25, "accuracy": 2.0})

    scores = reward([Problem((5,), "3.8")] * 3, completions)

    assert scores.parts["accuracy"].tolist() == [1, 1, 0]
    assert scores.parts["format"].tolist() == [1, 0, 1]
    torch.testing.assert_close(scores.total, torch.tensor([2.25, 2.0, 0.25]))


def test_weights_must_name_rules() -> None:
    with pytest.raises(ValueError, match=r"weights: expected .*, got \['brevity'\]"):
        TextReward(build_tokenizer(), weights={"brevity": 1.0})
