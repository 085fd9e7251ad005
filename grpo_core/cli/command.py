"""How a command starts: options first, then the imports that take seconds, then the work."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from grpo_core.cli.options import Parser, add_options, is_first_process, read_yaml

P = ParamSpec("P")
# how often libgomp's threads look for work before they sleep; its own default is 300,000. On idle
# cores both are as fast; beside another process this one is, see docs/training.md
SPIN_COUNT = 10_000


def interruptible(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` that ends with one line and status 130 on Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            return report_interrupt()

    return wrapped


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Within it Ctrl-C ends the process at once.

    For imports: some packages turn a KeyboardInterrupt into an ImportError.
    """
    before = signal.getsignal(signal.SIGINT)
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread or before is not signal.default_int_handler:
        # nothing to set, or ignored or handled by the caller
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(report_interrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def report_interrupt() -> int:
    """Prints one line in the first process; returns the exit status of a shell for Ctrl-C."""
    if is_first_process():
        print("\ninterrupted", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def training_command(name: str, kind: type, module: str) -> Callable[..., int]:
    """The `main(arguments=None)` of a command that trains; a wrong option is one line.

    The first argument may be a YAML file; options on the command line override it.

    Args:
        name: of the module behind `python -m`.
        kind: dataclass of the options, with `check_here`, which raises for what this machine
            lacks.
        module: imported when the options are right; its `run(config, parser)` does the work and
            returns the exit status.
    """

    @interruptible
    def main(arguments: Sequence[str] | None = None) -> int:
        parser = Parser(
            name,
            usage=f"python -m {name} [run.yaml] [--option value ...]",
            description=(kind.__doc__ or "").partition("\n")[0],
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        )
        add_options(parser, kind)
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            if given and given[0].endswith((".yaml", ".yml")):
                given = [*read_yaml(Path(given[0])), *given[1:]]
            config = kind(**vars(parser.parse_args(given)))
            config.check_here()
        except (OSError, ValueError, ModuleNotFoundError) as error:
            parser.error(str(error))
        if is_first_process():
            print(f"{name} writes to {config.output}/", flush=True)
        with exit_on_interrupt():
            prepare(config.threads)
            work = importlib.import_module(module)
        status: int = work.run(config, parser)
        return status

    return main


def prepare(threads: int) -> None:
    """Imports torch, sets its CPU threads (0: its own choice), and silences transformers.

    Threads that wait for each other spin `SPIN_COUNT` times, unless the environment says otherwise.
    Progress bars and warnings for developers would break up the console.
    """
    # libgomp reads it once, when torch loads it
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    import torch
    from transformers.utils import logging

    if threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
