"""grpo_core: the loss core of GRPO-style reinforcement learning, in one pass over the logits."""

from grpo_core.advantages import GroupNorm, group_advantages
from grpo_core.estimators import Estimator
from grpo_core.fused_loss import LossOutput, TokenLogp, fused_loss, token_logp
from grpo_core.head import with_fused_head, without_fused_head
from grpo_core.head_requests import HeadOutput, LogpRequest, LossRequest
from grpo_core.linear_head import LinearHead
from grpo_core.linear_logp import linear_logp
from grpo_core.linear_loss import fused_linear_loss, linear_token_logp
from grpo_core.logp_loss import logp_loss
from grpo_core.metrics import merge_metrics
from grpo_core.objective import Objective, Surrogate
from grpo_core.policy_factor import PolicyFactor
from grpo_core.presets import preset
from grpo_core.recipes import RECIPES, clip
from grpo_core.rejection import Rejection
from grpo_core.sampler import SamplerCorrection
from grpo_core.sequence_weight import SequenceWeight

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "Estimator",
    "GroupNorm",
    "HeadOutput",
    "LinearHead",
    "LogpRequest",
    "LossOutput",
    "LossRequest",
    "Objective",
    "PolicyFactor",
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
