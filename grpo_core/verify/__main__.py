"""Checks the kernels on this machine: python -m grpo_core.verify."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo_core.cli.command import exit_on_interrupt, interruptible
from grpo_core.cli.options import RECIPE_NAMES, Parser, new_file, vocabulary

# the names in `inputs.OBJECTIVES` and `report.DTYPES`, without importing torch
OBJECTIVES = (*RECIPE_NAMES, "exact KL", "entropy bonus", "exact KL, entropy", "sampler")
DTYPES = ("float32", "bfloat16", "float16")


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the checks, prints the report.

    Returns:
        The exit status: 0 if all checks pass, else 1.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    with exit_on_interrupt():
        import torch

        from grpo_core.backends import choose_backend, default_backend
        from grpo_core.verify.checks import Setup, verify
        from grpo_core.verify.inputs import SIZES, one_per_plan
        from grpo_core.verify.report import LEGEND, report_lines

    on_gpu = torch.cuda.is_available() and options.backend in (None, "triton")
    device = "cuda" if on_gpu else "cpu"
    try:
        backend = options.backend or default_backend(device)
        choose_backend(backend, torch.empty(0, device=device))
    except (NotImplementedError, ValueError) as error:
        parser.error(str(error))
    is_interpreted = backend == "triton" and _interpret()
    sizes = SIZES["interpreted" if is_interpreted else device]
    recipes = options.recipe or list(OBJECTIVES)
    if options.quick:
        recipes = one_per_plan(recipes)
    vocabularies = options.vocabulary or sizes.vocabularies[: 1 if options.quick else None]
    sizes = replace(sizes, vocabularies=tuple(vocabularies))
    dtypes = [getattr(torch, name) for name in DTYPES if options.dtype in (None, name)]

    where = torch.cuda.get_device_name() if on_gpu else f"CPU (threads: {torch.get_num_threads()})"
    modules = [name for name in ("grpo_core", "torch", "triton", "numba") if name in sys.modules]
    versions = {name: sys.modules[name].__version__ for name in modules}
    what = "Triton kernels, interpreted with a GPU's rounding" if is_interpreted else backend
    print(f"{what} on {where}; " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    print(f"{len(recipes)} recipes and variants, V = {', '.join(f'{V:,}' for V in vocabularies)}")
    print(f"\n{LEGEND}", flush=True)
    start = time.perf_counter()
    checks = list(verify(Setup(backend, device, sizes), recipes, dtypes))
    seconds = time.perf_counter() - start
    print("\n".join(report_lines(checks)))
    failures = sum(not check.ok for check in checks)
    verdict = f"{failures} FAILED" if failures else "all ok"
    place = where + ", interpreted" * is_interpreted
    print(f"{len(checks):,} comparisons in {seconds:.1f} s on {place}: {verdict}")
    if options.json:
        facts: dict[str, Any] = {"backend": backend, "device": where, "interpreted": is_interpreted}
        facts |= versions | {"seconds": round(seconds, 1), "failures": failures}
        facts["checks"] = [check.as_json() for check in checks]
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if failures else 0


def _parser() -> Parser:
    parser = Parser(
        "grpo_core.verify",
        description="Checks every plan, recipe and dtype on this machine against float64.",
        epilog="Exit status: 0 if all checks pass, else 1.",
    )
    add = parser.add_argument
    add("--backend", metavar="NAME", help="triton, cpu or torch (default: that of the device)")
    add(
        "--recipe",
        nargs="+",
        metavar="NAME",
        choices=OBJECTIVES,
        help=f"any of {', '.join(map(shlex.quote, OBJECTIVES))} (default: all)",
    )
    add("--dtype", choices=DTYPES, help="dtype of the logits (default: all)")
    add(
        "--vocabulary",
        nargs="+",
        type=vocabulary,
        metavar="V",
        help="vocabulary sizes: all recipes with the first, one recipe per plan with the others",
    )
    add("--json", type=new_file, metavar="FILE", help="write every comparison to FILE")
    add("--quick", action="store_true", help="only one recipe per plan and the first vocabulary")
    return parser


def _interpret() -> bool:
    """Whether Triton interprets kernels; if so, makes it round as a GPU does."""
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    from grpo_core.verify.interpreter import prepare_interpreter

    prepare_interpreter()
    return True


if __name__ == "__main__":
    sys.exit(main())
