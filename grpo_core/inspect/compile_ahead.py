"""Compiles the kernels that the public functions launch, for a GPU that is not present.

The public functions are called on a few rows of zeros while Triton is told that the GPU is present.
Every launch compiles its kernel with the types, alignments, constants and warps that it would have
on that GPU, and does not run it. So no list of signatures is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from grpo_core.inspect.loops import Loop, loops
from grpo_core.inspect.sass import sass
from grpo_core.loss.fused_loss import fused_loss, token_logp
from grpo_core.objective.advantage import group_advantages
from grpo_core.objective.objective import Objective, SampledKL
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.recipes import RECIPES, dppo_kl


class Launch(NamedTuple):
    """A kernel, its arguments, and the result of Triton's compiler."""

    kernel: JITFunction
    keywords: dict[str, Any]
    compiled: Any


@dataclass(frozen=True)
class Compiled:
    """The figures of a compiled kernel; None if a tool to read them is missing.

    Attributes:
        variant: the variant of the kernel, "" for the plain one.
        constants: the compile-time arguments.
        rows_read: rows of logits that a program reads: two with reference logits.
        registers: 32-bit registers per thread; on AMD vector registers.
        spills: registers per thread that are spilled to memory.
        shared: bytes of shared memory per program.
        loops: loops that access global memory; on AMD not read, [].
    """

    card: str
    kernel: str
    variant: str
    dtype: str
    itemsize: int
    vocabulary: int
    constants: dict[str, Any]
    warps: int
    rows_read: int
    registers: int | None
    spills: int | None
    shared: int
    loops: list[Loop] | None

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel}, {self.variant}" if self.variant else self.kernel

    def logits(self, loop: Loop) -> float:
        """Logits per thread and iteration: those written, or else those read."""
        bytes_of_one = self.itemsize * (1 if loop.stores else self.rows_read)
        return sum(loop.stores or loop.loads) / bytes_of_one


def target(card: str) -> GPUTarget:
    """Triton's name of a card such as sm_90 or gfx942.

    Raises:
        ValueError: neither of the form sm_NUMBER nor gfxNAME.
    """
    if number := re.fullmatch(r"sm_(\d+)", card):
        return GPUTarget("cuda", int(number[1]), 32)
    if re.fullmatch(r"gfx\w+", card):
        # data-centre GPUs have wavefronts of 64 threads
        return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)
    raise ValueError(f"card: expected a name such as sm_90 or gfx942, got {card!r}")


def must_compile() -> None:
    """Raises RuntimeError if Triton interprets kernels instead of compiling them."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")


def compile_kernels(
    card: str, dtype: torch.dtype, V: int, every_formula: bool = False
) -> Iterator[Compiled]:
    """Compiles every kernel in its variants, each once.

    Args:
        card: as for `target`.
        dtype, V: of the logits.
        every_formula: all surrogates and KL estimators, not only clip and k3.

    Raises:
        ValueError, RuntimeError: as `target` and `must_compile`.
    """
    seen: list[Any] = []
    for variant, call in _calls(dtype, V, every_formula):
        with as_if_on(card) as launches:
            call()
        for launch in launches:
            if not any(launch.compiled is other for other in seen):
                seen.append(launch.compiled)
                yield examine(card, variant, dtype, V, launch)


def _calls(
    dtype: torch.dtype, V: int, every_formula: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call) pairs that together launch every kernel."""
    logits = torch.zeros(4, V, dtype=dtype)
    index = torch.zeros(4, dtype=torch.int64)
    vector = torch.zeros(4)

    def loss(objective: Objective, gradient: bool = True, **given: Any) -> None:
        """Forward and backward of four tokens of one sequence."""
        if objective.kl:
            given |= {"ref_logits": logits} if objective.kl == "exact" else {"ref_logp": vector}
        out = fused_loss(
            logits.clone().requires_grad_(gradient),
            index,
            objective=objective,
            advantage=vector,
            sequence_id=index,
            **given,
        )
        if gradient:
            out.loss.backward()

    token, sequence = RECIPES["grpo"], RECIPES["gspo"].replace(kl="k3", beta=0.04)
    waiting = token.replace(factor=PolicyFactor(off_policy_delta=1.0))
    yield "", lambda: token_logp(logits, index)
    yield "", lambda: group_advantages(vector, 2)
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        ("entropy", {"entropy_coef": 0.01}),
        ("exact KL", {"kl": "exact"}),
        ("exact KL, entropy", {"kl": "exact", "entropy_coef": 0.01}),
        ("forward KL", {"kl": "exact", "interpolation": 0.0, "entropy_coef": 0.01}),
        ("Jensen-Shannon", {"kl": "exact", "interpolation": 0.5, "entropy_coef": 0.01}),
    )
    for variant, changes in (*variants, *(_formulas() if every_formula else ())):
        for level in (token, sequence, waiting):
            objective = level.replace(**changes)
            yield variant, partial(loss, objective, old_logp=vector)
    yield "on policy", lambda: loss(RECIPES["dapo"])
    yield "no gradient", lambda: loss(token, gradient=False, old_logp=vector)


