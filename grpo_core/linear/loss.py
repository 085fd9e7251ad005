"""`fused_linear_loss`: the loss from hidden states, and its autograd function.

Rows of weight 0 and rows that cannot have a gradient (`Tokens.has_no_gradient`) are left out before
the first product. The forward computes the gradients of the other rows, see `chunks`; the first
backward returns them, a second one computes them again. Gradients of float16 tensors stay float32
until the backward has multiplied them by grad_output, the loss scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.backends.kept import Kept
from grpo_core.backends.sharded import announce_failure
from grpo_core.linear.chunks import LossRows, loss_over_chunks, loss_with_frozen_head
from grpo_core.linear.head import LinearHead, check_head, check_hidden, check_rows, local_shard
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.linear.matmuls import Plan
from grpo_core.linear.vocab_slices import loss_over_slices
from grpo_core.linear.workspace import Gradients, LinearCall, LinearOptions, Workspace
from grpo_core.loss.compile import loss_in_graph, register_function
from grpo_core.loss.inputs import LossInputs, find_shared_objective
from grpo_core.loss.outputs import LossOutput
from grpo_core.loss.tokens import Tokens
from grpo_core.objective.objective import Objective
from grpo_core.objective.validation import check_concrete


def fused_linear_loss(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    objective: str | Objective = "grpo",
    advantage: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_id: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head: Tensor | LinearHead | None = None,
    ref_topk: tuple[Tensor, Tensor] | None = None,
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    kept: Kept | Tensor | None = None,
    nll_weight: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float = 1.0,
    group: Any = None,
    vocabulary_start: int | None = None,
    reduce_dhidden: bool = True,
    plan: Plan | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    all_logp: bool = False,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """The loss of `fused_loss`, from hidden states and the output matrix.

    Differentiated with respect to `hidden` and the tensors of `lm_head` that require a gradient.
    Rows of weight 0 are left out before the product, and so are rows that cannot have a gradient:
    advantage 0 (with a ratio of sequences: of the whole sequence), no KL term, no entropy bonus.
    Their logp, entropy, ratio and kl are 0, and they are in no metric but `skipped_rows`, which
    counts all rows left out; they still count in the divisor of a mean.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16 or float16, also as a view such as
            `hidden[:, :-1]`.
        lm_head: [V, D], or a `LinearHead` with bias, soft cap, scale, padding or an adapter.
        target, objective, advantage, rewards, group_size, group_id, old_logp, ref_logp,
        sampler_logp, mask, kept, nll_weight, sequence_id, normalizer, backend, validate: see
            `fused_loss`; with [B, T, D] for [B, T, V].
        temperature: T > 0, the logits are divided by it.
        group, vocabulary_start: as in `fused_loss`, for ranks that each hold some rows of `lm_head`
            (and of its bias and lora_B; `vocabulary` is of these rows), and the same of all else.
            A `DTensor` head with `Shard(0)` gives both by itself, of its one mesh axis.
        reduce_dhidden: with a group, sum the gradient of `hidden` over the ranks. False leaves each
            rank's part, for a reduction that follows (sequence parallelism).
        ref_hidden, ref_lm_head: instead of `ref_logp`, hidden states of the reference policy,
            shaped like target with any D, and its matrix (None: `lm_head`); one product more.
            kl="exact" needs them.
        ref_topk: as in `fused_loss`, no product more; by the fast plan only.
        plan: "fast" takes 3 products with a trained head and holds a float32 sum of its gradient;
            "lean" takes 4 and does not. None means fast if its memory fits, else lean.
        memory_budget: bytes to hold beyond inputs and returned gradients, as far as that is
            possible; the larger, the fewer chunks. None means about 1 GiB of logits on a GPU, 64
            MiB on a CPU.
        logits_dtype: of a chunk's logits; None means float32. bfloat16 halves their memory and
            costs up to 0.05 nats.
        all_logp: also return the log-probabilities of unmasked rows that have no gradient.

    Returns:
        `LossOutput`, as `fused_loss`; loss differentiable, everything else detached.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here; plan="lean" with
            `ref_topk`.

    Source: see `fused_loss`; gradients in the forward of a fused head: Liger (arXiv 2410.10989).
    """
    lm_head, group, vocabulary_start = local_shard(lm_head, group, vocabulary_start)
    inputs = LossInputs(
        target=target,
        objective=find_shared_objective(objective, group, hidden),
        advantage=advantage,
        rewards=rewards,
        group_size=group_size,
        group_id=group_id,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_topk=ref_topk,
        sampler_logp=sampler_logp,
        mask=mask,
        kept=kept,
        nll_weight=nll_weight,
        sequence_id=sequence_id,
        normalizer=normalizer,
        temperature=temperature,
        group=group,
        vocabulary_start=vocabulary_start,
        backend=backend,
        validate=validate,
    )
    options = LinearOptions(plan, memory_budget, logits_dtype, reduce_dhidden)
    further = (inputs, options, ref_hidden, ref_lm_head, all_logp)
    if torch.compiler.is_compiling():
        return loss_in_graph(
            loss_from_hidden, (hidden, lm_head), *further, gradients_in_forward=True
        )
    return loss_from_hidden(hidden, lm_head, *further)


@register_function
def loss_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    inputs: LossInputs,
    options: LinearOptions,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
    all_logp: bool,
) -> LossOutput:
    """`fused_linear_loss` outside of `torch.compile`, with the shard of a `DTensor` head."""
    others = {"ref_hidden": ref_hidden, "ref_lm_head": ref_lm_head}
    check_concrete(hidden=hidden, lm_head=lm_head, **vars(inputs), **others)
    if ref_lm_head is not None:
        ref_lm_head, *_ = local_shard(ref_lm_head, inputs.group, inputs.vocabulary_start)
    with announce_failure(inputs.group, hidden):
        head, logits = check_rows(hidden, lm_head, inputs.target)
        reference = _check_reference(inputs, head, hidden, ref_hidden, ref_lm_head)
    exact, shape = reference is not None and inputs.objective.kl == "exact", inputs.target.shape
    if exact:
        # only the shape is checked
        inputs = replace(inputs, ref_logits=logits)
    elif reference is not None:
        # computed below, when the rows are known
        inputs = replace(inputs, ref_logp=torch.zeros(shape, device=hidden.device))
    size, moves = hidden.shape[-1], hidden.requires_grad
    same = {"hidden_size": size, "requires_grad": moves, "all_logp": all_logp, **vars(options)}
    shards = inputs.shards(logits, **same)
    tokens = inputs.tokens(logits, shards=shards)
    without_gradient = tokens.has_no_gradient()
    if reference is not None and not exact:
        made = tokens.read if all_logp else tokens.read & ~without_gradient
        rows = replace(inputs, mask=made.view(shape), kept=tokens.kept, validate=False)
        with torch.no_grad():
            ref_logp, _ = logp_from_hidden(*reference, rows, replace(options, plan="fast"))
        tokens = replace(tokens, ref_logp=ref_logp.view(-1))
    tensors, enabled = (hidden, *head.tensors), torch.is_grad_enabled()
    call = LinearCall.of(
        hidden,
        inputs,
        options,
        shards,
        tokens.target,
        tokens.kept,
        tokens=tokens,
        reference=reference if exact else None,
        wanted=tuple(enabled and x is not None and x.requires_grad for x in tensors),
    )
    first = _call_of_rows(call, tokens, tokens.read & ~without_gradient)
    results = LossRows(*FusedLinearLoss.apply(first, head, *tensors))
    parts = [(first, results)]
    if all_logp and bool(without_gradient.any()):
        rest = replace(_call_of_rows(call, tokens, without_gradient), wanted=(False,) * 5)
        parts.append((rest, evaluate_call(rest, head, tensors)[0]))
    return _output(results.loss, tokens, shape, parts)


def _call_of_rows(call: LinearCall, tokens: Tokens, made: Tensor) -> LinearCall:
    """The call over the rows marked in `made` [N] bool, ordered by sequence where needed."""
    rows, lengths = made.nonzero().squeeze(1), None
    if tokens.couples_rows and not tokens.couples_sequences:
        rows = rows[tokens.sequence[rows].argsort(stable=True)]
        counts = torch.unique_consecutive(tokens.sequence[rows], return_counts=True)[1]
        lengths = tuple(counts.tolist())
    in_order = lengths is None or bool((rows[1:] > rows[:-1]).all())
    some = call if len(rows) == len(made) and in_order else call.at(rows)
    return replace(some, lengths=lengths)


def _output(
    loss: Tensor, tokens: Tokens, shape: torch.Size, parts: list[tuple[LinearCall, LossRows]]
) -> LossOutput:
    """The output over all N rows, from the vectors of the computed rows; 0 elsewhere."""
    N = len(tokens.target)
    vectors = tokens.advantage.new_zeros(4, N)
    dropped, valid = vectors.new_zeros(2, N, dtype=torch.bool)
    factor = torch.ones_like(vectors[0])
    for call, results in parts:
        place = slice(None) if call.rows is None else call.rows
        for vector, some in zip((*vectors, dropped, factor, valid), results[1:], strict=True):
            if some is not None:
                vector[place] = some
    logp, entropy, ratio, kl, factor = (vector.view(shape) for vector in (*vectors, factor))
    skipped = N - sum(len(call.target) for call, _ in parts)
    return LossOutput(loss, logp, entropy, ratio, kl, factor, tokens, valid, dropped, skipped)


def _check_reference(
    inputs: LossInputs,
    head: LinearHead,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    ref_lm_head: Tensor | LinearHead | None,
) -> tuple[Tensor, LinearHead] | None:
    """Hidden states and head of the reference policy, detached; None if they are not given."""
    spec = inputs.objective
    if ref_hidden is None:
        if ref_lm_head is not None:
            raise ValueError("ref_lm_head: expected None without ref_hidden, got one")
        if spec.kl == "exact" and spec.beta:
            raise ValueError(
                f"ref_hidden: expected a tensor for kl = 'exact' and beta = {spec.beta}, got None"
            )
        return None
    if inputs.ref_logp is not None:
        raise ValueError("ref_hidden: expected None with ref_logp, got both")
    if spec.reference == "ref_topk":
        what = f"None for kl = {spec.kl!r}, which takes ref_topk"
        raise ValueError(f"ref_hidden: expected {what}, got one")
    check_hidden("ref_hidden", ref_hidden, hidden)
    ref = check_head("ref_lm_head", head if ref_lm_head is None else ref_lm_head, ref_hidden)
    if spec.kl == "exact" and ref.V != head.V:
        raise ValueError(f"ref_lm_head: expected V = {head.V} as in lm_head, got {ref.V}")
    return ref_hidden.detach(), ref.of(*ref.tensors)  # type: ignore[arg-type]


class FusedLinearLoss(torch.autograd.Function):
    """The forward computes the loss and all gradients; the backward multiplies by grad_output."""

    @staticmethod
    def forward(
        ctx: Any, call: LinearCall, head: LinearHead, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        results, ctx.gradients = evaluate_call(call, head, tensors)
        ctx.call, ctx.head = call, head.without_tensors()
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(vector for vector in results[1:] if vector is not None))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_loss: its gradient cannot be differentiated (create_graph)"
            )
        tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None:
            gradients = evaluate_call(ctx.call, ctx.head, tensors)[1]
        for k, tensor in enumerate(tensors):
            gradient = gradients[k]
            if gradient is not None and gradient.numel():
                rows = gradient.view(-1, gradient.shape[-1])
                ctx.call.kernels.row_scale(rows, grad_output)
                gradients[k] = gradient.to(tensor.dtype)
        return None, None, *gradients


@torch.no_grad()
def evaluate_call(
    call: LinearCall, head: LinearHead, tensors: tuple[Tensor | None, ...]
) -> tuple[LossRows, Gradients]:
    """The vectors `[n]` with the sum of the loss; gradients shaped like `tensors`."""
    hidden, weight, *others = tensors
    tokens = call.tokens
    assert hidden is not None and weight is not None and tokens is not None
    only_dhidden = call.wanted == (True, False, False, False, False)
    has_row_kl = tokens.objective.has_row_kl and tokens.objective.beta
    only_logp = tokens.entropy_weight is None and not has_row_kl
    # products are in the dtypes that the call names
    with torch.autocast(hidden.device.type, enabled=False):
        work = Workspace(hidden, head.of(weight, *others), call)
        if work.lean:
            rows = loss_over_slices(work, tokens)
        elif only_dhidden and only_logp and tokens.needs_statistics:
            rows = loss_with_frozen_head(work, tokens)
        else:
            rows = loss_over_chunks(work, tokens)
    # without the loss scale, which is grad_output, float16 would underflow
    gradients = work.gradients(hidden, round_float16=False)
    return rows._replace(loss=rows.loss.sum()), gradients
