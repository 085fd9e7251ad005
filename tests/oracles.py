"""Each objective once more, transcribed from its paper and from nothing else.

Dense float64 PyTorch over `[B, T]` with a 0/1 mask, one loop over sequences, autograd for the
gradient. Nothing of grpo_core is imported here. Papers maximise J; a loss is −J.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logp_and_entropy(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy, summed without the target: exact for confident tokens too.

    log π(y) = −log(1 + Σ_{j≠y} exp(x_j − x_y)); H = −Σ_j π_j log π_j.
    """
    x = logits.double() / temperature
    gap = x - x.gather(-1, target[..., None])
    others = torch.ones_like(gap, dtype=torch.bool).scatter(-1, target[..., None], False)
    top = gap.masked_fill(~others, -math.inf).amax(-1)
    # Σ exp(gap) may overflow float64 for hopeless tokens: log-sum-exp, then log(1 + e^s)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    powers = torch.where(others, (gap - top[..., None]).exp(), 0.0)
    log_others = top + powers.sum(-1).log()
    logp = -torch.logaddexp(log_others, torch.zeros_like(log_others))
    logp = torch.where(log_others < -1, -torch.log1p(log_others.exp()), logp)
    log_pi = gap + logp[..., None]
    pi = log_pi.exp()
    entropy = -torch.where(pi > 0, pi * log_pi, 0.0).sum(-1)
    return logp, entropy


def group_advantage(rewards: list[float], G: int, *, scale: bool, ddof: int, eps: float) -> Tensor:
    """DeepSeekMath (arXiv 2402.03300), sec. 4.1.2: Â_i = (r_i − mean(r)) / std(r)."""
    advantages = []
    for start in range(0, len(rewards), G):
        group = rewards[start : start + G]
        mean = math.fsum(group) / G
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / max(G - ddof, 1))
        advantages += [(r - mean) / (std + eps) if scale else r - mean for r in group]
    return torch.tensor(advantages, dtype=torch.float64)


