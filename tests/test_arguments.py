"""Bad input: the error names the argument, what was expected and what came; nothing is touched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from grpo_core import (
    RECIPES,
    Objective,
    PolicyFactor,
    SamplerCorrection,
    clip,
    fused_loss,
    token_logp,
)
from grpo_core.reference import reference_loss
from tests.conftest import HAS_GPU

B, T, V = 4, 3, 11
EXACT = RECIPES["dapo"].replace(kl="exact", beta=0.1)
SAMPLED = RECIPES["dapo"].replace(factor=PolicyFactor(SamplerCorrection()))
PACKED = {"logits": (12, V), "target": (12,), "sequence_id": torch.arange(12) // 3}
LONG = torch.int64


def good(**changes: Any) -> dict[str, Any]:
    """Arguments that work, with some changed; a tuple becomes a tensor of that shape."""
    shape = changes.get("logits", (B, T, V))
    rows = tuple(shape[:-1]) if isinstance(shape, tuple) else (B, T)
    arguments: dict[str, Any] = {
        "logits": shape,
        "target": torch.zeros(rows, dtype=LONG),
        "objective": "dapo",
        "advantage": rows,
    } | changes
    filled = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    filled["target"] = filled["target"].long() if "target" in changes else filled["target"]
    return {k: v for k, v in filled.items() if v is not None}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"logits": (V,)}, "logits: expected a tensor [B, T, V] or [N, V], got [11]"),
    ({"logits": torch.zeros(B, T, V, dtype=LONG)}, "logits: expected one of "),
    ({"logits": torch.zeros(B, T, 0)}, "logits: expected V >= 1, got shape [4, 3, 0]"),
    (
        {"target": (B, T + 1)},
        "target: expected shape [4, 3] for logits [4, 3, 11], got [4, 4]; position t predicts",
    ),
    ({"target": torch.full((B, T), V)}, "target: expected -100 or a word in [0, V = 11), got 11"),
    ({"target": torch.full((B, T), -1)}, "target: expected -100 or a word in [0, V = 11), got -1"),
    ({"mask": (B,)}, "mask: expected shape [4, 3], got [4]"),
    ({"mask": [1, 0]}, "mask: expected a tensor, got list"),
    ({"advantage": (T,)}, "advantage: expected shape [4, 3] or [4], got [3]"),
    ({"advantage": torch.zeros(B, dtype=LONG)}, "advantage: expected a floating-point tensor"),
    ({"advantage": None}, "advantage: expected exactly one of advantage and rewards, got neither"),
    ({"rewards": (B,)}, "advantage: expected exactly one of advantage and rewards, got both"),
    (
        {"advantage": None, "rewards": (B,)},
        "group_size: expected an int that divides B = 4, or group_id, got None",
    ),
    ({"group_id": torch.zeros(B, dtype=LONG)}, "group_id: expected None without rewards"),
    (
        {"advantage": None, "rewards": (B,), "group_size": 2, "group_id": torch.zeros(B).long()},
        "group_size: expected exactly one of it and group_id, got both",
    ),
    (
        {"advantage": None, "rewards": (B,), "group_id": torch.arange(B) + 1},
        "group_id: expected integers in [0, B = 4), got 4 at row 3",
    ),
    (
        {"advantage": None, "rewards": (B,), "group_size": 3},
        "group_size: expected an int that divides B = 4, or group_id, got 3",
    ),
    (
        {"advantage": None, "rewards": (8,), "group_size": 2},
        "rewards: expected shape [4], got [8]",
    ),
    (
        {"advantage": None, "rewards": torch.tensor([0, 0, torch.nan, 0]), "group_size": 2},
        "rewards: expected finite numbers, got nan at index 2",
    ),
    (
        {"advantage": None, "rewards": torch.tensor([0, -torch.inf, 0, 0]), "group_size": 2},
        "rewards: expected finite numbers, got -inf at index 1",
    ),
    ({"old_logp": (B,)}, "old_logp: expected shape [4, 3], got [4]"),
    ({"ref_logp": (B, T, V)}, "ref_logp: expected shape [4, 3], got [4, 3, 11]"),
    ({"objective": "grpo"}, "ref_logp: expected a tensor for beta = 0.04, got None"),
    (
        {"objective": EXACT, "ref_logits": None},
        "ref_logits: expected a tensor for beta = 0.1, got None",
    ),
    (
        {"objective": EXACT, "ref_logits": (B, T, V), "ref_logp": (B, T)},
        "ref_logp: expected None for kl = 'exact', which takes ref_logits",
    ),
    (
        {"objective": EXACT, "ref_logits": (B, T)},
        "ref_logits: expected shape [4, 3, 11], got [4, 3]",
    ),
    (
        {"objective": EXACT, "ref_logits": torch.zeros(B, T, V, dtype=LONG)},
        "ref_logits: expected a floating-point tensor, got torch.int64",
    ),
    (
        {"ref_logits": (B, T, V)},
        "ref_logits: expected None for kl = None; use kl='exact', or give ref_logp=",
    ),
    ({"objective": SAMPLED}, "sampler_logp: expected a tensor for factor.sampler, got None"),
    (
        {"objective": SAMPLED, "sampler_logp": (B,)},
        "sampler_logp: expected shape [4, 3], got [4]",
    ),
    ({"objective": "gropo"}, "objective: expected an Objective or one of ['bnpo', 'cispo', "),
    ({"objective": Objective}, "objective: expected an Objective or one of"),
    ({"temperature": 0.0}, "temperature: expected a finite Python number >= 0.0001, got 0.0"),
    (
        {"temperature": float("nan")},
        "temperature: expected a finite Python number >= 0.0001, got nan",
    ),
    ({"normalizer": 0}, "normalizer: expected a finite number > 0, got 0"),
    ({"normalizer": (2,)}, "normalizer: expected a real 0-dim tensor, got [2]"),
    ({"normalizer": torch.tensor(0.0)}, "normalizer: expected a finite number > 0, got 0.0"),
    ({"normalizer": torch.tensor(-3)}, "normalizer: expected a finite number > 0, got -3"),
    ({"normalizer": torch.tensor(torch.nan)}, "normalizer: expected a finite number > 0, got nan"),
    ({"normalizer": torch.tensor(1j)}, "normalizer: expected a real 0-dim tensor, got [] "),
    ({"normalizer": True}, "normalizer: expected a number or a 0-dim tensor, got True"),
    ({"group_size": 2}, "group_size: expected None without rewards, got 2"),
    ({"objective": ["dapo"]}, "objective: expected an Objective or one of"),
    ({"normalizer": "8"}, "normalizer: expected a number or a 0-dim tensor, got '8'"),
    ({"sequence_id": (B,)}, "sequence_id: expected None for logits [B, T, V], got a tensor"),
    (PACKED | {"sequence_id": None}, "sequence_id: expected [N] for packed logits [N, V]"),
    (PACKED | {"sequence_id": (12,)}, "sequence_id: expected an integer tensor, got torch.float32"),
    (
        PACKED | {"sequence_id": torch.arange(12) + 1},
        "sequence_id: expected integers in [0, N = 12), got 12 at row 11",
    ),
    (
        PACKED | {"advantage": None, "rewards": (12,), "group_size": 2},
        "rewards: expected one per sequence, got 12, one per token, for 4 sequences",
    ),
    (PACKED | {"advantage": (4,)}, "advantage: expected shape [12], got [4]"),
    (
        PACKED | {"advantage": None, "rewards": (2,), "group_size": 2},
        "sequence_id: expected ids below the 2 rewards, got 2 at row 6",
    ),
    (
        PACKED | {"advantage": None, "rewards": (0,), "group_size": 2},
        "rewards: expected one for every sequence, got [0]",
    ),
    (
        PACKED | {"objective": "dr_grpo"},
        "normalizer: expected sequences · length for constant_length over packed rows, got None",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_bad_arguments_are_named(loss: Any, changes: dict[str, Any], message: str) -> None:
    """And even with inplace=True the logits are as they were."""
    arguments = good(**changes)
    logits = arguments["logits"].clone()
    if logits.is_floating_point():
        arguments["logits"].requires_grad_()
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(**arguments, inplace=True)
    assert torch.equal(arguments["logits"].detach(), logits)


def test_arguments_that_work_do_work() -> None:
    """The base of the table above is no error itself."""
    assert fused_loss(**good()).loss == 0
    assert fused_loss(**good(**PACKED)).loss == 0
    assert fused_loss(**good(advantage=(B,))).loss == 0
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        narrow = torch.full((B, T), 5).to(dtype)
        out = fused_loss(**good() | {"target": narrow})
        assert torch.equal(out.logp, fused_loss(**good() | {"target": narrow.long()}).logp)
    assert fused_loss(**good(mask=torch.ones(B, T), normalizer=torch.tensor(3))).loss == 0


def test_fused_loss_has_no_float64() -> None:
    with pytest.raises(ValueError, match=r"logits: expected one of .*got torch\.float64"):
        fused_loss(**good(logits=torch.zeros(B, T, V, dtype=torch.float64)))
    double = good(logits=torch.zeros(B, T, V, dtype=torch.float64))
    assert reference_loss(**double).loss.dtype == torch.float64


def test_inplace_needs_rows_of_its_own() -> None:
    """Strided words and overlapping rows have no place for a gradient of their own."""
    for logits in (
        torch.zeros(B, T, 2 * V)[..., ::2],
        torch.zeros(B, 1, V).expand(B, T, V),
        torch.zeros(60).as_strided((B, T, V), (9, 3, 1)),
    ):
        with pytest.raises(ValueError, match="inplace: expected logits with a contiguous last"):
            fused_loss(**good(logits=logits, inplace=True))
        leaf = logits.clone().requires_grad_()
        fused_loss(**good(logits=leaf, advantage=torch.ones(B))).loss.backward()
        expanded = fused_loss(**good(logits=logits, advantage=torch.ones(B)))
        assert torch.equal(expanded.loss, fused_loss(**good(advantage=torch.ones(B))).loss)


def test_token_logp_checks_too() -> None:
    logits = torch.zeros(B, T, V)
    with pytest.raises(ValueError, match=r"target: expected shape \[4, 3\], got \[4\]"):
        token_logp(logits, torch.zeros(B, dtype=LONG))
    with pytest.raises(ValueError, match=r"target: expected -100 or a word"):
        token_logp(logits, torch.full((B, T), V))
    with pytest.raises(ValueError, match="temperature: expected a finite Python number >="):
        token_logp(logits, torch.zeros(B, T, dtype=LONG), temperature=-1)
    out = token_logp(logits, torch.full((B, T), V), validate=False)
    assert torch.equal(out.logp, torch.zeros(B, T))


def test_backends_are_named() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'cuda'"):
        fused_loss(**good(backend="cuda"))


@pytest.mark.skipif(HAS_GPU, reason="there the triton backend runs")
def test_triton_without_gpu_or_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(NotImplementedError, match='backend: "triton" needs tensors on a GPU'):
        fused_loss(**good(backend="triton"))


def test_constants_get_no_gradient() -> None:
    """Only the logits are differentiated; advantages that require grad are taken as numbers."""
    advantage = torch.ones(B, requires_grad=True)
    logits = torch.randn(B, T, V, requires_grad=True)
    objective = Objective(clip(0.2))
    fused_loss(**good(logits=logits, advantage=advantage, objective=objective)).loss.backward()
    assert advantage.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    logits = torch.randn(B, T, V, requires_grad=True)
    arguments = good(logits=logits, advantage=torch.ones(B))
    expected = fused_loss(**arguments).loss
    try:
        torch.set_default_dtype(dtype)
        loss = fused_loss(**arguments).loss
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
