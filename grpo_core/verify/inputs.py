"""The inputs of the checks: kinds of rows, in several memory layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_core.loss.tokens import IGNORE
from grpo_core.objective.objective import Objective
from grpo_core.objective.off_policy import SamplerCorrection
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.recipes import RECIPES

TEMPERATURE = 0.9
# confident rows: the target's logit above the log-sum-exp of all others, nats
LARGEST_MARGIN = 30.0
OFFSET = 1000.0
# distance of old and reference policy, nats: most tokens inside, some outside every clip
SPREAD = 0.2
# the recipes, and terms and plans that no recipe uses
OBJECTIVES: dict[str, Objective] = RECIPES | {
    "exact KL": RECIPES["grpo"].replace(kl="exact", beta=0.3),
    "entropy bonus": RECIPES["grpo"].replace(entropy_coef=0.3),
    "exact KL, entropy": RECIPES["gspo"].replace(kl="exact", beta=0.3, entropy_coef=-0.1),
    "sampler": RECIPES["dapo"].replace(
        factor=PolicyFactor(SamplerCorrection("token", "truncate", 0.8, 1.2))
    ),
}


def one_per_plan(names: list[str]) -> list[str]:
    """Returns the first of these objectives for each plan of kernels."""
    plans: dict[tuple[bool, ...], str] = {}
    for name in names:
        spec = OBJECTIVES[name]
        exact, sampled = spec.kl == "exact", spec.factor.needs_sampler
        of_token = spec.is_token_level and spec.factor.sequence_weight is None
        plan = (of_token, exact, spec.entropy_coef != 0, sampled)
        plans.setdefault(plan, name)
    return list(plans.values())


@dataclass(frozen=True)
class Case:
    """A kind of rows in a memory layout."""

    rows: str  # "ordinary", "confident", "offset +1000", "offset −1000", "−inf logits"
    layout: str  # "padded", "view", "packed"
    inplace: bool = False
    on_policy: bool = False

    def __str__(self) -> str:
        return f"{self.rows}, {'on policy' if self.on_policy else self.layout}"


CASES = (
    Case("ordinary", "padded"),
    Case("ordinary", "view", inplace=True, on_policy=True),
    Case("confident", "view", inplace=True),
    Case("offset +1000", "packed"),
    Case("offset −1000", "view"),
    Case("−inf logits", "packed", inplace=True),
)


@dataclass(frozen=True)
class Sizes:
    """Number of rows, and vocabularies.

    All objectives use the first vocabulary, one objective per plan the others: a formula does not
    depend on the vocabulary.
    """

    sequences: int
    tokens: int
    vocabularies: tuple[int, ...]


# by device: odd sizes of one, several and many tiles; on a GPU those of real models
SIZES = {
    "cpu": Sizes(4, 5, (257, 5003, 32_001)),
    "cuda": Sizes(4, 5, (5003, 32_000, 151_669)),
    "interpreted": Sizes(2, 2, (70, 1101)),
}


@dataclass(frozen=True)
class Batch:
    """A buffer with logits, and the other arguments of a loss."""

    case: Case
    buffer: Tensor  # [B, T, V]; [B, T + 1, V] of a view; [N, V] packed
    arguments: dict[str, Any]

    def logits(self, buffer: Tensor) -> Tensor:
        """Returns the logits in a buffer of this batch."""
        return buffer[:, :-1] if self.case.layout == "view" else buffer

    def needed(self, objective: Objective) -> dict[str, Any]:
        """Returns the arguments that the objective uses."""
        given = dict(self.arguments)
        exact, sampled = objective.kl == "exact", objective.factor.needs_sampler
        del given["ref_logp" if exact else "ref_logits"]
        if not sampled:
            del given["sampler_logp"]
        if self.case.on_policy and not sampled:
            del given["old_logp"]
        return given


def draw_batch(case: Case, dtype: torch.dtype, V: int, sizes: Sizes, device: str) -> Batch:
    """Draws a batch, always the same: masked tokens, groups of two, half the rewards equal."""
    generator = torch.Generator().manual_seed(V)
    B, T = sizes.sequences, sizes.tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    buffer = 2 * normal(B, T + (case.layout == "view"), V)
    logits = buffer[:, :T]
    target = torch.randint(V, (B, T), generator=generator)
    if case.rows == "confident":
        margins = torch.linspace(0, LARGEST_MARGIN, target.numel()).view_as(target)
        logits.copy_(set_margins(logits, target, margins))
    elif case.rows.startswith("offset"):
        logits.add_(OFFSET if "+" in case.rows else -OFFSET)
    elif case.rows == "−inf logits":
        forbidden = torch.rand(logits.shape, generator=generator) < 0.3
        logits.masked_fill_(forbidden.scatter(-1, target[..., None], False), -math.inf)
    buffer = buffer.to(dtype)
    mask = torch.rand(B, T, generator=generator) < 0.9
    logp = torch.log_softmax(buffer[:, :T].double() / TEMPERATURE, -1)
    logp = logp.gather(2, target[..., None]).squeeze(2)
    # probabilities are at most 1
    old_logp, ref_logp = ((logp + SPREAD * normal(B, T)).clamp(max=0).float() for _ in range(2))
    sampler_logp = (old_logp + SPREAD * normal(B, T)).clamp(max=0)
    sampler_logp[0, 0] = math.nan
    target[-1, T // 2 :] = IGNORE
    vectors = {
        "target": target,
        "mask": mask,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
        "ref_logits": buffer[:, :T] + (SPREAD * normal(B, T, V)).to(dtype),
    }
    if case.layout == "packed":
        buffer = buffer.flatten(0, 1)
        vectors = {name: vector.flatten(0, 1) for name, vector in vectors.items()}
        vectors["sequence_id"] = torch.arange(B).repeat_interleave(T)
    vectors["rewards"] = torch.arange(B) * 0.25
    arguments: dict[str, Any] = {name: vector.to(device) for name, vector in vectors.items()}
    arguments |= {"group_size": 2, "normalizer": float(B * T), "temperature": TEMPERATURE}
    return Batch(case, buffer.to(device), arguments)


def set_margins(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """Returns logits whose targets exceed the log-sum-exp of all others by `margins` nats."""
    at = target[..., None]
    others = logits.scatter(-1, at, -math.inf).logsumexp(-1)
    return logits.scatter(-1, at, (others + margins)[..., None])
