"""Differentiable log-probability and entropy from hidden states, for any loss.

The forward computes logits and statistics of one chunk of rows after another. The backward gets the
gradients of both outputs, computes the logits of every chunk again and then the gradient products.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H)) / T

| result                                 | products of 2·n·V·D operations                       |
|----------------------------------------|------------------------------------------------------|
| no gradient                            | 1                                                    |
| gradients, head trained, either plan   | 1, and 3 in the backward over rows that have some    |
| gradients, head frozen                 | 1, and 2 in the backward over rows that have some    |
| with `gradients_in_forward`, of logp   | 2, both in the forward: dlogp only scales rows       |
| the same, of logp and entropy          | 2, and 2 in the backward                             |

A few statistics per row are saved for the backward. `fused_linear_loss` does not compute logits
twice, because it knows the loss in the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.backends.kept import Kept
from grpo_core.backends.sharded import announce_failure, sum_over_shards
from grpo_core.kernels.records import RowGradients, RowStats
from grpo_core.linear.chunks import only_finite, read_chunks, scale_rows
from grpo_core.linear.head import LinearHead, check_rows, local_shard
from grpo_core.linear.matmuls import Plan
from grpo_core.linear.vocab_slices import SoftmaxRows, add_gradients_of_slices, gather_target_logits
from grpo_core.linear.workspace import LinearCall, LinearOptions, Workspace, scatter_rows
from grpo_core.loss.compile import logp_in_graph, register_function
from grpo_core.loss.outputs import TokenLogp
from grpo_core.loss.row_inputs import RowInputs
from grpo_core.objective.validation import check_concrete


@torch.no_grad()
def linear_token_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    group: Any = None,
    vocabulary_start: int | None = None,
    mask: Tensor | None = None,
    kept: Kept | Tensor | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target, one product: old, reference, evaluation passes.

    Args:
        hidden, lm_head, target, temperature, group, vocabulary_start, mask, kept, memory_budget,
        logits_dtype, backend, validate: as in `fused_linear_loss`. Not differentiable.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError, NotImplementedError: as `fused_linear_loss`.
    """
    inputs = RowInputs(
        target=target,
        temperature=temperature,
        group=group,
        vocabulary_start=vocabulary_start,
        mask=mask,
        kept=kept,
        backend=backend,
        validate=validate,
    )
    options = LinearOptions("fast", memory_budget, logits_dtype)
    if torch.compiler.is_compiling():
        return TokenLogp(*logp_in_graph(logp_from_hidden, hidden, lm_head, inputs, options))
    logp, entropy = logp_from_hidden(hidden, lm_head, inputs, options)
    return TokenLogp(logp, entropy)


