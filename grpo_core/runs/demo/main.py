"""`python -m grpo_core.train`: the embedded run, from a base model to R1-Zero and R1."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grpo_core.cli.options import begin, prepare
from grpo_core.runs.run_config import DemoConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser, config = begin(DemoConfig, "grpo_core.train", arguments)
    start = time.perf_counter()
    way = {"zero": "R1-Zero", "r1": "SFT and R1", "both": "R1-Zero, SFT and R1"}[config.stages]
    prepare(f"{way} from a base model, in {config.output}/", config.threads)
    import torch

    from grpo_core.runs.demo.demo import Demo
    from grpo_core.runs.demo.report import markdown, show
    from grpo_core.trainer.checkpoint import Interrupted, heeding_interrupts

    try:
        demo = Demo(config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        with heeding_interrupts():
            stages = demo.run()
    except (FloatingPointError, OSError, ValueError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted) as stop:
        print(
            f"\ninterrupted; what was finished lies in {demo.directory}/, and the same command "
            "with --resume True goes on from there",
            file=sys.stderr,
        )
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    (demo.directory / "report.md").write_text(markdown(stages), "utf-8")
    show(stages)
    if config.plot:
        draw(demo.directory)
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s on {torch.get_num_threads()} threads; all of it in {demo.directory}/")
    return 0


def draw(directory: Path) -> None:
    """curves.png, unless matplotlib is missing: then a line that says how to get it."""
    from grpo_core.runs.plot import plot

    try:
        plot(directory)
    except ModuleNotFoundError as error:
        print(f"no curves.png, since {error.name} is missing: pip install {error.name}")
