"""PPO with a critic: it learns, its critic learns, and by hand its advantages are GAE's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_core import RECIPES
from grpo_core.trainer.baselines.ppo import CriticConfig, PPOTrainer
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.forward import packed_logp
from grpo_core.trainer.measure import Clock
from grpo_core.trainer.rollout import Sampling, rollout
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]


def trainer(critic: CriticConfig | None = None, **changes: Any) -> PPOTrainer:
    """The micro task; its default is a run that learns it."""
    settings: dict[str, Any] = {
        "objective": RECIPES["ppo"],
        "steps": 30,
        "prompts_per_step": 8,
        "group_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    config = TrainerConfig(**settings | changes)
    return PPOTrainer(micro_model(), draw_problems, share_of_sevens, config, critic=critic)


@pytest.mark.slow
def test_policy_and_critic_learn() -> None:
    run = trainer(CriticConfig(beta=0.0))
    history = run.train()
    assert history[1]["reward"] < 0.15 and history[-1]["reward"] > 0.8
    assert history[1]["value_loss"] > 2 * history[-1]["value_loss"]
    assert {"loss", "critic", "explained_variance"} - history[-1].keys() == {"critic"}
    assert "critic" in history[-1]["seconds"]


def test_advantages_are_those_of_gae_over_rewards_less_the_kl() -> None:
    """One completion by hand: λ = 1, γ = 1, so the return is what is still to come."""
    settings = CriticConfig(beta=0.5, lam=1.0)
    run = trainer(settings, minibatches=1, epochs=2)
    with torch.no_grad():
        run.critic.head.bias.fill_(0.25)
        run.model.lm_head.weight.mul_(1.1)
    torch.manual_seed(0)
    drawn = rollout(run.model, [[3, 4, 5], [6, 7]], Sampling(MAX_NEW_TOKENS))
    rewards = torch.tensor([1.0, -2.0])
    ((part,),) = run.minibatches(drawn, rewards, torch.arange(2))
    assert run.reference is not None and run.reference is not run.model
    ref_logp = packed_logp(run.reference, part.rows, run.config)
    assert not torch.equal(ref_logp, part.old_logp)
    price = 0.5 * (part.old_logp - ref_logp)
    advantage = []
    for sequence in (0, 1):
        mine = part.rows.sequence == sequence
        to_come = price[mine].flip(0).cumsum(0).flip(0)
        expected = rewards[sequence] - to_come
        torch.testing.assert_close(part.returns[mine], expected, rtol=1e-5, atol=1e-6)
        advantage.append(expected - 0.25)
    whole = torch.cat(advantage)
    white = (whole - whole.mean()) / whole.std()
    torch.testing.assert_close(part.advantage, white, rtol=1e-4, atol=1e-5)
    assert (part.value == 0.25).all()


def test_parts_train_the_same_critic() -> None:
    weights = []
    for tokens in (0, 60):
        run = trainer(CriticConfig(learning_rate=1e-3), steps=3, tokens_per_microbatch=tokens)
        run.step()
        weights.append([*run.critic.parameters(), *run.model.parameters()])
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_the_policy_is_not_trained_by_the_critic() -> None:
    """They share no tensor, and the critic's step leaves the policy's gradients empty."""
    run = trainer()
    policy = {tensor.data_ptr() for tensor in run.model.parameters()}
    assert policy.isdisjoint(tensor.data_ptr() for tensor in run.critic.parameters())
    torch.manual_seed(0)
    drawn = rollout(run.model, [[3, 4, 5]] * 4, Sampling(MAX_NEW_TOKENS))
    minibatches = run.minibatches(drawn, torch.ones(4), torch.arange(4))
    before = [weight.clone() for weight in run.model.parameters()]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.update(minibatches[0], Clock())
    for mine, theirs in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(mine, theirs)
    assert run.critic.head.weight.abs().sum() > 0


def test_objectives_that_do_not_fit_are_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="objective: expected no KL term, got 'k3'"):
        trainer(objective=RECIPES["grpo"])
    config = TrainerConfig(objective=RECIPES["ppo"], sampling=Sampling(4))
    with pytest.raises(ValueError, match="checkpoints: expected None"):
        PPOTrainer(micro_model(), draw_problems, share_of_sevens, config, checkpoints=tmp_path)
