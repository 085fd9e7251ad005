"""Are the kernels right on this machine? Every plan, recipe and dtype against float64.

    python -m grpo_core.verify

The truth is `reference_loss` in float64: dense PyTorch, differentiated by autograd. It shares with
the kernels the value of each scalar formula, which the test-suite holds to the papers; what a
device can get wrong, it does not share. Beside our error stands that of honest PyTorch, and the
rule between the two is `grpo_core.verify.accuracy`'s.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from grpo_core.backends import Backend
    from grpo_core.verify.checks import Bits, Found
    from grpo_core.verify.inputs import Sizes
    from grpo_core.verify.report import Report

__all__ = ["verify"]


def verify(
    recipes: list[str],
    dtypes: list[torch.dtype],
    *,
    backend: Backend,
    device: str,
    sizes: Sizes,
) -> Report:
    """Compares everything.

    Args:
        recipes: names in `inputs.OBJECTIVES`.
        dtypes: of the logits.
        backend: whose kernels.
        device: where they run.
        sizes: how many rows, over which vocabularies.
    """
    # here, so that the command's options are read before torch is loaded
    from grpo_core.verify.checks import Place, check_bits, check_confident, check_losses
    from grpo_core.verify.inputs import CASES, one_per_plan
    from grpo_core.verify.report import Report

    start = time.perf_counter()
    place = Place(backend, device, sizes)
    losses: list[Found] = []
    confident: list[Found] = []
    bits: list[Bits] = []
    for dtype in dtypes:
        for V in sizes.vocabularies:
            for case in CASES:
                everyone = sizes.vocabularies[0] == V and not case.on_policy
                names = recipes if everyone else one_per_plan(recipes)
                losses += check_losses(place, case, dtype, V, names)
            confident += check_confident(place, dtype, V)
            bits += check_bits(place, dtype, V)
    return Report(losses, confident, bits, time.perf_counter() - start)