def _formulas() -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, changes of an objective): every surrogate, and every KL estimator with clip."""
    used = [recipe.surrogate for recipe in RECIPES.values()]
    # the only surrogate that no recipe uses
    used.append(dppo_kl(0.05, 0.05))
    surrogates = {surrogate.function: surrogate for surrogate in used}
    for function, surrogate in surrogates.items():
        for kl in get_args(SampledKL) if function.__name__ == "clip" else ("k3",):
            changes = {"surrogate": surrogate, "kl": kl, "kl_times_ratio": True}
            yield f"{function.__name__} {kl}", changes
    yield "factor", {"factor": PolicyFactor(off_policy_delta=1.0)}
    yield "token clip", {"token_clip": (0.4, 0.4)}
    yield "sequence token", {"ratio_level": "sequence_token"}
    yield "token sum", {"aggregation": "token_sum"}


@contextmanager
def as_if_on(card: str) -> Iterator[list[Launch]]:
    """Collects the launches of all kernels, compiled for a card, instead of running them.

    Raises:
        ValueError, RuntimeError: as `target` and `must_compile`.
    """
    must_compile()
    launches = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, warmup: bool, **keywords: Any) -> Any:
        """Triton's `run`, which with `warmup` stops before the launch."""
        compiled = run(kernel, *args, warmup=True, **keywords)
        launches.append(Launch(kernel, keywords, compiled))
        return compiled

    there = target(card)
    device = SimpleNamespace(
        get_current_device=lambda: card,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: there,
    )
    hip = "ahead of time" if there.backend == "hip" else None
    with (
        patch.object(driver, "_active", device),
        patch.object(JITFunction, "run", compile_only),
        # read by `choose_backend` and `row_layout`
        patch.object(Tensor, "is_cuda", True),
        patch.object(torch.version, "hip", hip),
        patch("grpo_core.kernels.launch.architecture", lambda device: card),
        triton.knobs.amd.scope(),
    ):
        # AMD's compiler addresses tensors of 2 GiB and more differently
        triton.knobs.amd.use_buffer_ops = False
        yield launches


def examine(card: str, variant: str, dtype: torch.dtype, V: int, launch: Launch) -> Compiled:
    """Reads the figures of a launch."""
    registers, spills, code = measure(launch.compiled.asm)
    given = launch.keywords
    constants = {p.name: given[p.name] for p in launch.kernel.params if p.is_constexpr}
    read = ("logits_ptr", "ref_logits_ptr")
    return Compiled(
        card=card,
        kernel=launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        variant=variant,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        vocabulary=V,
        constants={name: getattr(value, "__name__", value) for name, value in constants.items()},
        warps=launch.compiled.metadata.num_warps,
        rows_read=sum(given.get(name) is not None for name in read),
        registers=registers,
        spills=spills,
        shared=launch.compiled.metadata.shared,
        # loops of kernels over vectors [N] do not matter
        loops=code if code is None or "THREADS" in constants else [],
    )


def measure(asm: dict[str, Any]) -> tuple[int | None, int | None, list[Loop] | None]:
    """(registers, spills, loops) of a compiled kernel; None if unknown."""
    if "amdgcn" in asm:
        registers, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", asm["amdgcn"])[0])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, spills, []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output_of("cuobjdump", "-res-usage", file.name)
        code = _output_of("nvdisasm", "-c", file.name)
    found = None if code is None else loops(sass(code))
    if usage is None:
        return None, None, found
    registers, stack = (
        max(map(int, re.findall(rf"\b{key}:(\d+)", usage))) for key in ("REG", "STACK")
    )
    return registers, -(-stack // 4), found


def _output_of(tool: str, *arguments: str) -> str | None:
    """The output of a tool of Triton; None if it is missing."""
    try:
        path = getattr(triton.knobs.nvidia, tool).path
    except RuntimeError:
        return None
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
