"""Rollouts: sampled completions of prompts and their log-probabilities, by `model.generate`.

`Recorder` records the sampler's log-probability of each token during generation, so that one
[S, V] tensor of scores is held at a time and never [S, T, V]. Where top-k, top-p or min-p filter
the vocabulary, it also records the ids that they kept: a token was drawn from the softmax over
these, and its ratio compares policies over the same ids.

Source: "Keep Sampling Mask" of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_core.backends.kept import Kept
from grpo_core.cli.options import check_at_least, check_filters
from grpo_core.trainer.decode import fewer_rows
from grpo_core.trainer.generation import (
    check_context,
    evaluation_mode,
    plain_generation,
    special_tokens,
)
from grpo_core.trainer.sharding import unsharded_params


@dataclass(frozen=True)
class Problem:
    """A prompt and what rewards need to score its completions."""

    prompt: tuple[int, ...]  # token ids
    answer: Any = None  # the correct answer
    tag: str = ""  # evaluation reports metrics by tag
    # further columns of the data, by name
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # the prompt before tokenization, a string or chat messages
    source: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. Without filters the policy itself is sampled.

    The filters are applied after the temperature, in the order top_k, top_p, min_p; each one
    renormalises what the one before has kept. (vLLM applies min_p first.)
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # the most likely tokens that together have this probability; 1: all
    top_k: int = 0  # the k most likely tokens and those equal to the last of them; 0: all
    min_p: float = 0.0  # tokens with at least this share of the largest probability; 0: all
    replay: bool = True  # record what the filters kept, for every log-probability of the tokens

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens")
        check_at_least(self, 0, "temperature")
        check_filters(self)

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        filters = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return filters and self.temperature > 0

    @property
    def keeps(self) -> bool:
        """Whether rollouts carry the ids that the filters kept."""
        return self.is_filtered and self.replay

    def processors(self) -> list[LogitsProcessor]:
        """Temperature and filters as transformers applies them."""
        found: list[LogitsProcessor] = []
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.is_filtered and self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.is_filtered and self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.is_filtered and self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class Observed(int):
    """A token id of an environment, in the list of a completion."""


@dataclass(frozen=True)
class Rollout:
    """S completions with their end tokens; prompts are padded left, completions right.

    With an environment (see `environment`) a completion is several turns of the model and the
    observations between them.
    """

    prompt: Tensor  # [S, T_prompt] int64
    prompt_mask: Tensor  # [S, T_prompt] bool
    completion: Tensor  # [S, T_completion] int64
    completion_mask: Tensor  # [S, T_completion] bool
    # [S, T_completion] float32, nats, over the ids that could be drawn; 0 where nothing was sampled
    sampler_logp: Tensor
    # [S] bool: a limit of length or turns came before an end token, or the end of an episode
    truncated: Tensor
    # version of the sampler's weights, see `engine`; None where it is not tracked
    weight_version: int | None = None
    # ids that the filters kept, of the tokens of `is_sampled` row by row; None: all of them
    kept: Kept | None = None
    # of an environment, None without one
    sampled: Tensor | None = None  # [S, T_completion] bool: tokens that the model wrote
    turns: Tensor | None = None  # [S] int64: turns of the model
    earned: Tensor | None = None  # [S] float32: the sum of the environment's rewards

    @property
    def is_sampled(self) -> Tensor:
        """[S, T_completion] bool: the tokens that the model wrote, the only ones to train on."""
        return self.completion_mask if self.sampled is None else self.sampled

    def select(self, sequences: Tensor | slice) -> Rollout:
        """The given sequences, in the given order."""
        named = vars(self).items()
        parts: dict[str, Any] = {n: v[sequences] for n, v in named if isinstance(v, Tensor)}
        if self.kept is not None:
            mask = self.is_sampled
            number = mask.flatten().cumsum(0).view_as(mask) - 1
            parts["kept"] = self.kept.select(number[sequences][mask[sequences]])
        return replace(self, **parts)

    def completions(self) -> list[list[int]]:
        """Token ids without padding, one list per completion; an environment's are `Observed`."""
        lengths = self.completion_mask.sum(1).tolist()
        rows = self.completion.tolist()
        if self.sampled is not None:
            masks = self.sampled.tolist()
            rows = [
                [id if is_sampled else Observed(id) for id, is_sampled in zip(*row, strict=True)]
                for row in zip(rows, masks, strict=True)
            ]
        return [ids[:length] for ids, length in zip(rows, lengths, strict=True)]

    def counts(self) -> dict[str, Tensor]:
        """Of each completion [S]: "length" in sampled tokens, "truncated" as 0 or 1.

        With an environment also "turns" and "observed", the tokens of its observations.
        """
        length = self.is_sampled.sum(1)
        counts = {"length": length, "truncated": self.truncated}
        if self.turns is not None:
            counts |= {"turns": self.turns, "observed": self.completion_mask.sum(1) - length}
        return counts


