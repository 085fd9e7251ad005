"""The public loss from hidden states: the output matrix is part of it, logits are never all there.

Chunks of rows go through the product, the kernels of `fused_loss`, and the gradient products; see
`linear_plans` for how many products that takes. Rows that cannot have a gradient take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.arguments import (
    Tokens,
    check_logits,
    check_loss_arguments,
    check_target,
    present,
)
from grpo_core.backends import Backend, choose_backend
from grpo_core.fused_loss import LossOutput, TokenLogp
from grpo_core.linear_head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear_memory import Plan
from grpo_core.linear_rows import loss_of_rows, scored_rows
from grpo_core.objective import Objective
from grpo_core.recipes import find_objective


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
    Those read 0 in logp, entropy, ratio and kl and are in no metric but `skipped_rows`, which
    counts all rows left out; they still count in the divisor of a mean.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16 or float16, also as a view such as
            `hidden[:, :-1]`.
        lm_head: [V, D], or a `LinearHead` with bias, soft cap, scale, padding or an adapter.
        target, objective, advantage, rewards, group_size, group_id, old_logp, ref_logp,
        sampler_logp, mask, sequence_id, normalizer, temperature, backend, validate: see
            `fused_loss`; with [B, T, D] for [B, T, V].
        old_hidden, old_lm_head: instead of `old_logp`, hidden states of the old policy, shaped like
            target with any D, and its matrix (None: `lm_head`); one product more.
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

    Returns:
        `LossOutput`, as `fused_loss`; loss differentiable, everything else detached.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: see `fused_loss`; gradients in the forward of a fused head: Liger (arXiv 2410.10989).
    """
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    _check_target_shape(target, hidden)
    kernels = choose_backend(backend, hidden)
    spec = find_objective(objective)
    logits = _stand_in(hidden, head.V)
    check_logits(logits, temperature, HEAD_DTYPES)
    dtype = _logits_dtype(logits_dtype)
    autocast = _autocast(hidden)

    def door(old_logp: Tensor | None, ref_logp: Tensor | None) -> Tokens:
        exact = spec.kl == "exact" and ref_hidden is not None
        return check_loss_arguments(
            logits,
            target,
            objective=spec,
            advantage=advantage,
            rewards=rewards,
            group_size=group_size,
            group_id=group_id,
            old_logp=old_logp,
            ref_logp=ref_logp,
            ref_logits=logits if exact else None,
            sampler_logp=sampler_logp,
            mask=mask,
            sequence_id=sequence_id,
            normalizer=normalizer,
            backend=backend,
            validate=validate,
        )

    def score(name: str, states: Tensor, matrix: Tensor | LinearHead | None, at: Tensor) -> Tensor:
        """Log-probabilities under another policy of the rows marked in `at` [N] bool."""
        other = check_head(f"{name}_lm_head", lm_head if matrix is None else matrix, states)
        found, _ = scored_rows(
            states,
            other,
            torch.where(at, target.reshape(-1).long(), -100),
            at,
            temperature=temperature,
            plan=plan,
            memory_budget=memory_budget,
            dtype=dtype,
            autocast=autocast,
            kernels=kernels,
        )
        return found.view(target.shape)

    _check_policy("old", old_logp, old_hidden, old_lm_head, hidden)
    _check_policy("ref", ref_logp, ref_hidden, ref_lm_head, hidden)
    reference = None
    if spec.kl == "exact":
        if ref_hidden is None and spec.beta:
            raise ValueError(
                f"ref_hidden: expected a tensor for kl = 'exact' and beta = {spec.beta}, got None"
            )
        if ref_hidden is not None:
            reference = (ref_hidden.detach(), _reference_head(ref_lm_head, head, ref_hidden))
    # what is still to be found cannot be told from 0 by any check
    later = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
    finds_old, finds_ref = old_hidden is not None, ref_hidden is not None and reference is None
    tokens = door(later if finds_old else old_logp, later if finds_ref else ref_logp)
    if finds_old or finds_ref:
        samples = spec.factor.needs_sampler
        at = tokens.given if samples or all_logp else tokens.given & ~tokens.still()
        if finds_old:
            assert old_hidden is not None
            old_logp = score("old", old_hidden, old_lm_head, at)
        if finds_ref:
            assert ref_hidden is not None
            ref_logp = score("ref", ref_hidden, ref_lm_head, at)
        tokens = door(old_logp, ref_logp)
    return loss_of_rows(
        hidden,
        head,
        tokens,
        target.shape,
        plan=plan,
        memory_budget=memory_budget,
        all_logp=all_logp,
        logits_dtype=dtype,
        autocast=autocast,
        temperature=float(temperature),
        kernels=kernels,
        reference=reference,
    )


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
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    _check_target_shape(target, hidden)
    kernels = choose_backend(backend, hidden)
    logits = _stand_in(hidden, head.V)
    check_logits(logits, temperature, HEAD_DTYPES)
    check_target(logits, target, mask, validate)
    valid = present(target, mask) & ((target >= 0) & (target < head.V)).reshape(-1)
    logp, entropy = scored_rows(
        hidden,
        head,
        target.reshape(-1).long(),
        valid,
        temperature=float(temperature),
        plan=None,
        memory_budget=memory_budget,
        dtype=_logits_dtype(logits_dtype),
        autocast=_autocast(hidden),
        kernels=kernels,
    )
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


def _stand_in(hidden: Tensor, V: int) -> Tensor:
    """Something of the logits' shape without their memory, for the door to look at."""
    return hidden.detach().new_zeros(()).expand(*hidden.shape[:-1], V)


def _check_target_shape(target: Tensor, hidden: Tensor) -> None:
    """Raises ValueError unless there is a target for every hidden state."""
    shape = hidden.shape[:-1]
    if not isinstance(target, Tensor) or target.shape != shape:
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"target: expected shape {list(shape)} for hidden {list(hidden.shape)}, got {got}; "
            "position t predicts token t + 1: give hidden[:, :-1], or pad the shifted target "
            "with -100"
        )


def _check_policy(
    name: str,
    logp: Tensor | None,
    states: Tensor | None,
    matrix: Tensor | LinearHead | None,
    hidden: Tensor,
) -> None:
    """Raises ValueError unless another policy is given in one way at most."""
    if states is None and matrix is not None:
        raise ValueError(f"{name}_lm_head: expected None without {name}_hidden")
    if states is not None and logp is not None:
        raise ValueError(f"{name}_hidden: expected None with {name}_logp, got both")
    if states is not None:
        check_hidden(f"{name}_hidden", states, hidden)


def _reference_head(
    matrix: Tensor | LinearHead | None, head: LinearHead, ref_hidden: Tensor
) -> LinearHead:
    """The reference's head without a graph, over the same words.

    Raises:
        ValueError: another number of words.
    """
    other = check_head("ref_lm_head", head if matrix is None else matrix, ref_hidden)
    if head.V != other.V:
        raise ValueError(f"ref_lm_head: expected V = {head.V} words as in lm_head, got {other.V}")
    return other.of(other.weight, other.bias, other.lora_A, other.lora_B)


def _logits_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """float32 unless another is asked for."""
    if dtype is not None and dtype not in HEAD_DTYPES:
        raise ValueError(f"logits_dtype: expected one of {HEAD_DTYPES} or None, got {dtype!r}")
    return dtype or torch.float32


def _autocast(hidden: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast wants products, or None."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
