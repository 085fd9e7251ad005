"""Log-probability and entropy of rows of hidden states, and what a gradient of them needs later.

One product of 2·n·V·D operations over the rows that are not masked, and with `ahead` a second one,
for dhidden of Σ logp.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_core.kernels.records import RowStats, Slopes
from grpo_core.linear.call import Pass, joined
from grpo_core.linear.head import LinearHead
from grpo_core.linear.memory import Plan, layout_of
from grpo_core.linear.walk import Walk


@dataclass(frozen=True, kw_only=True)
class ScoreCall:
    """Everything of a call but its differentiable tensors.

    Attributes:
        further: of a chunk's logits [n, V] and targets [n], vectors [n] that are wanted besides.
        ahead: makes dhidden of Σ logp at once: where the head is frozen, dlogp only scales it.
        gathered: a context that a backward enters to use the head.
    """

    target: Tensor  # [N] int64
    valid: Tensor | None = None  # [N] bool, the rows that are made; None for all
    temperature: float  # 1 with `heat`
    heat: Tensor | None = None  # [N] float32, temperatures of the rows
    plan: Plan | None
    memory_budget: int | None
    logits_dtype: torch.dtype
    autocast: torch.dtype | None
    kernels: ModuleType
    further: Callable[[Tensor, Tensor], list[Tensor]] | None = None
    ahead: bool = False
    gathered: Callable[[], AbstractContextManager[object]] = nullcontext

    def pass_over(
        self, rows: Tensor | None, hidden: Tensor, head: LinearHead, wanted: tuple[bool, ...]
    ) -> Pass:
        """The walk over some rows; None for all."""
        target = self.target if rows is None else self.target[rows]
        layout = layout_of(
            target.numel(),
            head,
            hidden,
            wanted,
            logits_dtype=self.logits_dtype,
            autocast=self.autocast,
            plan=self.plan,
            memory_budget=self.memory_budget,
        )
        return Pass(
            target=target,
            rows=rows,
            layout=layout,
            wanted=wanted,
            logits_dtype=self.logits_dtype,
            autocast=self.autocast,
            temperature=self.temperature,
            kernels=self.kernels,
            heat=self.heat if self.heat is None or rows is None else self.heat[rows],
        )


class Scored(NamedTuple):
    """What was found, `[n]` of the rows that were made."""

    rows: Tensor | None  # int64, their places among all N; None for all
    stats: RowStats
    at_target: Tensor | None  # the logits there, float32: of the lean plan, see `linear_lean`
    further: list[Tensor]
    dhidden: Tensor | None  # [n, D] float32, of Σ logp

    def over(self, N: int) -> tuple[Tensor, Tensor]:
        """(logp, entropy) `[N]`, 0 elsewhere."""
        place = slice(None) if self.rows is None else self.rows
        # not two views of one tensor, which autograd lets nobody write over
        logp, entropy = (self.stats.logp.new_zeros(N) for _ in range(2))
        logp[place], entropy[place] = self.stats.logp, self.stats.entropy
        return logp, entropy


@torch.no_grad()
def score_rows(
    hidden: Tensor, head: LinearHead, call: ScoreCall, *, at_target: bool = False
) -> Scored:
    """Reads the logits of every valid row once; keeps those `at_target` if they are asked for."""
    rows = None if call.valid is None else call.valid.nonzero().squeeze(1)
    if rows is not None and rows.numel() == call.target.numel():
        rows = None
    wanted = (call.ahead, False, False, False, False)
    stats, chosen, further = [], [], []
    # products are in the dtypes that the call says
    with torch.autocast(hidden.device.type, enabled=False):
        walk = Walk(hidden, head, call.pass_over(rows, hidden, head, wanted))
        for chunk in walk.call.chunks or [slice(0, 0)]:
            walk.make_logits(chunk)
            found, target = walk.read(chunk), walk.call.target[chunk]
            stats.append(found)
            if at_target:
                chosen.append(walk.at_target(chunk, walk.buffer))
            if call.further is not None:
                further.append(call.further(walk.buffer.logits[: target.numel()], target))
            if call.ahead and target.numel():
                ones = Slopes(torch.ones_like(found.logp), None, None)
                walk.differentiate(chunk, target, of_finite(ones, found), found)
    return Scored(
        rows,
        joined(stats),
        torch.cat(chosen) if at_target else None,
        [torch.cat(pieces) for pieces in zip(*further, strict=True)],
        walk.dhidden,
    )


def of_finite(slopes: Slopes, stats: RowStats) -> Slopes:
    """The slopes with 0 where the log-probability is not finite."""
    bad = ~stats.logp.isfinite()
    return Slopes._make(None if slope is None else slope.masked_fill(bad, 0.0) for slope in slopes)