def linear_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    group: Any = None,
    vocabulary_start: int | None = None,
    reduce_dhidden: bool = True,
    mask: Tensor | None = None,
    kept: Kept | Tensor | None = None,
    plan: Plan | None = None,
    memory_budget: int | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target, differentiable, without the logits.

    A loss may use both or one of them. A second backward through the same outputs (retain_graph)
    computes the chunks again and gives the correct gradient; a gradient of the gradient
    (create_graph) raises an error. The values are bitwise those of `linear_token_logp`.

    A log-probability that is not finite is returned as it is, without a gradient.

    Args:
        hidden, lm_head, target, temperature, group, vocabulary_start, reduce_dhidden, mask,
        memory_budget, backend, validate: as in `fused_linear_loss`.
        kept: as in `fused_loss`; a target that was not kept has logp −inf.
        plan: of the backward: "fast" holds a float32 sum of a narrower head's gradient, "lean"
            does not. None means fast, unless it would not fit.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.
    """
    inputs = RowInputs(
        target=target,
        temperature=temperature,
        group=group,
        vocabulary_start=vocabulary_start,
        mask=mask,
        kept=kept,
        backend=backend,
        validate=validate,
    )
    # rounding logits to 16 bits costs up to 0.05 nats
    options = LinearOptions(plan, memory_budget, torch.float32, reduce_dhidden)
    logp, entropy = logp_from_hidden(hidden, lm_head, inputs, options)
    return TokenLogp(logp, entropy)


@register_function
def logp_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    inputs: RowInputs,
    options: LinearOptions,
    *,
    gradients_in_forward: bool = False,
    extra_vectors: Callable[[Tensor, Tensor], list[Tensor]] = lambda logits, target: [],
    gathered: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Tensor]:
    """logp and entropy, shaped like target, then the vectors of `extra_vectors`; see `linear_logp`.

    Args:
        gradients_in_forward: with a frozen head, computes dhidden of Σ logp in the forward; the
            backward multiplies its rows by dlogp.
        extra_vectors: returns further vectors [n] from a chunk's logits [n, V] and targets [n].
        gathered: a context that the backward enters to use the head.
    """
    check_concrete(hidden=hidden, lm_head=lm_head, **vars(inputs))
    lm_head, group, start = local_shard(lm_head, inputs.group, inputs.vocabulary_start)
    inputs = replace(inputs, group=group, vocabulary_start=start)
    with announce_failure(group, hidden):
        head, logits = check_rows(hidden, lm_head, inputs.target)
        inputs.check_logits(logits)
    size, moves = hidden.shape[-1], hidden.requires_grad
    shards = inputs.shards(logits, hidden_size=size, requires_grad=moves, **vars(options))
    target, _, present, kept = inputs.read(logits, shards)
    call = LinearCall.of(hidden, inputs, options, shards, target, kept)
    if not present.all():
        call = call.at(present.nonzero().squeeze(1))
    trained = any(tensor is not None and tensor.requires_grad for tensor in head.tensors)
    gradients_in_forward = (
        gradients_in_forward and not trained and torch.is_grad_enabled() and moves
    )
    call = replace(call, wanted=(gradients_in_forward, False, False, False, False))
    logp, entropy, *others = LinearLogp.apply(
        extra_vectors, gathered, call, head, hidden, *head.tensors
    )
    shape = inputs.target.shape
    return [logp.view(shape), entropy.view(shape), *others]


class LinearLogp(torch.autograd.Function):
    """logp and entropy `[N]`, differentiable, and the vectors of `extra_vectors`, which are not."""

    @staticmethod
    def forward(
        ctx: Any,
        extra_vectors: Callable[[Tensor, Tensor], list[Tensor]],
        gathered: Callable[[], AbstractContextManager[object]],
        call: LinearCall,
        head: LinearHead,
        hidden: Tensor,
        weight: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # the lean plan needs the logits at the targets in the backward
        lean = call.options.plan != "fast"
        with torch.autocast(hidden.device.type, enabled=False):
            work = Workspace(hidden, head.of(weight, *others), call)

            def vectors_of(chunk: slice) -> list[Tensor]:
                target = call.target[chunk]
                vectors = [gather_target_logits(work.logits, target)] if lean else []
                return vectors + extra_vectors(work.logits[: len(target)], target)

            stats, vectors = read_chunks(
                work, gradients_in_forward=work.differentiates, extra_vectors=vectors_of
            )
        target_logit = vectors.pop(0) if lean else None
        ctx.call, ctx.head, ctx.gathered = call, head.without_tensors(), gathered
        # not the outputs, which a caller may overwrite
        kept = (stats.logp, stats.entropy, stats.state, target_logit, work.dhidden)
        ctx.save_for_backward(hidden, weight, *others, *kept)
        outputs = []
        for vector in (stats.logp, stats.entropy, *vectors):
            # not views of one tensor: autograd forbids in-place operations on those
            outputs.append(vector.new_zeros(hidden.shape[:-1].numel()))
            outputs[-1][slice(None) if call.rows is None else call.rows] = vector
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

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
        hidden, *tensors, logp, entropy, state, target_logit, dhidden_of_logp = ctx.saved_tensors
        call = ctx.call
        stats = RowStats(logp, entropy, None, state)
        row_gradients = RowGradients(dlogp, dentropy, None)
        row_gradients = only_finite(
            row_gradients if call.rows is None else row_gradients.at(call.rows), stats
        )
        if dhidden_of_logp is not None and dentropy is None:
            dhidden = scale_rows(dhidden_of_logp.clone(), row_gradients.dlogp)
            sum_over_shards(call.kernels, dhidden, None)
            dhidden = scatter_rows(dhidden.to(hidden.dtype), call.rows, hidden)
            return None, None, None, None, dhidden, *[None] * len(tensors)
        # the rows that have a gradient
        some = row_gradients.any.nonzero().squeeze(1)
        row_gradients = row_gradients.at(some)
        stats = stats.at(some)
        target_logit = None if target_logit is None else target_logit[some]
        call = call if len(some) == hidden.shape[:-1].numel() else call.at(some)
        call = replace(call, wanted=ctx.needs_input_grad[4:])
        with ctx.gathered(), torch.autocast(hidden.device.type, enabled=False):
            work = Workspace(hidden, ctx.head.of(*tensors), call)
            _add_gradients(work, row_gradients, stats, target_logit)
        return None, None, None, None, *work.gradients(hidden)


def _add_gradients(
    work: Workspace, row_gradients: RowGradients, stats: RowStats, target_logit: Tensor | None
) -> None:
    """Adds the gradients of all rows to `work`, by its plan."""
    call = work.call
    work.choose_loss_scale(torch.stack([v.abs() for v in row_gradients if v is not None]).amax(0))
    row_gradients = work.scaled(row_gradients)
    if work.lean:
        assert target_logit is not None
        softmax = SoftmaxRows(call.target, call.temperature, row_gradients, stats, target_logit)
        add_gradients_of_slices(work, softmax)
        return
    for chunk in work.chunks:
        work.make_logits(chunk)
        work.differentiate(chunk, call.target[chunk], row_gradients.at(chunk), stats.at(chunk))
