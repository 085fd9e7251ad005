"""The table of recipes: formula, paper, and the options of a framework that mean the same.

`python -m grpo_core.recipes` prints it, docs/objectives.md shows it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import RECIPES

# ℓ of a token, by the name of the surrogate's function; {0}, {1}, ... are its parameters
FORMULAS = {
    "clip": "−min(min(r, {2})·A, clip(r, 1−{0}, 1+{1})·A)",
    "importance": "−r·A",
    "reinforce": "−A·logp",
    "cispo": "−sg(clip(r, {0}, {1}))·A·logp",
    "sapo": "−(4/τ)·σ(τ·(r−1))·A, τ = {0} if A > 0 else {1}",
    "dro": "−A·logp + {0}/2·d²",
    "dppo_tv": "−sg(min(r, {2}))·A·logp where p−q ≤ {1} if A > 0, ≥ −{0} else",
    "ipo": "−r·A where |p−q| ≤ {0}, else 0",
    "dppo_kl": "−sg(min(r, {2}))·A·logp where KL(q, p) ≤ {1} if A > 0, {0} else",
    "topr": "−A·logp if A > 0, else −sg(min(r, 1))·A·logp",
    "zero": "0",
}
# recipes whose advantages are given, and by what
GIVEN = {"ppo": "given (GAE)", "dual_clip": "given (GAE)", "gdpo": "given (decoupled)"}
LEVELS = {
    "token": "token",
    "sequence": "sequence mean",
    "sequence_token": "sequence mean, token gradient",
}


class Origin(NamedTuple):
    """A method's paper, and the options of a framework that mean the same; "" without."""

    paper: str  # arXiv id
    trl: str = ""  # of TRL 1.16's GRPOConfig
    verl: str = ""  # of verl 0.9.1's actor


ORIGINS = {
    "ppo": Origin("1707.06347"),
    "dual_clip": Origin("1912.09729", verl="loss_mode=vanilla"),
    "grpo": Origin("2402.03300", trl="loss_type=grpo, beta=0.04, use_bias_correction_kl=False"),
    "dr_grpo": Origin("2503.20783", trl="loss_type=dr_grpo, scale_rewards=none"),
    "dapo": Origin("2503.14476", trl="loss_type=dapo, epsilon_high=0.28"),
    "bnpo": Origin("", trl="loss_type=bnpo"),
    "intellect2": Origin(
        "2505.07291", trl="loss_type=bnpo, delta=4.0, beta=0.001, use_bias_correction_kl=False"
    ),
    "gspo": Origin(
        "2507.18071",
        trl="loss_type=grpo, epsilon=0.0003, epsilon_high=0.0004, "
        "importance_sampling_level=sequence",
    ),
    "gspo_token": Origin(
        "2507.18071",
        verl="loss_mode=gspo, loss_agg_mode=seq-mean-token-mean, clip_ratio_low=0.0003, "
        "clip_ratio_high=0.0004, adv_estimator=grpo",
    ),
    "luspo": Origin(
        "2602.05261",
        trl="loss_type=luspo, epsilon=0.0003, epsilon_high=0.0004, "
        "importance_sampling_level=sequence",
    ),
    "gmpo": Origin(
        "2507.20673", verl="loss_mode=geo_mean, clip_ratio_low=0.4, clip_ratio_high=0.4"
    ),
    "cispo": Origin(
        "2506.13585",
        trl="loss_type=cispo, epsilon_high=5.0",
        verl="loss_mode=cispo, clip_ratio_low=1.0, clip_ratio_high=4.0",
    ),
    "sapo": Origin(
        "2511.20347", trl="loss_type=sapo", verl="loss_mode=sapo, loss_agg_mode=seq-mean-token-mean"
    ),
    "vespo": Origin("2602.10693", trl="loss_type=vespo"),
    "rloo": Origin(
        "2402.14740", verl="loss_mode=gpg, loss_agg_mode=seq-mean-token-sum, adv_estimator=rloo"
    ),
    "reinforce_plus_plus": Origin("2501.03262"),
    "reinforce_plus_plus_baseline": Origin("2501.03262"),
    "gpg": Origin(
        "2504.02546", verl="loss_mode=gpg, adv_estimator=grpo, norm_adv_by_std_in_grpo=False"
    ),
    "scalerl": Origin("2510.13786"),
    "maxrl": Origin("2602.02710"),
    "gdpo": Origin(
        "2601.05242", trl="loss_type=bnpo, multi_objective_aggregation=normalize_then_sum"
    ),
    "ipo": Origin(""),
    "m2po": Origin("2510.01161"),
    "fipo": Origin("2603.19835"),
    "sdar": Origin("2605.15155"),
    "dro": Origin(
        "2501.12599",
        verl="loss_mode=dro, dro_beta=0.1, adv_estimator=grpo, norm_adv_by_std_in_grpo=False, "
        "loss_agg_mode=seq-mean-token-mean",
    ),
    "dppo": Origin(
        "2602.04879",
        verl="loss_mode=dppo_tv, clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=20.0",
    ),
    "topr": Origin("2503.14286"),
    "opd": Origin("2306.13649"),
}
COLUMNS = ("recipe", "ℓ of a token", "KL", "ratio r of", "advantage", "aggregation", "arXiv")
FRAMEWORKS = ("TRL 1.16", "verl 0.9.1")


