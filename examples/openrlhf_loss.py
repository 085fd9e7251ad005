"""OpenRLHF's actor step with the loss of openrlhf_adapter.

    python examples/openrlhf_loss.py

OpenRLHF need not be installed. The loop passes the arguments that `ActorPPOTrainer.training_step`
passes, and compares every loss with the formula. Log-probabilities come from `linear_logp`, which
never stores all logits; this works with any loss that takes log-probabilities.
"""

from __future__ import annotations

import torch
from openrlhf_adapter import PolicyLoss
from torch import Tensor
from toy_task import PROMPT_LENGTH, build_model, build_tokenizer, rollout
from transformers import LlamaForCausalLM

from grpo_core import group_advantages, linear_logp

G, STEPS = 8, 12
LOW, HIGH, BOUNDS = 0.2, 0.28, (0.5, 2.0)


def action_log_probs(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """[B, R] log-probabilities of the completion tokens, differentiable."""
    hidden = model.model(ids).last_hidden_state[:, PROMPT_LENGTH - 1 : -1]
    return linear_logp(hidden, model.lm_head.weight, ids[:, PROMPT_LENGTH:]).logp


def formula(log_probs: Tensor, old: Tensor, rollout: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    """PPO's clipped loss, weighted by truncated importance sampling, averaged over tokens."""
    ratio, weight = (log_probs - old).exp(), (old - rollout).exp().clamp(*BOUNDS)
    policy = torch.minimum(ratio * A, ratio.clamp(1 - LOW, 1 + HIGH) * A)
    return -(weight * policy * mask).sum() / mask.sum()


def main() -> None:
    """Two updates on each of a few rollouts."""
    torch.manual_seed(0)
    model, tokenizer = build_model(), build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loss_fn = PolicyLoss(
        LOW,
        HIGH,
        is_correction_level="token",
        is_correction_mode="clip",
        is_correction_threshold=BOUNDS,
    )
    for step in range(STEPS):
        prompts = [f"{digit}:" for digit in range(10) for _ in range(G)]
        ids, mask, rewards = rollout(model, tokenizer, prompts)
        action_mask = mask[:, PROMPT_LENGTH - 1 :]
        advantages = group_advantages(rewards, G)[:, None].expand(action_mask.shape)
        with torch.no_grad():
            old = action_log_probs(model, ids)
        # a sampling engine that differs slightly from the policy
        sampled = old + 0.05 * torch.randn_like(old)
        for _ in range(2):
            log_probs = action_log_probs(model, ids)
            found = loss_fn(log_probs, old, advantages, action_mask, rollout_log_probs=sampled)
            wanted = formula(log_probs, old, sampled, advantages, action_mask)
            assert torch.isclose(found.loss, wanted, atol=1e-6), (found.loss, wanted)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
        if step % 4 == 3:
            print(f"step {step + 1:2}  reward {rewards.mean():.2f}  ", end="")
            print(f"clip_ratio {found.clip_ratio:.3f}  vllm_kl {found.vllm_kl:+.3f}")


if __name__ == "__main__":
    main()
