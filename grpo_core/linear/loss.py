"""The public functions from hidden states: the output matrix is part of the loss.

Read `chunks` next: the loop over chunks of rows, and how many products it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.linear.autograd import loss_from_hidden
from grpo_core.linear.head import LinearHead
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.linear.matmuls import Plan
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
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head: Tensor | LinearHead | None = None,
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float = 1.0,
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
        sampler_logp, mask, sequence_id, normalizer, backend, validate: see `fused_loss`; with
            [B, T, D] for [B, T, V].
        temperature: T > 0, the logits are divided by it.
        ref_hidden, ref_lm_head: instead of `ref_logp`, hidden states of the reference policy,
            shaped like target with any D, and its matrix (None: `lm_head`); one product more.
            kl="exact" needs them.
        plan: "fast" takes 3 products with a trained head and holds a float32 sum of its gradient;
            "lean" takes 4 and does not. None means fast, unless it would not fit.
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
        temperature=temperature,
        backend=backend,
        validate=validate,
    )
    options: dict[str, Any] = {
        "ref_hidden": ref_hidden,
        "ref_lm_head": ref_lm_head,
        "plan": plan,
        "memory_budget": memory_budget,
        "logits_dtype": logits_dtype,
        "all_logp": all_logp,
    }
    if torch.compiler.is_compiling():
        return loss_in_graph(loss_from_hidden, (hidden, lm_head), inputs, ahead=True, **options)
    check_concrete(hidden=hidden, lm_head=lm_head, **vars(inputs), **options)
    return loss_from_hidden(hidden, lm_head, inputs, **options)


@torch.no_grad()
def linear_token_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
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
    arguments: dict[str, Any] = {
        "temperature": temperature,
        "plan": "fast",
        "mask": mask,
        "memory_budget": memory_budget,
        "logits_dtype": logits_dtype,
        "backend": backend,
        "validate": validate,
    }
    if torch.compiler.is_compiling():
        return TokenLogp(*logp_in_graph(logp_from_hidden, hidden, lm_head, target, **arguments))
    check_concrete(hidden=hidden, lm_head=lm_head, target=target, **arguments)
    return TokenLogp(*logp_from_hidden(hidden, lm_head, target, **arguments))
