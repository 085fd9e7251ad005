"""Which rows a loss from hidden states makes the logits of, and what the others read.

Left out before the product: rows of weight 0, and rows without a gradient
(`Tokens.has_no_gradient`). Where a loss waits for its sequence, rows are taken in the order of
their sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.linear.autograd import FusedLinearLoss
from grpo_core.linear.call import LinearCall
from grpo_core.linear.head import LinearHead
from grpo_core.linear.memory import Plan, layout_of
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.inputs import Tokens


def loss_of_rows(
    hidden: Tensor,
    head: LinearHead,
    tokens: Tokens,
    shape: torch.Size,
    *,
    plan: Plan | None,
    memory_budget: int | None,
    all_logp: bool,
    accumulate_into: Tensor | None = None,
    **fields: Any,
) -> LossOutput:
    """The loss of tokens that have passed the door; vectors of all rows from those made.

    The vectors of `others` among the fields, see `LinearCall`, are filled in.
    """
    still = tokens.has_no_gradient()
    tensors, enabled = (hidden, *head.tensors), torch.is_grad_enabled()
    trained = tuple(enabled and x is not None and x.requires_grad for x in tensors)
    N, vector = tokens.target.numel(), tokens.advantage
    logp, entropy, ratio, kl = vector.new_zeros(4, N)
    factor = torch.ones_like(vector)
    dropped, valid = torch.zeros_like(still), torch.zeros_like(still)

    def part(at: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, int]:
        """Makes the rows marked in `at` [N] bool and files what they are like; their loss."""
        into = accumulate_into if any(wanted) else None
        call = _call(hidden, head, tokens, at, wanted, plan, memory_budget, into=into, **fields)
        loss, *found = FusedLinearLoss.apply(call, head, *tensors)
        homes = (logp, entropy, ratio, kl, dropped, factor, valid)
        place = slice(None) if call.rows is None else call.rows
        for home, value in zip(homes, found, strict=True):
            home[place] = value
        for other in call.others:
            # of all rows it has been filed already, the vectors being these
            getattr(tokens, other.name)[place] = getattr(call.tokens, other.name)
        return loss, call.n

    loss, made = part(tokens.valid & ~still, trained)
    if all_logp and bool(still.any()):
        with torch.no_grad():
            made += part(still, (False,) * len(trained))[1]
    logp, entropy, ratio, kl, factor = (v.view(shape) for v in (logp, entropy, ratio, kl, factor))
    return LossOutput(
        loss, logp, entropy, ratio, kl, factor, tokens, valid, dropped, _skipped=N - made
    )


def _call(
    hidden: Tensor,
    head: LinearHead,
    tokens: Tokens,
    at: Tensor,
    wanted: tuple[bool, ...],
    plan: Plan | None,
    memory_budget: int | None,
    **fields: Any,
) -> LinearCall:
    """The call that makes the rows marked in `at` [N] bool, in the order it wants them."""
    rows: Tensor | None = at.nonzero().squeeze(1)
    lengths: tuple[int, ...] | None = None
    assert rows is not None
    if tokens.needs_statistics and not tokens.couples_sequences:
        order = tokens.sequence[rows].argsort(stable=True)
        rows = rows[order]
        counts = torch.unique_consecutive(tokens.sequence[rows], return_counts=True)[1]
        lengths = tuple(counts.tolist())
    N, n = at.numel(), rows.numel()
    if n == N and (lengths is None or bool((rows[1:] > rows[:-1]).all())):
        rows = None
    layout = layout_of(
        n,
        head,
        hidden,
        wanted,
        logits_dtype=fields["logits_dtype"],
        autocast=fields["autocast"],
        plan=plan,
        memory_budget=memory_budget,
        has_reference=fields["reference"] is not None,
        into=fields["into"],
    )
    if rows is not None and fields["heat"] is not None:
        fields["heat"] = fields["heat"][rows]
    some = tokens if rows is None else tokens.select(rows)
    return LinearCall(
        target=some.target,
        tokens=some,
        rows=rows,
        lengths=lengths,
        layout=layout,
        wanted=wanted,
        **fields,
    )
