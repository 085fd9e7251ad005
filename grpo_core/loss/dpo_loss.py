"""DPO: a loss over pairs of completions, one preferred, with two derivatives per pair.

h = (logp_w − ref_w) − (logp_l − ref_l)        w chosen, l rejected; sums over tokens
ℓ(h) = −log σ(βh),    dℓ/dlogp_w = −dℓ/dlogp_l = −β·σ(−βh)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.objective.validation import (
    check_floats,
    check_ids,
    check_mask,
    check_number,
    check_vector,
    is_int,
)


@dataclass(frozen=True)
class PreferenceOutput:
    """What `dpo_loss` returns.

    Attributes:
        loss: 0-dim, differentiable with respect to the two log-probabilities.
        dlogp_chosen, dlogp_rejected: [B], the derivatives of `loss`, weight included; detached.
        reward_chosen, reward_rejected: [B], the implied reward β·(logp − ref_logp); detached.
    """

    loss: Tensor
    dlogp_chosen: Tensor
    dlogp_rejected: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """reward_chosen − reward_rejected: [B]."""
        return self.reward_chosen - self.reward_rejected

    @property
    def accuracy(self) -> Tensor:
        """Share of the pairs with a margin above 0; 0-dim, 0 without pairs."""
        return (self.margin > 0).sum() / max(self.margin.numel(), 1)


def dpo_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    weight: Tensor | None = None,
) -> PreferenceOutput:
    """L = Σ_i weight_i · ℓ(h_i) over B pairs, with ℓ(h) = −log σ(βh).

    Args:
        logp_chosen, logp_rejected: [B] floating point, log π of whole completions, nats.
        ref_chosen, ref_rejected: [B], of the reference policy, nats; constants.
        beta: β > 0.
        weight: [B], None means 1/B each. Under gradient accumulation give 1/(global number).

    Returns:
        `PreferenceOutput`, in float32, or float64 for float64 logp_chosen.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: DPO (arXiv 2305.18290, eq. 7).
    """
    check_number("a finite number > 0", beta=beta)
    B = len(check_vector("logp_chosen", logp_chosen))
    if weight is None:
        weight = torch.full_like(logp_chosen, 1 / max(B, 1), dtype=torch.float64)
    others = {"logp_rejected": logp_rejected, "ref_chosen": ref_chosen}
    for name, vector in (others | {"ref_rejected": ref_rejected, "weight": weight}).items():
        check_floats(name, vector, (B,), device=logp_chosen.device)
    chosen = logp_chosen.double() - ref_chosen.detach().double()
    rejected = logp_rejected.double() - ref_rejected.detach().double()
    weight, z = weight.detach().double(), beta * (chosen - rejected)
    total = (weight * -logsigmoid(z)).sum()
    dlogp = weight * (-beta * torch.sigmoid(-z)).detach()
    dtype = torch.promote_types(logp_chosen.dtype, torch.float32)
    results = (total, dlogp, -dlogp, beta * chosen.detach(), beta * rejected.detach())
    return PreferenceOutput(*(result.to(dtype) for result in results))


def sequence_logp(
    logp: Tensor,
    mask: Tensor,
    sequence_id: Tensor | None = None,
    *,
    sequences: int | None = None,
    mean: bool = False,
    validate: bool | None = None,
) -> Tensor:
    """Σ_t logp_t of every sequence, or the mean over its tokens; differentiable.

    Args:
        logp: [B, T] or packed [N], nats; masked entries may be anything.
        mask: the same shape, 0 means masked.
        sequence_id: [N] integers in [0, sequences), for packed tokens.
        sequences: S, how many there are, for packed tokens.
        mean: divide by the number of valid tokens.
        validate: look for wrong ids; None means on the CPU only. Unseen, their tokens are masked.

    Returns:
        [B] or [S], in the type of logp but at least float32; 0 for a sequence without tokens.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if check_floats("logp", logp).ndim not in (1, 2):
        raise ValueError(f"logp: expected shape [B, T] or [N], got {list(logp.shape)}")
    present = check_mask("mask", mask, tuple(logp.shape), device=logp.device) != 0
    # tokens are summed in float64, so that atomic additions round alike in any order
    tokens = torch.where(present, logp, 0.0).double()
    if logp.ndim == 2:
        if sequence_id is not None or sequences is not None:
            raise ValueError("sequence_id: expected None for [B, T], got ids or their number")
        total, length = tokens.sum(1), present.sum(1)
    else:
        if sequence_id is None or sequences is None:
            raise ValueError("sequence_id: expected ids and their number for packed [N], got None")
        if not is_int(sequences) or sequences < 0:
            raise ValueError(f"sequences: expected an int >= 0, got {sequences!r}")
        at, known = check_ids("sequence_id", sequence_id, "sequences", sequences, logp, validate)
        # tokens of unknown ids go to one more entry, which is cut off
        zeros = torch.zeros(sequences + 1, dtype=torch.float64, device=logp.device)
        at = torch.where(known, at, sequences)
        total = zeros.scatter_add(0, at, tokens)[:-1]
        length = zeros.scatter_add(0, at, present.double())[:-1]
    total = total / length.clamp(min=1) if mean else total
    return total.to(torch.promote_types(logp.dtype, torch.float32))
