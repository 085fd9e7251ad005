"""What must hold of every objective, whatever its formula: masks, padding, parts, order.

Each property is checked for every objective of `tests.test_fused_loss`, by turns in float64 by the
reference and in float32 by a backend of the CPU, and for a few by the interpreted kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import Objective, fused_loss, merge_metrics
from grpo_core.loss.reference import reference_loss
from tests.conftest import BACKENDS, HAS_GPU, HAS_TRITON
from tests.test_fused_loss import OBJECTIVES

B, T, V = 6, 5, 37
LENGTHS = [5, 2, 0, 4, 1, 3]
GROUPS = [0, 0, 2, 2, 2, 5]
# quantiles, moments and means over the call that no part of it can know
COUPLED = {
    name
    for name, spec in OBJECTIVES.items()
    if spec.factor.top_entropy < 1
    or spec.factor.second_moment < math.inf
    or spec.entropy_aggregation is not None
    or spec.averages_prompts
}
# by interpreted kernels: of tokens, of sequences, and of all that reads two rows
FEW = ["grpo", "gmpo", "sampler, mask, entropy, exact KL"]
PATHS = ["reference", *(backend for backend in BACKENDS if backend != "triton")]
CASES = [
    *(
        pytest.param(
            *(name, path),
            id=f"{name}-{path}",
            marks=() if number % len(PATHS) == turn else pytest.mark.rare,
        )
        for number, name in enumerate(OBJECTIVES)
        for turn, path in enumerate(PATHS)
    ),
    *(
        pytest.param(
            name,
            "triton",
            id=f"{name}-triton",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not HAS_TRITON or HAS_GPU, reason="interpreted kernels"),
            ],
        )
        for name in FEW
    ),
]
Batch = dict[str, Tensor]
each = pytest.mark.parametrize(("name", "path"), CASES)


def batch(objective: Objective, path: str) -> Batch:
    """A padded batch with holes in its mask, and everything the objective asks for."""
    dtype = torch.float64 if path == "reference" else torch.float32
    logits = torch.randn(B, T, V, dtype=dtype) * 2
    target = torch.randint(0, V, (B, T))
    target[torch.arange(T)[None] >= torch.tensor(LENGTHS)[:, None]] = -100
    target[0, 2] = -100
    logp = torch.log_softmax(logits.double(), -1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    given = {
        "logits": logits,
        "target": target,
        "advantage": torch.tensor([1.0, -0.5, 2.0, -1.0, 0.0, 0.3]),
        "old_logp": logp + 0.2 * torch.randn(B, T),
    }
    if objective.kl == "exact":
        given["ref_logits"] = logits + 0.3 * torch.randn(B, T, V)
    else:
        given["ref_logp"] = logp + 0.2 * torch.randn(B, T)
    if objective.averages_prompts:
        given["group_id"] = torch.tensor(GROUPS)
    if objective.factor.needs_sampler:
        given["sampler_logp"] = given["old_logp"] + 0.2 * torch.randn(B, T)
    return given


def normalizer(objective: Objective, target: Tensor) -> float:
    """What the objective's aggregation counts, of the whole batch."""
    valid = target != -100
    sequences = float(valid.any(1).sum())
    return {
        "token_mean": float(valid.sum()),
        "sequence_mean": sequences,
        "prompt_mean": float(
            len({g for g, kept in zip(GROUPS, valid.any(1), strict=True) if kept})
        ),
        "sequence_sum": sequences,
        "constant_length": sequences * T,
        "token_sum": 1.0,
    }[objective.aggregation]


def run(objective: Objective, path: str, given: dict[str, Any]) -> tuple[Any, Tensor]:
    """(output, gradient of the logits)."""
    leaf = given["logits"].detach().clone().requires_grad_()
    loss: Callable = reference_loss if path == "reference" else fused_loss
    backend = None if path == "reference" else path
    out = loss(leaf, objective=objective, backend=backend, **_without(given, "logits"))
    out.loss.backward()
    return out, leaf.grad


def _without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def close(ours: Tensor, theirs: Tensor, path: str) -> bool:
    """Equal up to the order of sums."""
    tolerance = 1e-10 if path == "reference" else 3e-6
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@each
def test_packed_is_padded(name: str, path: str) -> None:
    """The valid tokens alone, packed, with any ids of the sequences."""
    objective = OBJECTIVES[name]
    given = batch(objective, path)
    given["normalizer"] = normalizer(objective, given["target"])
    padded, gradient = run(objective, path, given)
    rows = (given["target"] != -100).nonzero(as_tuple=True)
    packed = {
        key: value[rows] if isinstance(value, Tensor) and value.ndim > 1 else value
        for key, value in given.items()
    }
    packed |= {"sequence_id": rows[0], "advantage": given["advantage"][rows[0]]}
    out, packed_gradient = run(objective, path, packed)
    assert close(out.loss, padded.loss, path)
    assert close(packed_gradient, gradient[rows], path)
    assert gradient.abs().sum() > 0 or "measured" in name
    for vector in ("logp", "entropy", "ratio", "kl", "factor"):
        assert close(getattr(out, vector), getattr(padded, vector)[rows], path), vector
    for key, value in out.metrics.items():
        assert close(value.double(), padded.metrics[key].double(), path), key


