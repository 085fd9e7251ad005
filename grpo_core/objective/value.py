"""PPO: advantages per token (GAE), the KL in the reward, and the loss of the value head.

    r_t = −beta·kl_t, plus the completion's reward at its last token
    δ_t = r_t + γ·V_{t+1} − V_t;  A_t = Σ_l (γλ)^l·δ_{t+l};  return_t = A_t + V_t
    L   = Σ_t weight_t · ½·max((V_t − return_t)², (clip(V_t, V_old ± ε) − return_t)²)

Batches are padded, `[B, T]`. Masked tokens, at the end or in the middle (a tool's answer), are
skipped: t + 1 is the next valid token, and the gap costs no discount.

Differences from verl 0.9.1: advantage and return of a masked token are 0, not the last value
carried along; k3 is not clamped at 10; a batch without a valid token gives 0, not an error. TRL's
PPOTrainer (up to 0.29; 1.16 has none) has no masks in the middle, and adds the completion's reward
one token later, at the first padding token, which has a value there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_core.objective.validation import (
    check_choice,
    check_finite,
    check_floats,
    check_mask,
    check_number,
)

KLPenalty = Literal["k1", "k2", "k3", "abs"]
# added to the variance, as in verl and TRL
WHITENING = 1e-8
# above this exponent float32 overflows
MAX_EXPONENT = 80.0


@torch.no_grad()
def rewards_with_kl(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kl: KLPenalty = "k1",
    validate: bool | None = None,
) -> Tensor:
    """r_t = −beta·kl(logp_t, ref_logp_t), plus the completion's reward at its last valid token.

    Args:
        rewards: [B] floating point; that of a completion without a valid token is not used.
        logp: [B, T], of the policy that sampled, nats.
        ref_logp: [B, T], nats.
        mask: [B, T], 0 means masked.
        beta: reward per nat, >= 0.
        kl: with d = logp − ref_logp, "k1" is d, "abs" |d|, "k2" d²/2, "k3" e⁻ᵈ − 1 + d (with −d
            clamped to 80, since float32 would overflow).
        validate: check for NaN and infinity; None means on the CPU only.

    Returns:
        [B, T] float32 (float64 for float64 logp), 0 where masked.

    Source: Ziegler et al. (arXiv 1909.08593, eq. 2); the estimators: Schulman (2020).
    """
    check_choice("kl", kl, get_args(KLPenalty))
    check_number("a finite number >= 0", beta=beta)
    present = _present(mask, "logp", logp, padded=True)
    d = _read("logp", logp, present, validate) - _read("ref_logp", ref_logp, present, validate)
    total = _read("rewards", rewards, present.any(1), validate)
    penalty = {
        "k1": lambda: d,
        "abs": d.abs,
        "k2": lambda: d * d / 2,
        "k3": lambda: torch.expm1((-d).clamp(max=MAX_EXPONENT)) + d,
    }[kl]()
    remaining = present.flip(1).cumsum(1).flip(1)
    last = present & (remaining == 1)
    return _like(logp, torch.where(last, total[:, None], 0.0) - beta * penalty)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whitened: bool = False,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(A_t, A_t + V_t) with A_t = δ_t + γλ·A_{t+1} and δ_t = r_t + γ·V_{t+1} − V_t.

    With values 0 and λ = 1 this is the discounted future reward (REINFORCE++, arXiv 2501.03262).

    Args:
        rewards: [B, T] floating point; those of masked tokens are not read.
        values: [B, T]: completions end where their mask ends, V = 0 after that. Or [B, T + 1]: the
            last column is V after the last valid token: 0 for a completion that ended, V of the
            state for one that was cut off.
        mask: [B, T], 0 means masked, anywhere.
        gamma, lam: γ and λ in [0, 1].
        whitened: subtract the mean of the advantages and divide by √(variance + 1e-8), over all
            valid tokens of this call; returns are not changed.
        validate: check for NaN and infinity; None means on the CPU only.

    Returns:
        advantage and return, both [B, T] float32 (float64 for float64 values), 0 where masked.

    Source: GAE (arXiv 1506.02438, eq. 16).
    """
    check_number("a number in [0, 1]", gamma=gamma, lam=lam)
    present = _present(mask, "rewards", rewards, padded=True)
    r = _read("rewards", rewards, present, validate)
    B, T = rewards.shape
    bootstrap = torch.zeros(B, dtype=torch.float64, device=rewards.device)
    check_floats("values", values, (B, T), (B, T + 1), device=rewards.device)
    if values.shape == (B, T + 1):
        bootstrap = _read("values", values[:, -1], present.any(1), validate)
        values = values[:, :-1]
    v = _read("values", values, present, validate)
    # V of the first valid token at or after t; one column further, V of the next one
    upcoming = backward_scan(v, (~present).double(), bootstrap)
    following = torch.cat([upcoming, bootstrap[:, None]], dim=1)[:, 1:]
    delta = torch.where(present, r + gamma * following - v, 0.0)
    # ones_like keeps float64; two Python numbers would give float32
    carried = torch.where(present, gamma * lam, torch.ones_like(delta))
    advantage = backward_scan(delta, carried, torch.zeros_like(bootstrap))
    advantage = torch.where(present, advantage, 0.0)
    returns = torch.where(present, advantage + v, 0.0)
    if whitened:
        advantage = whiten(advantage, mask)
    return _like(values, advantage), _like(values, returns)


