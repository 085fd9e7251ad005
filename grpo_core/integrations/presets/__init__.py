"""The loss of a framework by the framework's option names.

    trl = preset("trl", loss_type="grpo", beta=0.04, epsilon_high=0.28)
    print(trl)                                      # the objective and the other arguments
    out = fused_loss(logits, target, objective=trl.objective, normalizer=trl.normalizer(mask), ...)
    log(trl.metrics(out))                           # by TRL's names

Frameworks use one name for different formulas; a preset has the formula of its framework.
tests/test_conformance_*.py compare loss, gradient and metrics with TRL 1.16.0 and with recorded
results of verl 0.9.1; docs/objectives.md lists the differences. `*_options` have the options and
their limits, `trl` and `verl` make the objective of them. Read `base` first.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from grpo_core.integrations.presets.base import Preset
from grpo_core.integrations.presets.trl import TrlPreset, trl_preset
from grpo_core.integrations.presets.verl import VerlPreset, verl_preset

__all__ = ["Preset", "TrlPreset", "VerlPreset", "preset"]


@overload
def preset(framework: Literal["trl"], **options: Any) -> TrlPreset: ...
@overload
def preset(framework: Literal["verl"], **options: Any) -> VerlPreset: ...
def preset(framework: str, **options: Any) -> Preset:
    """The loss of TRL 1.16 or verl 0.9.1 with the given options, the others at their defaults.

    Args:
        framework: "trl" or "verl".
        options: options of TRL's `GRPOConfig`, or of verl's actor, policy_loss and algorithm, that
            affect the loss or the advantages; see `TrlOptions` and `VerlOptions`.

    Returns:
        `TrlPreset` or `VerlPreset`: an `Objective`, descriptions of the other arguments of
        `fused_loss`, and the functions `normalizer`, `advantages` and `metrics`.

    Raises:
        ValueError: an unknown framework or option, or a value outside its limits.
        NotImplementedError: an unsupported option; the message says what to do instead.
    """
    presets = {"trl": trl_preset, "verl": verl_preset}
    if framework not in presets:
        raise ValueError(f"framework: expected one of {tuple(presets)}, got {framework!r}")
    return presets[framework](**options)
