"""The Triton backend: the host functions of the kernels, gathered under one name."""

from grpo_core.kernels.group_norm import group_norm
from grpo_core.kernels.launch import lies_aligned
from grpo_core.kernels.row_dlogits import row_dlogits
from grpo_core.kernels.row_loss import row_loss
from grpo_core.kernels.row_scale import row_scale
from grpo_core.kernels.row_stats import row_stats
from grpo_core.kernels.token_loss import token_loss

__all__ = [
    "group_norm",
    "lies_aligned",
    "row_dlogits",
    "row_loss",
    "row_scale",
    "row_stats",
    "token_loss",
]