@each
def test_masking_a_token_is_removing_it(name: str, path: str) -> None:
    """Whatever is masked might hold anything; it leaves no trace but zeros."""
    objective = OBJECTIVES[name]
    given = batch(objective, path)
    given["normalizer"] = normalizer(objective, given["target"])
    mask = torch.rand(B, T) < 0.7
    mask[0, 0] = True
    out, gradient = run(objective, path, given | {"mask": mask})
    spoilt = {
        key: torch.where(mask[..., None] if value.ndim == 3 else mask, value, torch.nan)
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        else value
        for key, value in given.items()
    }
    again, gradient_again = run(objective, path, spoilt | {"mask": mask})
    assert close(again.loss, out.loss, path)
    assert close(gradient_again, gradient, path)
    assert (gradient_again[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    removed = given | {"target": torch.where(mask, given["target"], -100)}
    target_only, gradient_target_only = run(objective, path, removed)
    assert torch.equal(target_only.loss, out.loss)
    assert torch.equal(gradient_target_only, gradient)


@each
def test_padding_width_does_not_matter(name: str, path: str) -> None:
    objective = OBJECTIVES[name]
    given = batch(objective, path)
    given["normalizer"] = normalizer(objective, given["target"])
    out, gradient = run(objective, path, given)
    wider = {
        key: torch.nn.functional.pad(
            value,
            (0, 0, 0, 4) if value.ndim == 3 else (0, 4),
            value=-100 if key == "target" else 0.5,
        )
        if isinstance(value, Tensor) and value.ndim > 1
        else value
        for key, value in given.items()
    }
    wide, wide_gradient = run(objective, path, wider)
    assert close(wide.loss, out.loss, path)
    assert close(wide_gradient[:, :T], gradient, path)
    assert (wide_gradient[:, T:] == 0).all()
    assert close(wide.ratio[:, :T], out.ratio, path)


@each
def test_parts_sum_to_the_whole(name: str, path: str) -> None:
    """Micro-batches under the global count: losses and gradients add up, metrics merge."""
    objective = OBJECTIVES[name]
    if name in COUPLED:
        pytest.skip("its quantile or mean is over the call")
    given = batch(objective, path)
    given["normalizer"] = normalizer(objective, given["target"])
    whole, gradient = run(objective, path, given)
    parts = []
    for sequences in ([0, 1], [2], [3, 4, 5]):
        part = {k: v[sequences] if isinstance(v, Tensor) else v for k, v in given.items()}
        out, part_gradient = run(objective, path, part)
        assert close(part_gradient, gradient[sequences], path)
        parts.append(out)
    assert close(sum(part.loss for part in parts), whole.loss, path)
    merged = merge_metrics([part.metrics for part in parts])
    assert merged.keys() == whole.metrics.keys()
    for key, value in whole.metrics.items():
        if key not in ("ratio_min", "ratio_max") or value != 0:
            assert close(merged[key].double(), value.double(), path), key


@each
def test_order_of_sequences_does_not_matter(name: str, path: str) -> None:
    objective = OBJECTIVES[name]
    given = batch(objective, path)
    out, gradient = run(objective, path, given)
    order = torch.tensor([3, 0, 5, 4, 2, 1])
    moved = {k: v[order] if isinstance(v, Tensor) else v for k, v in given.items()}
    again, gradient_again = run(objective, path, moved)
    assert close(again.loss, out.loss, path)
    assert close(gradient_again, gradient[order], path)
    for vector in ("logp", "entropy", "kl"):
        given, moved = getattr(out, vector)[order], getattr(again, vector)
        # PyTorch's sigmoid of a number depends on the lane that it is computed in
        same = close(moved, given, path) if "gated" in name else torch.equal(moved, given)
        assert same, vector


def test_metrics_of_different_calls_do_not_merge() -> None:
    with pytest.raises(ValueError, match="parts: expected figures of the same names, got"):
        merge_metrics([{"loss": torch.zeros(())}, {}])
    with pytest.raises(ValueError, match="parts"):
        merge_metrics([])
