"""GRPO in one file, from prompt to update: python examples/grpo_minimal.py

A Llama of 21,000 parameters with fresh weights learns to repeat a digit: after "4:" it should write
"444444". It is never shown how; it only gets a reward for each right digit. On a CPU this takes
a few seconds. Read `main` first, then the functions in the order in which it calls them.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_core import RECIPES, fused_linear_loss, group_advantages, linear_token_logp

# the vocabulary: ten digits, ":", the end of a text, and padding
COLON, END, PAD, VOCABULARY = 10, 11, 12, 13
PROMPTS, GROUP = 10, 8  # prompts per step, completions per prompt
STEPS, UPDATES = 50, 2  # rollouts, and optimizer steps made from each
NEW_TOKENS = 6
LEARNING_RATE = 6e-3
OBJECTIVE = RECIPES["dapo"]  # clipped ratio, mean over tokens; see `python -m grpo_core.recipes`


def build_model() -> LlamaForCausalLM:
    """The policy: any model of transformers works the same way."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def draw_prompts(rng: random.Random) -> Tensor:
    """Prompts such as "4:", each `GROUP` times in a row, [S, 2]."""
    digits = [rng.randrange(10) for _ in range(PROMPTS)]
    return torch.tensor([[digit, COLON] for digit in digits for _ in range(GROUP)])


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor) -> Tensor:
    """Rollout: one completion per prompt, sampled from the policy. Returns prompts and completions.

    top_k=0 switches off a default of transformers, so that the policy itself is sampled.
    """
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
    )


def completion_mask(ids: Tensor) -> Tensor:
    """[S, T − 1] bool: the targets that the model wrote, up to and including the first END.

    The target of position t is the token at t + 1, hence one column less than `ids`.
    """
    is_end = ids == END
    after_end = is_end.cumsum(1) - is_end.long() > 0
    mask = ~after_end[:, 1:]
    mask[:, 0] = False  # the ":" of the prompt
    return mask


def score(ids: Tensor) -> Tensor:
    """Reward of each completion [S]: the share of right digits."""
    right = ids[:, 2:] == ids[:, :1]
    return right.sum(1) / NEW_TOKENS


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """[S, T − 1, D]: the states from which the tokens 1 … T − 1 are predicted."""
    return model.model(ids).last_hidden_state[:, :-1]


def update(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    advantage: Tensor,
    old_logp: Tensor,
) -> float:
    """One optimizer step; returns the largest ratio.

    Only chunks of the logits [S, T − 1, V] are in memory at a time.
    """
    out = fused_linear_loss(
        hidden_states(model, ids),
        model.lm_head.weight,
        ids[:, 1:],
        objective=OBJECTIVE,
        advantage=advantage,
        old_logp=old_logp,
        mask=completion_mask(ids),
    )
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return out.metrics["ratio_max"].item()


def main() -> None:
    rng, model = random.Random(0), build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        ids = sample(model, draw_prompts(rng))
        rewards = score(ids)
        # how much better than the mean of its group a completion is, in standard deviations
        advantage = group_advantages(rewards, group_size=GROUP)
        # of the policy that sampled; from the second update on the ratio to it differs from 1
        with torch.no_grad():
            states = hidden_states(model, ids)
            old_logp = linear_token_logp(states, model.lm_head.weight, ids[:, 1:]).logp
        for _ in range(UPDATES):
            largest = update(model, optimizer, ids, advantage, old_logp)
        if step % 5 == 0 or step == 1:
            text = "".join("0123456789:.?"[token] for token in ids[0].tolist())
            print(f"step {step:2}: reward {rewards.mean():.3f}, ratio up to {largest:.2f}, {text}")


if __name__ == "__main__":
    main()
