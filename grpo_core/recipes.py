"""The table of methods: `python -m grpo_core.recipes [--frameworks | --markdown]`."""

from __future__ import annotations

from grpo_core.cli.options import Parser


def main() -> int:
    """Parses the command line and prints; returns the exit status."""
    parser = Parser(
        "grpo_core.recipes",
        description="The published methods: formula, KL, ratio, advantage and aggregation.",
        epilog="r = π/π_old, d = log r, p = π(y), q = π_old(y), A advantage, sg stop-gradient. "
        "More: docs/objectives.md.",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--frameworks", action="store_true", help="add the equivalent options of TRL and verl"
    )
    choice.add_argument("--markdown", action="store_true", help="as docs/objectives.md shows it")
    given = parser.parse_args()
    from grpo_core.objective.catalogue import as_markdown, as_text

    print(as_markdown() if given.markdown else as_text(frameworks=given.frameworks))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
