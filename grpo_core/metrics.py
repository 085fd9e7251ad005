"""What one looks at while training, from the vectors a loss leaves behind; 0-dim tensors all.

Nothing here enters the loss and nothing waits for the device. Means are over the tokens that
count: not masked, not dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.arguments import Tokens
from grpo_core.objective import Objective
from grpo_core.torch_formula import as_torch


def loss_metrics(
    spec: Objective,
    tokens: Tokens,
    *,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    kl: Tensor,
    dropped: Tensor,
) -> dict[str, Tensor]:
    """The figures of one call.

    Returns:
        loss; tokens (count that enter the loss); ratio_mean, ratio_max; clip_fraction (share of
        tokens with an advantage whose policy gradient is 0); kl, entropy (mean, nats);
        approx_kl_old (mean of ratio − 1 − log ratio, nats: how far the policy has moved since
        the rollout); nonfinite_rows (rows left out because a term of theirs is NaN or infinite);
        bad_target_rows (rows left out because their target is no word).
    """
    counts = tokens.valid & ~dropped
    count = counts.sum()

    def mean(vector: Tensor) -> Tensor:
        return torch.where(counts, vector, 0.0).sum() / count.clamp(min=1)

    # a ratio of 0 is one too small for float32, not one of log −∞
    log_ratio = torch.log(ratio.clamp(min=torch.finfo(ratio.dtype).tiny))
    _, dlogp, dlog_ratio = as_torch(spec.surrogate.function)(
        logp, log_ratio, tokens.advantage, *spec.surrogate.args
    )
    moved = counts & (tokens.advantage != 0)
    return {
        "loss": loss,
        "tokens": count,
        "ratio_mean": mean(ratio),
        "ratio_max": torch.where(counts, ratio, 0.0).amax() if ratio.numel() else loss * 0,
        "clip_fraction": (moved & (dlogp == 0) & (dlog_ratio == 0)).sum()
        / moved.sum().clamp(min=1),
        "kl": mean(kl),
        "entropy": mean(entropy),
        "approx_kl_old": mean(ratio - 1 - log_ratio),
        "nonfinite_rows": (tokens.valid & dropped).sum(),
        "bad_target_rows": tokens.bad_target.sum(),
    }
