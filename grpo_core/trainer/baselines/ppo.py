"""PPO with a critic, on the trainer of GRPO: what a value model costs and what it gives.

Everything is as in `Trainer` but for the advantage. The price of the distance to the reference is
part of the reward (arXiv 1909.08593), a critic as large as the policy says what a state is worth,
and GAE (arXiv 1506.02438) makes an advantage of every token from both. The critic is trained beside
the policy by the clipped squared error. The policy's loss is the recipe "ppo" (arXiv 1707.06347).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_core.objective.value import gae, rewards_with_kl, value_loss, whiten
from grpo_core.trainer.batch import Batch, Rows
from grpo_core.trainer.clock import Clock
from grpo_core.trainer.distributed import world
from grpo_core.trainer.forward import packed_logp, reference_logp
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.reference_model import reference_of
from grpo_core.trainer.resampling import dealt_out
from grpo_core.trainer.rollout import Rollout
from grpo_core.trainer.trainer import Trainer


@dataclass(frozen=True)
class CriticConfig:
    """What PPO adds to a `TrainerConfig`.

    Attributes:
        beta: price of a nat of KL in the reward; the objective itself has none.
        learning_rate: of the critic, constant.
        gamma, lam: of GAE.
        eps: how far a value may move in an update before its loss is clipped, in units of reward.
    """

    beta: float = 0.01
    learning_rate: float = 1e-3
    gamma: float = 1.0
    lam: float = 0.95
    eps: float = 0.2


class Critic(nn.Module):
    """The policy's backbone, copied, and one number at every place: what is still to come."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        # all states are worth nothing until something is learnt of them
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Rows) -> Tensor:
        """The value before each target is written, [N] float32."""
        hidden = self.backbone(**rows.inputs).last_hidden_state
        values: Tensor = self.head(hidden[rows.hidden_places]).squeeze(1)
        return values.float()


class PPOTrainer(Trainer):
    """As `Trainer`, with objectives whose advantages can be given, such as the recipe "ppo".

    Raises:
        ValueError: the objective has a KL term of its own, checkpoints are asked for, which do not
            hold the critic, or there are several processes, which do not share it.
    """

    critic: Critic
    critic_optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, critic: CriticConfig | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        objective = self.config.objective
        if objective.kl is not None:
            raise ValueError(f"objective: expected no KL of its own, got {objective.kl!r}")
        if self.config.dynamic_sampling != "off":
            got = self.config.dynamic_sampling
            raise ValueError(f"dynamic_sampling: expected 'off', PPO has no groups, got {got!r}")
        if self.checkpoints is not None:
            raise ValueError("checkpoints: expected None, they do not hold the critic")
        if world() > 1:
            raise ValueError(f"processes: expected one, whose critic it is, got {world()}")
        self.critic_config = critic or CriticConfig()
        self.critic = Critic(self.model)
        self.reference = reference_of(self.model) if self.critic_config.beta else None
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(),
            lr=self.critic_config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    def minibatches(self, drawn: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        """As in `Trainer`; the advantage of every token by GAE, whitened over the rollout."""
        config = self.config
        packed = self.packed(drawn, rewards)
        minibatches = [
            [self.with_values(part) for part in whole.microbatches(config.tokens_per_microbatch)]
            for whole in dealt_out(packed, rewards, order, config)
        ]
        parts = [part for minibatch in minibatches for part in minibatch]
        everything = torch.cat([part.advantage for part in parts])
        white = iter(
            whiten(everything, torch.ones_like(everything)).split(
                [len(part.advantage) for part in parts]
            )
        )
        return [[replace(part, advantage=next(white)) for part in m] for m in minibatches]

    @torch.no_grad()
    def with_values(self, part: Batch) -> Batch:
        """A part whose `advantage` is its sequences' reward, with what GAE makes of that."""
        settings, rows = self.critic_config, part.rows
        old_logp, ref_logp = packed_logp(self.model, rows, self.config), None
        if self.reference is not None:
            ref_logp = reference_logp(self.reference, rows, self.config)
        value = self.critic(rows)
        reward = torch.zeros(len(rows.ids), device=value.device)
        reward[rows.sequence] = part.advantage
        padded_logp = _padded(rows, old_logp)
        given = rewards_with_kl(
            reward,
            padded_logp,
            padded_logp if ref_logp is None else _padded(rows, ref_logp),
            rows.places,
            beta=settings.beta,
        )
        advantage, returns = gae(
            given, _padded(rows, value), rows.places, gamma=settings.gamma, lam=settings.lam
        )
        at = rows.sequence, rows.column
        return replace(
            part, old_logp=old_logp, advantage=advantage[at], value=value, returns=returns[at]
        )

    def update(self, parts: Sequence[Batch], clock: Clock) -> Metrics:
        """One step of the policy and one of the critic."""
        metrics = super().update(parts, clock)
        total = sum(len(part.rows.sequence) for part in parts)
        with clock.phase("critic"):
            figures: list[Tensor] = []
            for part in parts:
                assert part.value is not None and part.returns is not None
                values = self.critic(part.rows)
                weight = torch.full_like(values, 1 / max(total, 1))
                found = value_loss(
                    values, part.value, part.returns, weight, eps=self.critic_config.eps
                )
                found.loss.backward()
                share = len(values) / max(total, 1)
                figures.append(torch.stack([found.loss.detach(), share * found.explained_variance]))
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.max_grad_norm)
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad()
            loss, explained = torch.stack(figures).sum(0).tolist()
        return metrics | {"value_loss": loss, "explained_variance": explained}


def _padded(rows: Rows, vector: Tensor) -> Tensor:
    """[N] as [S, T], 0 elsewhere."""
    padded = vector.new_zeros(rows.ids.shape)
    padded[rows.sequence, rows.column] = vector
    return padded
