"""Rollouts from what another program has written, and several rollouts in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.trainer.rollout import Rollout, left_pad


def rollout_of(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logp: Sequence[Sequence[float]],
    *,
    pad: int,
    ends: Sequence[int],
    device: torch.device,
    weight_version: int | None = None,
) -> Rollout:
    """Completions that another program has written, as tensors.

    Args:
        prompts, completions: S lists of token ids, none of them empty.
        logp: log-probabilities of the completions' tokens, nats.
        pad: token id of the padding.
        ends: token ids one of which ends a completion.
        device: of the tensors.
        weight_version: of the weights that wrote them.

    Raises:
        ValueError: a list is empty, or the numbers of tokens and log-probabilities differ.
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


def end_to_end(rollouts: Sequence[Rollout], pad: int) -> Rollout:
    """All their completions in one; the version is that of the first."""
    longest = {
        name: max(getattr(each, name).shape[1] for each in rollouts)
        for name in ("prompt", "completion")
    }

    def widened(each: Rollout, name: str) -> Tensor:
        tensor: Tensor = getattr(each, name)
        if tensor.ndim == 1:
            return tensor
        side = "prompt" if name.startswith("prompt") else "completion"
        gap = longest[side] - tensor.shape[1]
        fill = pad if name == side else 0
        ends = (gap, 0) if side == "prompt" else (0, gap)
        return torch.nn.functional.pad(tensor, ends, value=fill)

    names = [name for name, value in vars(rollouts[0]).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {
        name: torch.cat([widened(each, name) for each in rollouts]) for name in names
    }
    return replace(rollouts[0], **joined)
