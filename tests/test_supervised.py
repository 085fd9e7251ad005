"""Next-token training: which tokens count, and that it learns what it is shown."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from grpo_core.trainer.baselines.supervised import (
    Example,
    SupervisedConfig,
    train_supervised,
)
from grpo_core.trainer.optimizer import learning_rate_share
from grpo_core.trainer.rollout import Sampling, rollout
from tests.micro import EOS, micro_model

EXAMPLES = [Example([3, 4, 5], [6, 7, EOS]), Example([8, 9], [10, 11, 12, 13, EOS])]


def config(**changes: object) -> SupervisedConfig:
    settings = {
        "steps": 60,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "prompt_loss": False,
    }
    return SupervisedConfig(**{**settings, **changes})


@pytest.mark.parametrize("prompt_loss", [True, False])
def test_the_first_loss_is_the_mean_over_the_tokens_that_count(prompt_loss: bool) -> None:
    surprises = []
    for prompt, completion in EXAMPLES:
        ids = torch.tensor(prompt + completion)
        with torch.no_grad():
            logits = micro_model()(ids[None]).logits[0, :-1]
        each = cross_entropy(logits, ids[1:], reduction="none")
        surprises.append(each if prompt_loss else each[len(prompt) - 1 :])

    losses = train_supervised(
        micro_model(), EXAMPLES, config(prompt_loss=prompt_loss), seed=0, label="test"
    )

    assert losses[0] == pytest.approx(torch.cat(surprises).mean().item(), abs=1e-5)


def test_it_learns_the_examples_by_heart() -> None:
    model = micro_model()
    losses = train_supervised(model, EXAMPLES, config(), seed=0, label="test")
    assert losses[-1] < 0.02
    answers = rollout(model, [prompt for prompt, _ in EXAMPLES], Sampling(8, temperature=0))
    assert answers.completions() == [completion for _, completion in EXAMPLES]


def test_learning_rate_by_hand() -> None:
    shares = [learning_rate_share(step, 6, 2, final=0.2) for step in range(6)]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4])


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps: expected 0 to 5, got 20"):
        config(steps=6, warmup_steps=20)


def test_examples_that_do_not_fit_or_are_not_there_are_refused() -> None:
    """Of 64 positions."""

    def train(*examples: Example) -> None:
        once = config(steps=1, warmup_steps=0)
        train_supervised(micro_model(), examples, once, seed=0, label="test")

    train(EXAMPLES[0], Example([3] * 60, [4] * 4))
    with pytest.raises(ValueError, match=r"prompt \+ completion: expected at most 64 .* 60 \+ 5"):
        train(EXAMPLES[0], Example([3] * 60, [4] * 5))
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        train()
