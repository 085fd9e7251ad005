"""`model.generate` with fewer computations: the same completions from fewer rows of the batch.

A prompt that occurs several times is read once, and its keys and values are repeated. Finished
completions leave the batch: their tokens are padding whatever the model computes. New keys and
values are written behind those before, which are not copied for every token.

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
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_core.trainer.sharding import unwrap_peft

# fewer rows take hardly less time, and MKL rounds their products differently
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

    It has no effect where the cache holds other things than keys and values, as Mamba's, where the
    forward gets other matrices than those of S rows, and on weights of less than float32, whose
    products depend on the number of rows enough to change tokens.
    """
    rows, base = _Rows(prompts, torch.tensor(ends, device=model.device)), unwrap_peft(model)
    with (
        base.register_forward_pre_hook(rows.before, with_kwargs=True),
        base.register_forward_hook(rows.after, with_kwargs=True),
    ):
        yield


class _Rows:
    """Hooks around a forward, which computes `rows`; row s gets the logits at `place[s]`."""

    def __init__(self, prompts: Sequence[Sequence[int]], ends: Tensor) -> None:
        number: dict[tuple[int, ...], int] = {}
        place = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
        self.place = torch.tensor(place, device=ends.device)
        self.rows = torch.tensor([place.index(n) for n in number.values()], device=ends.device)
        self.finished = torch.zeros(len(place), dtype=torch.bool, device=ends.device)
        self.ends, self.forwards, self.is_known = ends, 0, False

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of the rows to compute."""
        S = len(self.place)
        if not self.forwards:
            self.is_known = _is_known(module, kwargs, S)
            if self.is_known and "logits_to_keep" in kwargs:
                # enough rows for the head as well; the last ones are read
                kwargs["logits_to_keep"] = -(-min(MIN_ROWS, S) // len(self.rows))
        elif self.is_known:
            self.leave(kwargs["input_ids"][:, -1], kwargs["past_key_values"])
        self.forwards += 1
        if self.is_known and len(self.rows) < S:
            for name, value in kwargs.items():
                if isinstance(value, Tensor) and value.ndim == 2:
                    kwargs[name] = value[self.rows]
        return args, kwargs

    def leave(self, token: Tensor, cache: Any) -> None:
        """Takes finished rows out of batch and cache once they are many; `token`: the last, [S]."""
        self.finished |= torch.isin(token, self.ends)
        finished = self.finished[self.rows]
        count = max(int((~finished).sum()), MIN_ROWS)
        if count <= SHARE_LEFT * len(finished):
            # the unfinished ones, and finished ones up to MIN_ROWS
            kept = finished.long().argsort(stable=True)[:count]
            cache.reorder_cache(kept)
            self.rows = self.rows[kept]
            # of a row that has left any logits will do
            self.place = torch.zeros_like(self.place)
            self.place[self.rows] = torch.arange(count, device=kept.device)

    def after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Gives `generate` the logits of all rows, [S, 1, V]."""
        if not self.is_known:
            return
        S, cache = len(self.place), output.past_key_values
        last = output.logits[:, -1:]
        output.logits = last[self.place] if len(self.rows) < S else last
        if self.forwards == 1:
            # from now on each row has its own tokens
            cache.reorder_cache(self.place)
            for n, layer in enumerate(cache.layers):
                if type(layer) is DynamicLayer:
                    cache.layers[n] = BufferedLayer(layer)
            self.rows = self.place = torch.arange(S, device=self.place.device)


def _is_known(model: PreTrainedModel, kwargs: dict[str, Any], S: int) -> bool:
    """Whether all that a forward reads of the rows are matrices of S rows, keys and values."""
    cache: Any = kwargs.get("past_key_values")
    shapes = [value.shape for value in kwargs.values() if isinstance(value, Tensor)]
    return (
        model.dtype.itemsize >= torch.float32.itemsize
        and type(cache) is DynamicCache
        and {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        and all(len(shape) < 2 or (len(shape) == 2 and shape[0] == S) for shape in shapes)
    )


class BufferedLayer(DynamicLayer):
    """Keys and values [S, heads, T, D] of a layer, at the beginning of buffers with more room."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.buffers: list[Tensor] = []

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.buffers = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Appends keys and values; returns those of all tokens."""
        start, new = self.keys.shape[-2], key_states.shape[-2]
        if not self.buffers or start + new > self.buffers[0].shape[-2]:
            self.buffers = [pad(held, (0, 0, 0, new + ROOM)) for held in (self.keys, self.values)]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, start, new).copy_(states)
        self.keys, self.values = (held.narrow(-2, 0, start + new) for held in self.buffers)
        return self.keys, self.values
