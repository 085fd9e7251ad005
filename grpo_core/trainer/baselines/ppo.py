"""PPO with a critic, as a subclass of the GRPO trainer.

Only the advantage differs. The KL to the reference is part of the reward (arXiv 1909.08593), a
critic as large as the policy estimates values, and GAE (arXiv 1506.02438) computes an advantage for
every token from both. The critic is trained beside the policy by the clipped squared error. The
policy's loss is the recipe "ppo" (arXiv 1707.06347).
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
from grpo_core.trainer.batch import Batch, TokenRows
from grpo_core.trainer.distributed import world
from grpo_core.trainer.forward import packed_logp, reference_logp, reference_of
from grpo_core.trainer.measure import Clock
from grpo_core.trainer.monitor import Metrics
from grpo_core.trainer.optimizer import adamw
from grpo_core.trainer.rollout import Rollout
from grpo_core.trainer.trainer import Trainer


@dataclass(frozen=True)
class CriticConfig:
    """Options of PPO besides those of `TrainerConfig`.

    Attributes:
        beta: reward subtracted per nat of KL; the objective has no KL term.
        learning_rate: of the critic, constant.
        gamma, lam: discount and λ of GAE.
        eps: clip range of the value in an update, in units of reward.
    """

    beta: float = 0.01
    learning_rate: float = 1e-3
    gamma: float = 1.0
    lam: float = 0.95
    eps: float = 0.2


class Critic(nn.Module):
    """A copy of the policy's backbone with a scalar head: the expected return at each position."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        # values start at 0
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: TokenRows) -> Tensor:
        """The value before each target, [N] float32."""
        hidden = self.backbone(**rows.inputs).last_hidden_state
        values: Tensor = self.head(hidden[rows.hidden_mask]).squeeze(1)
        return values.float()


class PPOTrainer(Trainer):
    """The trainer with a critic, for objectives that take given advantages, such as "ppo".

    Raises:
        ValueError: the objective has a KL term, or a run with checkpoints, dynamic sampling,
            asynchronous rollouts or several ranks are asked for, which the critic does not support.
    """

    def __init__(self, *args: Any, critic: CriticConfig | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        objective = self.config.objective
        if objective.kl is not None:
            raise ValueError(f"objective: expected no KL term, got {objective.kl!r}")
        if self.config.dynamic_sampling != "off":
            got = self.config.dynamic_sampling
            raise ValueError(f"dynamic_sampling: expected 'off', PPO has no groups, got {got!r}")
        if self.config.asynchronous:
            raise ValueError("asynchronous: expected 0, since PPO's old policy is the trainer's")
        if self.checkpoints is not None:
            raise ValueError("checkpoints: expected None, since they do not contain the critic")
        if world() > 1:
            raise ValueError(
                f"PPOTrainer: distributed training is not supported (world size {world()})"
            )
        self.critic_config = critic or CriticConfig()
        self.critic = Critic(self.model)
        self.critic_optimizer = adamw(self.critic.parameters(), self.critic_config.learning_rate)
        if self.critic_config.beta:
            self.reference = reference_of(self.model)

    def advantages(self, rewards: Tensor) -> Tensor:
        """The rewards themselves; `with_logp` replaces them."""
        return rewards

    def minibatches(self, rollout: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        """As in `Trainer`; advantages are whitened over the rollout."""
        minibatches = super().minibatches(rollout, rewards, order)
        parts = [part for minibatch in minibatches for part in minibatch]
        advantage = torch.cat([part.advantage for part in parts])
        advantage = whiten(advantage, torch.ones_like(advantage))
        whitened = iter(advantage.split([len(part.advantage) for part in parts]))
        return [[replace(part, advantage=next(whitened)) for part in m] for m in minibatches]

    @torch.no_grad()
    def with_logp(self, part: Batch) -> Batch:
        """Adds values and returns, and replaces the rewards in `advantage` by those of GAE."""
        rows, settings = part.rows, self.critic_config
        logp = packed_logp(self.model, rows, self.config)
        ref_logp = logp
        if self.reference is not None:
            ref_logp = reference_logp(self.reference, rows, self.config)
        value = self.critic(rows)
        reward = torch.zeros(len(rows.ids), device=value.device)
        reward[rows.sequence] = part.advantage
        token_rewards = rewards_with_kl(
            reward, _padded(rows, logp), _padded(rows, ref_logp), rows.mask, beta=settings.beta
        )
        advantage, returns = gae(
            token_rewards, _padded(rows, value), rows.mask, gamma=settings.gamma, lam=settings.lam
        )
        index = rows.sequence, rows.column
        return replace(
            part, old_logp=logp, advantage=advantage[index], value=value, returns=returns[index]
        )

    def update(self, parts: Sequence[Batch], clock: Clock) -> Metrics:
        """An update of the policy and one of the critic."""
        metrics = super().update(parts, clock)
        total = max(1, sum(len(part.rows.sequence) for part in parts))
        of_parts = []
        with clock.phase("critic"):
            for part in parts:
                assert part.value is not None and part.returns is not None
                values = self.critic(part.rows)
                weight = torch.full_like(values, 1 / total)
                eps = self.critic_config.eps
                out = value_loss(values, part.value, part.returns, weight, eps=eps)
                out.loss.backward()
                explained = out.explained_variance * len(values) / total
                of_parts.append(torch.stack([out.loss.detach(), explained]))
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.max_grad_norm)
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad()
            loss, explained_variance = torch.stack(of_parts).sum(0).tolist()
        return metrics | {"value_loss": loss, "explained_variance": explained_variance}


def _padded(rows: TokenRows, vector: Tensor) -> Tensor:
    """A vector [N] as [S, T], 0 elsewhere."""
    padded = vector.new_zeros(rows.ids.shape)
    padded[rows.sequence, rows.column] = vector
    return padded
