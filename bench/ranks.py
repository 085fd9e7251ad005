"""Memory of a GPU and bytes on the wire of a training step with FSDP2, by number of ranks: counted.

    python -m bench.memory --model 7b --ranks 64

Parameters are those of the architecture, built without memory. The trainer keeps weights, gradients
and AdamW's moments in float32 and shards all of them, block by block; embedding and head stay
gathered between forward and backward (`grpo_core.trainer.sharding.shard_model`). Activations are
those that gradient checkpointing keeps, one input a block, in bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

FLOAT32, BFLOAT16, GB = 4, 2, 1e9
# architectures of public models: Qwen2.5 of 0.5, 7 and 32 billion parameters
MODELS: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


class Size(NamedTuple):
    """What a model's shards are counted from."""

    blocks: int
    block: int  # parameters of one
    rest: int  # parameters of embedding, last norm and head
    hidden: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.blocks * self.block + self.rest

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        """Counts the blocks that `shard_model` shards, and the rest."""
        names = set(model._no_split_modules)
        blocks = [m for m in model.modules() if type(m).__name__ in names]
        block = sum(p.numel() for p in blocks[0].parameters())
        total = sum(p.numel() for p in model.parameters())
        rest = total - len(blocks) * block
        return cls(len(blocks), block, rest, model.config.hidden_size)


def size_of(name: str) -> Size:
    """Of one of `MODELS`, built on no device."""
    with torch.device("meta"):
        return Size.of(AutoModelForCausalLM.from_config(Qwen2Config(**MODELS[name])))


def wire(size: Size, ranks: int, backwards: int, forwards: int) -> dict[str, float]:
    """Bytes that a rank receives in a step, by purpose.

    Args:
        backwards: forward and backward passes: epochs · minibatches · microbatches.
        forwards: forward passes alone, for old and reference log-probabilities.
    """
    others = (ranks - 1) / ranks
    blocks, rest = (FLOAT32 * n * others for n in (size.blocks * size.block, size.rest))
    return {
        # the backward gathers the blocks again
        "weights, forward and backward": backwards * (2 * blocks + rest),
        "gradients": backwards * (blocks + rest),
        "weights, log-probabilities": forwards * (blocks + rest),
        "weights for the sampling engine": blocks + rest,
    }


def memory(size: Size, ranks: int, tokens: int, reference: bool) -> dict[str, float]:
    """Bytes that a rank holds in a backward pass, by purpose; `tokens` of a microbatch."""
    share = FLOAT32 * size.parameters / ranks
    return {
        "weights, gradients, AdamW": 4 * share,
        "reference": share * reference,
        # a block and the next one, weights and the gradients of one; embedding and head with theirs
        "gathered": FLOAT32 * (3 * size.block + 2 * size.rest),
        "activations": BFLOAT16 * size.blocks * tokens * size.hidden,
    }


def report(name: str, ranks: int, tokens: int = 16_384) -> str:
    """The tables of a model on 8 ranks, one node, and on as many as asked for."""
    size, columns = size_of(name), sorted({8, ranks})
    lines = [
        f"{name}: {size.parameters / 1e9:.2f} billion parameters, {size.blocks} blocks of "
        f"{size.block / 1e6:.0f} million, embedding and head {size.rest / 1e6:.0f} million",
        "",
        "| GB a rank | " + " | ".join(f"{n} ranks" for n in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    lines += _rows([memory(size, n, tokens, reference=True) for n in columns])
    lines += ["", "| GB received by a rank in a step | " + " | ".join([""] * len(columns)) + " |"]
    lines += ["|---|" + "---:|" * len(columns)]
    lines += _rows([wire(size, n, backwards=1, forwards=2) for n in columns])
    return "\n".join(lines)


def _rows(columns: list[dict[str, float]]) -> list[str]:
    columns = [{**column, "**sum**": sum(column.values())} for column in columns]
    return [
        f"| {key} | " + " | ".join(f"{column[key] / GB:.1f}" for column in columns) + " |"
        for key in columns[0]
    ]
