"""How the one pass reads a row again: the same bits in every way, and what each compiles to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core.kernels import launch, surrogates
from grpo_core.kernels.launch import ONE_READING, Tuning
from grpo_core.kernels.records import RowLoss, Rows, Terms, TokenVectors
from tests.compiled import uninterpreted
from tests.conftest import HAS_GPU, HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

# two warps: a tile is 1 KiB, 512 bfloat16 or 256 float32
PLAIN = Tuning(warps=2)
CANDIDATES = {
    "backwards": {"backwards": True},
    "kept": {"kept": 1},
    "held": {"held": 2},
    "more than there is": {"held": 99, "kept": 1024},
    "everything": {"backwards": True, "kept": 1, "held": 1, "tiles": 2},
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def device() -> str:
    """That of the kernels, of which there is one backend here."""
    return "cuda" if HAS_GPU else "cpu"


def one_pass(
    logits: Tensor, target: Tensor, dlogits: Tensor, tuning: Tuning, **given: Any
) -> RowLoss:
    """`row_loss` of rows some of which are masked, under an entry of the table."""
    from grpo_core.kernels.row_loss import row_loss

    rows = Rows.of(logits)
    key = launch.tuning_key(logits.device, logits.dtype, rows.V)
    weight = (target >= 0).float()
    tokens = TokenVectors(target, weight, advantage=2 * weight, **given.pop("vectors", {}))
    terms = Terms(surrogates.clip, (0.2, 0.2, math.inf), None, False, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.TUNED, key, tuning)
        return row_loss(rows, tokens, 0.9, terms, dlogits, given.get("ref_rows"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in CANDIDATES]
    + [(name, dtype) for name in ("held", "everything") for dtype in DTYPES[1:]],
)
def test_no_bit_depends_on_how_a_row_is_read_again(
    device: str, name: str, dtype: torch.dtype
) -> None:
    """Targets in the first tile, in what is held, last, none; in place, aside, lying unlike."""
    V = 2053 if dtype.itemsize == 2 else 1029
    candidate = replace(PLAIN, **CANDIDATES[name])
    logits = (2 * torch.randn(1, 5, V + 2)).to(dtype).to(device)
    target = torch.tensor([0, V // 3, V - 1, -100, 1], device=device)
    # without a good anchor a row is read once more in between
    logits[0, 1, V - 5] = 300.0
    view = logits[:, :, 1:-1]
    expected = torch.empty(1, 5, V, dtype=dtype, device=device)
    plain = one_pass(view, target, expected, PLAIN)
    assert plain.dlogp.count_nonzero() == 4
    aside = torch.full_like(expected, math.nan)
    inplace = logits.clone()
    for found in (aside, inplace[:, :, 1:-1]):
        moved = one_pass(view if found is aside else found, target, found, candidate)
        assert torch.equal(found, expected)
        assert all(map(torch.equal, moved[:-1], plain[:-1]))
    assert torch.equal(inplace[:, :, [0, -1]], logits[:, :, [0, -1]]), "wrote outside the view"


def test_nor_does_one_of_the_entropys_gradient(device: str) -> None:
    """What is held has the second coefficient, too."""
    logits = torch.randn(2, 2053, device=device).bfloat16()
    target = torch.tensor([600, 5], device=device)
    vectors = {"entropy_weight": torch.tensor([0.1, 0.2], device=device)}
    gradients = []
    for tuning in (PLAIN, replace(PLAIN, **CANDIDATES["everything"])):
        gradients.append(torch.empty_like(logits))
        one_pass(logits, target, gradients[-1], tuning, vectors=vectors)
    assert torch.equal(*gradients)


def test_the_exact_kl_is_read_backwards_too(device: str) -> None:
    """Neither registers nor caches are asked to hold two rows; the same bits either way."""
    logits, ref_logits = torch.randn(2, 2, 1301, device=device)
    target = torch.tensor([300, 1300], device=device)
    gradients = []
    for tuning in (PLAIN, replace(PLAIN, **CANDIDATES["everything"], registers=128)):
        gradients.append(torch.empty_like(logits))
        one_pass(logits, target, gradients[-1], tuning, ref_rows=Rows.of(ref_logits))
    assert torch.equal(*gradients)


def test_what_the_kernel_is_told(device: str) -> None:
    """Nothing of a second reading without one, and no more held than a row has whole tiles for."""
    rows = Rows.of(torch.empty(1, 3 * 1024, dtype=torch.bfloat16, device=device))
    key = launch.tuning_key(rows.logits.device, torch.bfloat16, rows.V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.TUNED, key, Tuning(4, backwards=True, held=5, kept=64))
        layout = launch.row_layout(rows)
    assert not ONE_READING.keys() & layout.keywords.keys()
    told = layout.of_two_readings(rows.V, gradient=True, pair=False)
    assert {name: told[name] for name in ONE_READING} == {
        "HELD": 2,
        "KEPT": 32,
        "BACKWARDS": True,
    }
    assert layout.of_two_readings(1000, gradient=True, pair=False)["HELD"] == 0
    without = layout.of_two_readings(rows.V, gradient=False, pair=False)
    assert {name: without[name] for name in ONE_READING} == ONE_READING
    pair = layout.of_two_readings(rows.V, gradient=True, pair=True)
    assert (pair["HELD"], pair["KEPT"], pair["BACKWARDS"]) == (0, None, True)
    assert launch.row_layout(rows).of_two_readings(rows.V, True, False) == (
        launch.at_most_registers(launch.WRITING_REGISTERS)
        | launch.row_layout(rows).keywords
        | ONE_READING
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.TUNED, key, Tuning(4, registers=96))
        told = launch.row_layout(rows).of_two_readings(rows.V, True, False)
    assert told == launch.row_layout(rows).keywords | ONE_READING | (launch.at_most_registers(96))


@pytest.mark.skipif(HAS_GPU, reason="counts interpreted kernels")
@pytest.mark.parametrize(("held", "issued"), [(0, 6.0), (1, 5.5), (3, 4.5)])
def test_what_is_held_is_not_read_again(held: int, issued: float) -> None:
    """Bytes per bfloat16 logit of a row of four tiles: two readings, less what is held."""
    from bench.kernel_meter import KernelMeter

    logits = torch.empty(2 * 2048 + 8).bfloat16()
    logits = logits[-logits.data_ptr() // 2 % 8 :][: 2 * 2048].view(2, 2048)
    with KernelMeter() as meter:
        one_pass(logits.normal_(), torch.tensor([5, 1000]), logits, replace(PLAIN, held=held))
    # the target's logit is read twice more, and written once more
    assert meter.traffic(logits).issued == 2 * (2048 * issued + 2 * 2 + 2)
    masked = torch.full((2,), -100)
    with KernelMeter() as meter:
        one_pass(logits, masked, logits, replace(PLAIN, held=held))
    assert meter.traffic(logits, stores=False).issued == 0


COMPILED = """
import json, torch
from bench.second_reading import CANDIDATES, compile_one_pass
from grpo_core.inspect.__main__ import exceeded, hottest
for name in ("backwards, end kept", "22 % held, backwards"):
    tuning = CANDIDATES[name]
    kernel = compile_one_pass("sm_90", torch.bfloat16, 151_669, tuning)
    beyond = [line for line in exceeded([kernel]) if "instructions" not in line]
    hot = {loop.role: loop for loop in hottest(kernel.loops)}
    counts = [hot[role].instructions / kernel.logits(hot[role]) for role in ("forward", "gradient")]
    opcodes = [[*hot[role].opcodes] for role in ("forward", "gradient")]
    print(json.dumps([beyond, counts, opcodes]))
