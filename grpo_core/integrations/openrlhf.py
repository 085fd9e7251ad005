"""OpenRLHF's policy loss, by our code: constructor, arguments and results of its `PolicyLoss`.

    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    from grpo_core.integrations.openrlhf import PolicyLoss

    ppo_actor.PolicyLoss = PolicyLoss      # before the actor's trainer is built

OpenRLHF need not be installed. The formulas are those of its 0.11.0. What stays different:

- it holds log-ratios of tokens within ±20; here they are as they come, and a token whose ratio is
  beyond float32, or that is not finite, is left out, and counted in the attribute `out`;
- a batch without a token is NaN there, 0 here;
- `dual_clip` below 1 + clip_eps_high is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_core.fused_loss import LossOutput
from grpo_core.logp_loss import logp_loss
from grpo_core.objective import Objective
from grpo_core.recipes import clip

CORRECTIONS = ("tis", "icepop", "seq-mask-tis")
LOSSES = ("ppo", "gspo")


class PolicyLossOutput(NamedTuple):
    """0-dim each: the loss, with a graph, and what OpenRLHF logs; in its order."""

    loss: Tensor
    clip_ratio: Tensor  # share of the tokens whose clipped term is the smaller one
    ppo_kl: Tensor  # mean of −log ratio, nats
    vllm_kl: Tensor | None  # mean of log π_rollout − log π_old, nats; None without a correction


class PolicyLoss(nn.Module):
    """PPO's clipped loss, or GSPO's, over `[B, T]` log-probabilities of actions.

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 − low, 1 + high].
        dual_clip: c > 1, where A < 0 the loss of a token is at most −c·A; None means no bound.
        token_level_loss: mean over tokens, else over sequences of the mean over their tokens;
            gspo always takes the latter.
        policy_loss_type: "ppo", or "gspo" for the ratio of a whole sequence.
        enable_vllm_is_correction: weigh tokens by π_old / π_rollout; for gspo instead the ratio is
            to π_rollout.
        vllm_is_truncated_threshold: (low, high) of those weights.
        vllm_is_correction_type: "tis" brings them within the bounds, "icepop" sets those outside to
            0, "seq-mask-tis" leaves them, but for 0 in sequences whose geometric mean is outside.

    Attributes:
        out: what the last call left behind, with metrics of our own; None before the first.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: OpenRLHF 0.11.0, openrlhf/models/loss.py.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: list[float] | tuple[float, float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        if policy_loss_type not in LOSSES:
            raise ValueError(f"policy_loss_type: expected one of {LOSSES}, got {policy_loss_type}")
        if vllm_is_correction_type not in CORRECTIONS:
            raise ValueError(
                f"vllm_is_correction_type: expected one of {CORRECTIONS}, got "
                f"{vllm_is_correction_type}"
            )
        if dual_clip is not None and not dual_clip >= 1 + clip_eps_high:
            raise ValueError(
                f"dual_clip: expected None or at least 1 + clip_eps_high = {1 + clip_eps_high}, "
                f"got {dual_clip}"
            )
        self.is_sequence = policy_loss_type == "gspo"
        self.token_level_loss = token_level_loss and not self.is_sequence
        self.low, self.high = clip_eps_low, clip_eps_high
        self.corrects, self.correction = enable_vllm_is_correction, vllm_is_correction_type
        self.bounds: tuple[float, float] | None = None
        if self.corrects and not self.is_sequence:
            if vllm_is_truncated_threshold is None or len(vllm_is_truncated_threshold) != 2:
                raise ValueError(
                    "vllm_is_truncated_threshold: expected (low, high), got "
                    f"{vllm_is_truncated_threshold}"
                )
            self.bounds = (vllm_is_truncated_threshold[0], vllm_is_truncated_threshold[1])
        bound = float("inf") if dual_clip is None else dual_clip
        self.objective = Objective(
            clip(clip_eps_low, clip_eps_high, bound),
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
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> PolicyLossOutput:
        """The loss and what is logged.

        Args:
            log_probs, old_log_probs, advantages: [B, T]; nats, nats, and of each token.
            action_mask: [B, T], 0 means masked; None means that all count.
            rollout_log_probs: [B, T], of the engine that sampled; needed by the correction.
            dp_size: ranks over which gradients are averaged.
            batch_num_tokens, global_batch_size: tokens and sequences of the whole batch; None means
                this call's own.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        old, weight, kl = old_log_probs, None, None
        if self.corrects:
            if rollout_log_probs is None:
                raise ValueError(
                    "rollout_log_probs: expected a tensor for the correction, got None"
                )
            if self.is_sequence:
                old = rollout_log_probs
            else:
                gap = (old_log_probs - rollout_log_probs).detach().float()
                weight, kl = self._weight(gap, mask), _mean(-gap, mask)
        count = batch_num_tokens if self.token_level_loss else global_batch_size
        # without a count, dp_size has no part in OpenRLHF's loss either
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
        return PolicyLossOutput(out.loss, _mean(clipped.float(), mask), _mean(moved, mask), kl)

    def _weight(self, gap: Tensor, mask: Tensor) -> Tensor:
        """[B, T] weights of the policy term from log π_old − log π_rollout."""
        assert self.bounds is not None
        low, high = self.bounds
        weight = gap.exp()
        if self.correction == "tis":
            return weight.clamp(low, high)
        judged = weight
        if self.correction == "seq-mask-tis":
            total = torch.where(mask != 0, gap, 0.0).sum(-1, keepdim=True)
            judged = (total / (mask != 0).sum(-1, keepdim=True).clamp(min=1)).exp()
        return weight * ((judged >= low) & (judged <= high))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 without any."""
    counts = mask != 0
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)
