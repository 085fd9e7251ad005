"""A GRPO loop written by hand, and the lines that change: python examples/hand_written_loop.py

Two models with equal weights are trained on the same rollouts, one by plain PyTorch and one by
`fused_linear_loss`. All losses and the final parameters must agree. Prints the reward and the diff
between the two. Start with grpo_minimal.py; this file is for changing a loop that you have.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from toy_task import build_model, build_tokenizer, rollout
from transformers import LlamaForCausalLM

from grpo_core import RECIPES, fused_linear_loss, linear_token_logp

G, PROMPTS, STEPS, UPDATES = 8, 10, 30, 2
EPSILON, BETA, T = 0.2, 0.01, 1.0
LEARNING_RATE = 6e-3
Model = LlamaForCausalLM
Batch = tuple[Tensor, Tensor, Tensor]


# --- in plain PyTorch ----------------------------------------------------------------------------


def naive_logp(model: Model, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    logp = torch.log_softmax(logits.float() / T, -1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0]


def naive_loss(model: Model, batch: Batch, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    ids, mask, rewards = batch
    logp = naive_logp(model, ids)
    ratio = torch.exp(logp - old_logp)
    groups = rewards.view(-1, G)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantage = advantage.view(-1, 1)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    policy = torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return (((BETA * kl - policy) * mask).sum(1) / mask.sum(1)).mean()


# --- with grpo_core ------------------------------------------------------------------------------


def fused_logp(model: Model, ids: Tensor) -> Tensor:
    hidden = model.model(ids).last_hidden_state[:, :-1]
    return linear_token_logp(hidden, model.lm_head.weight, ids[:, 1:], temperature=T).logp


def fused_loss(model: Model, batch: Batch, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    ids, mask, rewards = batch
    hidden = model.model(ids).last_hidden_state[:, :-1]
    out = fused_linear_loss(
        hidden,
        model.lm_head.weight,
        ids[:, 1:],
        objective=RECIPES["grpo"].replace(beta=BETA),
        rewards=rewards,
        group_size=G,
        old_logp=old_logp,
        ref_logp=ref_logp,
        mask=mask,
        temperature=T,
    )
    return out.loss


# --- the loop, which is the same -----------------------------------------------------------------


class Learner:
    """A model, the one it started from, and an optimizer."""

    def __init__(self, logp_of: Callable[..., Tensor], loss_of: Callable[..., Tensor]) -> None:
        self.logp_of, self.loss_of = logp_of, loss_of
        self.model, self.reference = build_model(), build_model()
        # with a smaller eps Adam would amplify rounding errors of tiny gradients
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, eps=1e-3)

    def learn(self, batch: Batch) -> list[float]:
        """Makes `UPDATES` updates on one rollout; returns their losses."""
        with torch.no_grad():
            old_logp = self.logp_of(self.model, batch[0])
            ref_logp = self.logp_of(self.reference, batch[0])
        losses = []
        for _ in range(UPDATES):
            loss = self.loss_of(self.model, batch, old_logp, ref_logp)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def main() -> None:
    """Trains both, compares them, prints the diff."""
    tokenizer = build_tokenizer()
    naive, fused = Learner(naive_logp, naive_loss), Learner(fused_logp, fused_loss)
    furthest = 0.0
    for step in range(STEPS):
        digits = torch.randperm(10)[:PROMPTS].tolist()
        batch = rollout(naive.model, tokenizer, [f"{d}:" for d in digits for _ in range(G)])
        for a, b in zip(naive.learn(batch), fused.learn(batch), strict=True):
            furthest = max(furthest, abs(a - b))
        if step % 5 == 4:
            print(f"step {step + 1:3}  reward {batch[2].mean():.2f}")
    pairs = zip(naive.model.parameters(), fused.model.parameters(), strict=True)
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    moved = zip(naive.model.parameters(), naive.reference.parameters(), strict=True)
    way = max(float((a - b).detach().abs().max()) for a, b in moved)
    print(f"largest difference of a loss {furthest:.1e}, of a parameter {apart:.1e}; ", end="")
    print(f"parameters moved by up to {way:.1e}\n")
    assert furthest < 1e-4 and apart < 1e-3 * way, "the two are not the same training"
    for before, after in ((naive_logp, fused_logp), (naive_loss, fused_loss)):
        lines = (inspect.getsource(function).splitlines() for function in (before, after))
        print("\n".join(list(difflib.unified_diff(*lines, lineterm="", n=1))[2:]))


if __name__ == "__main__":
    main()
