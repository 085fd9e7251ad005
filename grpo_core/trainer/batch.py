"""Padded sequences to packed rows; the only module that knows about the shift by one.

A language model predicts token t + 1 from the hidden state at t. `TokenRows` lists the N positions
whose prediction is trained. Tokens of prompts, observations and padding never become rows, and the
output matrix is applied to the rows only.

Where a model supports it, sequences are concatenated instead of padded. Transformers marks the
start of a sequence by its position 0. FlashAttention and flex attention then skip the pairs of
tokens between two sequences; other attentions get a mask over all pairs, which is correct but no
cheaper. A model whose state runs on, such as Mamba, mixes the sequences; `separates_sequences`
tests for that with seven tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.backends.kept import Kept
from grpo_core.trainer.config import PaddingFree
from grpo_core.trainer.generation import evaluation_mode
from grpo_core.trainer.rollout import Rollout
from grpo_core.trainer.sharding import unsharded_params, unwrap_peft


@dataclass(frozen=True)
class TokenRows:
    """S padded sequences of length T and the N positions whose next token is a target."""

    ids: Tensor  # [S, T] int64
    attention: Tensor  # [S, T] bool
    sequence: Tensor  # [N] int64, ascending
    column: Tensor  # [N] int64: the target's column minus one
    padding_free: bool = False  # the model gets one concatenated sequence
    kept: Kept | None = None  # ids that each target was sampled from; None: the vocabulary

    @property
    def target(self) -> Tensor:
        """Target tokens, [N] int64."""
        return self.ids[self.sequence, self.column + 1]

    @property
    def mask(self) -> Tensor:
        """[S, T] bool: the positions that are rows; rows are in this order."""
        mask = torch.zeros_like(self.attention)
        mask[self.sequence, self.column] = True
        return mask

    @property
    def hidden_mask(self) -> Tensor:
        """`mask` in the layout of `inputs`: [S, T], or [1, tokens] without padding."""
        return self.mask[self.attention][None] if self.padding_free else self.mask

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        # left padding must not shift positions; padding gets 0 and is never attended to
        positions = (self.attention.long().cumsum(1) - 1).clamp(min=0)
        if self.padding_free:
            ids, positions = (each[self.attention][None] for each in (self.ids, positions))
            return {"input_ids": ids, "position_ids": positions, "use_cache": False}
        attention = self.attention.long()
        inputs = {"input_ids": self.ids, "attention_mask": attention, "position_ids": positions}
        return inputs | {"use_cache": False}

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Hidden states of the rows, [N, D]."""
        hidden = unwrap_peft(model).base_model(**self.inputs).last_hidden_state  # [S, T, D]
        rows: Tensor = hidden[self.hidden_mask]
        return rows

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of the rows, [N, V]."""
        logits: Tensor = unwrap_peft(model).get_output_embeddings()(self.hidden(model))
        return logits


def find_rows(ids: Tensor, attention: Tensor, is_target: Tensor) -> TokenRows:
    """The rows that predict the tokens marked in `is_target` [S, T]; a first token has none."""
    sequence, column = is_target[:, 1:].nonzero(as_tuple=True)
    return TokenRows(ids=ids, attention=attention, sequence=sequence, column=column)


@dataclass(frozen=True)
class Batch:
    """Completions ready for the loss: their rows and the vectors that the objective reads."""

    rows: TokenRows
    advantage: Tensor  # [N] float32
    sampler_logp: Tensor  # [N] float32, nats
    old_logp: Tensor | None = None  # [N] float32, nats
    ref_logp: Tensor | None = None  # [N] float32, nats
    # of prompt_mean: rows of the group in the whole minibatch
    group_rows: Tensor | None = None  # [N] int64
    # critic of PPO: its values at the time of the rollout, and their targets
    value: Tensor | None = None  # [N] float32
    returns: Tensor | None = None  # [N] float32
    is_filler: bool = False  # only keeps ranks in step: no row, no loss

    def select(self, sequences: Tensor) -> Batch:
        """The given sequences (int64), renumbered in ascending order."""
        rows = self.rows
        chosen = torch.zeros(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
        chosen[sequences] = True
        taken = chosen[rows.sequence]
        number = chosen.long().cumsum(0) - 1
        named = vars(self).items()
        vectors: dict[str, Any] = {name: v[taken] for name, v in named if isinstance(v, Tensor)}
        chosen_rows = replace(
            rows,
            ids=rows.ids[chosen],
            attention=rows.attention[chosen],
            sequence=number[rows.sequence[taken]],
            column=rows.column[taken],
            kept=rows.kept and rows.kept.select(taken),
        )
        return replace(self, rows=chosen_rows, **vectors)

    def microbatches(self, tokens: int) -> list[Batch]:
        """Parts of at most `tokens` tokens, each of sequences of similar length.

        Padding counts where the model gets padding. A longer sequence becomes a part of its own.
        With 0 the batch is one part.
        """
        if not tokens:
            return [self]
        attention = self.rows.attention.int()
        starts = attention.argmax(1).tolist()
        ends = (attention.shape[1] - attention.flip(1).argmax(1)).tolist()
        lengths = attention.sum(1).tolist()

        def count(part: list[int]) -> int:
            if self.rows.padding_free:
                return sum(lengths[sequence] for sequence in part)
            width = max(ends[sequence] for sequence in part) - min(starts[each] for each in part)
            return width * len(part)

        parts: list[list[int]] = []
        for sequence in sorted(range(len(ends)), key=lambda each: starts[each] - ends[each]):
            if parts and count([*parts[-1], sequence]) <= tokens:
                parts[-1].append(sequence)
            else:
                parts.append([sequence])
        device = attention.device
        return [self.select(torch.tensor(part, device=device)).trim() for part in parts]

    def trim(self) -> Batch:
        """Removes the columns that are padding in every sequence."""
        rows = self.rows
        used = rows.attention.any(0).nonzero()
        first, end = int(used.min()), int(used.max()) + 1
        trimmed = replace(
            rows,
            ids=rows.ids[:, first:end],
            attention=rows.attention[:, first:end],
            column=rows.column - first,
        )
        return replace(self, rows=trimmed)

    def filler(self) -> Batch:
        """Two tokens without a target, for a rank with fewer microbatches than others."""
        rows = replace(
            self.rows,
            ids=self.rows.ids.new_zeros(1, 2),
            attention=self.rows.attention.new_ones(1, 2),
            sequence=self.rows.sequence[:0],
            column=self.rows.column[:0],
            kept=self.rows.kept and self.rows.kept.select(self.rows.column[:0]),
        )
        none = self.advantage[:0]
        group_rows = None if self.group_rows is None else self.group_rows[:0]
        return Batch(rows, none, sampler_logp=none, group_rows=group_rows, is_filler=True)


def pack(
    rollout: Rollout,
    advantage: Tensor,
    *,
    mask_truncated: bool = False,
    padding_free: bool = False,
) -> Batch:
    """Packs completions and their advantages [S] float32 as rows, without what was not sampled.

    Args:
        mask_truncated: no rows from completions cut off at the length limit (DAPO,
            arXiv 2503.14476, section 3.4).
        padding_free: the model gets the sequences concatenated.
    """
    no_prompt = torch.zeros_like(rollout.prompt_mask)
    is_target = rollout.is_sampled
    if mask_truncated:
        is_target = is_target & ~rollout.truncated[:, None]
    rows = find_rows(
        ids=torch.cat([rollout.prompt, rollout.completion], dim=1),
        attention=torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1),
        is_target=torch.cat([no_prompt, is_target], dim=1),
    )
    kept = rollout.kept and rollout.kept.select(is_target[rollout.is_sampled])
    return Batch(
        rows=replace(rows, padding_free=padding_free, kept=kept),
        advantage=advantage[rows.sequence],
        # a boolean mask and `nonzero` have the same order
        sampler_logp=rollout.sampler_logp[is_target],
    )


@torch.no_grad()
def check_output_matrix(model: PreTrainedModel) -> None:
    """Raises ValueError if logits are capped (Gemma 2) or scaled (Granite) after the product."""
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    everything = torch.ones_like(ids, dtype=torch.bool)
    with evaluation_mode(model):
        logits = find_rows(ids, everything, everything).logits(model)
        expected = model(input_ids=ids).logits[0, :-1]
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            "model: expected logits = get_output_embeddings()(hidden states), got logits that are "
            f"scaled or capped afterwards ({type(model).__name__})"
        )


def is_padding_free(model: PreTrainedModel, mode: PaddingFree, autocast: bool = False) -> bool:
    """Whether the model gets concatenated sequences.

    Args:
        model: any of transformers.
        mode: "auto" for attentions that gain from it and models that support it, "always", "never".
        autocast: the model computes in bfloat16, which FlashAttention requires.

    Raises:
        ValueError: "always" for a model that mixes sequences.
    """
    attention = str(getattr(model.config, "_attn_implementation", ""))
    if mode == "never" or (mode == "auto" and not ("flash" in attention or "flex" in attention)):
        return False
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        separate = separates_sequences(model)
    if mode == "always" and not separate:
        raise ValueError(
            "padding_free: expected a model that keeps concatenated sequences separate, got "
            f"{type(model).__name__} with {attention or 'its own'} attention"
        )
    return separate


@torch.no_grad()
def separates_sequences(model: PreTrainedModel) -> bool:
    """Whether hidden states of concatenated and padded sequences agree within bfloat16."""
    ids = torch.arange(8, device=model.device).view(2, 4) % model.config.vocab_size
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[0, 0] = False
    # the tokens that follow a real token
    rows = find_rows(ids, attention, attention & attention.roll(1, 1))
    with evaluation_mode(model), unsharded_params(model):
        padded = rows.hidden(model).float()
        concatenated = replace(rows, padding_free=True).hidden(model).float()
    return bool((concatenated - padded).norm() <= 0.02 * padded.norm())
