"""The surrogates, and the published methods as objectives; defaults are those of the papers.

The papers are in `catalogue.ORIGINS`.

A new method is a function in kernels/surrogates.py if its formula is new, a line in `RECIPES`, and
its oracle in tests/oracles.py. No other library code contains the name of a method.
"""

from __future__ import annotations

import math

from grpo_core.kernels import surrogates
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.objective import Objective, Surrogate
from grpo_core.objective.policy_factor import FutureKL, PolicyFactor, SequenceWeight
from grpo_core.objective.validation import check_number, is_number


def clip(eps_low: float, eps_high: float | None = None, delta: float = math.inf) -> Surrogate:
    """PPO's clipped ratio: bounds 1 − eps_low and 1 + eps_high (eps_low if None), outer bound δ.

    Raises:
        ValueError: a negative bound, or δ < 1 + eps_high, where δ and dual clip would differ.
    """
    eps_high = eps_low if eps_high is None else eps_high
    check_number("a finite number >= 0", eps_low=eps_low, eps_high=eps_high)
    if not is_number(delta) or not delta >= 1 + eps_high:
        raise ValueError(f"delta: expected >= 1 + eps_high = {1 + eps_high}, got {delta!r}")
    return Surrogate(surrogates.clip, (eps_low, eps_high, delta), homogeneous=True)


def importance() -> Surrogate:
    """The ratio without a bound; with `Objective.token_clip`, that of GMPO."""
    return Surrogate(surrogates.importance, homogeneous=True)


def reinforce() -> Surrogate:
    """−A·logp."""
    return Surrogate(surrogates.reinforce, homogeneous=True)


def cispo(high: float, low: float = 0.0) -> Surrogate:
    """Detached ratio with absolute bounds, as in TRL (verl's bounds are 1 ± ε)."""
    check_number("a finite number >= 0", low=low)
    if not is_number(high) or not high > low:
        raise ValueError(f"high: expected more than low = {low}, got {high!r}")
    return Surrogate(surrogates.cispo, (low, high), homogeneous=True)


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05) -> Surrogate:
    """A soft gate around ratio 1, by the sign of the advantage."""
    check_number("a finite number > 0", tau_pos=tau_pos, tau_neg=tau_neg)
    return Surrogate(surrogates.sapo, (tau_pos, tau_neg), homogeneous=True)


def dro(beta: float) -> Surrogate:
    """A penalty on the squared log-ratio instead of a clip."""
    check_number("a finite number >= 0", beta=beta)
    return Surrogate(surrogates.dro, (beta,))


def dppo_tv(delta_low: float, delta_high: float, cap: float = 20.0) -> Surrogate:
    """Trust region on the difference of probabilities."""
    check_number("a finite number >= 0", delta_low=delta_low, delta_high=delta_high, cap=cap)
    return Surrogate(surrogates.dppo_tv, (delta_low, delta_high, cap), homogeneous=True)


def ipo(delta: float) -> Surrogate:
    """The ratio, inside a symmetric trust region on the difference of probabilities."""
    check_number("a finite number >= 0", delta=delta)
    return Surrogate(surrogates.ipo, (delta,), homogeneous=True)


def dppo_kl(delta_low: float, delta_high: float, cap: float = 20.0) -> Surrogate:
    """Trust region on the KL of two Bernoulli variables: this token, or any other."""
    check_number("a finite number >= 0", delta_low=delta_low, delta_high=delta_high, cap=cap)
    return Surrogate(surrogates.dppo_kl, (delta_low, delta_high, cap), homogeneous=True)


def topr() -> Surrogate:
    """REINFORCE for positive advantages, a truncated ratio for the others."""
    return Surrogate(surrogates.topr, homogeneous=True)


def zero() -> Surrogate:
    """No policy term: the KL alone, as in distillation; no advantages are needed."""
    return Surrogate(surrogates.zero, homogeneous=True)


MEAN_ONLY = Estimator(scale=None)