@torch.no_grad()
def whiten(vector: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / √(variance + 1e-8) of the valid entries, n − 1 in the variance; else 0."""
    present = _present(mask, "vector", vector)
    centred = _centre(vector.double(), present)
    variance = centred.square().sum() / (present.sum() - 1).clamp(min=1)
    return _like(vector, centred / (variance + WHITENING).sqrt())


@dataclass(frozen=True)
class ValueLoss:
    """Loss and quality of the value head; all 0-dim.

    Attributes:
        loss: differentiable with respect to the values.
        clip_fraction: share of the valid tokens with the clipped loss.
        explained_variance: 1 − Var(return − V) / Var(return); NaN where returns do not vary.
    """

    loss: Tensor
    clip_fraction: Tensor
    explained_variance: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weight: Tensor,
    *,
    eps: float,
    validate: bool | None = None,
) -> ValueLoss:
    """L = Σ_t weight_t · ½·max((V − return)², (clip(V, V_old − ε, V_old + ε) − return)²).

    Args:
        values: any shape, floating point; differentiated.
        old_values, returns: shaped like values; constants.
        weight: shaped like values, 0 where masked, see `aggregation.token_weights`.
        eps: ε > 0, in units of reward; infinity for the plain squared error.
        validate: check for NaN and infinity; None means on the CPU only.

    Source: openai/baselines, ppo2, and not the PPO paper (1707.06347); TRL and verl: the same.
    """
    check_number("a number > 0", eps=eps)
    shape = tuple(check_floats("values", values).shape)
    present = check_floats("weight", weight, shape, device=values.device) != 0
    v = _like(values, _read("values", values, present, validate))
    old = _like(values, _read("old_values", old_values, present, validate)).detach()
    target = _like(values, _read("returns", returns, present, validate)).detach()
    plain = (v - target).square()
    clipped = (v.clamp(old - eps, old + eps) - target).square()
    count = present.sum().clamp(min=1)
    return ValueLoss(
        loss=(weight.detach() * torch.maximum(plain, clipped)).sum() / 2,
        clip_fraction=(clipped > plain).sum() / count,
        explained_variance=explained_variance(v, target, present),
    )


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(return − V) / Var(return) over the valid tokens: 0-dim float32, NaN for Var = 0."""
    present = _present(mask, "values", values)
    check_floats("returns", returns, tuple(present.shape), device=values.device)
    total = _centre(returns.double(), present).square().sum()
    unexplained = _centre(returns.double() - values.double(), present).square().sum()
    return torch.where(total > 0, 1 - unexplained / total, torch.nan).float()


def _centre(vector: Tensor, present: Tensor) -> Tensor:
    """Each present entry less their mean, 0 elsewhere."""
    vector = torch.where(present, vector, 0.0)
    return torch.where(present, vector - vector.sum() / present.sum(), 0.0)


def backward_scan(addend: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    """x_t = addend_t + factor_t·x_{t+1} with x_T = last: [B, T], in log₂ T steps."""
    T = addend.shape[1]
    total = torch.cat([addend, last[:, None]], dim=1)
    factor = torch.cat([factor, torch.zeros_like(last)[:, None]], dim=1)
    stride = 1
    while stride <= T:
        # doubles the number of terms in the partial sum at t
        near, far = factor[:, :-stride], factor[:, stride:]
        total = torch.cat(
            [total[:, :-stride] + near * total[:, stride:], total[:, -stride:]], dim=1
        )
        factor = torch.cat([near * far, factor[:, -stride:]], dim=1)
        stride *= 2
    return total[:, :-1]


def _like(model: Tensor, result: Tensor) -> Tensor:
    """The result in float32, or in float64 if `model` is."""
    return result.to(torch.promote_types(model.dtype, torch.float32))


def _present(mask: Tensor, name: str, tensor: Tensor, *, padded: bool = False) -> Tensor:
    """Where the mask is not 0; raises ValueError unless both have one shape, if padded [B, T]."""
    shape = tuple(check_floats(name, tensor).shape)
    if padded and len(shape) != 2:
        raise ValueError(f"{name}: expected a padded batch [B, T], got {list(shape)}")
    return check_mask("mask", mask, shape, device=tensor.device) != 0


def _read(name: str, tensor: Tensor, present: Tensor, validate: bool | None) -> Tensor:
    """The tensor in float64, checked, 0 where not present."""
    check_floats(name, tensor, tuple(present.shape), device=present.device)
    check_finite(name, tensor, present, validate)
    return torch.where(present, tensor, 0.0).double()
