"""The float64 reference of the loss from hidden states, a sequence at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.hidden import HiddenBatch, HiddenOutcome
from bench.truth import WrongResult
from grpo_core.loss.reference import reference_loss

# words whose rows of dweight are looked at, beside the first targets
SAMPLE_WORDS = 64
# of the gradients' and log-probabilities' norms: float32 products of up to 4,096 terms; and logits
# that were rounded to 16 bits on their way, as plain PyTorch does
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class HiddenTruth(NamedTuple):
    """What every contender has to find."""

    words: Tensor  # [W] int64, where dweight is looked at
    loss: Tensor  # 0-dim
    size: Tensor  # 0-dim, of what the loss is a sum of
    logp: Tensor  # [N], nats
    dhidden: Tensor  # [N, D]
    dweight: Tensor  # [W, D]


def find_truth(batch: HiddenBatch) -> HiddenTruth:
    """Everything in float64."""
    tokens, device = batch.tokens, batch.hidden.device
    V = len(batch.lm_head)
    spaced = torch.linspace(0, V - 1, min(SAMPLE_WORDS, V), device=device).long()
    words = torch.cat([spaced, tokens.word[:SAMPLE_WORDS]]).unique()
    lm_head, hidden = batch.lm_head.double(), batch.hidden.double()
    loss, dweight = lm_head.new_zeros(()), lm_head.new_zeros(len(words), lm_head.shape[1])
    logp, dhidden = [], []
    for nth in range(tokens.B):
        rows = slice(nth * tokens.T, (nth + 1) * tokens.T)
        logits = (hidden[rows] @ lm_head.t()).requires_grad_()
        out = reference_loss(
            logits,
            tokens.target[rows],
            objective="dapo",
            advantage=tokens.advantage[rows],
            old_logp=tokens.old_logp[rows],
            sequence_id=torch.zeros_like(tokens.target[rows]),
            normalizer=float(tokens.scored),
        )
        (dlogits,) = torch.autograd.grad(out.loss, logits)
        loss += out.loss.detach()
        logp.append(out.logp)
        dhidden.append(dlogits @ lm_head)
        dweight += dlogits[:, words].t() @ hidden[rows]
    size = tokens.advantage.abs().mean()
    return HiddenTruth(words, loss, size, torch.cat(logp), torch.cat(dhidden), dweight)


def errors(batch: HiddenBatch, outcome: HiddenOutcome, truth: HiddenTruth) -> dict[str, float]:
    """Error of everything that a contender returned, relative to the norm of the truth."""
    valid = batch.tokens.valid
    found = {}
    if outcome.loss is not None:
        found["loss"] = float((outcome.loss.double() - truth.loss).abs() / truth.size)
    for name, value, right in (
        ("logp", None if outcome.logp is None else outcome.logp[valid], truth.logp[valid]),
        ("dhidden", outcome.dhidden, truth.dhidden),
        (
            "dweight",
            None if outcome.dweight is None else outcome.dweight[truth.words],
            truth.dweight,
        ),
    ):
        if value is not None:
            found[name] = float((value.double() - right).norm() / right.norm())
    return found


def refuse_wrong(name: str, found: dict[str, float], dtype: torch.dtype) -> None:
    """Raises WrongResult, naming contender and quantity, unless all errors are roundings."""
    for what, error in found.items():
        if not error <= ALLOWED[dtype]:
            raise WrongResult(
                f"{name}: {what}: expected the float64 reference's, off by {error:.2e} of its "
                f"size where {ALLOWED[dtype]:.0e} is allowed"
            )
