"""From padded sequences to packed rows: the only room that knows of the shift by one.

A language model predicts token t + 1 from the hidden state at t. `Rows` lists the N places where
that prediction counts; prompt and padding tokens never become rows. The output matrix is applied to
those rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.trainer.rollout import Rollout, evaluation_mode
from grpo_core.trainer.sharding import beneath


@dataclass(frozen=True)
class Rows:
    """S padded sequences of length T and the N positions whose next token is a target."""

    ids: Tensor  # [S, T] int64
    attention: Tensor  # [S, T] bool
    sequence: Tensor  # [N] int64, ascending
    column: Tensor  # [N] int64: the target's column less one
    end_to_end: bool = False  # how a model gets them: as one sequence, without the padding

    @property
    def target(self) -> Tensor:
        """The token to be predicted, [N] int64."""
        return self.ids[self.sequence, self.column + 1]

    @property
    def places(self) -> Tensor:
        """[S, T] bool: the hidden states that become rows, which are in this order."""
        places = torch.zeros_like(self.attention)
        places[self.sequence, self.column] = True
        return places

    @property
    def hidden_places(self) -> Tensor:
        """The same where a model has been given `inputs`: [S, T], or [1, tokens] end to end."""
        return self.places[self.attention][None] if self.end_to_end else self.places

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes."""
        # Left padding must not shift positions; padded places get 0 and are never attended to.
        positions = (self.attention.long().cumsum(1) - 1).clamp(min=0)
        if self.end_to_end:
            # a position that is no step of one tells attention that a sequence begins
            return {
                "input_ids": self.ids[self.attention][None],
                "position_ids": positions[self.attention][None],
                "use_cache": False,
            }
        return {
            "input_ids": self.ids,
            "attention_mask": self.attention.long(),
            "position_ids": positions,
            "use_cache": False,
        }

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """What the output matrix is applied to, [N, D]: the backbone over all tokens."""
        hidden = beneath(model).base_model(**self.inputs).last_hidden_state  # [S, T, D]
        rows: Tensor = hidden[self.hidden_places]
        return rows

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Predictions [N, V]: the backbone over all tokens, the output matrix over the rows."""
        logits: Tensor = beneath(model).get_output_embeddings()(self.hidden(model))
        return logits


def rows_of(ids: Tensor, attention: Tensor, is_target: Tensor) -> Rows:
    """The rows that predict the tokens marked in `is_target` [S, T]; a first token has none."""
    sequence, column = is_target[:, 1:].nonzero(as_tuple=True)
    return Rows(ids=ids, attention=attention, sequence=sequence, column=column)


@dataclass(frozen=True)
class Batch:
    """Completions ready for the loss: their rows, and what the objective wants to know of each."""

    rows: Rows
    advantage: Tensor  # [N] float32
    sampler_logp: Tensor  # [N] float32, nats
    old_logp: Tensor | None = None  # [N] float32, nats
    ref_logp: Tensor | None = None  # [N] float32, nats
    # of a critic (PPO): its values when the rollout was made, and what they ought to have been
    value: Tensor | None = None  # [N] float32
    returns: Tensor | None = None  # [N] float32
    is_filler: bool = False  # takes part in a forward and a backward, and in nothing else

    def select(self, sequences: Tensor) -> Batch:
        """The part that belongs to the given sequences (int64), renumbered in ascending order."""
        rows = self.rows
        chosen = torch.zeros(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
        chosen[sequences] = True
        kept = chosen[rows.sequence]
        renumbered = chosen.long().cumsum(0) - 1
        named = vars(self).items()
        vectors: dict[str, Any] = {name: v[kept] for name, v in named if isinstance(v, Tensor)}
        chosen_rows = replace(
            rows,
            ids=rows.ids[chosen],
            attention=rows.attention[chosen],
            sequence=renumbered[rows.sequence[kept]],
            column=rows.column[kept],
        )
        return replace(self, rows=chosen_rows, **vectors)

    def microbatches(self, tokens: int) -> list[Batch]:
        """Parts of at most `tokens` places a model is given, of sequences of like length.

        Padding is counted where there is any. A sequence longer than that is a part of its own. 0
        leaves everything together.
        """
        if not tokens:
            return [self]
        attention = self.rows.attention.long()
        firsts = attention.argmax(1)
        ends = attention.shape[1] - attention.flip(1).argmax(1)
        lengths = attention.sum(1).tolist()
        parts: list[list[int]] = []
        first, end, total = 0, 0, 0
        for sequence in (ends - firsts).argsort(descending=True, stable=True).tolist():
            mine = int(firsts[sequence]), int(ends[sequence])
            wider = min(first, mine[0]), max(end, mine[1])
            total += lengths[sequence]
            places = (wider[1] - wider[0]) * (len(parts[-1]) + 1) if parts else 0
            if not parts or (total if self.rows.end_to_end else places) > tokens:
                parts.append([])
                wider, total = mine, lengths[sequence]
            parts[-1].append(sequence)
            first, end = wider
        device = attention.device
        return [self.select(torch.tensor(part, device=device)).trimmed() for part in parts]

    def trimmed(self) -> Batch:
        """Without the columns that are padding in every sequence."""
        seen = self.rows.attention.any(0).nonzero().squeeze(1)
        first, end = (int(seen[0]), int(seen[-1]) + 1) if seen.numel() else (0, 0)
        rows = self.rows
        trimmed = replace(
            rows,
            ids=rows.ids[:, first:end],
            attention=rows.attention[:, first:end],
            sequence=rows.sequence,
            column=rows.column - first,
        )
        return replace(self, rows=trimmed)

    def filler(self) -> Batch:
        """Two tokens of a sequence, none to be learnt, for a process that has no part left."""
        first = torch.zeros(1, dtype=torch.int64, device=self.rows.ids.device)
        one = self.select(first).trimmed()
        rows = replace(
            one.rows,
            ids=one.rows.ids[:, :2],
            attention=one.rows.attention[:, :2],
            sequence=one.rows.sequence[:0],
            column=one.rows.column[:0],
        )
        none = one.advantage[:0]
        return Batch(rows=rows, advantage=none, sampler_logp=none, is_filler=True)


def pack(
    rollout: Rollout,
    advantage: Tensor,
    *,
    mask_truncated: bool = False,
    end_to_end: bool = False,
) -> Batch:
    """Completions and their advantages [S] float32, as rows.

    Args:
        mask_truncated: those that ran into the length limit are not learnt from (DAPO,
            arXiv 2503.14476, section 3.4).
        end_to_end: a model gets them without padding, see `padding`.
    """
    no_prompt = torch.zeros_like(rollout.prompt_mask)
    learnt = rollout.completion_mask
    if mask_truncated:
        learnt = learnt & ~rollout.truncated[:, None]
    rows = rows_of(
        ids=torch.cat([rollout.prompt, rollout.completion], dim=1),
        attention=torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1),
        is_target=torch.cat([no_prompt, learnt], dim=1),
    )
    return Batch(
        rows=replace(rows, end_to_end=end_to_end),
        advantage=advantage[rows.sequence],
        # A boolean mask and `nonzero` walk the completions in the same order.
        sampler_logp=rollout.sampler_logp[learnt],
    )


@torch.no_grad()
def check_output_matrix(model: PreTrainedModel) -> None:
    """Raises ValueError unless logits are a plain product (Gemma 2 caps them, Granite scales)."""
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    everything = torch.ones_like(ids, dtype=torch.bool)
    with evaluation_mode(model):
        ours = rows_of(ids, everything, everything).logits(model)
        theirs = model(input_ids=ids).logits[0, :-1]
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            "model: expected logits = get_output_embeddings()(hidden states), got logits that are "
            f"scaled or capped afterwards ({type(model).__name__})"
        )
