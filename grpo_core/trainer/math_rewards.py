"""Tasks with answers that can be verified, on the libraries that have them.

`math_accuracy` compares answers as mathematics (math-verify), `reasoning_gym_task` takes any data
set of reasoning-gym with its own scoring. Both read a completion's only `<answer>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.answers import same_answer
from grpo_core.trainer.data import problems_of
from grpo_core.trainer.extras import extra
from grpo_core.trainer.rewards import FunctionReward, continued, given_answer
from grpo_core.trainer.rollout import Problem

# how a model is told where its answer belongs; for base models and chat models alike
INSTRUCTION = (
    "Think between <think> and </think>, then give the final answer alone between <answer> and "
    "</answer>."
)


def math_accuracy(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1 where the only `<answer>` equals the true one as mathematics: 0.5, 1/2 and \\frac{1}{2}.

    A true answer such as GSM8K's counts from its last "####" on. Where it is a plain number, a
    calculation that yields it (48+24, \\max(3.8, 3.11), or 144/2 for a whole number) is no answer,
    nor are two numbers.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """
    extra("math_verify", "math_verify is needed here", "'math-verify'")
    pairs = zip(completions, answer, strict=True)
    return [
        float(same_answer(given_answer(text) or "", str(true).rpartition("####")[2]))
        for text, true in pairs
    ]


def reasoning_gym_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int,
    seed: int = 0,
    chat: bool = False,
    **options: Any,
) -> tuple[list[Problem], FunctionReward]:
    """Problems of one of reasoning-gym's data sets, and a reward of 1 for a full score alone.

    Args:
        name: such as "chain_sum" or "gsm_symbolic"; `reasoning_gym.factory.DATASETS` has them all.
        tokenizer: of the model.
        size, seed: how many problems, and which.
        chat: ask by chat messages, with the instruction as system message.
        options: of the data set.

    Returns:
        The problems and their reward, under the name "accuracy".

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: there is no such data set.
    """
    gym = extra("reasoning_gym", "reasoning_gym is needed here", "'reasoning-gym'")
    try:
        data = gym.create_dataset(name, size=size, seed=seed, **options)
    except ValueError as error:
        raise ValueError(f"name: expected a data set of reasoning-gym, got {name!r}") from error
    records = [
        {"prompt": entry["question"], "answer": str(entry["answer"]), "entry": entry}
        for entry in data
    ]

    @continued
    def accuracy(completions: Sequence[str], entry: Sequence[Any], **_: Any) -> list[float]:
        """Some data sets give a part for a wrong answer; that is none here."""
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