"""


@pytest.mark.slow
def test_candidates_compile_without_spills_and_hint_what_they_should() -> None:
    """Within the limits of `grpo_core.inspect`, but for half an instruction to a logit more.

    Hints show in the names of loads and stores: EF, evicted first, and EL, last.
    """
    done = uninterpreted("-c", COMPILED)
    assert done.returncode == 0, done.stderr[-4000:]
    kept, held = map(json.loads, done.stdout.splitlines())
    for beyond, (forward, gradient), _ in (kept, held):
        assert not beyond
        assert forward < 7.5 and gradient < 6.5
    assert {"LDG.E.EF.128", "LDG.E.EL.128"} & set(kept[2][0])
    assert {"LDG.E.EF.128", "STG.E.EF.128"} <= set(kept[2][1])
    assert "LDG.E.128" in held[2][0] and "STG.E.128" in held[2][1]


def test_caches_serve_what_was_used_last() -> None:
    """A row of 64 KiB, one program: forwards nothing is left of it, backwards what fits is."""
    from bench.second_reading import BLOCK, Shares, simulate

    def shares(level2: int, **changes: Any) -> Shares:
        return simulate(replace(PLAIN, **changes), 16 * BLOCK, 1, 1, 0.0, level2 * BLOCK)

    assert shares(16).level2 == 1 and shares(0).memory == 1
    assert shares(15).memory == 1
    # one place is the next row's
    assert shares(9, backwards=True).level2 == pytest.approx(9 / 16, abs=1 / 16)
    # forwards only what was asked for
    assert shares(9, kept=20).level2 == pytest.approx(5 / 16, abs=1 / 16)
    # two warps: four tiles are a block; the first block is read again
    held = shares(8, backwards=True, held=32)
    assert held.registers == 0.5 and held.level2 == pytest.approx(7 / 16, abs=1 / 16)
    assert held.registers + held.level2 + held.memory == pytest.approx(1)
