"""open-instruct's GRPO step with the loss of open_instruct_adapter.

    python examples/open_instruct_loss.py

open-instruct need not be installed. The loop passes the arguments that `grpo_fast.py` passes, masks
and averages the results in the same way, and compares every loss with the formula.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_instruct_adapter import compute_grpo_loss
from torch import Tensor
from toy_task import build_model, build_tokenizer, rollout
from transformers import LlamaForCausalLM

from grpo_core import group_advantages, linear_logp

G, STEPS, BETA = 8, 12, 0.05
CONFIG = SimpleNamespace(loss_fn="dapo", clip_lower=0.2, clip_higher=0.272, kl_estimator=2)


def log_probs(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """[B, T − 1] log-probabilities of the next tokens, differentiable."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    return linear_logp(hidden, model.lm_head.weight, ids[:, 1:]).logp


def formula(new: Tensor, old: Tensor, ref: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    """DAPO's clipped loss and the k3 estimate of the KL, over the number of tokens."""
    ratio, gap = (new - old).exp(), new - ref
    bounded = ratio.clamp(1 - CONFIG.clip_lower, 1 + CONFIG.clip_higher)
    policy = torch.minimum(ratio * A, bounded * A)
    return ((BETA * ((-gap).exp() - 1 + gap) - policy) * mask).sum() / mask.sum()


def main() -> None:
    """Two updates on each of a few rollouts."""
    torch.manual_seed(0)
    model, reference, tokenizer = build_model(), build_model(), build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(STEPS):
        prompts = [f"{digit}:" for digit in range(10) for _ in range(G)]
        ids, mask, rewards = rollout(model, tokenizer, prompts)
        advantages = group_advantages(rewards, G)[:, None].expand(mask.shape)
        with torch.no_grad():
            old, ref = log_probs(model, ids), log_probs(reference, ids)
        for _ in range(2):
            new = log_probs(model, ids)
            pg_loss, clipfrac, kl = compute_grpo_loss(
                new, torch.exp(new - old), advantages, ref, CONFIG, torch.ones_like(new)
            )
            loss = ((pg_loss + BETA * kl) * mask).sum() / mask.sum()
            wanted = formula(new, old, ref, advantages, mask)
            assert torch.isclose(loss, wanted, atol=1e-6), (loss, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 4 == 3:
            share = (clipfrac * mask).sum() / mask.sum()
            print(f"step {step + 1:2}  reward {rewards.mean():.2f}  clipped {share:.3f}  ", end="")
            print(f"kl {float((kl * mask).detach().sum() / mask.sum()):.3f}")


if __name__ == "__main__":
    main()
