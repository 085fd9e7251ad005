"""Rollouts: sampled completions of prompts and their log-probabilities, by `model.generate`.

`SampledLogp` records the sampler's log-probability of each token during generation, so that one
[S, V] tensor of scores is held at a time and never [S, T, V].
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

from grpo_core.trainer.sharding import unsharded_params

# values of the generation fields that leave the distribution unchanged
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
    """A prompt and what rewards need to score its completions.

    Attributes:
        prompt: token ids.
        answer: the correct answer.
        tag: evaluation reports metrics by tag.
        columns: further columns of the data, by name.
        source: the prompt before tokenization, a string or chat messages.
    """

    prompt: tuple[int, ...]
    answer: Any = None
    tag: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. Without top-k, top-p and penalties the policy itself is sampled."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")


@dataclass(frozen=True)
class Rollout:
    """S completions with their end tokens; prompts are padded left, completions right."""

    prompt: Tensor  # [S, T_prompt] int64
    prompt_mask: Tensor  # [S, T_prompt] bool
    completion: Tensor  # [S, T_completion] int64
    completion_mask: Tensor  # [S, T_completion] bool
    sampler_logp: Tensor  # [S, T_completion] float32, nats; 0 where masked
    truncated: Tensor  # [S] bool: the length limit came before an end token
    # version of the sampler's weights, see `engine`; None where it is not tracked
    weight_version: int | None = None

    def select(self, sequences: Tensor | slice) -> Rollout:
        """The given sequences, in the given order."""
        named = vars(self).items()
        parts: dict[str, Any] = {n: v[sequences] for n, v in named if isinstance(v, Tensor)}
        return replace(self, **parts)

    def completions(self) -> list[list[int]]:
        """Token ids without padding, one list per completion."""
        lengths = self.completion_mask.sum(1).tolist()
        return [ids[:length] for ids, length in zip(self.completion.tolist(), lengths, strict=True)]


class SampledLogp(LogitsProcessor):
    """Records the log-probability of each sampled token; does not change the scores.

    The token sampled from the scores of one call is the last input token of the next call.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(input_ids[:, -1])
        self.scores = scores
        return scores

    def record(self, sampled: Tensor) -> None:
        """Appends the log-probabilities [S] of the sampled tokens [S] under the last scores."""
        if self.scores is not None:
            logp = torch.log_softmax(self.scores.float() / self.temperature, dim=-1)
            self.columns.append(logp.gather(1, sampled[:, None]).squeeze(1))


@torch.no_grad()
def rollout(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Rollout:
    """Samples one completion per prompt with torch's global generator; repeat prompts for groups.

    Args:
        model: a causal language model. Its generation config gives the padding and end tokens;
            its other fields are ignored, see `ignored_fields`.
        prompts: S non-empty lists of token ids.
        sampling: length limit and temperature.

    Raises:
        ValueError: a prompt is empty or too long for the model, or the model has no end token.
    """
    pad, ends = special_tokens(model)
    prompt, prompt_mask = left_pad(prompts, pad, model.device)
    check_context(model.config, prompt.shape[1], sampling.max_new_tokens)
    # log-probabilities at the sampling temperature; at 1 for greedy completions
    sampled_logp = SampledLogp(sampling.temperature or 1.0)
    settings = plain_generation(sampling, pad, ends)
    with evaluation_mode(model), unsharded_params(model), generation_defaults(model, settings):
        ids = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=prompt_mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampled_logp]),
        )
    completion = ids[:, prompt.shape[1] :]
    sampled_logp.record(completion[:, -1])
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


