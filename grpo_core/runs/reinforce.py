"""`python -m grpo_core.reinforce`: reinforcement learning of a model of yours on prompts of yours.

    python -m grpo_core.reinforce --model Qwen/Qwen3-0.6B --data train.jsonl --rewards math format
    python -m grpo_core.reinforce run.yaml

Reads the options; the run itself is in `run`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from traceback import format_exception

from grpo_core.cli.options import Parser, begin, prepare
from grpo_core.runs.run_config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status."""
    parser, config = begin(RunConfig, "grpo_core.reinforce", arguments)
    prepare(f"{config.model} on {config.data}, in {config.output}/", config.threads)
    from grpo_core.trainer.checkpoint import heeding_interrupts
    from grpo_core.trainer.distributed import process_group

    with process_group(), heeding_interrupts():
        return _run(parser, config)


def _run(parser: Parser, config: RunConfig) -> int:
    """Trains; returns the exit status."""
    from grpo_core.runs.run import Run
    from grpo_core.trainer.checkpoint import Interrupted
    from grpo_core.trainer.rewards import RewardError

    try:
        run = Run(config)
    except (OSError, ValueError, ImportError) as error:
        if trace := _traceback(error):
            _say(trace)
        parser.error(str(error))
    try:
        run.train()
    except (FloatingPointError, RewardError) as error:
        _say(f"\nstopped: {error}{_traceback(error)}")
        return 1
    except OSError as error:
        # of this process alone: others may wait for it, so that the group has to stay open
        raise SystemExit(f"\nstopped: {error}") from error
    except (Interrupted, KeyboardInterrupt) as stop:
        _say("\ninterrupted; the same command with --resume True goes on")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    return 0


def _say(line: str) -> None:
    """A line on standard error, once however many processes there are."""
    from grpo_core.trainer.distributed import is_main

    if is_main():
        print(line, file=sys.stderr)


def _traceback(error: Exception) -> str:
    """The traceback of what a reward function raised, without our call of it; else ""."""
    from grpo_core.trainer.rewards import RewardError

    cause = error.__cause__ if isinstance(error, RewardError) else None
    if cause is None:
        return ""
    cause = cause.with_traceback(cause.__traceback__ and cause.__traceback__.tb_next)
    return "\n" + "".join(format_exception(cause))
