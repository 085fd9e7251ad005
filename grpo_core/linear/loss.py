"""The public loss from hidden states: the output matrix is part of it, logits are never all there.

Chunks of rows go through the product, the kernels of `fused_loss`, and the gradient products; see
`linear_plans` for how many products that takes. Rows that cannot have a gradient take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.linear.door import LinearOptions, logp_from_hidden, loss_from_hidden
from grpo_core.linear.head import LinearHead
from grpo_core.linear.memory import Plan
from grpo_core.loss.compile import logp_in_graph, loss_in_graph
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.outputs import LossOutput, TokenLogp
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective
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
    old_hidden: Tensor | None = None,
    old_lm_head: Tensor | LinearHead | None = None,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head: Tensor | LinearHead | None = None,
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float | Tensor = 1.0,
    plan: Plan | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    all_logp: bool = False,
    accumulate_into: Tensor | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """The loss of `fused_loss`, from hidden states and the output matrix.

    Differentiated with respect to `hidden` and the tensors of `lm_head` that require a gradient.
    Rows of weight 0 are left out before the product, and so are rows that cannot have a gradient:
    advantage 0 (with a ratio of sequences: of the whole sequence), no KL term, no entropy bonus.
    Those read 0 in logp, entropy, ratio and kl and are in no metric but `skipped_rows`, which
    counts all rows left out; they still count in the divisor of a mean.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16 or float16, also as a view such as
            `hidden[:, :-1]`.
        lm_head: [V, D], or a `LinearHead` with bias, soft cap, scale, padding or an adapter.
        target, objective, advantage, rewards, group_size, group_id, old_logp, ref_logp,
        sampler_logp, mask, sequence_id, normalizer, backend, validate: see `fused_loss`; with
            [B, T, D] for [B, T, V].
        temperature: T > 0, the logits are divided by it; or one for every token, shaped like
            target, which costs a pass over the logits and one over their gradient.
        old_hidden, old_lm_head: instead of `old_logp`, hidden states of the old policy, shaped like
            target with any D, and its matrix (None: `lm_head`); one product more, of the chunk
            that the loss is at, into the same memory. Where weights of other rows follow from it
            (a sampler correction), or its matrix has more words, the product comes beforehand.
        ref_hidden, ref_lm_head: the same for the reference policy, instead of `ref_logp`; what
            kl="exact" needs.
        plan: "fast" takes 3 products with a trained head and holds a float32 sum of its gradient;
            "lean" takes 4 and does not. None means fast, unless it would not fit.
        memory_budget: bytes to hold beyond inputs and returned gradients, as far as that is
            possible; the larger, the fewer chunks. None means about 1 GiB of logits on a GPU, 64
            MiB on a CPU.
        logits_dtype: of a chunk's logits; None means float32. bfloat16 halves their memory and
            costs up to 0.05 nats.
        all_logp: make the logits of unmasked rows that have no gradient, too: their
            log-probability is wanted.
        accumulate_into: float32, shaped as the matrix of `lm_head`: its `.grad`, or a `main_grad`.
            The matrix's gradient is added to it while the loss is made, which saves a sum of its
            size, and autograd gets none. The loss is then to be differentiated once, as it is: a
            factor belongs into `normalizer`. Fast plan only; not in float16, nor with an adapter.

    Returns:
        `LossOutput`, as `fused_loss`; loss differentiable, everything else detached.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: see `fused_loss`; gradients in the forward of a fused head: Liger (arXiv 2410.10989).
    """
    inputs = LossInputs(
        target=target,
        objective=find_objective(objective),
        advantage=advantage,
        rewards=rewards,
        group_size=group_size,
        group_id=group_id,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampler_logp=sampler_logp,
        mask=mask,
        sequence_id=sequence_id,
        normalizer=normalizer,
        temperature=temperature,  # type: ignore[arg-type]
        backend=backend,
        validate=validate,
    )
    options = LinearOptions(
        old_hidden=old_hidden,
        old_lm_head=old_lm_head,
        ref_hidden=ref_hidden,
        ref_lm_head=ref_lm_head,
        plan=plan,
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
        all_logp=all_logp,
        accumulate_into=accumulate_into,
    )
    if torch.compiler.is_compiling():
        if accumulate_into is not None:
            raise NotImplementedError("accumulate_into: expected None inside torch.compile")
        return loss_in_graph(loss_from_hidden, (hidden, lm_head), inputs, options, ahead=True)
    check_concrete(hidden=hidden, lm_head=lm_head, **vars(inputs), **vars(options))
    return loss_from_hidden(hidden, lm_head, inputs, options)


@torch.no_grad()
def linear_token_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target, one product: old, reference, evaluation passes.

    Args:
        hidden, lm_head, target, temperature, mask, memory_budget, logits_dtype, backend, validate:
            as in `fused_linear_loss`. Not differentiable.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError, NotImplementedError: as `fused_linear_loss`.
    """
    check_concrete(hidden=hidden, lm_head=lm_head, target=target, mask=mask)
    arguments = (hidden, lm_head, target, temperature, mask, memory_budget)
    options = (logits_dtype, backend, validate)
    if torch.compiler.is_compiling():
        return TokenLogp(*logp_in_graph(logp_from_hidden, *arguments, *options))
    return logp_from_hidden(*arguments, *options)
