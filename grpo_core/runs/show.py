"""`python -m grpo_core.show RUN`: the live console of a run, drawn from its files.

RUN is the directory of a run of `grpo_core.reinforce` or `grpo_core.train`, which may still be
training. `--svg FILE` makes a picture of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_core.cli.command import interruptible
from grpo_core.cli.options import Parser, check_package, new_file
from grpo_core.runs.directory import read_metrics, run_with_metrics

if TYPE_CHECKING:
    from grpo_core.runs.console import Live


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Draws it; returns the exit status."""
    parser = Parser("grpo_core.show", description="Shows a run from its files.")
    parser.add_argument("run", type=run_with_metrics, help="run directory")
    parser.add_argument("--stage", help="stage of the run; default: the last")
    parser.add_argument("--svg", type=new_file, help="picture to write, 80 columns wide")
    options = parser.parse_args(arguments)
    histories, _ = read_metrics(options.run)
    stage = options.stage or next(reversed(histories), "")
    try:
        check_package("show", "rich")
        if stage not in histories:
            raise ValueError(f"stage: expected one of {list(histories)}, got {stage!r}")
        from rich.console import Console as Terminal

        from grpo_core.runs.console import Live

        picture = Terminal(
            highlight=False, record=True, width=80, force_terminal=True, color_system="truecolor"
        )
        live = Live(picture if options.svg else None, moving=False)
        replay(live, options.run, stage)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    live.terminal.print(live.frame(whole=True))
    if options.svg:
        drawn = live.terminal.export_svg(title=f"{stage} in {options.run}")
        # system fonts, so that a viewer downloads nothing
        drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
        options.svg.write_text(drawn, "utf-8")
    return 0


def replay(live: Live, run: Path, stage: str) -> None:
    """Gives a console what the trainer would have given it."""
    from grpo_core.objective.recipes import RECIPES
    from grpo_core.trainer.config import TrainerConfig
    from grpo_core.trainer.samples import Sample

    history = read_metrics(run)[0][stage]
    options = json.loads((run / "config.json").read_text("utf-8"))
    steps = options.get("options", options)["steps"]
    with_kl = RECIPES["grpo"].replace(beta=1.0, kl="k3")
    objective = with_kl if any(record.get("kl") for record in history) else RECIPES["dapo"]
    live.begin(stage, 0, TrainerConfig(objective=objective, steps=steps))
    file = run / "samples.jsonl"
    kept = map(json.loads, file.read_text("utf-8").splitlines() if file.exists() else ())
    samples = [Sample(**record) for record in kept if record.pop("stage") == stage]
    parts = list(samples[-1].parts) if samples else []
    for record in history:
        live.step(record, parts, ())
        for message in record.get("warnings", ()):
            live.note(message)
    live.samples = [sample for sample in samples if sample.step == samples[-1].step]
    live.start = time.monotonic() - sum(sum(each.get("seconds", {}).values()) for each in history)
