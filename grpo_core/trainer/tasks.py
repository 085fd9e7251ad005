"""Problems of reasoning-gym, scored by the data set itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.cli.options import check_package
from grpo_core.trainer.data import problems_of
from grpo_core.trainer.rewards import FunctionReward
from grpo_core.trainer.rollout import Problem
from grpo_core.trainer.rules import given_answer, prepend_think

# asks base models and chat models for the format that rules expect
INSTRUCTION = (
    "Think between <think> and </think>, then give the final answer alone between <answer> and "
    "</answer>."
)


def reasoning_gym_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int,
    seed: int = 0,
    chat: bool = False,
) -> tuple[list[Problem], FunctionReward]:
    """Problems of a reasoning-gym data set; their reward "accuracy" is 1 for a full score, else 0.

    Args:
        name: such as "chain_sum"; `reasoning_gym.factory.DATASETS` lists them all.
        size: number of problems.
        chat: make chat messages, with the instruction as system message.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: there is no such data set.
    """
    check_package("reasoning_gym", "reasoning_gym", "reasoning-gym")
    import reasoning_gym

    try:
        data = reasoning_gym.create_dataset(name, size=size, seed=seed)
    except ValueError as error:
        raise ValueError(f"name: expected a data set of reasoning-gym, got {name!r}") from error
    records = [
        {"prompt": entry["question"], "answer": str(entry["answer"]), "entry": entry}
        for entry in data
    ]

    @prepend_think
    def accuracy(completions: Sequence[str], entry: Sequence[Any], **_: Any) -> list[float]:
        """Partial scores, which some data sets give to wrong answers, count as 0."""
        given = [given_answer(text) for text in completions]
        return [
            float(answer is not None and data.score_answer(answer, asked) == 1)
            for answer, asked in zip(given, entry, strict=True)
        ]

    if chat:
        problems = problems_of(records, tokenizer, system=INSTRUCTION)
    else:
        problems = problems_of(records, tokenizer, template="{prompt}\n" + INSTRUCTION + "\n")
    return problems, FunctionReward(tokenizer, {"accuracy": accuracy})
