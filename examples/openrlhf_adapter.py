"""OpenRLHF's policy loss, computed by grpo_core: the interface of `PolicyLoss` in OpenRLHF 0.11.2.

Copy this file beside your launch script, then:

    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    from openrlhf_adapter import PolicyLoss

    ppo_actor.PolicyLoss = PolicyLoss  # before the actor's trainer is built

OpenRLHF need not be installed. An installed version other than 0.11.2 is refused at import, since
the interface changes between releases. Differences from OpenRLHF:

- OpenRLHF clamps the log-ratio of a token to ±20. Here a token whose ratio overflows float32, or is
  not finite, is left out and counted in the attribute `out`.
- The loss of a batch without tokens is NaN in OpenRLHF and 0 here.
- `dual_clip` below 1 + clip_eps_high is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.logp_loss import logp_loss
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import clip

VERSION = "0.11.2"
Loss = Literal["ppo", "gspo"]
Level = Literal["off", "token", "seq"]
Mode = Literal["mask", "clip"]
Gating = Literal["ratio", "binary_kl", "tv"]


def check_version() -> None:
    """Raises ImportError if another version of OpenRLHF than `VERSION` is installed."""
    try:
        found = version("openrlhf")
    except PackageNotFoundError:
        return
    if found != VERSION:
        raise ImportError(
            f"openrlhf_adapter: expected openrlhf {VERSION}, got {found}: "
            f"pip install openrlhf=={VERSION}"
        )


check_version()


class PolicyLossOutput(NamedTuple):
    """The differentiable loss and the metrics that OpenRLHF logs, in its order; 0-dim each."""

    loss: Tensor
    clip_ratio: Tensor  # share of tokens whose clipped term is the smaller one
    ppo_kl: Tensor  # mean of −log ratio, nats
    vllm_kl: Tensor | None  # mean of log π_rollout − log π_old, nats; None without a correction
    is_filter_ratio: Tensor | None  # share of tokens or sequences outside the threshold


class PolicyLoss(nn.Module):
    """The clipped loss of PPO or GSPO over `[B, T]` log-probabilities of actions.

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 − low, 1 + high].
        dual_clip: c > 1 bounds the loss of a token with A < 0 by −c·A; None means no bound.
        token_level_loss: True averages over tokens, False over the means of sequences; gspo always
            averages over the means of sequences.
        policy_loss_type: "ppo", or "gspo" for the ratio of a whole sequence.
        is_correction_level: "off", "token" or "seq": the correction of ppo compares the statistic
            of each token, or its mean over the sequence (geometric for ratios), with the threshold.
            With gspo, "token" and "seq" both take the ratio to π_rollout instead of π_old.
        is_correction_mode: "mask" weights a token by π_old / π_rollout, and by 0 outside the
            threshold; "clip" clamps the weight (level "token", gating "ratio" only).
        is_correction_gating: the statistic: "ratio" π_old / π_rollout, or "binary_kl" or "tv", the
            divergence between the two policies' Bernoulli distributions of the sampled token.
        is_correction_threshold: (low, high); low is 0 for a divergence.

    Attributes:
        out: the `LossOutput` of the last call with all metrics; None before the first call.

    Raises:
        ValueError: an invalid argument; the message says what was expected.

    Source: OpenRLHF 0.11.2, openrlhf/models/loss.py.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: Loss = "ppo",
        is_correction_level: Level = "off",
        is_correction_mode: Mode = "mask",
        is_correction_gating: Gating = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("policy_loss_type", policy_loss_type, get_args(Loss)),
            ("is_correction_level", is_correction_level, get_args(Level)),
            ("is_correction_mode", is_correction_mode, get_args(Mode)),
            ("is_correction_gating", is_correction_gating, get_args(Gating)),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        if dual_clip is not None and not dual_clip >= 1 + clip_eps_high:
            raise ValueError(
                f"dual_clip: expected None or at least 1 + clip_eps_high = {1 + clip_eps_high}, "
                f"got {dual_clip}"
            )
        is_plain = is_correction_level == "token" and is_correction_gating == "ratio"
        if is_correction_mode == "clip" and not is_plain:
            raise ValueError(
                "is_correction_mode: expected 'mask' unless level is 'token' and gating 'ratio', "
                f"got 'clip' with {is_correction_level!r} and {is_correction_gating!r}"
            )
        bounds = tuple(is_correction_threshold)
        if len(bounds) != 2 or not bounds[0] <= bounds[1]:
            raise ValueError(
                f"is_correction_threshold: expected (low, high), got {is_correction_threshold}"
            )
        if is_correction_level != "off" and is_correction_gating != "ratio" and bounds[0] > 0:
            raise ValueError(
                f"is_correction_threshold: expected low = 0 for {is_correction_gating}, got "
                f"{bounds[0]}"
            )
        self.is_sequence = policy_loss_type == "gspo"
        self.token_level_loss = token_level_loss and not self.is_sequence
        self.low, self.high = clip_eps_low, clip_eps_high
        self.level, self.mode = is_correction_level, is_correction_mode
        self.gating, self.bounds = is_correction_gating, bounds
        self.objective = Objective(
            clip(clip_eps_low, clip_eps_high, float("inf") if dual_clip is None else dual_clip),
            ratio_level="sequence" if self.is_sequence else "token",
            aggregation="token_mean" if self.token_level_loss else "sequence_mean",
        )
        self.out: LossOutput | None = None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> PolicyLossOutput:
        """Returns the loss and the logged metrics.

        Args:
            log_probs, old_log_probs: [B, T], nats.
            advantages: [B, T].
            action_mask: [B, T], 0 means masked; None means no masked token.
            rollout_log_probs: [B, T], nats, from the sampling engine; needed by the correction.
            dp_size: number of ranks over which gradients are averaged.
            batch_num_tokens, global_batch_size: tokens and sequences of the whole batch; None means
                those of this call.

        Raises:
            ValueError: an invalid argument; the message says what was expected.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        old, weight, kl, filtered = old_log_probs, None, None, None
        if self.level != "off":
            if rollout_log_probs is None:
                raise ValueError(
                    "rollout_log_probs: expected a tensor for the correction, got None"
                )
            if self.is_sequence:
                old = rollout_log_probs
            else:
                pair = (old_log_probs.detach().float(), rollout_log_probs.detach().float())
                weight, filtered = self._correction(*pair, mask)
                kl = _mean(pair[1] - pair[0], mask)
        count = batch_num_tokens if self.token_level_loss else global_batch_size
        # OpenRLHF also ignores dp_size without a count
        self.out = out = logp_loss(
            log_probs,
            objective=self.objective,
            advantage=advantages,
            old_logp=old,
            factor=weight,
            mask=mask,
            normalizer=None if count is None else count / dp_size,
        )
        ratio, gains, losses = out.ratio, advantages > 0, advantages < 0
        clipped = (gains & (ratio > 1 + self.high)) | (losses & (ratio < 1 - self.low))
        moved = (old_log_probs - log_probs).detach()
        return PolicyLossOutput(
            out.loss, _mean(clipped.float(), mask), _mean(moved, mask), kl, filtered
        )

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns [B, T] weights of the policy term, and the share outside the threshold."""
        low, high = self.bounds
        log_ratio = old - rollout
        if self.gating == "ratio":
            statistic = log_ratio
        else:
            p, q = (logp.exp().clamp(1e-6, 1 - 1e-6) for logp in (rollout, old))
            if self.gating == "tv":
                statistic = (p - q).abs()
            else:
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.level == "seq":
            counts = mask != 0
            # a sequence without tokens has mean NaN, which is outside
            total = torch.where(counts, statistic, 0.0).sum(-1, keepdim=True)
            statistic = total / counts.sum(-1, keepdim=True)
        if self.gating == "ratio":
            statistic = statistic.exp()
        outside = ~((statistic >= low) & (statistic <= high))
        if self.mode == "clip":
            weight = statistic.clamp(low, high)
        else:
            weight = torch.where(outside, 0.0, log_ratio.exp())
        share = outside.float()
        return weight, share.mean() if self.level == "seq" else _mean(share, mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked tokens; 0 if there are none."""
    counts = mask != 0
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)
