"""Sequences end to end in the place of padded ones, where a model can tell them apart.

Transformers knows by the positions where a sequence begins. FlashAttention and flex attention then
skip what lies between two sequences, so that padding costs nothing; the others get a mask over all
pairs of tokens, right but no cheaper. A model with a state that runs on, such as Mamba's, mixes the
sequences, which a trial of seven tokens shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from grpo_core.trainer.batch import rows_of
from grpo_core.trainer.config import PaddingFree
from grpo_core.trainer.rollout import evaluation_mode
from grpo_core.trainer.sharding import whole_weights


def is_padding_free(model: PreTrainedModel, wish: PaddingFree, autocast: bool = False) -> bool:
    """Whether a model is given sequences end to end.

    Args:
        model: any of transformers.
        wish: "auto" where its attention gains by it and it can be done, "always", "never".
        autocast: it computes in bfloat16, which FlashAttention asks for.

    Raises:
        ValueError: always, by a model that mixes them.
    """
    attention = str(getattr(model.config, "_attn_implementation", ""))
    if wish == "never" or (wish == "auto" and not ("flash" in attention or "flex" in attention)):
        return False
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        apart = keeps_apart(model)
    if apart:
        return True
    if wish == "always":
        raise ValueError(
            "padding_free: expected a model that keeps sequences in one row apart, got "
            f"{type(model).__name__} with {attention or 'its own'} attention"
        )
    return False


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether hidden states end to end are those of padded sequences, within bfloat16."""
    ids = torch.arange(8, device=model.device).view(2, 4) % model.config.vocab_size
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[0, 0] = False
    # what comes after a real token
    padded = rows_of(ids, attention, attention & attention.roll(1, 1))
    with evaluation_mode(model), whole_weights(model):
        theirs = padded.hidden(model).float()
        ours = replace(padded, end_to_end=True).hidden(model).float()
    return bool((ours - theirs).norm() <= 0.02 * theirs.norm())
