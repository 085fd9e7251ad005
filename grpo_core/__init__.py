"""grpo_core: the loss core of GRPO-style reinforcement learning, in one pass over the logits."""

from typing import TYPE_CHECKING

from grpo_core.lazy import exports

if TYPE_CHECKING:
    from grpo_core.backends.kept import Kept
    from grpo_core.integrations.presets import preset
    from grpo_core.linear.head import LinearHead
    from grpo_core.linear.logp import linear_logp, linear_token_logp
    from grpo_core.linear.loss import fused_linear_loss
    from grpo_core.linear.model import (
        HeadOutput,
        LogpRequest,
        LossRequest,
        ReferenceRequest,
        with_fused_head,
        without_fused_head,
    )
    from grpo_core.loss.fused_loss import LossOutput, TokenLogp, fused_loss, token_logp
    from grpo_core.loss.logp_loss import logp_loss
    from grpo_core.loss.metrics import merge_metrics
    from grpo_core.objective.advantage import Estimator, GroupNorm, group_advantages
    from grpo_core.objective.objective import Objective, Surrogate
    from grpo_core.objective.off_policy import Rejection, SamplerCorrection
    from grpo_core.objective.policy_factor import FutureKL, PolicyFactor, SequenceWeight
    from grpo_core.objective.recipes import RECIPES, clip

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "Estimator",
    "FutureKL",
    "GroupNorm",
    "HeadOutput",
    "Kept",
    "LinearHead",
    "LogpRequest",
    "LossOutput",
    "LossRequest",
    "Objective",
    "PolicyFactor",
    "ReferenceRequest",
    "Rejection",
    "SamplerCorrection",
    "SequenceWeight",
    "Surrogate",
    "TokenLogp",
    "clip",
    "fused_linear_loss",
    "fused_loss",
    "group_advantages",
    "linear_logp",
    "linear_token_logp",
    "logp_loss",
    "merge_metrics",
    "preset",
    "token_logp",
    "with_fused_head",
    "without_fused_head",
]

# imported when first used, so that `python -m grpo_core.train --help` needs no torch
__getattr__ = exports(
    __name__,
    {
        "backends.kept": "Kept",
        "integrations.presets": "preset",
        "linear.head": "LinearHead",
        "linear.logp": "linear_logp linear_token_logp",
        "linear.loss": "fused_linear_loss",
        "linear.model": "HeadOutput LogpRequest LossRequest ReferenceRequest with_fused_head "
        "without_fused_head",
        "loss.fused_loss": "LossOutput TokenLogp fused_loss token_logp",
        "loss.logp_loss": "logp_loss",
        "loss.metrics": "merge_metrics",
        "objective.advantage": "Estimator GroupNorm group_advantages",
        "objective.objective": "Objective Surrogate",
        "objective.off_policy": "Rejection SamplerCorrection",
        "objective.policy_factor": "FutureKL PolicyFactor SequenceWeight",
        "objective.recipes": "RECIPES clip",
    },
)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