RECIPES: dict[str, Objective] = {
    # advantages are given (GAE)
    "ppo": Objective(clip(0.2)),
    # c = 3
    "dual_clip": Objective(clip(0.2, delta=3.0)),
    # DeepSeekMath, arXiv 2402.03300, eq. 3; beta: sec. 4.2
    "grpo": Objective(clip(0.2), kl="k3", beta=0.04, aggregation="sequence_mean"),
    # Understanding R1-Zero-like training, arXiv 2503.20783, sec. 3.2
    "dr_grpo": Objective(clip(0.2), advantage=MEAN_ONLY, aggregation="constant_length"),
    # DAPO, arXiv 2503.14476, eq. 8; pass the global token count as `normalizer`
    "dapo": Objective(clip(0.2, 0.28)),
    # TRL's name for the token mean of the local batch
    "bnpo": Objective(clip(0.2)),
    # two-sided clipping with δ = 4
    "intellect2": Objective(clip(0.2, delta=4.0), kl="k3", beta=0.001),
    "gspo": Objective(clip(3e-4, 4e-4), ratio_level="sequence", aggregation="sequence_mean"),
    # the same paper, sec. 4.3: for advantages that differ within a sequence
    "gspo_token": Objective(
        clip(3e-4, 4e-4), ratio_level="sequence_token", aggregation="sequence_mean"
    ),
    # log-ratios within ±0.4, geometric mean
    "gmpo": Objective(
        importance(), ratio_level="sequence", token_clip=(0.4, 0.4), aggregation="sequence_mean"
    ),
    # GSPO's ratio, the sequence's token sum
    "luspo": Objective(clip(3e-4, 4e-4), ratio_level="sequence", aggregation="sequence_sum"),
    # MiniMax-M1, arXiv 2506.13585; bound of ScaleRL, 2510.13786
    "cispo": Objective(cispo(5.0)),
    # without the groups of equal rewards; fused heads accumulate in float32
    "scalerl": Objective(
        cispo(5.0), advantage=Estimator("group", "centred"), aggregation="prompt_mean"
    ),
    "sapo": Objective(sapo(), aggregation="sequence_mean"),
    "vespo": Objective(reinforce(), factor=PolicyFactor(sequence_weight=SequenceWeight())),
    # REINFORCE over whole completions, the others of the group as baseline
    "rloo": Objective(
        reinforce(), advantage=Estimator("leave_one_out", None), aggregation="sequence_sum"
    ),
    # normalised over the batch; its KL belongs in the rewards (`value`)
    "reinforce_plus_plus": Objective(clip(0.2), advantage=Estimator("batch", "batch")),
    # the same paper's variant with groups
    "reinforce_plus_plus_baseline": Objective(clip(0.2), advantage=Estimator("group", "centred")),
    "gpg": Objective(reinforce(), advantage=MEAN_ONLY),
    # rewards >= 0, on policy
    "maxrl": Objective(
        reinforce(), advantage=Estimator("group", "mean", epsilon=0.0), aggregation="sequence_sum"
    ),
    # advantages are given (`decoupled_advantages`)
    "gdpo": Objective(clip(0.2)),
    # Kimi k1.5, arXiv 2501.12599
    "dro": Objective(dro(0.1), advantage=MEAN_ONLY, aggregation="sequence_mean"),
    "dppo": Objective(dppo_tv(0.15, 0.15)),
    # prime-rl: old_logp and ref_logp are both the sampler's; its τ·d² is 2τ·k2
    "ipo": Objective(ipo(0.1), kl="k2", beta=2e-3, advantage=MEAN_ONLY),
    # τ = 0.04
    "m2po": Objective(importance(), factor=PolicyFactor(second_moment=0.04)),
    # DAPO with dual clip and a look ahead
    "fipo": Objective(
        clip(0.2, 0.28, delta=10.0), factor=PolicyFactor(future_kl=FutureKL(max_ratio=10.0))
    ),
    # ref_logp is the teacher's
    "sdar": Objective(clip(0.2), kl="gated", beta=0.01),
    "topr": Objective(topr(), advantage=MEAN_ONLY),
    # on-policy distillation, arXiv 2306.13649 and 2606.30406: the KL to a teacher, which is given
    # as the reference
    "opd": Objective(zero(), kl="exact", beta=1.0),
}


def find_objective(objective: str | Objective) -> Objective:
    """The objective itself, or the recipe of that name.

    Raises:
        ValueError: neither an `Objective` nor a name in `RECIPES`.
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in RECIPES:
        raise ValueError(
            f"objective: expected an Objective or one of {sorted(RECIPES)}, got {objective!r}"
        )
    return RECIPES[objective]
