"""The instrument itself: loops of programs whose counts are known, the gate, the table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_core.inspect.loops import Loop, loops
from grpo_core.inspect.sass import sass
from tests.compiled import uninterpreted
from tests.conftest import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def assembly(text: str) -> str:
    """Numbered as nvdisasm prints it: a label stands at the margin, an instruction does not."""
    lines = []
    for number, line in enumerate(text.strip("\n").splitlines()):
        code = line.strip()
        lines.append(code if code.endswith(":") else f"        /*{number:04x}*/    {code} ;")
    return "\n".join(lines)


WHOLE_TILES_AND_A_TAIL = """
    S2R R0, SR_TID.X
.L_x_0:
    UIADD3 UR4, UR4, 0x400, URZ
    ISETP.GE.AND P0, PT, R1, UR4, PT
    @P0 BRA `(.L_x_1)
    LDG.E.128 R4, desc[UR6][R2.64]
    BRA `(.L_x_2)
.L_x_1:
    LDL.LU R9, [R1]
    ISETP.LT.AND P1, PT, R3, UR5, PT
    @P1 LDG.E.U16 R4, desc[UR6][R2.64]
    @!P1 MOV R4, RZ
    SHFL.BFLY PT, R4, R4, 0x1, 0x1f
    @P2 LDG.E.U16 R5, desc[UR6][R2.64+0x2]
.L_x_2:
    MUFU.EX2 R4, R4
    FADD R8, R8, R4
    @!P3 BRA `(.L_x_0)
    BAR.SYNC.DEFER_BLOCKING 0x0
    STL [R1], R8
    EXIT
.L_x_3:
    BRA `(.L_x_3)
"""


def test_whole_tiles_are_counted_and_not_the_tail() -> None:
    """The masked loads, and the shuffle among them, lie on the other way; the barrier behind."""
    (loop,) = loops(sass(assembly(WHOLE_TILES_AND_A_TAIL)))
    assert (loop.role, loop.instructions, loop.special) == ("forward", 8, 1)
    assert (loop.loads, loop.stores) == ((16,), ())
    assert (loop.waits, loop.spills) == (1, 1)
    assert "LDG.E.U16" not in loop.opcodes


def test_the_predicate_of_a_branch_says_which_store_happens() -> None:
    """A row of zeros as ptxas writes it: the wide store is guarded like the branch behind it."""
    text = """
.L_x_0:
    ISETP.GT.AND P0, PT, R1, R2, PT
    @!P0 STG.E.128 desc[UR6][R2.64], RZ
    @!P0 BRA `(.L_x_1)
    @!P6 STG.E.U16 desc[UR6][R8.64], RZ
    @!P5 STG.E.U16 desc[UR6][R8.64+0x2], RZ
.L_x_1:
    ISETP.LE.AND P0, PT, R1, R3, PT
    @P0 EXIT
    BRA `(.L_x_0)
"""
    (loop,) = loops(sass(assembly(text)))
    assert (loop.role, loop.instructions, loop.stores) == ("zeros", 6, (16,))


def test_a_tile_that_is_always_masked_counts_its_masked_accesses() -> None:
    """Also where the guard copies a uniform predicate, so that nothing is certain."""
    text = """
.L_x_0:
    PLOP3.LUT P3, PT, PT, PT, UP0, 0x80, 0x8
    @!P3 LDG.E.64 R4, desc[UR6][R2.64]
    @!P3 LDG.E.64 R6, desc[UR6][R2.64+0x8]
    BRA.U !UP0, `(.L_x_1)
    @P1 LDG.E R4, desc[UR6][R2.64]
    @P2 LDG.E R5, desc[UR6][R2.64+0x4]
.L_x_1:
    FADD R8, R8, R4
    @!P0 STG.E.64 desc[UR6][R2.64], R4
    @!P0 STG.E.64 desc[UR6][R2.64+0x8], R6
    BRA.U UP1, `(.L_x_0)
    EXIT