def make_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logp: Sequence[Sequence[float]],
    *,
    pad: int,
    ends: Sequence[int],
    device: torch.device,
    weight_version: int | None = None,
) -> Rollout:
    """A rollout from the lists that an inference engine returns.

    Args:
        prompts, completions: S non-empty lists of token ids.
        logp: log-probabilities of the completions' tokens, nats.
        pad: token id of padding.
        ends: token ids that end a completion.
        device: of the tensors.
        weight_version: version of the engine's weights.

    Raises:
        ValueError: a list is empty, or tokens and log-probabilities differ in number.
    """
    for ids, scores in zip(completions, logp, strict=True):
        if not ids or len(ids) != len(scores):
            got = f"{len(ids)} and {len(scores)}"
            raise ValueError(f"completions: expected tokens with a log-probability each, got {got}")
    prompt, prompt_mask = left_pad(prompts, pad, device)
    longest = max(map(len, completions))
    gaps = [longest - len(ids) for ids in completions]
    padded = [[*ids, *[pad] * gap] for ids, gap in zip(completions, gaps, strict=True)]
    scored = [[*scores, *[0.0] * gap] for scores, gap in zip(logp, gaps, strict=True)]
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        completion=torch.tensor(padded, device=device),
        completion_mask=torch.arange(longest, device=device) < lengths[:, None],
        sampler_logp=torch.tensor(scored, dtype=torch.float32, device=device),
        truncated=torch.tensor([ids[-1] not in ends for ids in completions], device=device),
        weight_version=weight_version,
    )


def concat_rollouts(rollouts: Sequence[Rollout], pad: int) -> Rollout:
    """Concatenates rollouts of one weight version, padded to the longest."""
    longest = {
        name: max(getattr(each, name).shape[1] for each in rollouts)
        for name in ("prompt", "completion")
    }

    def widen(each: Rollout, name: str) -> Tensor:
        tensor: Tensor = getattr(each, name)
        if tensor.ndim == 1:
            return tensor
        side = "prompt" if name.startswith("prompt") else "completion"
        gap = longest[side] - tensor.shape[1]
        fill = pad if name == side else 0
        ends = (gap, 0) if side == "prompt" else (0, gap)
        return torch.nn.functional.pad(tensor, ends, value=fill)

    names = [name for name, value in vars(rollouts[0]).items() if isinstance(value, Tensor)]
    tensors: dict[str, Any] = {
        name: torch.cat([widen(each, name) for each in rollouts]) for name in names
    }
    return replace(rollouts[0], **tensors)


def plain_generation(sampling: Sampling, pad: int, ends: list[int]) -> GenerationConfig:
    """A generation config that samples the policy itself, with every field that matters set."""
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, **NEUTRAL}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, eos_token_id=ends, **how
    )


@contextmanager
def generation_defaults(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Context in which `generate` takes its defaults from `settings`, not from the model's config.

    A peft model and the model inside it may both have a generation config.
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
    """Fields of the model's generation config that are set and have no effect on rollouts."""
    used = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    neutral = {**NEUTRAL, "do_sample": True, "temperature": 1.0, "use_cache": True}
    return sorted(
        name
        for name, value in vars(model.generation_config).items()
        if name not in used
        and not name.startswith("_")
        and value not in (None, False, neutral.get(name))
    )


def check_context(
    config: PretrainedConfig,
    prompt: int,
    completion: int,
    names: str = "longest_prompt + max_new_tokens",
) -> None:
    """Raises ValueError if prompt and completion have more tokens than the model has positions.

    Args:
        config: of the model; models without a limit (Bloom, Mamba) pass.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        names: the two options, for the message.
    """
    positions = positions_of(config)
    if positions is not None and prompt + completion > positions:
        raise ValueError(
            f"{names}: expected at most {positions} tokens, the positions of the model, got "
            f"{prompt} + {completion} = {prompt + completion}"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Positions of a model, with a scaled rotary embedding; None without a limit."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    known = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    if not known or known[0] < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # one entry for all layers, or one per kind of layer
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    scaled = [
        int(each["factor"] * (each.get("original_max_position_embeddings") or known[0]))
        for each in ropes
        if each.get("factor")
    ]
    return max(known[0], *scaled, 0)


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
    """Context with dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
