"""`python -m grpo_core.compare`: DPO, PPO and GRPO on the same task, from the same base, measured.

Reads the options and writes the result; see `comparison`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from grpo_core.cli.options import begin, prepare
from grpo_core.runs.run_config import CompareConfig, clear


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    _, config = begin(CompareConfig, "grpo_core.compare", arguments)
    prepare(f"all methods, {config.seeds} seeds each, in {config.output}/", config.threads)
    from grpo_core.runs.comparison import Comparison, lines, markdown
    from grpo_core.trainer.checkpoint import heeding_interrupts

    directory = Path(config.output)
    clear(directory)
    try:
        with heeding_interrupts():
            outcomes = [
                outcome
                for seed in range(config.seeds)
                for outcome in Comparison(config, seed).run()
            ]
    except (FloatingPointError, OSError, ValueError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the base models are kept", file=sys.stderr)
        return 128 + signal.SIGINT
    text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2)
    (directory / "compare.json").write_text(text + "\n", "utf-8")
    (directory / "compare.md").write_text(markdown(outcomes), "utf-8")
    print("\n".join(lines(outcomes)))
    if config.plot:
        try:
            from grpo_core.runs.compare_plot import plot

            plot(outcomes, directory / "compare.png")
        except ModuleNotFoundError as error:
            print(f"no compare.png, since {error.name} is missing: pip install {error.name}")
    print(f"all of it in {directory}/")
    return 0
