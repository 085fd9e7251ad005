"""On-policy distillation in one file: python examples/distill.py

A teacher of 71,000 parameters has learnt to repeat a digit ("4:444444"). A student of 6,000
parameters with fresh weights learns it from the teacher alone, without rewards or right texts: it
writes completions, and at each of its tokens the KL to the teacher over the whole vocabulary is
minimised. On a CPU this takes a few seconds. Read `main` first.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_core import LossRequest, ReferenceRequest, with_fused_head

# the vocabulary: ten digits, ":", the end of a text, and padding
COLON, END, PAD, VOCABULARY = 10, 11, 12, 13
NEW_TOKENS, BATCH, STEPS = 6, 32, 100
IGNORE = -100  # the target of a token that is not trained


def build_model(hidden_size: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Teacher and student may differ in all sizes, but not in the tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def train_teacher() -> LlamaForCausalLM:
    """By next-token prediction on right texts."""
    teacher, rng = build_model(hidden_size=48, layers=3, seed=1), random.Random(1)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(100):
        digits = draw_digits(rng)
        ids = digits[:, None].repeat(1, NEW_TOKENS + 3)
        ids[:, 1], ids[:, -1] = COLON, END
        logits = teacher(ids).logits[:, 1:-1]
        cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher


def draw_digits(rng: random.Random) -> Tensor:
    """[S] digits to repeat."""
    return torch.tensor([rng.randrange(10) for _ in range(BATCH)])


@torch.no_grad()
def sample(student: LlamaForCausalLM, digits: Tensor) -> Tensor:
    """Prompts such as "4:" and completions by the student, [S, T]."""
    prompts = torch.stack([digits, torch.full_like(digits, COLON)], 1)
    mask = torch.ones_like(prompts)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    return student.generate(prompts, attention_mask=mask, **settings)


def shifted_target(ids: Tensor) -> Tensor:
    """[S, T] the token after each; ignored are the prompt and what follows the first END."""
    is_end = ids == END
    ignored = is_end.cumsum(1) - is_end.long() > 0
    ignored[:, :2] = True
    target = ids.masked_fill(ignored, IGNORE).roll(-1, 1)
    target[:, -1] = IGNORE
    return target


def main() -> None:
    rng = random.Random(0)
    teacher = with_fused_head(train_teacher().eval().requires_grad_(False))
    student = with_fused_head(build_model(hidden_size=16, layers=2, seed=0))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        ids = sample(student, draw_digits(rng))
        target = shifted_target(ids)
        # hidden states and output matrix; the teacher's logits are made chunk by chunk in the loss
        with torch.no_grad():
            reference = teacher(ids, request=ReferenceRequest()).reference
        # reverse KL; RECIPES["opd"].replace(interpolation=0.0) is the forward KL
        out = student(ids, request=LossRequest(target, objective="opd", **reference))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 1:
            right = (ids[:, 2:] == ids[:, :1]).float().mean()
            text = "".join("0123456789:.?"[token] for token in ids[0].tolist())
            print(f"step {step:3}: KL {out.loss.item():.3f} nats, right digits {right:.2f}, {text}")


if __name__ == "__main__":
    main()