def ppo_clip(ratio: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    """PPO (arXiv 1707.06347), eq. 7; with two bounds DAPO (2503.14476), eq. 8."""
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def dual_clip(ratio: Tensor, A: Tensor, low: float, high: float, c: float) -> Tensor:
    """Dual-clip PPO (arXiv 1912.09729): for A < 0 the objective is at least c·A."""
    clipped = ppo_clip(ratio, A, low, high)
    return torch.where(A < 0, torch.maximum(clipped, c * A), clipped)


def kl_estimate(name: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman (2020), with r = π_ref/π: k1 = −log r, k2 = ½ log² r, k3 = r − 1 − log r.

    `+` (verl): the value without the sign, its gradient replaced by that of k2.
    """
    r = (ref_logp - logp).exp()
    k2 = r.log() ** 2 / 2
    if name.endswith("_plus"):
        value = kl_estimate(name.removesuffix("_plus"), logp, ref_logp)
        return value.detach() + k2 - k2.detach()
    if name == "gated":
        return gated_gap(logp, ref_logp)
    return {"k1": -r.log(), "absolute": r.log().abs(), "k2": k2, "k3": r - 1 - r.log()}[name]


def gated_gap(logp: Tensor, teacher: Tensor) -> Tensor:
    """SDAR (arXiv 2605.15155): sg(σ(β·Δ))·Δ with Δ = log π_T − log π, β = 5."""
    gate = 1 / (1 + (-5 * (teacher - logp.detach())).exp())
    return gate * (teacher - logp)


def grpo(policy: Tensor, kl: Tensor, beta: float, mask: Tensor) -> Tensor:
    """DeepSeekMath (arXiv 2402.03300), eq. 3: mean over outputs of the mean over their tokens."""
    outputs = [
        (policy - beta * kl)[i][mask[i]].sum() / mask[i].sum()
        for i in range(len(mask))
        if mask[i].any()
    ]
    return -torch.stack(outputs).mean()


def dr_grpo(policy: Tensor, kl: Tensor, beta: float, mask: Tensor, length: int) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783), sec. 3.2: token sums over a constant length."""
    outputs = [
        (policy - beta * kl)[i][mask[i]].sum() / length for i in range(len(mask)) if mask[i].any()
    ]
    return -torch.stack(outputs).mean()


def dapo(policy: Tensor, kl: Tensor, beta: float, mask: Tensor) -> Tensor:
    """DAPO (arXiv 2503.14476), eq. 8: one sum over all tokens over the number of tokens."""
    return -(policy - beta * kl)[mask].sum() / mask.sum()


def prompt_mean(policy: Tensor, mask: Tensor, group: list[int]) -> Tensor:
    """ScaleRL (arXiv 2510.13786): mean over prompts of the mean over all tokens of a prompt."""
    prompts = []
    for g in sorted(set(group)):
        members = [i for i in range(len(mask)) if group[i] == g]
        tokens = torch.cat([policy[i][mask[i]] for i in members])
        if len(tokens):
            prompts.append(tokens.sum() / len(tokens))
    return -torch.stack(prompts).mean()


def ipo(logp: Tensor, q_logp: Tensor, A: Tensor, delta: float) -> Tensor:
    """prime-rl (#3418): r·A where |p − q| ≤ ε; q is the sampler's probability."""
    inside = (logp.exp() - q_logp.exp()).detach().abs() <= delta
    return torch.where(inside, (logp - q_logp).exp() * A, 0.0)


def m2po(logp: Tensor, old_logp: Tensor, A: Tensor, mask: Tensor, tau: float) -> Tensor:
    """M2PO (arXiv 2510.01161): r·A without the tokens of largest (log r)², among those with A > 0
    and r > 1 or A < 0 and r < 1, until the mean of the others of these is below τ."""
    d = (logp - old_logp).detach()
    keep = torch.ones_like(d)
    places = [
        (float(d[i, t]) ** 2, i, t)
        for i, t in mask.nonzero().tolist()
        if (A[i, t] > 0 and d[i, t] > 0) or (A[i, t] < 0 and d[i, t] < 0)
    ]
    while places and math.fsum(p[0] for p in places) / len(places) >= tau:
        worst = max(places)
        places.remove(worst)
        keep[worst[1], worst[2]] = 0
    return keep * (logp - old_logp).exp() * A


def future_kl(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    half_life: float,
    low: float,
    high: float,
    c: float,
) -> Tensor:
    """FIPO (arXiv 2603.19835): f_t = clip(exp(Σ_k≥t γ^(k−t)·M_k·Δ_k), low, high), M_k = [r_k ≤ c].

    γ = 2^(−1/half_life); t and k count the tokens of the completion.
    """
    factor = torch.ones_like(logp)
    for i in range(len(mask)):
        places = mask[i].nonzero().flatten().tolist()
        d = [float((logp - old_logp)[i, t]) for t in places]
        for j, t in enumerate(places):
            total = math.fsum(
                2 ** (-(k - j) / half_life) * d[k] for k in range(j, len(d)) if math.exp(d[k]) <= c
            )
            factor[i, t] = min(max(math.exp(total), low), high)
    return factor


def bernoulli_distance(name: str, sampler_logp: float, old_logp: float) -> float:
    """OpenRLHF 0.11.2's gates: KL(Bern(p_s) ‖ Bern(p_old)), or |p_s − p_old|."""
    p, q = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (sampler_logp, old_logp))
    if name == "tv":
        return abs(p - q)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """GSPO (arXiv 2507.18071), eq. 7: s_i = exp(1/|y_i| Σ_t log ratio), for every token of i."""
    rows = [
        (logp - old_logp)[i][mask[i]].mean().exp() if mask[i].any() else logp[i, 0] * 0 + 1
        for i in range(len(mask))
    ]
    return torch.stack(rows)[:, None].expand_as(logp)


def cispo(logp: Tensor, ratio: Tensor, A: Tensor, high: float) -> Tensor:
    """MiniMax-M1 (arXiv 2506.13585): sg(min(r, ε_high))·A·log π, no lower bound."""
    return ratio.clamp(max=high).detach() * A * logp


def sapo(ratio: Tensor, A: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """SAPO (arXiv 2511.20347): f(r)·A with f(r) = σ(τ(r − 1))·4/τ and τ by the sign of A."""
    choice = [tau_pos if a > 0 else tau_neg for a in A.flatten().tolist()]
    tau = torch.tensor(choice, dtype=torch.float64).view_as(A)
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A


def gmpo(logp: Tensor, old_logp: Tensor, A: Tensor, mask: Tensor, bound: float) -> Tensor:
    """GMPO (arXiv 2507.20673): A·(Π_t min-or-clip(r_t)^sgn A)^(1/|o|), for every token of o.

    Per token, in log space and on the pessimistic side: min(d, ε) for A > 0, max(d, −ε) else.
    """
    rows = []
    for i in range(len(mask)):
        d = (logp - old_logp)[i][mask[i]]
        if not len(d):
            rows.append(logp[i, 0] * 0)
            continue
        a = A[i, 0]
        bounded = torch.stack(
            [min(x, x * 0 + bound) if a > 0 else max(x, x * 0 - bound) for x in d]
        )
        rows.append(a * bounded.mean().exp())
    return torch.stack(rows)[:, None].expand_as(logp)


def dro(logp: Tensor, old_logp: Tensor, A: Tensor, beta: float) -> Tensor:
    """Kimi k1.5 (arXiv 2501.12599): A·log π − β/2·(log π − log π_old)²."""
    return A * logp - beta / 2 * (logp - old_logp) ** 2


def dppo_tv(logp: Tensor, old_logp: Tensor, A: Tensor, delta: float, cap: float) -> Tensor:
    """DPPO (arXiv 2602.04879), total variation: moves away beyond δ in probability are masked."""
    p, q = logp.exp().detach(), old_logp.exp()
    away = torch.where(A > 0, p - q > delta, q - p > delta)
    return torch.where(away, 0.0, (p / q).clamp(max=cap)) * A * logp


def dppo_kl(logp: Tensor, old_logp: Tensor, A: Tensor, delta: float, cap: float) -> Tensor:
    """DPPO (arXiv 2602.04879), binary KL: D(Bern(q) ‖ Bern(p)) > δ and a move away are masked."""
    p, q = logp.exp().detach(), old_logp.exp()
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    away = (divergence > delta) & torch.where(A > 0, p > q, p < q)
    return torch.where(away, 0.0, (p / q).clamp(max=cap)) * A * logp


def topr(logp: Tensor, ratio: Tensor, A: Tensor) -> Tensor:
    """TOPR (arXiv 2503.14286): REINFORCE on gains, the ratio truncated to [0, 1] on losses."""
    return torch.where(A > 0, 1.0, ratio.clamp(0, 1).detach()) * A * logp


def vespo(logp: Tensor, old_logp: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    """VESPO (arXiv 2602.10693): sg(φ(W_i))·A·log π, φ(W) = W^k·exp(λ(1 − W)), W_i = Π_t r_t.

    (k, λ) = (2, 3) for A ≥ 0 and (3, 2) else, TRL's defaults.
    """
    W = torch.stack([(logp - old_logp)[i][mask[i]].sum().exp() for i in range(len(mask))])[:, None]
    k, decay = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
    return (W**k * (decay * (1 - W)).exp()).detach() * A * logp


def sequence_sum_mean(policy: Tensor, mask: Tensor) -> Tensor:
    """LUSPO (arXiv 2602.05261): mean over sequences of the sum over their tokens."""
    outputs = [policy[i][mask[i]].sum() for i in range(len(mask)) if mask[i].any()]
    return -torch.stack(outputs).mean()


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    """KL(π ‖ π_ref) = Σ_j π_j·log(π_j / π_ref,j) at every position, over the whole vocabulary."""
    x, y = logits.double() / temperature, ref_logits.double() / temperature
    log_pi, log_ref = x - x.logsumexp(-1, keepdim=True), y - y.logsumexp(-1, keepdim=True)
    # a word that π forbids adds nothing
    return (log_pi.exp() * torch.where(log_pi > -math.inf, log_pi - log_ref, 0.0)).sum(-1)


def divergence(logits: Tensor, ref_logits: Tensor, temperature: float, beta: float) -> Tensor:
    """GKD (arXiv 2306.13649), sec. 2: P the teacher (reference), Q the student, all tokens.

    D_JSD(β)(P ‖ Q) = β·KL(P ‖ M) + (1 − β)·KL(Q ‖ M), M = β·P + (1 − β)·Q; forward KL(P ‖ Q) for
    β = 0 and reverse KL(Q ‖ P) for β = 1, as in TRL.
    """
    Q, P = ((x.double() / temperature).log_softmax(-1).exp() for x in (logits, ref_logits))

    def kl(A: Tensor, B: Tensor) -> Tensor:
        possible = A > 0
        log_ratio = torch.where(possible, A, 1.0).log() - torch.where(possible, B, 1.0).log()
        return (A * log_ratio).sum(-1)

    if beta in (0, 1):
        return kl(P, Q) if beta == 0 else kl(Q, P)
    M = beta * P + (1 - beta) * Q
    return beta * kl(P, M) + (1 - beta) * kl(Q, M)


def sampler_weight(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    level: str,
    action: str,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """(weight, mask) [B, T]: TIS (Yao et al., 2025), IcePop (2510.18855), rejection (2512.23075).

    w_t = π_old / π_sampler, its product over a sequence or the geometric mean of it; outside the
    bounds truncated, set to zero, or out of the mask. What the sampler could not score is out.
    """
    weight, kept = torch.zeros_like(old_logp), mask & sampler_logp.isfinite()
    for i in range(len(mask)):
        gaps = [float(old_logp[i, t] - sampler_logp[i, t]) for t in kept[i].nonzero().flatten()]
        for t in kept[i].nonzero().flatten().tolist():
            of_token = float(old_logp[i, t] - sampler_logp[i, t])
            log_w = {
                "token": of_token,
                "sequence": math.fsum(gaps),
                "geometric": math.fsum(gaps) / len(gaps),
            }[level]
            w = math.exp(log_w)
            if action == "truncate":
                weight[i, t] = min(max(w, low), high)
            elif low <= w <= high:
                weight[i, t] = w
            elif action == "reject":
                kept[i, t] = False
    return weight, kept


def off_policy_sequences(
    logp: Tensor, before: Tensor, A: Tensor, mask: Tensor, delta: float
) -> Tensor:
    """DeepSeek-V3.2 (arXiv 2512.02556), sec. 3.1: M_i = 0 where A < 0 and the mean of
    log(π_old/π) over the sequence is above δ, else 1: [B, T]."""
    keep = torch.ones_like(logp)
    for i in range(len(mask)):
        drift = (before - logp)[i][mask[i]].mean() if mask[i].any() else torch.zeros(())
        keep[i, (A[i] < 0) & (drift > delta)] = 0
    return keep


def high_entropy(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """ "Beyond the 80/20 rule" (arXiv 2506.01939): I[H_t >= τ], τ the quantile of the batch."""
    values = sorted(entropy[mask].tolist())
    place = (1 - share) * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    threshold = values[low] + (place - low) * (values[high] - values[low])
    return mask & (entropy >= threshold - 1e-12)
