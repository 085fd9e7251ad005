"""A framework's loss by the framework's own option names.

    trl = preset("trl", loss_type="grpo", beta=0.04, epsilon_high=0.28)
    print(trl)                                              # the objective, and how to call it
    out = fused_loss(logits, target, objective=trl.objective, normalizer=trl.normalizer(mask), ...)
    log(trl.metrics(out))                                   # by TRL's names

The same name hides different formulas; a preset has the framework's. tests/test_conformance_*.py
compare loss, gradient and metrics with the real TRL 1.16.0, and with what the real verl 0.9.1
answered. What stays different is listed in `presets_trl` and `presets_verl`.
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
    """The loss of TRL 1.16 or verl 0.9.1 with the given options, all others at its defaults.

    Args:
        framework: "trl" or "verl".
        options: of TRL's `GRPOConfig`, or of verl's actor, policy_loss and algorithm, those on
            which the loss or the advantages depend; see `TrlOptions` and `VerlOptions`.

    Returns:
        `TrlPreset` or `VerlPreset`: an `Objective`, in words how to give the other arguments of
        `fused_loss`, and the functions `normalizer`, `advantages` and `metrics`.

    Raises:
        ValueError: an unknown framework or option, or a value the option cannot have.
        NotImplementedError: what is left out on purpose; the message says what to do instead.
    """
    presets = {"trl": trl_preset, "verl": verl_preset}
    if framework not in presets:
        raise ValueError(f"framework: expected one of {tuple(presets)}, got {framework!r}")
    return presets[framework](**options)
