"""The loss from logits; its gradient is computed in the forward.

A token-level objective is one pass: `row_loss` reads every row, evaluates the loss and writes
dlogits; backward only multiplies by grad_output. A sequence-level ratio takes two phases: row
statistics, a small step over `[N]` vectors, `row_dlogits`. Both plans are in `autograd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.backends.kept import Kept
from grpo_core.backends.sharded import announce_failure
from grpo_core.kernels.records import Rows
from grpo_core.loss.autograd import (
    Call,
    FusedLoss,
    evaluate,
    is_readable,
    make_readable,
    prepare_reference,
)
from grpo_core.loss.compile import logp_in_graph, loss_in_graph, register_function
from grpo_core.loss.inputs import LossInputs, find_shared_objective
from grpo_core.loss.outputs import LossOutput as LossOutput
from grpo_core.loss.outputs import TokenLogp as TokenLogp
from grpo_core.loss.row_inputs import RowInputs
from grpo_core.loss.tokens import IGNORE
from grpo_core.objective.objective import Objective


def fused_loss(
    logits: Tensor,
    target: Tensor,
    *,
    objective: str | Objective = "grpo",
    advantage: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_id: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_logits: Tensor | None = None,
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
    inplace: bool = False,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """Policy-gradient loss of a language model, forward and backward in one pass over the logits.

    L = Σ_n weight_n · (ℓ(logp_n, logp_n − old_logp_n, A_n) + beta · kl(logp_n, ref_logp_n)),
    where `objective` gives ℓ, kl, beta and the weights; differentiated with respect to the logits.

    A row whose loss or gradient is not finite (NaN or +inf among its logits, a ratio beyond
    float32) is left out; with a ratio of sequences, so is its whole sequence. Loss and gradient
    there are exactly 0, and `metrics["nonfinite_rows"]` counts the row. Its logp, entropy, ratio
    and kl are returned as computed. It still counts in the divisor of a mean.

    Args:
        logits: [B, T, V], or packed [N, V]; float32, bfloat16 or float16. Views such as
            `logits[:, :-1]` are not copied, unless the last axis is not contiguous or rows
            overlap. In float16 the backward computes the gradient, after the loss scale.
        target: [B, T] or [N] integers, already shifted; -100 means masked.
        objective: an `Objective`, or the name of one in `RECIPES`.
        advantage: [B], [B, T] or [N]; not needed without a policy term ("opd"). Or instead:
        rewards: [B], one per sequence, finite; normalised within groups as `objective` says.
        group_size: completions per prompt, neighbours in `rewards`; a group of 1 has advantage 0.
            Or instead:
        group_id: [B] integers in [0, B), the prompt of each: groups of any size, in any order. With
            `advantage` both are for the aggregation prompt_mean only.
        old_logp: shaped like target, nats; None means on policy: the ratio is exactly 1 and the
            gradient is that of REINFORCE.
        ref_logp: shaped like target, nats; needed if the objective's beta is not 0, otherwise only
            reported as `kl`. For kl="exact" give instead:
        ref_logits: shaped like logits, any of their dtypes, at the same temperature; read once,
            beside the logits. For kl="topk" and kl="topk_tail":
        ref_topk: (ids, logp), the K tokens that a teacher holds likely in each row, [B, T, K] or
            [N, K] integers, and their log-probabilities, nats, of the whole vocabulary and at the
            same temperature. A row with fewer tokens is filled up with id -1 or logp -inf. The rows
            are read twice and written once.
        sampler_logp: shaped like target, nats, of the sampling engine; needed by `factor.sampler`
            and `factor.rejections`, otherwise only reported. They remove tokens for which it is NaN
            or infinite. Without `old_logp` they compare the policy itself, in two phases.
        mask: shaped like target, 0 means masked, anything else counts fully; together with
            target -100. Sequences without a token are in no mean.
        kept: the vocabulary ids that the sampler kept for each token (top-p, top-k, min-p), a
            `Kept` or a bool mask shaped like logits: both policies are renormalised over these ids
            alone. A token whose target is not among its own ids is left out, and counted in
            `metrics["unkept_rows"]`. Compute `old_logp` and `ref_logp` with the same `kept`.
        nll_weight: shaped like target, finite, >= 0: adds Σ_n nll_weight_n·(−logp_n) to the loss,
            without a divisor, also for tokens with mask 0. Cross-entropy on observations (ECHO):
            0.05 / their number there, 0 elsewhere. The logits are then read twice.
        sequence_id: [N] integers in [0, N), for packed logits: the sequence of each row; it also
            indexes `rewards`.
        normalizer: what the sum is divided by, a number or 0-dim tensor; or shaped like target,
            what each token's weight is divided by. None means this call's own count, see
            `aggregation`. Under gradient accumulation give the global count of what
            the aggregation counts: tokens, sequences, or sequences · length. Put a factor c of the
            loss here, as n / c: `(c * loss).backward()` rounds a bfloat16 gradient
            twice unless c is a power of two (at most 2⁻⁷ of an element instead of 2⁻⁸).
        temperature: T > 0, the logits are divided by it.
        group: a `ProcessGroup` whose ranks each hold some columns of the logits, and the same of
            all else; V is then their sum. Every rank gets the same results, and the gradient of
            its own columns.
        vocabulary_start: the first column of this rank; None on all ranks means that their columns
            lie in the order of the ranks.
        inplace: write the gradient, if one is wanted, over the logits. This needs the least
            memory; the logits are overwritten and backward can run once only. If the logits are a
            leaf, their `.grad` is the same memory. Not for logits whose producer keeps its
            output for its own backward (a tanh soft cap): torch then raises. Not inside
            `torch.compile`, see `compile`.
        backend: "triton", "cpu" (Numba), "torch" (plain and slow), or None for triton on a GPU and
            cpu elsewhere, torch where Numba is not installed.
        validate: check the values of targets, sequence ids and rewards. None means on the CPU only,
            since on a GPU this synchronises; unchecked, a bad row gets weight 0 and is counted.

    Returns:
        `LossOutput`: loss, logp, entropy, ratio, kl, metrics.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing was overwritten.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: GRPO: DeepSeekMath (arXiv 2402.03300, eq. 3); the recipes name their own.
    """
    inputs = LossInputs(
        target=target,
        objective=find_shared_objective(objective, group, logits),
        advantage=advantage,
        rewards=rewards,
        group_size=group_size,
        group_id=group_id,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_logits=ref_logits,
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
    if torch.compiler.is_compiling():
        if inplace:
            raise NotImplementedError("inplace: expected False inside torch.compile, got True")
        return loss_in_graph(loss_from_logits, (logits,), inputs, gradients_in_forward=False)
    return loss_from_logits(logits, inputs, inplace)


@register_function
def loss_from_logits(logits: Tensor, inputs: LossInputs, inplace: bool = False) -> LossOutput:
    """`fused_loss` outside of `torch.compile`."""
    if inplace:
        with announce_failure(inputs.group, logits):
            inputs.check_logits(logits)
            if not is_readable(logits):
                raise ValueError(
                    "inplace: expected logits with a contiguous last axis and separate rows, "
                    f"got strides {logits.stride()}"
                )
    shards = inputs.shards(logits)
    tokens = inputs.tokens(logits, shards=shards)
    call = Call(
        tokens,
        prepare_reference(inputs.ref_logits, logits, inplace),
        temperature=float(inputs.temperature),
        inplace=inplace,
        kernels=inputs.kernels(logits, tokens.target, tokens.kept, shards),
    )
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    logits = make_readable(logits)
    rows, dlogits = call.rows(logits), None
    if wants_gradient and logits.dtype != torch.float16:
        dlogits = call.allocate_gradient(rows.logits)
    result, tokens = evaluate(rows, call, dlogits)
    loss = FusedLoss.apply(logits, call, result, tokens, dlogits)
    return LossOutput.of(loss, result, tokens, inputs.target.shape)


@torch.no_grad()
def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    group: Any = None,
    vocabulary_start: int | None = None,
    mask: Tensor | None = None,
    kept: Kept | Tensor | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target in one read: old, reference, evaluation passes.

    Bit for bit the `logp` of `fused_loss` for the same row. Not differentiable.

    Args:
        logits, target, temperature, group, vocabulary_start, mask, kept, backend, validate: as in
            `fused_loss`.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked; logp is
        −inf for a target that was not kept.

    Raises:
        ValueError, NotImplementedError: as `fused_loss`.
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
    if torch.compiler.is_compiling():
        return TokenLogp(*logp_in_graph(logp_from_logits, logits, inputs))
    return logp_from_logits(logits, inputs)


@register_function
def logp_from_logits(logits: Tensor, inputs: RowInputs) -> TokenLogp:
    """`token_logp` outside of `torch.compile`."""
    shards = inputs.shards(logits)
    # a row whose target is outside [0, V) is not read
    target, kept = inputs.flat_target(logits, shards), None
    if inputs.kept is not None:
        *_, kept = inputs.read(logits, shards)
    if inputs.mask is not None:
        target = torch.where(inputs.mask.reshape(-1) != 0, target, IGNORE)
    kernels = inputs.kernels(logits, target, kept, shards)
    rows = Rows(make_readable(logits), float(inputs.temperature))
    stats = kernels.row_stats(rows, target)
    shape = inputs.target.shape
    return TokenLogp(stats.logp.view(shape), stats.entropy.view(shape))
