"""`python -m grpo_core.show RUN`: what the live console of a run looks like, from its files.

For runs that go on somewhere else, or went on last week; RUN is the directory of a run of
`grpo_core.reinforce` or `grpo_core.train`. `--svg FILE` makes a picture of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.cli.options import Parser, check_package, new_file, run_with_metrics
from grpo_core.runs.plot import Run

if TYPE_CHECKING:
    from grpo_core.runs.console_rich import Live
    from grpo_core.trainer.samples import Sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws it; returns the exit status."""
    parser = Parser("grpo_core.show", description="Shows a run from its files.")
    parser.add_argument("run", type=run_with_metrics, help="run directory")
    parser.add_argument("--stage", help="stage of the run; default: the last")
    parser.add_argument("--svg", type=new_file, help="picture to write, 80 columns wide")
    options = parser.parse_args(arguments)
    try:
        check_package("show", "rich")
        find_stage(options.run, options.stage)
        from rich.console import Console as Terminal

        from grpo_core.runs.console_rich import Live

        picture = Terminal(
            highlight=False, record=True, width=80, force_terminal=True, color_system="truecolor"
        )
        live = Live(picture if options.svg else Terminal(highlight=False))
        replay(live, options.run, options.stage)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    live.terminal.print(live.frame(whole=True))
    if options.svg:
        drawn = live.terminal.export_svg(title=f"{live.label} in {options.run}")
        # with fonts that are there: nothing is fetched to look at it
        drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
        options.svg.write_text(drawn, "utf-8")
    return 0


def replay(live: Live, run: Path, stage: str | None = None) -> None:
    """Tells a console what it would have been told.

    Raises:
        FileNotFoundError, ValueError: no run, or no such stage in it.
    """
    from grpo_core.objective.recipes import RECIPES
    from grpo_core.trainer.config import TrainerConfig

    stage, history = find_stage(run, stage)
    options = json.loads((run / "config.json").read_text("utf-8"))
    steps = options.get("options", options)["steps"]
    with_kl = RECIPES["grpo"].replace(beta=1.0, kl="k3")
    objective = with_kl if any(record.get("kl") for record in history) else RECIPES["dapo"]
    live.prepare(stage, 0, TrainerConfig(objective=objective, steps=steps))
    samples = list(_samples(run / "samples.jsonl", stage))
    parts = list(samples[-1].parts) if samples else []
    for record in history:
        live.take(record, parts, ())
        for message in record.get("warnings", ()):
            live.note(message)
    live.samples = [sample for sample in samples if sample.step == samples[-1].step]
    taken = sum(sum(record.get("seconds", {}).values()) for record in history)
    live.start = time.monotonic() - taken


def find_stage(run: Path, stage: str | None) -> tuple[str, list[dict[str, Any]]]:
    """A stage's name and records; the last one's for None.

    Raises:
        FileNotFoundError, ValueError: no run, or no such stage in it.
    """
    histories = Run.read(run / "metrics.jsonl").histories
    if not histories or (stage or next(reversed(histories))) not in histories:
        raise ValueError(f"stage: expected one of {list(histories)}, got {stage!r}")
    stage = stage or next(reversed(histories))
    return stage, histories[stage]


def _samples(path: Path, stage: str) -> Iterator[Sample]:
    """What is kept of a stage's samples."""
    from grpo_core.trainer.samples import Sample

    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        record: dict[str, Any] = json.loads(line)
        if record.pop("stage") == stage:
            yield Sample(**record)
