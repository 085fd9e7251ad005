"""Metrics of a loss, from the vectors that it returns; 0-dim tensors.

They do not change the loss and do not synchronise with the device. `METRICS` says how each is
merged over micro-batches and ranks, and `merge_metrics` does so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core.loss.tokens import Tokens
from grpo_core.objective.groups import equal_reward_groups
from grpo_core.objective.validation import check_tensor

if TYPE_CHECKING:
    from grpo_core.loss.outputs import LossOutput


class Metric(NamedTuple):
    """How a metric is reduced, and what it means."""

    reduction: Literal["sum", "mean", "min", "max", "derived"]
    over: str  # the metric that counts what it is taken over; "" for sums
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric("sum", "", "the loss; sums over parts that share a normalizer"),
    "tokens": Metric("sum", "", "tokens in the loss: neither masked nor left out"),
    "moved_tokens": Metric("sum", "", "those with an advantage"),
    "ratio_mean": Metric(
        "mean", "tokens", "π / π_old, of the sequence where the objective says so"
    ),
    "ratio_min": Metric("min", "tokens", "its smallest"),
    "ratio_max": Metric("max", "tokens", "its largest"),
    "ratio_square": Metric("mean", "tokens", "its second moment"),
    "effective_sample_size": Metric("derived", "", "ratio_mean² / ratio_square: 1 on policy"),
    "clip_fraction": Metric("mean", "moved_tokens", "clipped: advantage but no policy gradient"),
    "clip_fraction_low": Metric("mean", "moved_tokens", "of these, advantage below 0"),
    "clip_fraction_high": Metric("mean", "moved_tokens", "of these, advantage above 0"),
    "kl": Metric("mean", "tokens", "to the reference policy, nats, as the objective estimates it"),
    "entropy": Metric("mean", "tokens", "of the whole distribution, nats"),
    "approx_kl_old": Metric("mean", "tokens", "ratio − 1 − log ratio, nats: moved since rollout"),
    "factor_mean": Metric("mean", "tokens", "factor of the surrogate"),
    "sampler_kl": Metric("mean", "scored_tokens", "sampler to trainer, nats: w − 1 − log w"),
    "sampler_gap_mean": Metric("mean", "scored_tokens", "|log π_old − log π_sampler|, nats"),
    "sampler_gap_max": Metric("max", "scored_tokens", "its largest"),
    "scored_tokens": Metric("sum", "", "tokens whose sampler log-probability is finite"),
    "unscored_tokens": Metric("sum", "", "tokens whose sampler log-probability is not"),
    "groups": Metric("sum", "", "prompts with a token in the loss's rewards"),
    "zero_variance_groups": Metric("mean", "groups", "share of groups whose rewards are all equal"),
    "nonfinite_rows": Metric("sum", "", "left out because a term is NaN or infinite"),
    "skipped_rows": Metric("sum", "", "rows whose logits were not computed, masked ones included"),
    "bad_target_rows": Metric("sum", "", "left out because the target is outside [0, V)"),
    "unkept_rows": Metric("sum", "", "left out because the target is not among its kept ids"),
}


def loss_metrics(out: LossOutput) -> dict[str, Tensor]:
    """The metrics of one call, see `METRICS`.

    Those of the sampler are there if `sampler_logp` was given, those of groups with `rewards`,
    `skipped_rows` for a loss from hidden states, `unkept_rows` with `kept`.
    """
    tokens, valid, dropped = out._tokens, out._valid, out._dropped
    vectors = (out.logp, out.entropy, out.ratio, out.kl, out.factor)
    logp, entropy, ratio, kl, factor = (vector.reshape(-1) for vector in vectors)
    counts = valid & ~dropped
    count = counts.sum()
    # a ratio of 0 is one too small for float32, not one of log −∞
    log_ratio = torch.log(ratio.clamp(min=torch.finfo(ratio.dtype).tiny))
    surrogate = tokens.objective.surrogate
    _, dlogp, dlog_ratio = surrogate.plain(logp, log_ratio, tokens.advantage, *surrogate.args)
    moved = counts & (tokens.advantage != 0)
    clipped = moved & (dlogp == 0) & (dlog_ratio == 0) & tokens.objective.has_policy_term
    ratio_mean, ratio_square = _mean(ratio, counts), _mean(ratio * ratio, counts)
    metrics = {
        "loss": out.loss.detach(),
        "tokens": count,
        "moved_tokens": moved.sum(),
        "ratio_mean": ratio_mean,
        "ratio_min": _extreme(ratio, counts, largest=False),
        "ratio_max": _extreme(ratio, counts, largest=True),
        "ratio_square": ratio_square,
        "effective_sample_size": _effective_share(ratio_mean, ratio_square),
        "clip_fraction": _mean(clipped, moved),
        "clip_fraction_low": _mean(clipped & (tokens.advantage < 0), moved),
        "clip_fraction_high": _mean(clipped & (tokens.advantage > 0), moved),
        "kl": _mean(kl, counts),
        "entropy": _mean(entropy, counts),
        "approx_kl_old": _mean(ratio - 1 - log_ratio, counts),
        "factor_mean": _mean(factor, counts),
        "nonfinite_rows": dropped.sum(),
        "bad_target_rows": tokens.bad_target.sum(),
    }
    if out._skipped is not None:
        metrics["skipped_rows"] = torch.zeros_like(count) + out._skipped
    if tokens.unkept is not None:
        metrics["unkept_rows"] = tokens.unkept.sum()
    if tokens.sampler_logp is not None:
        metrics |= _sampler_metrics(tokens, logp, counts)
    if tokens.groups is not None:
        equal, groups = equal_reward_groups(*tokens.groups)
        metrics |= {"groups": groups, "zero_variance_groups": equal / groups.clamp(min=1)}
    return metrics


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of several micro-batches, or of several ranks, as if of one.

    Raises:
        ValueError: no parts, parts with different metrics, or with others than `METRICS` has.
    """
    if not isinstance(parts, (list, tuple)) or not all(isinstance(x, Mapping) for x in parts):
        raise ValueError(f"parts: expected a list of `LossOutput.metrics`, got {parts!r}")
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"parts: expected figures of the same names, got {list(map(list, parts))}")
    names = set(parts[0])
    needed = {"ratio_mean", "ratio_square"} | {METRICS[n].over for n in names & METRICS.keys()}
    if names - METRICS.keys() or needed - names - {""}:
        wrong = sorted(names - METRICS.keys()) or f"none named {sorted(needed - names - {''})}"
        raise ValueError(f"parts: expected the figures of `LossOutput.metrics`, got {wrong}")
    for name in parts[0]:
        for part in parts:
            check_tensor(f"parts[...][{name!r}]", part[name], ())
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    merged = {}
    for name, column in columns.items():
        reduction, over, _ = METRICS[name]
        if reduction == "mean":
            weight = columns[over].to(column.dtype)
            merged[name] = (column * weight).sum() / weight.sum().clamp(min=1)
        elif reduction == "sum":
            merged[name] = column.sum()
        elif reduction != "derived":
            merged[name] = _extreme(column, columns[over] > 0, largest=reduction == "max")
    merged["effective_sample_size"] = _effective_share(merged["ratio_mean"], merged["ratio_square"])
    return {name: merged[name] for name in columns}


