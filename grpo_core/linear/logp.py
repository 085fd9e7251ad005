"""Log-probability and entropy from hidden states, differentiable: for losses that are not ours.

A trainer that keeps its own loss asks for logp and entropy of every target and sends both gradients
back later. The logits of all tokens exist in neither direction: chunks of rows go through the
product and the row kernel, and once more in the backward, followed by the gradient products.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H)) / T

| what is wanted                         | products of 2·n·V·D operations                       |
|----------------------------------------|------------------------------------------------------|
| no gradient                            | 1                                                    |
| gradients, head trained, either plan   | 1, and 3 in the backward over rows that have some    |
| gradients, head frozen                 | 1, and 2 in the backward over rows that have some    |
| the same, `ahead`, of logp alone       | 2, both in the forward: dlogp only scales rows       |
| the same, `ahead`, of entropy, too     | 2, and 2 in the backward                             |

The backward reads no statistics again: those of the forward are kept, a few numbers a row. Where
the loss is one of ours, `fused_linear_loss` knows it beforehand and makes no logits twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import RowStats, Slopes
from grpo_core.linear.call import spread
from grpo_core.linear.checks import autocast_dtype, stand_in
from grpo_core.linear.head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear.memory import Plan
from grpo_core.linear.reading import ScoreCall, of_finite, score_rows
from grpo_core.linear.vocab_slices import Words, log_sum_exp, sliced_gradients
from grpo_core.linear.walk import Walk
from grpo_core.loss.fused_loss import TokenLogp
from grpo_core.loss.inputs import check_logits, check_target, find_unmasked, flatten_target
from grpo_core.objective.validation import check_concrete


def linear_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    plan: Plan | None = None,
    memory_budget: int | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target, differentiable, without the logits.

    Both can be used in any loss, together or alone, any number of times; a second backward through
    the same outputs (retain_graph) makes the chunks again and is right; a gradient of the gradient
    (create_graph) is refused. Bit for bit the values of `linear_token_logp`.

    A row whose log-probability is not finite shows so, and passes no gradient on.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16 or float16, also as a view.
        lm_head: [V, D], or a `LinearHead` with bias, soft cap, scale, padding or an adapter.
        target: [B, T] or [N] integers, already shifted; -100 means masked.
        temperature: T > 0, the logits are divided by it.
        mask: shaped like target, 0 means masked.
        plan: of the backward: "fast" holds a float32 sum of a narrower head's gradient, "lean"
            does not. None means fast, unless it would not fit.
        memory_budget: bytes to hold beyond inputs and returned gradients, as far as that is
            possible. None means about 1 GiB of logits on a GPU, 64 MiB on a CPU.
        backend, validate: as in `fused_loss`.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.
    """
    check_concrete(hidden=hidden, lm_head=lm_head, target=target, mask=mask)
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    kernels = choose_backend(backend, hidden)
    logits = stand_in(hidden, head.V)
    check_logits(logits, temperature, HEAD_DTYPES)
    target = check_target(logits, target, mask, validate)
    flat = flatten_target(target)
    call = ScoreCall(
        target=flat,
        valid=find_unmasked(target, mask) & (flat >= 0) & (flat < head.V),
        temperature=float(temperature),
        plan=plan,
        memory_budget=memory_budget,
        # rounding logits to 16 bits costs up to 0.05 nats
        logits_dtype=torch.float32,
        autocast=autocast_dtype(hidden),
        kernels=kernels,
    )
    logp, entropy = LinearLogp.apply(call, head, hidden, *head.tensors)
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


class LinearLogp(torch.autograd.Function):
    """logp, entropy and what else is wanted, `[N]`; gradients of the first two."""

    @staticmethod
    def forward(
        ctx: Any, call: ScoreCall, head: LinearHead, hidden: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weight, *others = tensors
        assert weight is not None
        lean = call.plan != "fast"
        found = score_rows(hidden, head.of(weight, *others), call, at_target=lean)
        ctx.call = call
        # the record without its tensors: those are saved where autograd looks after them
        ctx.head = head.of(torch.empty(weight.shape, device="meta"), None, None, None)
        logp, entropy, _, state = found.stats
        kept = (found.rows, logp, entropy, state, found.at_target, found.dhidden)
        # not the outputs, which their owner may write over
        ctx.save_for_backward(hidden, *tensors, *kept)
        ctx.mark_non_differentiable(*found.further)
        ctx.set_materialize_grads(False)
        return *found.over(call.target.numel()), *found.further

    @staticmethod
    def backward(
        ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logp: its gradient cannot be differentiated (create_graph)")
        if dlogp is None:
            if dentropy is None:
                return (None,) * len(ctx.needs_input_grad)
            dlogp = torch.zeros_like(dentropy)
        hidden, *tensors, rows, logp, entropy, state, at_target, ahead = ctx.saved_tensors
        stats = RowStats(logp, entropy, None, state)
        slopes = Slopes(dlogp, dentropy, None)
        slopes = of_finite(slopes if rows is None else slopes.at(rows), stats)
        if ahead is not None and dentropy is None:
            still = slopes.dlogp == 0
            dhidden = (ahead * slopes.dlogp[:, None]).masked_fill_(still[:, None], 0.0)
            return None, None, spread(dhidden.to(hidden.dtype), rows, hidden), *[None] * 4
        some = slopes.any.nonzero().squeeze(1)
        slopes = slopes.at(some)
        stats = RowStats(logp[some], entropy[some], None, state[:, some].contiguous())
        at_target = None if at_target is None else at_target[some]
        rows = some if rows is None else rows[some]
        rows = None if rows.numel() == len(ctx.call.target) else rows
        wanted = ctx.needs_input_grad[2:]
        with ctx.call.gathered(), torch.autocast(hidden.device.type, enabled=False):
            head = ctx.head.of(*tensors)
            walk = Walk(hidden, head, ctx.call.pass_over(rows, hidden, head, wanted))
            dhidden, *rest = _gradients(walk, slopes, stats, at_target)
        if dhidden is not None:
            dhidden = spread(dhidden.to(hidden.dtype), rows, hidden)
        pairs = zip(rest, tensors, strict=True)
        return None, None, dhidden, *(None if d is None else d.to(x.dtype) for d, x in pairs)


def _gradients(
    walk: Walk, slopes: Slopes, stats: RowStats, at_target: Tensor | None
) -> list[Tensor | None]:
    """Of hidden `[n, D]` and the head's tensors, by the plan of the walk."""
    call = walk.call
    size = slopes.dlogp.abs()
    size = size if slopes.dentropy is None else torch.maximum(size, slopes.dentropy.abs())
    walk.lift_by(size)
    slopes = walk.lifted(slopes)
    if call.layout.plan == "lean":
        assert at_target is not None
        del walk.buffer
        lse = log_sum_exp(stats, at_target, call.temperature)
        words = Words(call.target, call.temperature, slopes, stats, lse)
        return sliced_gradients(walk, words)
    for chunk in call.chunks:
        walk.make_logits(chunk)
        walk.differentiate(chunk, call.target[chunk], slopes.at(chunk), stats.at(chunk))
    return walk.gradients()
