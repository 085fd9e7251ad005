"""Causal language models of every kind of head, a few thousand parameters each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

V = 97
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# family -> what is its own; with random weights logits are small: the cap is low enough to matter
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "HyperCLOVAX": {"logits_scaling": 4.0},
    "GPTNeoX": {},
}


def tiny(family: str = "Llama", **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights."""
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def batch(B: int = 4, T: int = 9) -> tuple[Tensor, dict[str, Any]]:
    """Ids [B, T], and the arguments of a loss over them; the third sequence is short."""
    ids = torch.randint(3, V, (B, T))
    target = pad(ids[:, 1:], (0, 1), value=-100)
    target[:, :2] = -100
    target[2, T // 2 :] = -100
    return ids, {
        "target": target,
        "objective": "dapo",
        "advantage": torch.randn(B),
        "old_logp": -4.6 + 0.3 * torch.randn(B, T),
        "temperature": 0.9,
    }