class Recorder(LogitsProcessor):
    """Records what each token was sampled from; the last processor, which changes no scores.

    The token sampled from the scores of one call is the last input token of the next call.

    Args:
        keeps: record the ids with a finite score as well, 4 bytes each.
    """

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.scores: Tensor | None = None
        self.columns: list[Tensor] = []
        self.sets: list[Kept] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(input_ids[:, -1])
        self.scores = scores
        if self.keeps:
            self.sets.append(Kept.from_mask(scores > -torch.inf))
        return scores

    def record(self, sampled: Tensor) -> None:
        """Appends the log-probabilities [S] of the sampled tokens [S] under the last scores."""
        if self.scores is not None:
            logp = torch.log_softmax(self.scores.float(), dim=-1)
            self.columns.append(logp.gather(1, sampled[:, None]).squeeze(1))

    def kept(self, mask: Tensor) -> Kept | None:
        """The ids kept for the tokens of a mask [S, T], row by row."""
        if not self.keeps:
            return None
        # recorded step by step
        number = torch.arange(mask.numel(), device=mask.device).view(mask.shape[::-1]).T
        return Kept.cat(self.sets).select(number[mask])


@torch.no_grad()
def rollout(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Rollout:
    """Samples one completion per prompt with torch's global generator; repeat prompts for groups.

    Args:
        model: a causal language model. Its generation config gives the padding and end tokens;
            its other fields are ignored, see `generation.ignored_fields`.
        prompts: S non-empty lists of token ids.
        sampling: length limit, temperature and filters.

    Raises:
        ValueError: a prompt is empty or too long for the model, or the model has no end token.
    """
    pad, ends = special_tokens(model)
    prompt, prompt_mask = pad_prompts(prompts, pad, model.device)
    check_context(model.config, prompt.shape[1], sampling.max_new_tokens)
    # log-probabilities at the sampling temperature; at 1 for greedy completions
    recorder = Recorder(sampling.keeps)
    with (
        evaluation_mode(model),
        unsharded_params(model),
        fewer_rows(model, prompts, ends),
        plain_generation(model, sampling.max_new_tokens, sample=sampling.temperature > 0) as config,
    ):
        ids = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=prompt_mask.long(),
            generation_config=config,
            # `generate` would apply those of its configuration after the recorder
            logits_processor=LogitsProcessorList([*sampling.processors(), recorder]),
        )
    completion = ids[:, prompt.shape[1] :]
    recorder.record(completion[:, -1])
    sampler_logp = torch.stack(recorder.columns[: completion.shape[1]], dim=1)

    is_end = torch.isin(completion, torch.tensor(ends, device=completion.device))
    ended_before = is_end.cumsum(1) - is_end.long() > 0
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        completion=completion,
        completion_mask=~ended_before,
        sampler_logp=sampler_logp.masked_fill(ended_before, 0.0),
        truncated=~is_end.any(1),
        kept=recorder.kept(~ended_before),
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
    kept: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Rollout:
    """A rollout from lists of token ids and log-probabilities (nats), as engines return them.

    Args:
        pad: token id of padding.
        ends: token ids that end a completion.
        kept: of every token the ids that the filters kept; None without filters.

    Raises:
        ValueError: a list is empty, or tokens, log-probabilities and sets differ in number.
    """
    for ids, scores, sets in zip(completions, logp, kept or completions, strict=True):
        if not ids or not len(ids) == len(scores) == len(sets):
            got = f"{len(ids)} and {len(scores)}" + (f", and {len(sets)} sets" if kept else "")
            raise ValueError(f"completions: expected tokens with a log-probability each, got {got}")
    prompt, prompt_mask = pad_prompts(prompts, pad, device)
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        completion=_pad(completions, pad).to(device),
        completion_mask=_pad([True] * len(ids) for ids in completions).to(device),
        sampler_logp=_pad(logp).to(device, torch.float32),
        truncated=torch.tensor([ids[-1] not in ends for ids in completions], device=device),
        weight_version=weight_version,
        kept=Kept.from_sets([row for sets in kept for row in sets], device) if kept else None,
    )


def concat_rollouts(rollouts: Sequence[Rollout], pad: int) -> Rollout:
    """Concatenates rollouts of one weight version, padded to the longest."""
    if len(rollouts) == 1:
        return rollouts[0]

    sets = [each.kept for each in rollouts if each.kept is not None]

    def concat(name: str, value: int = 0, side: str = "right") -> Tensor:
        return _pad((row for each in rollouts for row in getattr(each, name)), value, side)

    def join(vectors: Sequence[Tensor | None]) -> Tensor | None:
        known = [vector for vector in vectors if vector is not None]
        return torch.cat(known) if known else None

    return replace(
        rollouts[0],
        prompt=concat("prompt", pad, "left"),
        prompt_mask=concat("prompt_mask", side="left"),
        completion=concat("completion", pad),
        completion_mask=concat("completion_mask"),
        sampler_logp=concat("sampler_logp"),
        kept=Kept.cat(sets) if sets else None,
        truncated=torch.cat([each.truncated for each in rollouts]),
        sampled=None if rollouts[0].sampled is None else concat("sampled"),
        turns=join([each.turns for each in rollouts]),
        earned=join([each.earned for each in rollouts]),
    )


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids [S, T] and mask [S, T] of prompts, padded left."""
    if not prompts or not all(prompts):
        raise ValueError("prompts: expected at least one, none of them empty")
    mask = _pad(([True] * len(prompt) for prompt in prompts), side="left")
    return _pad(prompts, pad, "left").to(device), mask.to(device)


def _pad(rows: Iterable[Any], value: int = 0, side: str = "right") -> Tensor:
    """Lists or vectors of different lengths as one matrix."""
    vectors = [torch.as_tensor(row) for row in rows]
    return pad_sequence(vectors, batch_first=True, padding_value=value, padding_side=side)
