"""A task and a model small enough for a CPU: after "4:" write as many 4s as fit."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS = ["<pad>", "<eos>", ":", *"0123456789"]
PROMPT_LENGTH, NEW_TOKENS = 2, 6


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Characters are tokens."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 21,000 parameters with fresh weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=TOKENS.index("<eos>"),
        pad_token_id=TOKENS.index("<pad>"),
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def rollout(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples a completion of every prompt.

    Returns:
        ids [B, T]: prompts and completions.
        mask [B, T − 1]: 1 where the target is a token of the completion.
        rewards [B]: correct digits divided by the largest possible number.
    """
    given = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(
        **given, do_sample=True, top_k=0, min_new_tokens=1, max_new_tokens=NEW_TOKENS
    )
    written = ids[:, PROMPT_LENGTH:]
    ends = (written == tokenizer.eos_token_id).long()
    alive = ends.cumsum(1) - ends == 0  # up to and including the end
    mask = torch.zeros_like(ids[:, 1:])
    mask[:, PROMPT_LENGTH - 1 :] = alive.long()
    right = (written == ids[:, :1]) & alive
    return ids, mask, right.sum(1) / NEW_TOKENS
