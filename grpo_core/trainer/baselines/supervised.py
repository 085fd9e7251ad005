"""Supervised training: next-token loss on whole texts, or on completions only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from grpo_core.cli.options import check_at_least, check_warmup
from grpo_core.trainer.batch import TokenRows, find_rows
from grpo_core.trainer.generation import check_context
from grpo_core.trainer.optimizer import adamw, set_learning_rate

Item = TypeVar("Item")


class Example(NamedTuple):
    """Token ids of a prompt and of a completion with its end token."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """Options of `optimize`.

    Attributes:
        steps: updates.
        batch_size: items per update.
        learning_rate: the peak.
        warmup_steps: 5 by default, or all steps but the last.
        max_grad_norm: gradients are clipped to this norm.
        final_learning_rate: after the last step, as a share of the peak.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int | None = None
    max_grad_norm: float = 1.0
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "batch_size")
        check_warmup(self)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(OptimizeConfig):
    """Options of `train_supervised`; `prompt_loss`: whether prompt tokens are targets too."""

    prompt_loss: bool
    final_learning_rate: float = 0.1


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

    def metrics_of(batch: list[Example]) -> dict[str, Tensor]:
        rows = pad_examples(batch, config.prompt_loss, model.device)
        return {"loss": cross_entropy(rows.logits(model).float(), rows.target)}

    history = optimize(model, examples, config, metrics_of, seed=seed, label=label)
    return [metrics["loss"] for metrics in history]


def check_lengths(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raises ValueError for an example of more tokens than the model has positions."""
    prompt, completion = max(examples, key=lambda each: len(each.prompt) + len(each.completion))
    check_context(model.config, len(prompt), len(completion), "prompt + completion")


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


def optimize(
    model: PreTrainedModel,
    items: Sequence[Item],
    config: OptimizeConfig,
    metrics_of: Callable[[list[Item]], dict[str, Tensor]],
    *,
    seed: int,
    label: str,
) -> list[dict[str, float]]:
    """Trains in place by AdamW with warm-up, linear decay and clipping; a new order every epoch.

    Args:
        model: to train.
        items: to draw batches from.
        config: of the run.
        metrics_of: maps a batch to 0-dim metrics; "loss" is minimised.
        seed: of the order.
        label: of the progress bar.

    Returns:
        The metrics of every step.
    """
    optimizer = adamw(model.parameters(), config.learning_rate)
    rng = random.Random(seed)
    queue: list[Item] = []
    history = []
    progress = tqdm(range(config.steps), desc=label, unit="step")
    for step in progress:
        if len(queue) < config.batch_size:
            queue = rng.sample(list(items), len(items))
        batch = [queue.pop() for _ in range(min(config.batch_size, len(queue)))]
        set_learning_rate(optimizer, config, step, config.final_learning_rate)

        metrics = metrics_of(batch)
        metrics["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        values = torch.stack([value.detach() for value in metrics.values()]).tolist()
        history.append(dict(zip(metrics, values, strict=True)))
        progress.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
    return history