def formula(objective: Objective) -> str:
    """ℓ of a token with the objective's numbers."""
    name = objective.surrogate.function.__name__
    text = FORMULAS[name].format(*(f"{number:g}" for number in objective.surrogate.args))
    text = text.replace("min(r, inf)", "r")
    weight = objective.factor.sequence_weight
    if weight is not None:
        text = "sg(W^k·exp(λ(1−W)))·(" + text + "), (k, λ) = "
        text += f"({weight.k_pos:g}, {weight.lambda_pos:g}) if A ≥ 0 "
        text += f"else ({weight.k_neg:g}, {weight.lambda_neg:g})"
    if objective.factor.second_moment < math.inf:
        text += f", 0 for outliers, until mean d² < {objective.factor.second_moment:g}"
    ahead = objective.factor.future_kl
    if ahead is not None:
        gamma = f"2^(−1/{ahead.half_life:g})"
        text = f"sg(clip(exp(Σ_k≥t {gamma}^(k−t)·d_k), {ahead.low:g}, {ahead.high:g}))·({text})"
    if objective.token_clip is not None:
        low, high = objective.token_clip
        text += f", d ≤ {high:g} if A > 0, d ≥ −{low:g} else"
    return text


def kl_term(objective: Objective) -> str:
    """The KL term, or nothing."""
    if not objective.beta:
        return ""
    return f"{objective.beta:g}·{'r·' if objective.kl_times_ratio else ''}{objective.kl}"


def advantage(objective: Objective) -> str:
    """How rewards become advantages."""
    if not objective.has_policy_term:
        return ""
    baseline, scale = objective.advantage.baseline, objective.advantage.scale
    if baseline == "group" and scale in ("group", None):
        return "group mean, std" if scale else "group mean"
    if scale == "mean":
        return f"{baseline} mean, over that mean"
    return baseline.replace("_", " ") + (f", std of {scale}" if scale else "")


def row(name: str, *, frameworks: bool) -> tuple[str, ...]:
    """The cells of a recipe."""
    objective, origin = RECIPES[name], ORIGINS[name]
    has_ratio = objective.surrogate.function.__name__ not in ("reinforce", "zero")
    cells = (
        name,
        formula(objective),
        kl_term(objective),
        LEVELS[objective.ratio_level] if has_ratio else "",
        GIVEN.get(name) or advantage(objective),
        objective.aggregation.replace("_", " "),
        origin.paper,
    )
    return (*cells, origin.trl, origin.verl) if frameworks else cells


def as_text(*, frameworks: bool = False) -> str:
    """The table with aligned columns."""
    header = COLUMNS + FRAMEWORKS if frameworks else COLUMNS
    rows = [header, *(row(name, frameworks=frameworks) for name in RECIPES)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def as_markdown() -> str:
    """The table as docs/objectives.md shows it, frameworks included."""
    header = COLUMNS + FRAMEWORKS
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in RECIPES:
        first, text, *middle, paper, trl, verl = row(name, frameworks=True)
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        options = (f"`{given}`" if given else "" for given in (trl, verl))
        cells = [f"`{first}`", text, *middle, link, *options]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
