"""How much a step launches on a GPU, held by name: nobody adds a launch unnoticed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grpo_core import fused_loss, token_logp
from grpo_core.kernels.launch import most_registers
from tests.combinations import slow
from tests.compiled import ROOT
from tests.conftest import HAS_GPU
from tests.launches import launches
from tests.test_fused_loss import OBJECTIVES

DEVICE = "cuda" if HAS_GPU else "cpu"
SCALE = "_row_scale_kernel"
TOKENS = ["_row_loss_kernel", SCALE]
SEQUENCES = ["_row_stats_kernel", "_sequence_loss_kernel", "_row_dlogits_kernel", SCALE]
# small operations of torch over [N] vectors, at most: targets, weights, the sum of the loss
VECTOR_OPERATIONS = 40
# objective, what else it is given, what kernels it launches forward and backward
STEPS: dict[str, tuple[str, list[str], list[str]]] = {
    "dapo": ("dapo", [], TOKENS),
    "grpo": ("grpo", ["ref_logp"], TOKENS),
    "dr_grpo": ("dr_grpo", [], TOKENS),
    "entropy": ("entropy kept low", [], TOKENS),
    "exact KL": ("exact KL, only measured", ["ref_logits"], TOKENS),
    "rewards": ("grpo", ["ref_logp", "rewards"], ["_group_norm_kernel", *TOKENS]),
    "gspo": ("gspo", [], SEQUENCES),
    "gmpo": ("gmpo", [], SEQUENCES),
    "sequence": ("sequence", ["ref_logp"], SEQUENCES),
}
QUICK = ("dapo", "rewards", "gspo")


def given(packed: bool, *names: str) -> dict[str, Any]:
    """A batch as a trainer has it: targets and mask are views of what was generated."""
    B, T, V = 4, 3, 40
    ids = torch.randint(0, V, (B, T + 1), device=DEVICE)
    logp = torch.full((B, T), -3.7, device=DEVICE)
    arguments: dict[str, Any] = {
        "logits": torch.randn(B, T, V, device=DEVICE),
        "target": ids[:, 1:],
        "mask": (ids != 3)[:, 1:],
        "advantage": torch.randn(B, device=DEVICE),
        "old_logp": logp,
        "ref_logp": logp - 0.1,
        "ref_logits": torch.randn(B, T, V, device=DEVICE),
    }
    if packed:
        flat = {k: v.flatten(0, 1) for k, v in arguments.items() if v.ndim > 1}
        sequence = torch.arange(B * T, device=DEVICE) // T
        arguments |= flat | {"sequence_id": sequence, "advantage": torch.randn(B * T).to(DEVICE)}
    for name in {"ref_logp", "ref_logits"} - set(names):
        del arguments[name]
    if "rewards" in names:
        arguments |= {"advantage": None, "rewards": torch.randn(B, device=DEVICE), "group_size": 2}
    return arguments


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in STEPS if name not in QUICK))])
def test_a_step_launches_no_more(name: str, packed: bool) -> None:
    """Forward and backward together; torch's own root gradient is given, not launched."""
    objective, others, expected = STEPS[name]
    if packed and OBJECTIVES[objective].aggregation == "constant_length":
        pytest.skip("a constant length is that of a padded batch")
    arguments = given(packed, *others)
    logits = arguments.pop("logits").requires_grad_()
    one = torch.ones((), device=DEVICE)
    with launches() as names:
        out = fused_loss(
            logits,
            objective=OBJECTIVES[objective],
            backend="triton",
            validate=False,
            **arguments,
        )
        out.loss.backward(one)
    assert [name for name in names if name.endswith("_kernel")] == expected
    assert not [name for name in names if name.startswith("synchronisation")]
    assert len(names) - len(expected) <= VECTOR_OPERATIONS, names
    assert logits.grad.abs().sum() > 0


def test_log_probabilities_launch_one_read() -> None:
    """And nothing else for targets of their own memory; a mask and a view cost a few more."""
    arguments = given(False)
    target, mask = arguments["target"], arguments["mask"]
    for masked, expected in (
        ({"target": target.contiguous()}, []),
        ({"target": target, "mask": mask}, ["clone", "clone", "ne", "scalar_tensor", "where"]),
    ):
        with launches() as names:
            token_logp(arguments["logits"], backend="triton", validate=False, **masked)
        assert names == [*expected, "_row_stats_kernel"]


def test_the_counter_sees_what_torch_launches() -> None:
    """Views and allocations are free, what computes is not, and a read on the host is named."""
    with launches() as names:
        vector = torch.zeros(6)
        float((vector.view(2, 3)[0] + 1).sum())
    assert names == ["zeros", "add", "sum", "synchronisation: _local_scalar_dense"]


def launches_of(path: Path) -> Iterator[ast.Call]:
    """The calls `..._kernel[grid](...)` of a file, also those inside `partial(...)`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = node.args[0] if ast.unparse(node.func) == "partial" else node.func
            if isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("kernel"):
                yield node


@pytest.mark.parametrize("folder", ["kernels", "bench", "tests"])
def test_every_launch_says_whether_products_and_sums_are_contracted(folder: str) -> None:
    """Else Triton contracts them, and one formula has other bits in another kernel."""
    launched = [
        (path, call) for path in (ROOT / folder).rglob("*.py") for call in launches_of(path)
    ]
    assert launched
    for path, call in launched:
        assert "enable_fp_fusion" in {k.arg for k in call.keywords}, f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    ("warps", "of_program", "registers"),
    [(32, 8, 64), (32, 16, 64), (24, 4, 80), (24, 8, 80), (24, 16, 128), (16, 8, 128)],
)
def test_a_limit_leaves_room_for_whole_programs(
    warps: int, of_program: int, registers: int
) -> None:
    """By hand, of 65,536: 24 warps are 6, 3 and 1 programs of 4, 8 and 16; steps of 8 registers."""
    assert most_registers(warps, of_program) == registers