def _sampler_metrics(tokens: Tokens, logp: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """How far the sampler is from the trainer, over the tokens that both have scored."""
    assert tokens.sampler_logp is not None
    finite = tokens.sampler_logp.isfinite()
    before = logp if tokens.old_logp is None else tokens.old_logp
    scored = counts & finite & before.isfinite()
    gap = torch.where(scored, before - tokens.sampler_logp, 0.0)
    return {
        "sampler_kl": _mean(torch.expm1(gap) - gap, scored),
        "sampler_gap_mean": _mean(gap.abs(), scored),
        "sampler_gap_max": _extreme(gap.abs(), scored, largest=True),
        "scored_tokens": scored.sum(),
        "unscored_tokens": (tokens.unmasked & ~finite).sum(),
    }


def _mean(vector: Tensor, counts: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 without any."""
    vector = vector.to(torch.float32) if vector.dtype == torch.bool else vector
    return torch.where(counts, vector, 0.0).sum() / counts.sum().clamp(min=1)


def _extreme(vector: Tensor, counts: Tensor, *, largest: bool) -> Tensor:
    """Largest or smallest over the tokens that count; 0 without any."""
    if not vector.numel():
        return vector.sum()
    far = -torch.inf if largest else torch.inf
    vector = torch.where(counts, vector, far)
    extreme = vector.amax() if largest else vector.amin()
    return torch.where(counts.any(), extreme, 0.0)


def _effective_share(mean: Tensor, square: Tensor) -> Tensor:
    """(Σ r)² / (n · Σ r²); 0 without tokens."""
    return torch.where(square > 0, mean * mean / square.clamp(min=1e-38), 0.0)
