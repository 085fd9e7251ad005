"""Which rows a loss from hidden states makes the logits of, and what the others read.

Left out before the product: rows of weight 0, and rows that can have no gradient (`Tokens.still`).
Where a loss waits for its sequence, rows are taken in the order of their sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.arguments import Tokens
from grpo_core.fused_loss import LossOutput
from grpo_core.linear_autograd import FusedLinearLoss
from grpo_core.linear_call import LinearCall, dlogits_dtype, linear_stats
from grpo_core.linear_head import LinearHead
from grpo_core.linear_memory import Plan, Sizes, buffer_bytes, choose_layout
from grpo_core.linear_products import HeadProducts


class Run(NamedTuple):
    """How calls over some hidden states and a head are evaluated."""

    wanted: tuple[bool, ...]
    evaluate: Callable[[LinearCall], tuple[Tensor, ...]]  # loss and vectors, as FusedLinearLoss


def of_autograd(hidden: Tensor, head: LinearHead) -> Run:
    """With a graph, to what asks for a gradient."""
    tensors, enabled = (hidden, *head.tensors), torch.is_grad_enabled()
    wanted = tuple(enabled and x is not None and x.requires_grad for x in tensors)
    return Run(wanted, lambda call: FusedLinearLoss.apply(call, head, *tensors))


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
    run: Run | None = None,
    **fields: Any,
) -> LossOutput:
    """The loss of tokens that have passed the door; vectors of all rows from those made.

    Args:
        run: how a call is evaluated, and which gradients it wants, see `LinearCall`; None means by
            autograd.
    """
    still = tokens.still()
    run = run or of_autograd(hidden, head)
    N, vector = tokens.target.numel(), tokens.advantage
    logp, entropy, ratio, kl = vector.new_zeros(4, N)
    factor = torch.ones_like(vector)
    dropped, valid = torch.zeros_like(still), torch.zeros_like(still)

    def part(at: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, int]:
        """Makes the rows marked in `at` [N] bool and files what they are like; their loss."""
        into = accumulate_into if any(wanted) else None
        call = _call(hidden, head, tokens, at, wanted, plan, memory_budget, into=into, **fields)
        loss, *found = run.evaluate(call)
        homes = (logp, entropy, ratio, kl, dropped, factor, valid)
        place = slice(None) if call.rows is None else call.rows
        for home, value in zip(homes, found, strict=True):
            home[place] = value
        return loss, call.n

    loss, made = part(tokens.valid & ~still, run.wanted)
    if all_logp and bool(still.any()):
        with torch.no_grad():
            made += part(still, (False,) * len(run.wanted))[1]
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
    products = HeadProducts(head, hidden, fields["autocast"])
    narrow = dlogits_dtype(fields["logits_dtype"], products.compute) if any(wanted) else None
    row_bytes = buffer_bytes(
        head.V,
        fields["logits_dtype"],
        narrow,
        apart=head.softcap is not None,
        ref=fields["reference"] is not None,
    )
    sums = wanted if fields["into"] is None else (wanted[0], False, *wanted[2:])
    sizes = Sizes.of(n, head, hidden, sums, row_bytes)
    layout = choose_layout(sizes, plan, memory_budget, hidden.device)
    if rows is not None and fields["heat"] is not None:
        fields["heat"] = fields["heat"][rows]
    some = tokens if rows is None else tokens.of_rows(rows)
    return LinearCall(
        tokens=some, rows=rows, lengths=lengths, layout=layout, wanted=wanted, **fields
    )


def scored_rows(
    hidden: Tensor,
    head: LinearHead,
    target: Tensor,
    at: Tensor,
    *,
    temperature: float,
    heat: Tensor | None,
    plan: Plan | None,
    memory_budget: int | None,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) `[N]` of the rows marked in `at` [N] bool; 0 elsewhere."""
    rows = at.nonzero().squeeze(1)
    logp, entropy = torch.zeros(2, at.numel(), dtype=torch.float32, device=hidden.device)
    row_bytes = buffer_bytes(head.V, dtype, None, apart=False, ref=False)
    sizes = Sizes.of(rows.numel(), head, hidden, (False,) * 5, row_bytes)
    layout = choose_layout(sizes, plan, memory_budget, hidden.device)
    # products are in the dtypes that the call says
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        logp[rows], entropy[rows] = linear_stats(
            hidden,
            head,
            target[rows],
            None if rows.numel() == at.numel() else rows,
            step=layout.rows,
            logits_dtype=dtype,
            autocast=autocast,
            temperature=temperature,
            heat=None if heat is None else heat[rows],
            kernels=kernels,
        )
    return logp, entropy
