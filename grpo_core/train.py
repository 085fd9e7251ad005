"""`python -m grpo_core.train`: the embedded run, from a base model to R1-Zero and R1."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from grpo_core.checkpoint import Interrupted, heeding_interrupts
from grpo_core.demo import Demo, DemoConfig
from grpo_core.options import begin, check_unchanged, read_resumed
from grpo_core.plot import plot
from grpo_core.report import markdown, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser, config = begin(DemoConfig, "grpo_core.train", arguments)

    start = time.perf_counter()
    try:
        demo = Demo(config)
        save_config(config, demo.directory)
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


def save_config(config: DemoConfig, directory: Path) -> None:
    """config.json: the options as resolved, and what they ran on.

    Raises:
        ValueError: with --resume, another option than the interrupted run had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config.resume:
        file = directory / "config.json"
        shown = ("resume", "threads", "plot", "console", "output")
        check_unchanged(asdict(config), read_resumed(file)["options"], file, shown)
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    record = {"options": asdict(config), "environment": environment}
    (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def draw(directory: Path) -> None:
    """curves.png, unless matplotlib is missing: then a line that says how to get it."""
    try:
        plot(directory)
    except ModuleNotFoundError as error:
        print(f"no curves.png, since {error.name} is missing: pip install {error.name}")


if __name__ == "__main__":
    sys.exit(main())
