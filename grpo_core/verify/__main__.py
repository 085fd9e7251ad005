"""Verifies the kernels on this machine: python -m grpo_core.verify."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo_core.cli.options import RECIPE_NAMES, Parser, new_file, vocabulary

# those of `backends.Backend`, `inputs.OBJECTIVES` and `table.DTYPES`
BACKENDS = ("triton", "torch")
OBJECTIVES = (*RECIPE_NAMES, "exact KL", "entropy bonus", "exact KL, entropy", "sampler")
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, compares, prints.

    Returns:
        The exit status: 0 if everything is right, 1 if anything is not.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    import torch

    from grpo_core.backends import Backend, choose_backend
    from grpo_core.verify import verify
    from grpo_core.verify.inputs import SIZES, one_per_plan
    from grpo_core.verify.table import LEGEND, summary, table

    backend: Backend = given.backend or ("triton" if torch.cuda.is_available() else "torch")
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    try:
        choose_backend(backend, torch.empty(0, device=device))
    except NotImplementedError as cannot:
        parser.error(
            f"backend: {cannot}; without a GPU the kernels can be interpreted, slowly: "
            "TRITON_INTERPRET=1 python -m grpo_core.verify --backend triton"
        )
    interpreted = backend == "triton" and _interpret()
    sizes = SIZES["interpreted" if interpreted else backend]
    recipes = given.recipe or list(OBJECTIVES)
    if given.quick:
        recipes = one_per_plan(recipes)
    vocabularies = given.vocabulary or sizes.vocabularies[: 1 if given.quick else None]
    sizes = replace(sizes, vocabularies=tuple(vocabularies))
    dtypes = [getattr(torch, name) for name in DTYPES if given.dtype in (None, name)]
    where = _device_name(device)
    print(_title(backend, where, interpreted))
    print(f"{len(recipes)} recipes and variants, V = {', '.join(f'{V:,}' for V in vocabularies)}")
    print(f"\n{LEGEND}")
    sys.stdout.flush()
    report = verify(recipes, dtypes, backend=backend, device=device, sizes=sizes)
    print("\n".join(table(report)))
    print(summary(report, where + ", interpreted" * interpreted))
    if given.json:
        facts = {"backend": backend, "device": where, "interpreted": interpreted} | _versions()
        given.json.write_text(json.dumps(facts | report.as_json(), indent=1) + "\n")
    return 1 if report.failures else 0


def _parser() -> Parser:
    parser = Parser(
        "grpo_core.verify",
        description="Every plan, recipe and dtype against float64, on this machine.",
        epilog="Exit status: 0 if everything is right, 1 if anything is not.",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="what computes (default: triton on a GPU, else torch)",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        metavar="NAME",
        choices=OBJECTIVES,
        help=f"any of {', '.join(map(repr, OBJECTIVES))} (default: all)".replace("'", ""),
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the logits (default: all)")
    parser.add_argument(
        "--vocabulary",
        nargs="+",
        type=vocabulary,
        metavar="V",
        help="all recipes over the first, one of every plan over the others",
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write every comparison there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one recipe of every plan, the first vocabulary"
    )
    return parser


def _interpret() -> bool:
    """Whether Triton interprets; then it is made to round as a GPU does."""
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    from grpo_core.verify.interpreter_rounding import round_as_hardware_does

    round_as_hardware_does()
    # numpy reports what IEEE arithmetic defines
    warnings.filterwarnings("ignore", ".*encountered in.*", RuntimeWarning, "triton")
    return True


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)})"


def _versions() -> dict[str, Any]:
    versions = {name: sys.modules[name].__version__ for name in ("grpo_core", "torch")}
    if "triton" in sys.modules:
        versions["triton"] = sys.modules["triton"].__version__
    return versions


def _title(backend: str, where: str, interpreted: bool) -> str:
    how = "Triton kernels, interpreted with a GPU's rounding" if interpreted else backend
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return f"{how} on {where}; {versions}"


if __name__ == "__main__":
    sys.exit(main())
