"""`model.generate` with fewer computations: the same completions from fewer rows of the batch.

- A prompt that occurs several times is read once; its keys and values are then repeated.
- Finished completions leave the batch: their tokens are padding whatever the model computes.
- New keys and values are written behind those before, which are not copied for every token.

`generate` still samples from scores [S, V], so that torch's generator draws the same numbers. On a
CPU a row of a float32 product does not depend on the number of rows, from `MIN_ROWS` on, so that
log-probabilities are the same bits. Where it does (a low rank, a GPU), they differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_core.trainer.sharding import unwrap_peft

# fewer rows take hardly less time, and MKL rounds their products in another way
MIN_ROWS = 16
# finished rows leave together, since the keys and values of the others are then copied
SHARE_LEFT = 0.75
# tokens that a full buffer grows by
ROOM = 64


@contextmanager
def fewer_rows(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ends: Sequence[int]
) -> Iterator[None]:
    """Context for one call of `model.generate` with these prompts, padded left.

    It has no effect on models whose cache has other layers than keys and values of single tokens,
    such as Mamba, or whose forward gets other matrices than those of S rows; nor on weights of less
    than float32, whose products depend on the number of rows enough to change tokens.

    Args:
        model: a causal language model, with an adapter or not.
        prompts: S lists of token ids.
        ends: token ids that end a completion.
    """
    if model.dtype.itemsize < torch.float32.itemsize:
        yield
        return
    rows = _Rows(prompts, torch.tensor(ends, device=model.device))
    base = unwrap_peft(model)
    before = base.register_forward_pre_hook(rows.before, with_kwargs=True)
    after = base.register_forward_hook(rows.after, with_kwargs=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Rows:
    """Hooks around a forward: which rows of the batch it computes, and where each row's result is.

    Attributes:
        rows: the rows that the next forward computes, in order.
        place: [S] int64, the position in `rows` of each row; 0 of finished rows that have left.
        finished: [S] bool.
        is_known: whether the model can compute fewer rows; None before its first forward.
        has_read_prompts: whether that forward is done.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], ends: Tensor) -> None:
        number: dict[tuple[int, ...], int] = {}
        place = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
        self.place = torch.tensor(place, device=ends.device)
        self.rows = torch.tensor([place.index(n) for n in number.values()], device=ends.device)
        self.finished = torch.zeros(len(place), dtype=torch.bool, device=ends.device)
        self.ends = ends
        self.is_known: bool | None = None
        self.has_read_prompts = False

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the rows to compute."""
        S = len(self.place)
        if self.is_known is None:
            self.is_known = _is_known(kwargs, S)
            if self.is_known and "logits_to_keep" in kwargs:
                # enough rows for the head as well; the last ones are read
                kwargs["logits_to_keep"] = -(-min(MIN_ROWS, S) // len(self.rows))
        elif self.is_known:
            self.leave(kwargs["input_ids"][:, -1], kwargs["past_key_values"])
        if not self.is_known or len(self.rows) == S:
            return None
        is_matrix = {name: isinstance(v, Tensor) and v.ndim == 2 for name, v in kwargs.items()}
        return args, {n: v[self.rows] if is_matrix[n] else v for n, v in kwargs.items()}

    def leave(self, token: Tensor, cache: DynamicCache) -> None:
        """Takes finished rows out of the batch, once they are many.

        Args:
            token: [S] int64, the last tokens.
            cache: keys and values of `rows`.
        """
        self.finished |= torch.isin(token, self.ends)
        finished = self.finished[self.rows]
        count = max(int((~finished).sum()), MIN_ROWS)
        if count > SHARE_LEFT * len(finished):
            return
        # the unfinished ones, or some more
        kept = finished.long().argsort(stable=True)[:count].sort().values
        cache.reorder_cache(kept)
        self.rows = self.rows[kept]
        self.place = torch.zeros_like(self.place)
        self.place[self.rows] = torch.arange(count, device=kept.device)

    def after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The logits of all rows, [S, 1, V]."""
        if not self.is_known:
            return output
        S, cache = len(self.place), output.past_key_values
        output.logits = output.logits[:, -1:]
        if len(self.rows) < S:
            output.logits = output.logits[self.place]
        if not self.has_read_prompts:
            # from now on each row has its own tokens
            if len(self.rows) < S:
                cache.reorder_cache(self.place)
            cache.layers = [_with_buffer(layer) for layer in cache.layers]
            self.rows = self.place = torch.arange(S, device=self.place.device)
            self.has_read_prompts = True
        return output


def _is_known(kwargs: dict[str, Any], S: int) -> bool:
    """Whether all that a forward reads of the rows are matrices of S rows, keys and values."""
    cache = kwargs.get("past_key_values")
    shapes = [value.shape for value in kwargs.values() if isinstance(value, Tensor)]
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    return (
        type(cache) is DynamicCache
        and {type(layer) for layer in cache.layers} <= known
        and all(len(shape) < 2 or (len(shape) == 2 and shape[0] == S) for shape in shapes)
    )


def _with_buffer(layer: Any) -> Any:
    """Keys and values of all tokens in a buffer; those of a window as they are."""
    return BufferedLayer(layer) if type(layer) is DynamicLayer else layer


class BufferedLayer(DynamicLayer):
    """Keys and values [S, heads, T, D], which are the beginning of buffers with room for more."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.buffers: list[Tensor] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the rows by those of the given numbers."""
        super().reorder_cache(beam_idx)
        self.buffers = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values [S, heads, tokens, D]; returns those of all tokens."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            self.buffers = [_longer(held, end + ROOM) for held in (self.keys, self.values)]
        keys, values = self.buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def _longer(held: Tensor, length: int) -> Tensor:
    """A buffer [..., length, D] that begins with the given keys or values."""
    buffer = held.new_empty((*held.shape[:-2], length, held.shape[-1]))
    buffer[..., : held.shape[-2], :] = held
    return buffer
