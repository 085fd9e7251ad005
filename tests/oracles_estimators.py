"""Advantages, corrections, preference and value losses once more, from their papers alone.

Plain Python and NumPy in float64: loops over groups, sequences and tokens, lists of what is valid.
Nothing of grpo_core is imported here.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def _members(ids: list[int]) -> dict[int, list[int]]:
    """The places of each group."""
    places: dict[int, list[int]] = {}
    for i, group in enumerate(ids):
        places.setdefault(group, []).append(i)
    return places


def _over(values: Array, std_of: Array, ddof: int, eps: float) -> Array:
    """values / (std + ε); what does not vary has nothing to be divided by."""
    n = len(std_of)
    std = math.sqrt(((std_of - std_of.mean()) ** 2).sum() / max(n - ddof, 1))
    return values / (std + eps) if std > 1e-12 else np.zeros_like(values)


def _per_token(values: Array, tokens: list[int] | None) -> Array:
    """Every completion as often as it has tokens."""
    return values if tokens is None else np.repeat(values, tokens)


def grpo(R: Array, ids: list[int], ddof: int = 1, eps: float = 1e-4) -> Array:
    """DeepSeekMath (arXiv 2402.03300), sec. 4.1.2: (r − mean(r)) / std(r) within the group."""
    A = np.zeros(len(R))
    for places in _members(ids).values():
        group = R[places]
        A[places] = _over(group - group.mean(), group, ddof, eps)
    return A


def dr_grpo(R: Array, ids: list[int]) -> Array:
    """Dr. GRPO (arXiv 2503.20783), sec. 3.2: r − mean(r) within the group."""
    A = np.zeros(len(R))
    for places in _members(ids).values():
        A[places] = R[places] - R[places].mean()
    return A


def rloo(R: Array, ids: list[int]) -> Array:
    """RLOO (arXiv 2402.14740): r_i less the mean of the other samples' rewards."""
    A = np.zeros(len(R))
    for places in _members(ids).values():
        for i in places:
            others = [R[j] for j in places if j != i]
            A[i] = R[i] - sum(others) / len(others) if others else 0.0
    return A


def batch_std(
    R: Array, ids: list[int], ddof: int = 1, eps: float = 1e-4, tokens: list[int] | None = None
) -> Array:
    """ "Tricks or Traps?" (arXiv 2508.08221): mean of the group, std of the batch."""
    return _over(dr_grpo(R, ids), _per_token(R, tokens), ddof, eps)


def reinforce_pp_baseline(
    R: Array, ids: list[int], ddof: int = 1, eps: float = 1e-4, tokens: list[int] | None = None
) -> Array:
    """REINFORCE++ with baseline (arXiv 2501.03262): group-centred, then normalised by the batch."""
    centred = dr_grpo(R, ids)
    everyone = _per_token(centred, tokens)
    return _over(centred - everyone.mean(), everyone, ddof, eps)


def reinforce_pp(
    R: Array, ids: list[int], ddof: int = 1, eps: float = 1e-4, tokens: list[int] | None = None
) -> Array:
    """REINFORCE++ (arXiv 2501.03262): normalised by the batch, no groups."""
    everyone = _per_token(R, tokens)
    return _over(R - everyone.mean(), everyone, ddof, eps)


def gdpo(
    R: Array,
    ids: list[int],
    w: Array,
    ddof: int = 1,
    eps: float = 1e-4,
    tokens: list[int] | None = None,
) -> Array:
    """GDPO (arXiv 2601.05242): GRPO per reward function, weighted sum, normalised by the batch."""
    Z = sum(w[f] * grpo(R[:, f], ids, ddof, eps) for f in range(R.shape[1]))
    everyone = _per_token(Z, tokens)
    return _over(Z - everyone.mean(), everyone, ddof, eps)


