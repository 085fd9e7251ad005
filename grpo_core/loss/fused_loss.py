"""The public loss: from logits to a scalar whose gradient is already there.

A token-level objective is one pass: `row_loss` reads every row, evaluates the loss and writes
dlogits; backward only multiplies by grad_output. A sequence-level ratio takes two phases: row
statistics, a small step over `[N]` vectors, `row_dlogits`. Both plans are in `autograd`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.backends import Backend, choose_backend
from grpo_core.loss import in_graph
from grpo_core.loss.autograd import Call, FusedLoss, logp_of_rows
from grpo_core.loss.inputs import LOGIT_DTYPES, Measured, check_logits, check_loss_arguments
from grpo_core.loss.layout import readable, readable_in_place, reference_rows
from grpo_core.loss.metrics import loss_metrics
from grpo_core.objective.objective import Objective


class TokenLogp(NamedTuple):
    """Log-probability of each target and entropy of its distribution, nats, shaped like target."""

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LossOutput:
    """What `fused_loss` returns: the loss, and per token what it was made of.

    Attributes:
        loss: 0-dim float32, differentiable with respect to the logits.
        logp: log π(target), nats, shaped like target, float32, detached, 0 where masked; so are:
        entropy: of the distribution at temperature T, nats.
        ratio: π / π_old; with a sequence-level objective that of the sequence.
        kl: the objective's estimate of KL(π ‖ π_ref), nats.
    """

    loss: Tensor
    logp: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    ratio: Tensor = field(repr=False)
    kl: Tensor = field(repr=False)
    _factor: Tensor | None = field(repr=False)
    _tokens: Measured = field(repr=False)
    _valid: Tensor = field(repr=False)
    _dropped: Tensor = field(repr=False)
    _skipped: int | Tensor | None = field(default=None, repr=False)
    _metrics: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def factor(self) -> Tensor:
        """What the surrogate was multiplied by, see `policy_factor`; 1 without one."""
        return torch.ones_like(self.logp) if self._factor is None else self._factor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Figures of this call, see `metrics.METRICS`; computed when first asked for."""
        if not self._metrics:
            found = loss_metrics(
                self._tokens,
                loss=self.loss.detach(),
                logp=self.logp.reshape(-1),
                entropy=self.entropy.reshape(-1),
                ratio=self.ratio.reshape(-1),
                kl=self.kl.reshape(-1),
                factor=self.factor.reshape(-1),
                valid=self._valid,
                dropped=self._dropped,
                skipped=self._skipped,
            )
            self._metrics.update(found)
        return self._metrics


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
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """Policy-gradient loss of a language model, forward and backward in one pass over the logits.

    L = Σ_n weight_n · (ℓ(logp_n, logp_n − old_logp_n, A_n) + beta · kl(logp_n, ref_logp_n)) with
    ℓ, kl, beta and the weights from `objective`, and what else that names (see there);
    differentiated with respect to the logits only.

    A row whose loss or gradient is not finite (NaN or +inf among its logits, a ratio beyond
    float32) is left out, with a ratio of sequences its whole sequence: loss and gradient there are
    exactly 0, `metrics["nonfinite_rows"]` counts it, and its entries of logp, entropy, ratio and kl
    stay as they came out. It still counts in the divisor of a mean.

    Args:
        logits: [B, T, V], or packed [N, V]; float32, bfloat16 or float16. Views such as
            `logits[:, :-1]` are read where they lie; only a last axis that is not contiguous, and
            rows that overlap, cost a copy. In float16 the gradient is made in the backward, after
            the loss scale.
        target: [B, T] or [N] integers, already shifted; -100 means masked.
        objective: an `Objective`, or the name of one in `RECIPES`.
        advantage: [B], [B, T] or [N]. Or instead:
        rewards: [B], one per sequence, finite; normalised within groups as `objective` says.
        group_size: completions per prompt, neighbours in `rewards`; a group of 1 has advantage 0.
            Or instead
        group_id: [B] integers in [0, B), the prompt of each: groups of any size, in any order.
        old_logp: shaped like target, nats; None means on policy: the ratio is exactly 1 and the
            gradient is that of REINFORCE.
        ref_logp: shaped like target, nats; needed when the objective's beta is not 0, else only
            measured as `kl`. For kl="exact" instead
        ref_logits: shaped like logits, any of their dtypes, at the same temperature; read once,
            beside the logits.
        sampler_logp: shaped like target, nats, of the program that sampled; needed by
            `factor.sampler`, else only measured. There a token for which it is NaN or infinite
            leaves the mask and is counted. Without `old_logp` the policy itself is taken for the
            old one, in two phases.
        mask: shaped like target, 0 means masked, anything else counts fully; together with
            target -100. Sequences without a token are in no mean.
        sequence_id: [N] integers in [0, N), for packed logits: the sequence of each row; it also
            indexes `rewards`.
        normalizer: what the sum is divided by, a number or 0-dim tensor; None means this call's
            own count, see `weights`. Under gradient accumulation give the global count of what
            the aggregation counts: tokens, sequences, or sequences · length. A factor c on the
            loss is best put here as n / c: `(c * loss).backward()` rounds a bfloat16 gradient
            twice unless c is a power of two (at most 2⁻⁷ of an element instead of 2⁻⁸).
        temperature: T > 0, the logits are divided by it.
        inplace: write the gradient, if one is wanted, over the logits. Needs the least memory;
            the logits are gone after the call, and backward runs once. The `.grad` of logits
            that are a leaf is then the same memory. Not for logits whose producer keeps its
            output for its own backward (a tanh soft cap): torch then raises. Not inside
            `torch.compile`, see `operators`.
        backend: "triton", "torch", or None for triton on a GPU and torch elsewhere.
        validate: look at values for bad targets, sequence ids and rewards. None means on the CPU
            only: on a GPU the host would wait, so there a bad row gets weight 0 and is counted.

    Returns:
        `LossOutput`: loss, logp, entropy, ratio, kl, metrics.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing was overwritten.
        NotImplementedError: a backend asked for by name that cannot run here.

    Source: GRPO: DeepSeekMath (arXiv 2402.03300, eq. 3); the recipes name their own.
    """
    arguments: dict[str, Any] = {
        "objective": objective,
        "advantage": advantage,
        "rewards": rewards,
        "group_size": group_size,
        "group_id": group_id,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "ref_logits": ref_logits,
        "sampler_logp": sampler_logp,
        "mask": mask,
        "sequence_id": sequence_id,
        "normalizer": normalizer,
        "backend": backend,
        "validate": validate,
    }
    if torch.compiler.is_compiling():
        outcome, measured = in_graph.loss_in_graph(
            logits, target, temperature=temperature, inplace=inplace, **arguments
        )
        shown = (vector.view(target.shape) for vector in outcome[1:6])
        logp, entropy, ratio, kl, factor = shown
        loss, valid, dropped = outcome.loss, outcome.valid, outcome.dropped
        return LossOutput(loss, logp, entropy, ratio, kl, factor, measured, valid, dropped)
    check_logits(logits, temperature, LOGIT_DTYPES)
    kernels = choose_backend(backend, logits)
    if inplace and not readable_in_place(logits):
        raise ValueError(
            "inplace: expected logits with a contiguous last axis and separate rows, "
            f"got strides {logits.stride()}"
        )
    tokens = check_loss_arguments(logits, target, **arguments)
    call = Call(
        tokens,
        reference_rows(ref_logits, logits, inplace),
        temperature=float(temperature),
        inplace=inplace,
        wants_gradient=logits.requires_grad and torch.is_grad_enabled(),
        kernels=kernels,
    )
    loss, *four, dropped, factor, valid = FusedLoss.apply(readable(logits), call)
    logp, entropy, ratio, kl = (vector.view(target.shape) for vector in four)
    shaped = None if factor is None else factor.view(target.shape)
    valid = tokens.valid if valid is None else valid
    return LossOutput(loss, logp, entropy, ratio, kl, shaped, tokens, valid, dropped)


@torch.no_grad()
def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target in one read: old, reference, evaluation passes.

    Bit for bit the `logp` that `fused_loss` finds for the same row. Not differentiable.

    Args:
        logits, target, temperature, mask, backend, validate: as in `fused_loss`.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError, NotImplementedError: as `fused_loss`.
    """
    arguments = (temperature, mask, backend, validate)
    found = (in_graph.logp_in_graph if torch.compiler.is_compiling() else logp_of_rows)(
        logits, target, *arguments
    )
    return TokenLogp(*(vector.view(target.shape) for vector in found))
