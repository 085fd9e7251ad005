"""A model of 11 k parameters and a reward it learns in a second: the share of sevens it writes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_core.trainer.rewards import Scores
from grpo_core.trainer.rollout import Problem

PAD, EOS, SEVEN = 0, 1, 7
VOCABULARY = 16
MAX_NEW_TOKENS = 8


def micro_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Fresh weights; `changes` go to the configuration."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        # Large enough that the untrained model's predictions differ from place to place.
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def draw_problems(count: int, rng: random.Random) -> list[Problem]:
    """Prompts of two to five tokens."""
    return [
        Problem(tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(2, 5))))
        for _ in range(count)
    ]


def share_of_sevens(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
    """How much of the allowed length is the token 7; an early end costs."""
    share = torch.tensor([ids.count(SEVEN) / MAX_NEW_TOKENS for ids in map(list, completions)])
    return Scores(share, {"sevens": share})