def gae(
    r: Array, V: Array, mask: Array, gamma: float, lam: float, bootstrap: Array | None = None
) -> tuple[Array, Array]:
    """GAE (arXiv 1506.02438), eq. 16: Â_t = Σ_l (γλ)^l·δ_{t+l}, over the valid tokens of a row."""
    A, returns = np.zeros_like(r), np.zeros_like(r)
    for i in range(len(r)):
        valid = [t for t in range(r.shape[1]) if mask[i, t]]
        values = [V[i, t] for t in valid] + [0.0 if bootstrap is None else bootstrap[i]]
        delta = [r[i, t] + gamma * values[k + 1] - values[k] for k, t in enumerate(valid)]
        for k, t in enumerate(valid):
            A[i, t] = sum((gamma * lam) ** j * d for j, d in enumerate(delta[k:]))
            returns[i, t] = A[i, t] + V[i, t]
    return A, returns


def rewards_with_kl(
    R: Array, logp: Array, ref_logp: Array, mask: Array, beta: float, kl: str
) -> Array:
    """Ziegler et al. (arXiv 1909.08593), eq. 2, token by token; estimators of Schulman (2020)."""
    out = np.zeros_like(logp)
    for i in range(len(R)):
        valid = [t for t in range(logp.shape[1]) if mask[i, t]]
        for t in valid:
            r = math.exp(ref_logp[i, t] - logp[i, t])
            estimate = {
                "k1": -math.log(r),
                "k2": math.log(r) ** 2 / 2,
                "k3": r - 1 - math.log(r),
                "abs": abs(math.log(r)),
            }[kl]
            out[i, t] = -beta * estimate + (R[i] if t == valid[-1] else 0.0)
    return out


def sampler_weights(
    old: Array, sampler: Array, mask: Array, level: str, action: str, low: float, high: float
) -> tuple[Array, Array]:
    """Truncated and masked importance weights, π_old/π_sampler: (factor, mask).

    TIS: Yao et al. (2025); IcePop (arXiv 2510.18855); sequence level: 2512.23075.
    """
    factor, left = np.zeros_like(old), np.zeros_like(old, dtype=bool)
    for i in range(len(old)):
        valid = [
            t
            for t in range(old.shape[1])
            if mask[i, t] and math.isfinite(old[i, t]) and math.isfinite(sampler[i, t])
        ]
        for t in valid:
            ratios = [math.exp(old[i, u] - sampler[i, u]) for u in valid]
            w = {
                "token": math.exp(old[i, t] - sampler[i, t]),
                "sequence": math.prod(ratios),
                "geometric": math.prod(ratios) ** (1 / len(ratios)),
            }[level]
            inside = low <= w <= high
            factor[i, t] = w if inside else min(max(w, low), high) if action == "truncate" else 0
            left[i, t] = inside or action != "reject"
    return factor, left


def off_policy(new: Array, old: Array, A: Array, mask: Array, delta: float) -> Array:
    """DeepSeek-V3.2 (arXiv 2512.02556), sec. 3.1: M = 0 if Â < 0 and mean log(π_old/π) > δ."""
    M = np.zeros_like(new)
    for i in range(len(new)):
        valid = [t for t in range(new.shape[1]) if mask[i, t]]
        if valid:
            drift = sum(old[i, t] - new[i, t] for t in valid) / len(valid)
            M[i, valid] = 0.0 if A[i] < 0 and drift > delta else 1.0
    return M


def dpo(h: float, beta: float) -> float:
    """DPO (arXiv 2305.18290), eq. 7: −log σ(βh)."""
    z = beta * h
    return math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z)) - z


def value_loss(V: Array, old: Array, R: Array, w: Array, eps: float) -> float:
    """openai/baselines, ppo2: ½·max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²), weighted."""
    total = 0.0
    for v, o, r, weight in zip(V.flat, old.flat, R.flat, w.flat, strict=True):
        if weight:
            clipped = o + min(max(v - o, -eps), eps)
            total += weight * 0.5 * max((v - r) ** 2, (clipped - r) ** 2)
    return total
