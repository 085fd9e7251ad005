"""DPO on pairs of completions sampled from the model itself.

`sample_pairs` completes every prompt several times and keeps the best and the worst completion if
their rewards differ. `train_preferences` trains on these pairs (arXiv 2305.18290, eq. 7), with
log-probabilities from hidden states, so that no logits of all tokens are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core.linear.logp import linear_logp
from grpo_core.linear.model_head import read_head
from grpo_core.loss.dpo_loss import dpo_loss, sequence_logp
from grpo_core.trainer.baselines.supervised import (
    Example,
    OptimizeConfig,
    check_lengths,
    optimize,
    pad_examples,
)
from grpo_core.trainer.batch import TokenRows, check_output_matrix
from grpo_core.trainer.forward import adapter_off, reference_of
from grpo_core.trainer.rewards import Reward, best_and_worst, score
from grpo_core.trainer.rollout import Problem, Sampling, rollout
from grpo_core.trainer.sharding import unwrap_peft


class Pair(NamedTuple):
    """A prompt, its better and its worse completion: token ids with end tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(OptimizeConfig):
    """Options of `train_preferences`; `beta`: reward per nat of log-ratio."""

    beta: float = 0.1


def sample_pairs(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    reward: Reward,
    sampling: Sampling,
    *,
    group_size: int,
    seed: int = 0,
) -> list[Pair]:
    """The best and the worst completion of every problem whose rewards differ.

    Args:
        model: samples the completions.
        problems: each completed `group_size` times.
        reward: scores the completions.
        sampling: options of the rollout.
        group_size: at least 2.
        seed: of the sampler; torch's global generator is restored.

    Raises:
        ValueError: group_size is too small.
    """
    if group_size < 2:
        raise ValueError(f"group_size: expected at least 2, got {group_size}")
    repeated = [problem for problem in problems for _ in range(group_size)]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = rollout(model, [problem.prompt for problem in repeated], sampling)
    completions = drawn.completions()
    scores = score(reward, repeated, completions, "pairs").total.view(-1, group_size)
    pairs = []
    for group, problem in enumerate(problems):
        best, worst = best_and_worst(scores[group])
        if scores[group, best] > scores[group, worst]:
            of_group = completions[group * group_size :]
            pairs.append(Pair(list(problem.prompt), of_group[best], of_group[worst]))
    return pairs


def train_preferences(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    config: PreferenceConfig,
    *,
    seed: int = 0,
    label: str = "DPO",
) -> list[dict[str, float]]:
    """Trains in place, see `supervised.optimize`.

    Returns:
        For every step: "loss"; "accuracy", the share of pairs whose better completion has the
        larger implied reward; "margin", the mean difference of implied rewards.

    Raises:
        ValueError: there are no pairs, one has more tokens than the model has positions, or the
            model's logits are not a plain product.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none: all rewards are equal")
    check_lengths(model, [Example(p.prompt, max(p.chosen, p.rejected, key=len)) for p in pairs])
    check_output_matrix(model)
    reference = reference_of(model)

    def metrics_of(batch: list[Pair]) -> dict[str, Tensor]:
        examples = [Example(pair.prompt, pair.chosen) for pair in batch]
        examples += [Example(pair.prompt, pair.rejected) for pair in batch]
        rows = pad_examples(examples, prompt_loss=False, device=model.device)
        with torch.no_grad(), adapter_off(reference):
            ref_chosen, ref_rejected = completion_logp(reference, rows).chunk(2)
        chosen, rejected = completion_logp(model, rows).chunk(2)
        out = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta)
        return {"loss": out.loss, "accuracy": out.accuracy, "margin": out.margin.mean()}

    return optimize(model, pairs, config, metrics_of, seed=seed, label=label)


def completion_logp(model: PreTrainedModel, rows: TokenRows) -> Tensor:
    """Σ log π over each completion's tokens, [S] float32, differentiable."""
    head = read_head(unwrap_peft(model).get_output_embeddings())
    logp = linear_logp(rows.hidden(model), head, rows.target).logp
    everything = torch.ones_like(rows.target, dtype=torch.bool)
    return sequence_logp(logp, everything, rows.sequence, sequences=len(rows.ids))