"""
    (loop,) = loops(sass(assembly(text)))
    assert (loop.role, loop.instructions) == ("scale", 8)
    assert (loop.loads, loop.stores) == ((8, 8), (8, 8))


def test_an_inner_loop_is_counted_by_itself() -> None:
    """Its five instructions are not the outer loop's, which has none of its own but six."""
    text = """
.L_x_0:
    LDG.E.128 R4, desc[UR6][R2.64]
    MOV R9, RZ
.L_x_1:
    LDG.E R10, desc[UR6][R8.64]
    MUFU.EX2 R10, R10
    STG.E desc[UR6][R8.64], R10
    IADD3 R9, R9, 0x1, RZ
    @P1 BRA `(.L_x_1)
    STG.E.128 desc[UR6][R2.64], R4
    IADD3 R2, R2, 0x10, RZ
    ISETP.LT.AND P0, PT, R2, R3, PT
    @P0 BRA `(.L_x_0)
    EXIT
"""
    outer, inner = loops(sass(assembly(text)))
    assert (outer.role, outer.instructions, outer.loads) == ("scale", 6, (16,))
    assert (inner.role, inner.instructions, inner.loads) == ("gradient", 5, (4,))


def test_a_loop_is_found_behind_one_that_is_left_by_a_call() -> None:
    """As the assembler writes for sm_80: with a guard, and nothing returns."""
    text = """
.L_x_0:
    LDG.E.128 R4, desc[UR6][R2.64]
    MUFU.EX2 R10, R4
    @!P6 CALL.REL.NOINC `(.L_x_1)
    BRA `(.L_x_0)
.L_x_1:
    STG.E.128 desc[UR6][R2.64], R4
    @P0 BRA `(.L_x_1)
    EXIT
"""
    first, second = loops(sass(assembly(text)))
    assert (first.role, first.instructions) == ("forward", 4)
    assert (second.role, second.instructions) == ("zeros", 2)


KNOWN_LOOPS = """
import json, sys, torch
from grpo_core.inspect.compile_ahead import as_if_on, measure
from tests.copy_kernel import copy_in_tiles
source = torch.zeros(4096)
with as_if_on("sm_90") as launches:
    copy_in_tiles(source, torch.zeros(4096), together=False)
    copy_in_tiles(source, torch.zeros(4096), together=True)
found = [measure(launch.compiled.asm)[2] for launch in launches]
print(json.dumps([[vars(loop) for loop in loops] for loops in found]))
"""


@needs_triton
@pytest.mark.slow
def test_compiled_loops_of_a_known_kernel() -> None:
    """It copies 2ˣ: for four numbers a load and a store of 16 bytes, four powers, little else.

    The compiler may unroll the loop; the figures of a number stay.
    """
    done = uninterpreted("-c", KNOWN_LOOPS)
    assert done.returncode == 0, done.stderr[-4000:]
    (alone,), (together,) = json.loads(done.stdout)
    for loop in (alone, together):
        assert set(loop["loads"]) == {16} and loop["loads"] == loop["stores"]
        assert loop["special"] == 4 * len(loop["loads"])
    assert alone["waits"] == 0 and together["waits"] > 0
    needed = 6 * len(alone["loads"])
    assert needed < sum(alone["opcodes"].values()) <= 2 * needed + 6


