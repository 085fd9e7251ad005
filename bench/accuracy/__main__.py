"""Measures, and writes docs/accuracy.md and its picture: python -m bench.accuracy."""

from __future__ import annotations

import os

# before the first import of a kernel: on every machine the tables are those of the interpreter
os.environ["TRITON_INTERPRET"] = "1"

from bench.accuracy.divergences import measure_divergences
from bench.accuracy.document import DOCUMENT, PICTURE, plot, write
from bench.accuracy.measure import measure
from bench.machine import versions
from grpo_core.cli.options import Parser
from grpo_core.verify.interpreter import prepare_interpreter

# the versions that docs/accuracy.md speaks of
PEERS = {"liger-kernel": "0.8.5", "trl": "1.16.0"}


def main() -> None:
    """Checks that the peers are there, measures, writes."""
    Parser("bench.accuracy", description=__doc__).parse_args()
    for name, wanted in PEERS.items():
        if (found := versions()[name]) != wanted:
            raise SystemExit(
                f"{name}: expected {wanted}, got {found}: pip install {name}=={wanted}"
            )
    prepare_interpreter()
    measured = [*measure(), *measure_divergences()]
    write(measured)
    plot(measured)
    print(f"wrote {DOCUMENT} and {PICTURE}")


if __name__ == "__main__":
    main()
