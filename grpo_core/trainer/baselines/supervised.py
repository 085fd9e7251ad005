"""Supervised training: next-token loss on whole texts, or on completions only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from grpo_core.cli.options import check_at_least, check_warmup, warmup
from grpo_core.trainer.batch import TokenRows, find_rows
from grpo_core.trainer.generation import check_context

if TYPE_CHECKING:
    from grpo_core.trainer.baselines.dpo import PreferenceConfig

Item = TypeVar("Item")


class Example(NamedTuple):
    """Token ids of a prompt and of a completion with its end token."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class SupervisedConfig:
    """Configuration of `train_supervised`."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int | None
    prompt_loss: bool  # whether prompt tokens are targets too
    max_grad_norm: float = 1.0
    final_learning_rate: float = 0.1  # as a share of `learning_rate`

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps")
        check_warmup(self)


def learning_rate_share(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Linear warm-up to 1, then linear decay towards `final`; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (steps - step) / (steps - warmup_steps)
    return final + (1 - final) * left


def pad_examples(examples: Sequence[Example], prompt_loss: bool, device: torch.device) -> TokenRows:
    """The examples as rows, padded on the right."""
    longest = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    is_target = torch.zeros_like(attention)
    for row, (prompt, completion) in enumerate(examples):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor([*prompt, *completion])
        attention[row, :length] = True
        is_target[row, 0 if prompt_loss else len(prompt) : length] = True
    return find_rows(ids.to(device), attention.to(device), is_target.to(device))


def check_lengths(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raises ValueError for an example of more tokens than the model has positions."""
    prompt, completion = max(examples, key=lambda each: len(each.prompt) + len(each.completion))
    check_context(model.config, len(prompt), len(completion), "prompt + completion")


def train_supervised(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: SupervisedConfig,
    *,
    seed: int,
    label: str,
) -> list[float]:
    """Trains in place, see `optimize`.

    Returns:
        The loss of every step, nats per token.

    Raises:
        ValueError: there are no examples, or one has more tokens than the model has positions.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    check_lengths(model, examples)

    def loss_of(batch: list[Example]) -> tuple[Tensor, Tensor]:
        rows = pad_examples(batch, config.prompt_loss, model.device)
        loss = cross_entropy(rows.logits(model).float(), rows.target)
        return loss, loss.detach()[None]

    return [loss for (loss,) in optimize(model, examples, config, loss_of, seed=seed, label=label)]


def optimize(
    model: PreTrainedModel,
    items: Sequence[Item],
    config: SupervisedConfig | PreferenceConfig,
    loss_of: Callable[[list[Item]], tuple[Tensor, Tensor]],
    *,
    seed: int,
    label: str,
) -> list[list[float]]:
    """Trains in place by AdamW with warm-up, linear decay and clipping; a new order every epoch.

    Args:
        model: to train.
        items: to draw batches from.
        config: of the run.
        loss_of: maps a batch to its loss and to detached metrics [k], the loss first.
        seed: of the order.
        label: of the progress bar.

    Returns:
        The metrics of every step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    rng = random.Random(seed)
    queue: list[Item] = []
    history = []
    progress = tqdm(range(config.steps), desc=label, unit="step")
    for step in progress:
        if len(queue) < config.batch_size:
            queue = rng.sample(list(items), len(items))
        batch = [queue.pop() for _ in range(min(config.batch_size, len(queue)))]
        share = learning_rate_share(step, config.steps, warmup(config), config.final_learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share

        loss, metrics = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append(metrics.tolist())
        progress.set_postfix(loss=f"{history[-1][0]:.3f}", refresh=False)
    return history