@needs_triton
class TestGate:
    """`exceeded` over figures made up for it."""

    def kernel(self, **changes: object):
        """Within every limit."""
        from grpo_core.inspect.compile_ahead import Compiled

        loop = Loop(Counter(FFMA=40), loads=(16,), stores=(16,), special=8, waits=0)
        good = Compiled(
            card="sm_90",
            kernel="row_dlogits",
            variant="",
            dtype="bfloat16",
            itemsize=2,
            vocabulary=64,
            constants={},
            warps=4,
            rows_read=1,
            registers=32,
            spills=0,
            shared=0,
            loops=[loop],
        )
        return replace(good, **changes)

    def test_what_is_within_the_limits_passes(self) -> None:
        from grpo_core.inspect.__main__ import exceeded

        assert not list(exceeded([self.kernel()]))

    @pytest.mark.parametrize(
        ("changes", "of_loop", "complaint"),
        [
            ({"spills": 2}, {}, "2 registers spilled"),
            ({"registers": 129}, {}, "129 registers, more than 128"),
            ({"spills": None}, {}, "a tool is missing"),
            ({"loops": []}, {}, "no gradient loop was found"),
            ({}, {"waits": 3}, "3 barriers or shuffles in the gradient loop"),
            ({}, {"loads": (8, 8)}, "the gradient loop loads 8 bytes at a time"),
            ({}, {"stores": (2,) * 8}, "the gradient loop stores 2 bytes at a time"),
            (
                {},
                {"opcodes": Counter(FFMA=46)},
                "5.75 instructions in the gradient loop, limit 5.6",
            ),
            ({"card": "sm_120", "spills": 5}, {}, "5 registers spilled"),
            ({"card": "sm_120", "spills": 1}, {"spills": 1}, "1 registers spilled"),
            ({"card": "gfx942", "registers": 129, "spills": 3, "loops": []}, {}, "3 registers"),
        ],
    )
    def test_what_is_beyond_a_limit_is_named(
        self, changes: dict, of_loop: dict, complaint: str
    ) -> None:
        from grpo_core.inspect.__main__ import exceeded

        kernel = self.kernel()
        if of_loop:
            changes = {"loops": [replace(kernel.loops[0], **of_loop)], **changes}
        (line,) = exceeded([replace(kernel, **changes)])
        assert line.startswith(changes.get("card", "sm_90")) and complaint in line

    def test_another_assembler_has_leeway(self) -> None:
        """A few values of a row beside the loops."""
        from grpo_core.inspect.__main__ import exceeded

        kernel = self.kernel(card="sm_120", spills=4)
        assert not list(exceeded([kernel]))
        assert len(list(exceeded([replace(kernel, card="sm_90")]))) == 1

    def test_float32_has_twice_the_instructions(self) -> None:
        """Its logits take twice as long to come; two rows are two logits."""
        from grpo_core.inspect.__main__ import exceeded

        loop = Loop(Counter(FFMA=44), loads=(16,), stores=(16,), special=4, waits=0)
        of_four = self.kernel(loops=[loop], dtype="float32", itemsize=4)
        assert not list(exceeded([of_four]))
        assert of_four.logits(loop) == 4

    def test_a_missing_tool_shows_in_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Figures are then unknown, not 0."""
        from grpo_core.inspect import compile_ahead as ahead
        from grpo_core.inspect.__main__ import kernel_table

        monkeypatch.setattr(ahead, "_output_of", lambda *arguments: None)
        registers, spills, found = ahead.measure({"cubin": b""})
        lines = list(kernel_table([self.kernel(registers=registers, spills=spills, loops=found)]))
        assert lines[-2].split() == ["row_dlogits", "?", "?", "0", "?"]
        assert lines[-1].startswith("?: cuobjdump")

    def test_the_budget_is_that_of_the_notes(self) -> None:
        """19.8 and 10 instructions, 2.5 and 1.25 MUFU, per bfloat16 logit read."""
        from grpo_core.inspect.__main__ import BUDGETS, SPECIAL, figures

        h100, b200 = BUDGETS["sm_90"][1], BUDGETS["sm_100"][1]
        assert 2 * h100 == pytest.approx(19.8, abs=0.05)
        assert 2 * b200 == pytest.approx(10.0, abs=0.05)
        assert 2 * h100 * SPECIAL == pytest.approx(2.5, abs=0.05)
        assert 2 * b200 * SPECIAL == pytest.approx(1.25, abs=0.01)
        kernel = self.kernel()
        cost = figures(kernel, kernel.loops[0])
        assert cost["issue_share"] == pytest.approx(40 / 8 / 19.8, rel=5e-3)
        assert cost["special_share"] == pytest.approx(1 / 2.47, rel=5e-3)


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-m", "grpo_core.inspect", "h100"], "expected a name such as sm_90"),
        (
            ["-m", "grpo_core.inspect", "--dtype", "int8"],
            "--dtype: expected one of bfloat16, float16, float32",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], complaint: str) -> None:
    done = uninterpreted(*arguments)
    assert done.returncode == 2 and complaint in done.stderr


@needs_triton
def test_an_interpreting_process_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from grpo_core.inspect.__main__ import main

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit):
        main(["sm_90"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_the_module_does_not_hide_pythons_own() -> None:
    """A module called `inspect` in a package is harmless as long as imports are absolute."""
    import inspect

    assert Path(inspect.__file__).parent.name != "grpo_core"
