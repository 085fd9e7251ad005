"""Compiles every kernel for cards that are not here and prints what came out, as JSON lines.

Run as a script, without the interpreter: `python -m tests.aot ARCHITECTURE...`. Registers, spills,
load widths and the instructions of the hot loop are read from the machine code by the tools that
come with Triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_core.kernels import kl, surrogates
from grpo_core.kernels.group_norm import _group_norm_kernel
from grpo_core.kernels.row_dlogits import _row_dlogits_kernel
from grpo_core.kernels.row_loss import _row_loss_kernel
from grpo_core.kernels.row_scale import _row_scale_kernel
from grpo_core.kernels.row_stats import _row_stats_kernel
from grpo_core.kernels.token_loss import _token_loss_kernel


def is_formula(value: Any, module: Any) -> bool:
    """Whether a name of a module is a jitted function of its own."""
    return isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SURROGATES = [f for f in vars(surrogates).values() if is_formula(f, surrogates)]
ESTIMATORS = [f for f in vars(kl).values() if is_formula(f, kl) and f is not kl.times_ratio]
POINTERS = {"target_ptr": "*i64", "dropped_ptr": "*i1"}
INTEGERS = {"N", "V", "G", "freedom"}


def signature(kernel: Any, logits: str, constants: dict[str, Any]) -> dict[str, Any]:
    """The type of every argument, as a launch on a GPU would find it."""
    types: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "surrogate_args":
            # the functions of `surrogates` begin with logp, log_ratio, advantage
            types[name] = ("fp32",) * (len(constants["SURROGATE"].arg_names) - 3)
        elif name.endswith("logits_ptr"):
            types[name] = f"*{logits}"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        elif name in INTEGERS or name.endswith("rows_per_batch"):
            types[name] = "i32"
        else:
            types[name] = "i64" if name.endswith("_stride") else "fp32"
    return types


def cases(lanes: int) -> Iterator[tuple[str, Any, str, dict[str, Any], int]]:
    """(name, kernel, dtype, constants, warps) of every kernel in its variants."""
    layouts = [
        ("bf16", 8, True, 4),
        ("bf16", 8, True, 8),
        ("bf16", 8, False, 8),
        ("fp32", 4, True, 8),
        ("fp32", 4, False, 8),
    ]
    terms = {"SURROGATE": surrogates.clip, "KL": kl.k3, "KL_TIMES_RATIO": True}
    without = {"old_logp_ptr": None, "ref_logp_ptr": None, "dlogits_ptr": None}
    sampled = {"ref_logits_ptr": None}
    exact = {"KL": None, "KL_TIMES_RATIO": False, "ref_logp_ptr": None}
    no_entropy = {"entropy_weight_ptr": None, "factor_ptr": None}
    for logits, width, vector, warps in layouts:
        shape = {
            "THREADS": 32 * warps,
            "WIDTH": width,
            "VECTOR": vector,
            "TILES": 4 if vector else 2,
            "ALIGNMENT": width if vector else 1,
        }
        tag = f"{logits}-{'vector' if vector else 'odd'}-{warps}"
        warps = 32 * warps // lanes
        yield f"row_scale-{tag}", _row_scale_kernel, logits, shape, warps
        with_kl = shape | sampled | {"dkl_ptr": None, "kl_ptr": None}
        for kernel, name, constants in (
            (_row_stats_kernel, "row_stats", shape | sampled | {"kl_ptr": None}),
            (_row_stats_kernel, "row_stats_exact_kl", shape),
            (_row_dlogits_kernel, "row_dlogits", with_kl),
            (_row_dlogits_kernel, "row_dlogits_exact_kl", shape),
            (_row_loss_kernel, "row_loss", shape | sampled | terms),
            (_row_loss_kernel, "row_loss_exact_kl", shape | terms | exact),
            (_row_loss_kernel, "row_loss_plain", shape | sampled | terms | no_entropy),
            (_row_loss_kernel, "row_loss_only", shape | sampled | terms | without),
        ):
            yield f"{name}-{tag}", kernel, logits, constants, warps
    layout = {"THREADS": 128, "WIDTH": 8, "VECTOR": True, "TILES": 4, "ALIGNMENT": 8}
    for surrogate in SURROGATES:
        of_row = layout | sampled | terms | no_entropy | {"SURROGATE": surrogate}
        yield f"row_loss_of-{surrogate.fn.__name__}", _row_loss_kernel, "bf16", of_row, 128 // lanes
        for estimator in ESTIMATORS if surrogate is surrogates.clip else (kl.k3,):
            of_one = terms | {
                "exact_kl_ptr": None,
                "BLOCK": 256,
                "SURROGATE": surrogate,
                "KL": estimator,
            }
            name = f"token_loss-{surrogate.fn.__name__}-{estimator.fn.__name__}"
            yield name, _token_loss_kernel, "", of_one, 4
    bare = {**terms, "BLOCK": 256, "KL": None, "ref_logp_ptr": None}
    yield "token_loss-without-kl", _token_loss_kernel, "", bare, 4
    yield "group_norm", _group_norm_kernel, "", {"SCALE": True, "BLOCK_G": 16}, 4


def hot_loops(sass: str) -> list[list[str]]:
    """Instructions of every loop: what lies between a label and a jump back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(code.group(1).strip())
            jump = re.search(r"BRA.*?(\.L_x_\d+)", instructions[-1])
            if jump and jump.group(1) in labels:
                loops.append((labels[jump.group(1)], len(instructions)))
    proper = [loop for loop in loops if loop[1] - loop[0] > 4]
    return [instructions[a:b] for a, b in proper]


def nvidia_report(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and what the loops are made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    loops = hot_loops(sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
        + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "loads": [sorted({m for i in loop for m in re.findall(r"LDG\S*", i)}) for loop in loops],
        "barriers": sum(len(re.findall(r"BAR\.|SHFL", i)) for loop in loops for i in loop),
        "loop_lengths": [len(loop) for loop in loops],
    }


def amd_report(assembly: str) -> dict[str, Any]:
    """Registers and spills from the metadata of the code object."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]

    return {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count")}


def compile_for(architecture: str) -> Iterator[dict[str, Any]]:
    """One report per kernel variant."""
    target = TARGETS[architecture]
    for name, kernel, logits, constants, warps in cases(target.warp_size):
        types = signature(kernel, logits, constants)
        positions = {name: (index,) for index, name in enumerate(kernel.arg_names)}
        # as at a launch: only the logits' pointers are specialised on alignment
        aligned = {
            p: [["tt.divisibility", 16]] for n, p in positions.items() if n.endswith("logits_ptr")
        }
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs={positions[n]: value for n, value in constants.items()},
            attrs={p: a for p, a in aligned.items() if kernel.arg_names[p[0]] not in constants},
        )
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        report = (
            amd_report(compiled.asm["amdgcn"])
            if target.backend == "hip"
            else nvidia_report(compiled.asm["cubin"])
        )
        yield {"architecture": architecture, "kernel": name, **report}


if __name__ == "__main__":
    for wanted in sys.argv[1:] or TARGETS:
        for line in compile_for(wanted):
            print(json.dumps(line), flush=True)
