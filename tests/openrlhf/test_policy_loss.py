"""Our `PolicyLoss` beside that of the installed OpenRLHF: loss, gradient, metrics, and its caller.

Its package imports DeepSpeed and FlashAttention, which need a GPU; its losses need neither.
"""

from __future__ import annotations

import ast
import inspect
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

openrlhf = pytest.importorskip("openrlhf", reason="needs OpenRLHF: make test-openrlhf")

from examples.openrlhf_adapter import PolicyLoss, PolicyLossOutput  # noqa: E402

ROOT = Path(openrlhf.__file__).parent
SINGLE = 3e-6

CORRECTIONS: list[dict[str, Any]] = [
    {},
    *(
        {
            "is_correction_level": level,
            "is_correction_mode": mode,
            "is_correction_gating": gating,
            "is_correction_threshold": threshold,
        }
        for level, mode, gating, threshold in [
            ("token", "mask", "ratio", [0.9, 1.1]),
            ("token", "clip", "ratio", [0.9, 1.1]),
            ("seq", "mask", "ratio", [0.97, 1.03]),
            ("token", "mask", "binary_kl", [0.0, 2e-3]),
            ("seq", "mask", "binary_kl", [0.0, 1e-2]),
            ("token", "mask", "tv", [0.0, 0.03]),
            ("seq", "mask", "tv", [0.0, 0.05]),
        ]
    ),
]


@pytest.fixture(scope="module")
def theirs() -> type[nn.Module]:
    """OpenRLHF's own `PolicyLoss`, its package's imports left out."""
    package = ModuleType("openrlhf.models")
    package.__path__ = [str(ROOT / "models")]
    sys.modules["openrlhf.models"] = package
    sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
    return import_module("openrlhf.models.loss").PolicyLoss


def batch(seed: int) -> dict[str, Tensor]:
    """[4, 6]; one sequence has no token."""
    torch.manual_seed(seed)
    mask = torch.rand(4, 6) < 0.8
    mask[:, 0], mask[2] = True, False
    logp = -2 * torch.rand(4, 6) - 0.1
    old = (logp + 0.35 * torch.randn(4, 6)).clamp(max=-0.02)
    return {
        "log_probs": logp,
        "old_log_probs": old,
        "advantages": torch.randn(4, 6),
        "action_mask": mask.float(),
        "rollout_log_probs": (old + 0.15 * torch.randn(4, 6)).clamp(max=-0.02),
    }


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_the_same_figures(theirs: type[nn.Module], kind: str, correction: dict[str, Any]) -> None:
    totals = {"dp_size": 2, "batch_num_tokens": torch.tensor(37.0), "global_batch_size": 9.0}
    moved = 0
    for seed, (token_level, dual, counts) in enumerate(
        product([True, False], [None, 1.5], [{}, totals])
    ):
        options = {"dual_clip": dual, "token_level_loss": token_level, "policy_loss_type": kind}
        options |= {"clip_eps_low": 0.1, "clip_eps_high": 0.3} | correction
        results = []
        for kind_of_loss in (PolicyLoss, theirs):
            given = batch(seed)
            given["log_probs"].requires_grad_()
            found = kind_of_loss(**options)(**given, **counts)
            (gradient,) = torch.autograd.grad(found[0], given["log_probs"])
            results.append((tuple(found), gradient))
        (ours, our_gradient), (wanted, their_gradient) = results
        assert len(ours) == len(wanted) == len(PolicyLossOutput._fields)
        moved += bool(their_gradient.any())
        assert torch.allclose(our_gradient, their_gradient, rtol=SINGLE, atol=SINGLE)
        for name, a, b in zip(PolicyLossOutput._fields, ours, wanted, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.allclose(a, b, rtol=SINGLE, atol=SINGLE), name
    # a correction may leave out a whole batch, but not most of them
    assert moved > 4


def test_the_signature_is_theirs(theirs: type[nn.Module]) -> None:
    for method in ("__init__", "forward"):
        wanted = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(PolicyLoss, method)).parameters
        assert list(found) == list(wanted)
        for name, parameter in wanted.items():
            default = parameter.default
            same = tuple(default) if isinstance(default, (list, tuple)) else default
            assert found[name].default == same, name


def test_its_actor_calls_what_ours_takes() -> None:
    """Constructor and call in `ppo_actor`: keywords, and how many results are unpacked."""
    tree = ast.parse((ROOT / "trainer/ray/ppo_actor.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (built,) = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "PolicyLoss")
    assert not built.args
    assert {k.arg for k in built.keywords} <= set(inspect.signature(PolicyLoss).parameters)
    (step,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "actor_loss_fn"
    )
    assert isinstance(step.targets[0], ast.Tuple)
    assert [name.id for name in step.targets[0].elts] == [
        "actor_loss",
        *PolicyLossOutput._fields[1:],
    ]
    given = {k.arg for k in step.value.keywords if k.arg}
    assert given <= set(inspect.signature(PolicyLoss.forward).parameters)
