"""Rollout: prompts in, sampled completions and their log-probabilities out, by `model.generate`.

`generate` brings the key-value cache, left padding and stopping; on the CPU it is as fast as a
hand-written loop. What it does not give cheaply is the sampler's own log-probability of each token,
which `SampledLogp` picks up on the way: one [S, V] table of scores is alive at a time,
never [S, T, V].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
)

from grpo_core.trainer.sharding import whole_weights

# what leaves the distribution as it is, of the fields that transformers may set otherwise
NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}


@dataclass(frozen=True)
class Problem:
    """A prompt, what a right completion says, and a tag by which evaluation groups its figures.

    Attributes:
        prompt: token ids.
        columns: whatever else rewards may want to know of it, by name.
        source: the prompt as it was given, a string or chat messages.
    """

    prompt: tuple[int, ...]
    answer: Any = None
    tag: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; no top-k, top-p or penalty, so the policy itself is sampled."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")


@dataclass(frozen=True)
class Rollout:
    """S completions, each with its end token; prompts padded left, completions right."""

    prompt: Tensor  # [S, T_prompt] int64
    prompt_mask: Tensor  # [S, T_prompt] bool
    completion: Tensor  # [S, T_completion] int64
    completion_mask: Tensor  # [S, T_completion] bool
    sampler_logp: Tensor  # [S, T_completion] float32, nats; 0 where masked
    truncated: Tensor  # [S] bool: the length limit came before an end token
    # of the weights that wrote them, see `rollouts`; None where nobody keeps count
    weight_version: int | None = None

    def select(self, sequences: Tensor | slice) -> Rollout:
        """The part that belongs to the given sequences, in their order."""
        named = vars(self).items()
        parts: dict[str, Any] = {n: v[sequences] for n, v in named if isinstance(v, Tensor)}
        return replace(self, **parts)

    def completions(self) -> list[list[int]]:
        """Token ids without padding, one list per completion."""
        lengths = self.completion_mask.sum(1).tolist()
        return [ids[:length] for ids, length in zip(self.completion.tolist(), lengths, strict=True)]


class SampledLogp(LogitsProcessor):
    """Leaves the scores alone and notes the log-probability of each token once it is drawn.

    The token drawn from one call's scores is the last input of the next call, so every call settles
    the one before it.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.settle(input_ids[:, -1])
        self.scores = scores
        return scores

    def settle(self, drawn: Tensor) -> None:
        """Appends the log-probability [S] of the `drawn` tokens [S] under the scores last seen."""
        if self.scores is not None:
            logp = torch.log_softmax(self.scores.float() / self.temperature, dim=-1)
            self.columns.append(logp.gather(1, drawn[:, None]).squeeze(1))


@torch.no_grad()
def rollout(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Rollout:
    """Draws one completion per prompt, from the global generator; for a group, repeat its prompt.

    Args:
        model: a causal language model. Its generation config names the padding and end tokens;
            every other field of it is ignored, see `ignored_fields`.
        prompts: S lists of token ids, of any lengths but 0.
        sampling: length limit and temperature.

    Returns:
        The completions with the sampler's log-probabilities.

    Raises:
        ValueError: a prompt is empty or too long for the model, see `check_context`, or the model
            names no end token.
    """
    pad, ends = special_tokens(model)
    prompt, prompt_mask = left_pad(prompts, pad, model.device)
    check_context(model.config, prompt.shape[1], sampling.max_new_tokens)
    # The tokens are drawn at `temperature`, so that is where their log-probability belongs; greedy
    # reports it at 1.
    sampled_logp = SampledLogp(sampling.temperature or 1.0)
    settings = plain_generation(sampling, pad, ends)
    with evaluation_mode(model), whole_weights(model), generation_defaults(model, settings):
        ids = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=prompt_mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampled_logp]),
        )
    completion = ids[:, prompt.shape[1] :]
    sampled_logp.settle(completion[:, -1])
    sampler_logp = torch.stack(sampled_logp.columns[: completion.shape[1]], dim=1)

    is_end = torch.isin(completion, torch.tensor(ends, device=completion.device))
    ended_before = is_end.cumsum(1) - is_end.long() > 0
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        completion=completion,
        completion_mask=~ended_before,
        sampler_logp=sampler_logp.masked_fill(ended_before, 0.0),
        truncated=~is_end.any(1),
    )


def plain_generation(sampling: Sampling, pad: int, ends: list[int]) -> GenerationConfig:
    """The policy itself: every field that transformers fills with a default of its own is given."""
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {"do_sample": True, "temperature": sampling.temperature, **NEUTRAL}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, eos_token_id=ends, **drawing
    )


@contextmanager
def generation_defaults(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Within it `generate` fills what a call leaves open from `settings`, not from the model's own.

    An adapter may have a generation config beside that of the model beneath it.
    """
    holders: list[Any] = [m for m in model.modules() if "generation_config" in vars(m)]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


def ignored_fields(model: PreTrainedModel) -> list[str]:
    """The fields of the model's generation config that would change a rollout if they were heeded.

    Those of `Sampling` are among them where they are set.
    """
    heeded = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    neutral = {**NEUTRAL, "do_sample": True, "temperature": 1.0, "use_cache": True}
    return sorted(
        name
        for name, value in vars(model.generation_config).items()
        if name not in heeded
        and not name.startswith("_")
        and value not in (None, False, neutral.get(name))
    )


def check_context(
    config: PretrainedConfig,
    prompt: int,
    completion: int,
    names: str = "longest_prompt + max_new_tokens",
) -> None:
    """Raises ValueError if a prompt and its completion have more tokens than the model positions.

    Args:
        config: of the model; nothing is checked of one without a limit, such as Bloom's or Mamba's.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        names: what these two are called where they come from.
    """
    positions = positions_of(config)
    if positions is not None and prompt + completion > positions:
        raise ValueError(
            f"{names}: expected at most {positions} tokens, the positions of the model, got "
            f"{prompt} + {completion} = {prompt + completion}"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """How many positions a model knows, those of a stretched rotary embedding included."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    known = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    if not known or known[0] < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # one for all layers, or one for each kind of layer
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    stretched = [
        int(each["factor"] * (each.get("original_max_position_embeddings") or known[0]))
        for each in ropes
        if each.get("factor")
    ]
    return max(known[0], *stretched, 0)


def special_tokens(model: PreTrainedModel) -> tuple[int, list[int]]:
    """The padding token and the end tokens; without a padding token, the first end token pads."""
    config = model.generation_config
    end = config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    if not ends:
        raise ValueError(f"model.generation_config.eos_token_id: expected a token id, got {end}")
    pad = config.pad_token_id
    return (ends[0] if pad is None else pad), ends


def left_pad(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids [S, T] and mask [S, T], T the longest prompt."""
    if not prompts or not all(prompts):
        raise ValueError("prompts: expected at least one, none of them empty")
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * gap + list(prompt) for prompt, gap in zip(prompts, gaps, strict=True)]
    mask = [[False] * gap + [True] * (longest - gap) for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
