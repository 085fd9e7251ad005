"""grpo_core: the loss core of GRPO-style reinforcement learning, in one pass over the logits."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when first asked for: `python -m grpo_core.train --help` needs no torch.
_MODULES = {
    "advantages": "GroupNorm group_advantages",
    "estimators": "Estimator",
    "fused_loss": "LossOutput TokenLogp fused_loss token_logp",
    "head": "with_fused_head without_fused_head",
    "head_requests": "HeadOutput LogpRequest LossRequest",
    "linear_head": "LinearHead",
    "linear_logp": "linear_logp",
    "linear_loss": "fused_linear_loss linear_token_logp",
    "logp_loss": "logp_loss",
    "metrics": "merge_metrics",
    "objective": "Objective Surrogate",
    "policy_factor": "PolicyFactor",
    "presets": "preset",
    "recipes": "RECIPES clip",
    "rejection": "Rejection",
    "sampler": "SamplerCorrection",
    "sequence_weight": "SequenceWeight",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


class _Package(ModuleType):
    """The package as a module whose public names are imported when they are first used."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        setattr(self, name, getattr(import_module(f"grpo_core.{_HOMES[name]}"), name))
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system sets submodules: `fused_loss` stays the function in the module
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
