"""DPO: a pair of completions, one preferred; two scalars a pair are the whole gradient.

    h = (logp_w − ref_w) − (logp_l − ref_l)          w the chosen, l the rejected; sums over tokens

| loss    | ℓ(h)                                  | dℓ/dh                            | source      |
|---------|---------------------------------------|----------------------------------|-------------|
| sigmoid | −(1 − s)·log σ(βh) − s·log σ(−βh)     | −β·((1 − s)·σ(−βh) − s·σ(βh))    | DPO         |
| hinge   | max(0, 1 − βh)                        | −β·[βh < 1]                      | SLiC-HF     |
| ipo     | (h − 1/(2β))²                         | 2·(h − 1/(2β))                   | IPO, eq. 17 |

dℓ/dlogp_w = dℓ/dh = −dℓ/dlogp_l. s is the label smoothing, the chance that the labels are swapped
(conservative DPO). TRL 1.16 feeds ipo with means over tokens: give `sequence_logp(..., mean=True)`;
its "sigmoid" knows no label smoothing.

Source: DPO: arXiv 2305.18290, eq. 7; IPO: 2310.12036; hinge: SLiC-HF, 2305.10425, eq. 1;
conservative DPO: E. Mitchell, "A note on DPO with noisy preferences" (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_core.objective.validation import check_floats, check_ids, check_mask, is_int, is_number

PreferenceLoss = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class PreferenceOutput:
    """What `dpo_loss` returns.

    Attributes:
        loss: 0-dim, differentiable with respect to the two log-probabilities.
        dlogp_chosen, dlogp_rejected: [B], the derivatives of `loss`, weight included; detached. So:
        reward_chosen, reward_rejected: [B], β·(logp − ref_logp), the reward that is implied.
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
    loss: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> PreferenceOutput:
    """L = Σ_i weight_i · ℓ(h_i) over B pairs, see the table above.

    Args:
        logp_chosen, logp_rejected: [B] floating point, log π of whole completions, nats.
        ref_chosen, ref_rejected: [B], of the reference policy, nats; constants.
        beta: β > 0.
        loss: "sigmoid", "hinge" or "ipo".
        label_smoothing: s in [0, 0.5), for "sigmoid" only.
        weight: [B], None means 1/B each. Under gradient accumulation give 1/(global number).

    Returns:
        `PreferenceOutput`, in float32, or float64 for float64 logp_chosen.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: DPO (arXiv 2305.18290, eq. 7).
    """
    if loss not in get_args(PreferenceLoss):
        raise ValueError(f"loss: expected one of {get_args(PreferenceLoss)}, got {loss!r}")
    if not is_number(beta) or not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number > 0, got {beta!r}")
    smooth = is_number(label_smoothing) and 0 <= label_smoothing < 0.5
    if not smooth or (label_smoothing and loss != "sigmoid"):
        want = "a number in [0, 0.5)" if loss == "sigmoid" else f"0 for loss={loss!r}"
        raise ValueError(f"label_smoothing: expected {want}, got {label_smoothing!r}")
    if check_floats("logp_chosen", logp_chosen).ndim != 1:
        got = f"{list(logp_chosen.shape)} {logp_chosen.dtype}"
        raise ValueError(f"logp_chosen: expected a floating-point tensor [B], got {got}")
    B = len(logp_chosen)
    others = {"logp_rejected": logp_rejected, "ref_chosen": ref_chosen}
    for name, vector in (others | {"ref_rejected": ref_rejected, "weight": weight}).items():
        if name != "weight" or vector is not None:
            check_floats(name, vector, (B,), device=logp_chosen.device)

    chosen = logp_chosen.double() - ref_chosen.detach().double()
    rejected = logp_rejected.double() - ref_rejected.detach().double()
    if weight is None:
        weight = torch.full_like(chosen, 1 / max(B, 1))
    weight = weight.detach().double()
    value, slope = _loss_and_slope(chosen - rejected, beta, loss, label_smoothing)
    dlogp = weight * slope.detach()
    total = (weight * value).sum()
    kept = (dlogp, -dlogp, beta * chosen.detach(), beta * rejected.detach())
    if logp_chosen.dtype == torch.float64:
        return PreferenceOutput(total, *kept)
    return PreferenceOutput(total.float(), *(vector.float() for vector in kept))


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
        # room for ids that are unknown, whose tokens are left out
        zeros = torch.zeros(sequences + 1, dtype=torch.float64, device=logp.device)
        at = torch.where(known, at, sequences)
        total = zeros.scatter_add(0, at, tokens)[:-1]
        length = zeros.scatter_add(0, at, present.double())[:-1]
    total = total / length.clamp(min=1) if mean else total
    return total if logp.dtype == torch.float64 else total.float()


def _loss_and_slope(
    h: Tensor, beta: float, loss: PreferenceLoss, smoothing: float
) -> tuple[Tensor, Tensor]:
    """ℓ(h), for autograd, and dℓ/dh in closed form."""
    z = beta * h
    if loss == "sigmoid":
        value = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
        return value, -beta * ((1 - smoothing) * torch.sigmoid(-z) - smoothing * torch.sigmoid(z))
    if loss == "hinge":
        return torch.relu(1 - z), -beta * (z < 1).to(z.dtype)
    distance = h - 1 / (2 * beta)
    return distance.square(), 2 * distance
