"""AdamW and its learning rate: linear warm-up, then linear decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from grpo_core.cli.options import warmup


def adamw(weights: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with this project's settings."""
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate_share(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Linear warm-up to 1, then linear decay to `final` after the last step; counts from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (steps - step) / (steps - warmup_steps)
    return final + (1 - final) * left


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: Any, step: int, final: float = 0.0
) -> float:
    """Sets and returns the learning rate of a step, see `learning_rate_share`.

    `config` has `steps`, `warmup_steps` and the peak, `learning_rate`.
    """
    share = learning_rate_share(step, config.steps, warmup(config), final)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * share
    return config.learning_rate * share
