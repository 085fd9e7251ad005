"""Compiles the kernels that a call would launch, for a card that is not here.

The public functions are called on a few rows of zeros while everything that asks is told that the
card is present. Each launch on the way compiles its kernel as it would there, with the same types,
alignments, constants and warps, and then does not run. So the layout is the one that a model's
vocabulary and dtype give, and no list of signatures has to be kept here.
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
from grpo_core.inspect.sass import amdgcn, sass
from grpo_core.loss.fused_loss import fused_loss, token_logp
from grpo_core.objective.advantage import group_advantages
from grpo_core.objective.objective import KL, Objective
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.recipes import RECIPES, dppo_kl

# registers, spills and loops; None is unknown
Figures = tuple[int | None, int | None, list[Loop] | None]


class Launch(NamedTuple):
    """A kernel, what it was launched with, and what Triton compiled."""

    kernel: JITFunction
    keywords: dict[str, Any]
    compiled: Any


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel; None where a tool to find out is missing.

    Attributes:
        variant: which of the kernel's forms, "" for the plain one.
        constants: the compile-time arguments.
        rows_read: rows of logits that a program reads: two with those of a reference policy.
        registers: 32-bit registers of a thread.
        spills: registers of a thread that live in memory instead; on AMD vector registers.
        shared: bytes of shared memory of a program.
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
        """Logits of one thread and iteration: those it writes, if any, else those it reads."""
        bytes_of_one = self.itemsize * (1 if loop.stores else self.rows_read)
        return sum(loop.stores or loop.loads) / bytes_of_one


def target(card: str) -> GPUTarget:
    """What Triton calls a card: sm_90 or gfx942.

    Raises:
        ValueError: neither of the form sm_NUMBER nor gfxNAME.
    """
    if number := re.fullmatch(r"sm_(\d+)", card):
        return GPUTarget("cuda", int(number[1]), 32)
    if re.fullmatch(r"gfx\w+", card):
        # the data-centre cards compute in wavefronts of 64
        return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)
    raise ValueError(f"card: expected a name such as sm_90 or gfx942, got {card!r}")


def must_compile() -> None:
    """Raises RuntimeError where Triton interprets its kernels: those cannot be compiled."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")


def compile_kernels(
    card: str, dtype: torch.dtype, V: int, every_formula: bool = False
) -> Iterator[Compiled]:
    """Every kernel in its variants, each once.

    Args:
        card: as for `target`.
        dtype, V: of the logits.
        every_formula: every surrogate and every estimator of the KL, not only clip and k3.

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
    """(variant, call) such that together they launch everything."""
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
    )
    for variant, changes in (*variants, *(_formulas() if every_formula else ())):
        for level in (token, sequence, waiting):
            objective = level.replace(**changes)
            yield variant, partial(loss, objective, old_logp=vector)
    yield "on policy", lambda: loss(RECIPES["dapo"])
    yield "no gradient", lambda: loss(token, gradient=False, old_logp=vector)


def _formulas() -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, changes of an objective): every surrogate, and with clip every KL estimator."""
    used = [recipe.surrogate for recipe in RECIPES.values()]
    # the one surrogate that no recipe has
    used.append(dppo_kl(0.05, 0.05))
    surrogates = {surrogate.function: surrogate for surrogate in used}
    for function, surrogate in surrogates.items():
        for kl in get_args(KL) if function.__name__ == "clip" else ("k3",):
            if kl != "exact":
                changes = {"surrogate": surrogate, "kl": kl, "kl_times_ratio": True}
                yield f"{function.__name__} {kl}", changes
    yield "factor", {"factor": PolicyFactor(off_policy_delta=1.0)}
    yield "token clip", {"token_clip": (0.4, 0.4)}
    yield "sequence token", {"ratio_level": "sequence_token"}
    yield "token sum", {"aggregation": "token_sum"}


@contextmanager
def as_if_on(card: str) -> Iterator[list[Launch]]:
    """Within it every launch of any kernel is collected instead of run.

    Raises:
        ValueError, RuntimeError: as `target` and `must_compile`.
    """
    must_compile()
    launches = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, warmup: bool, **keywords: Any) -> Any:
        """Triton's own `run`, told to stop before the launch."""
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
        # what the dispatch and `row_keywords` look at
        patch.object(Tensor, "is_cuda", True),
        patch.object(torch.version, "hip", hip),
        patch("grpo_core.kernels.launch.architecture", lambda device: card),
        triton.knobs.amd.scope(),
    ):
        # four rows are less than the 2 GiB from which on AMD's compiler addresses differently
        triton.knobs.amd.use_buffer_ops = False
        yield launches


def examine(card: str, variant: str, dtype: torch.dtype, V: int, launch: Launch) -> Compiled:
    """Reads what came out."""
    registers, spills, found = measure(launch.compiled.asm)
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
        # vectors of [N] are small beside a vocabulary: their loops are nobody's concern
        loops=found if found is None or "THREADS" in constants else [],
    )


def measure(asm: dict[str, Any]) -> Figures:
    """(registers, spills, loops) of what Triton compiled."""
    return _measure_amd(asm["amdgcn"]) if "amdgcn" in asm else _measure_nvidia(asm["cubin"])


def _measure_nvidia(cubin: bytes) -> Figures:
    """By the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of("cuobjdump", "-res-usage", file.name)
        code = _output_of("nvdisasm", "-c", file.name)
    registers = spills = None
    if usage is not None:
        registers, stack = (
            max(map(int, re.findall(rf"\b{of}:(\d+)", usage))) for of in ("REG", "STACK")
        )
        spills = -(-stack // 4)
    return registers, spills, None if code is None else loops(sass(code))


def _measure_amd(text: str) -> Figures:
    """From the assembly and its metadata."""
    registers, spills = (
        int(found[1]) if (found := re.search(rf"\.{key}:\s+(\d+)", text)) else None
        for key in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spills, loops(amdgcn(text))


def _output_of(tool: str, *arguments: str) -> str | None:
    """What one of Triton's tools prints; None if it is not there."""
    try:
        path = getattr(triton.knobs.nvidia, tool).path
    except RuntimeError:
        return None
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
