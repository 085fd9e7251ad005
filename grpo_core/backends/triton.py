"""The Triton backend: the host functions of the kernels, gathered under one name."""

from grpo_core.kernels.group_norm import group_norm
from grpo_core.kernels.row_dlogits import row_dlogits
from grpo_core.kernels.row_loss import row_loss
from grpo_core.kernels.row_scale import row_scale
from grpo_core.kernels.row_stats import row_stats
from grpo_core.kernels.sequence_loss import sequence_loss

__all__ = [
    "group_norm",
    "row_dlogits",
    "row_loss",
    "row_scale",
    "row_stats",
    "sequence_loss",
]
