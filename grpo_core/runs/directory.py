"""The directory of a run: its files, whether a run may be written there, the records in it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_core.cli.options import check_unchanged, require

Record = dict[str, Any]
# all that the commands write, except base models, which later runs use again
FILES = (
    *("config.json", "metrics.jsonl", "samples.jsonl", "before.json", "results.json"),
    *("report.md", "curves.png", "compare.json", "compare.md", "compare.png"),
)
FOLDERS = ("checkpoints", "model", "r1-zero", "sft", "r1")
# options that may differ when a run is resumed
FREE = (
    *("resume", "overwrite", "output", "threads", "log", "console", "plot"),
    *("checkpoint_every", "keep_checkpoints", "rollout_url", "rollout_memory", "rollout_sleep"),
)


def check_output(config: Any, *read: tuple[str, str]) -> None:
    """Creates the run directory `config.output`, or checks that the run in it can be resumed.

    Args:
        config: of the run.
        read: options and the files or folders that they name, or "", which must not be deleted.

    Raises:
        ValueError: it holds a run and neither `resume` nor `overwrite` is set; there is no run to
            resume, or one with other options; it cannot be written to.
    """
    require(bool(config.output), "output", "a folder", "nothing")
    directory = Path(config.output)
    resume = getattr(config, "resume", False)
    require(not (resume and config.overwrite), "overwrite", "False with --resume True", True)
    if resume:
        file = directory / "config.json"
        before = read_resumed(file)
        check_unchanged(asdict(config), before.get("options", before), file, FREE)
    elif config.overwrite:
        _check_kept(directory, read)
    elif present := [name for name in (*FILES, *FOLDERS) if (directory / name).exists()]:
        resuming = "continue it by --resume True, " if hasattr(config, "resume") else ""
        raise ValueError(
            f"output: expected a folder without a run, found {directory / present[0]}; "
            f"{resuming}name another folder by --output, or delete that run by --overwrite True"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output: expected a folder that can be made, got {directory} ({error.strerror})"
        ) from error
    require(os.access(directory, os.W_OK), "output", "a folder that can be written to", directory)


def _check_kept(directory: Path, read: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if overwriting the run would delete what an option reads."""
    deleted = {(directory / name).resolve() for name in (*FILES, *FOLDERS)}
    for option, path in read:
        file = Path(path).resolve()
        # a model's folder is lost with its config.json
        is_lost = path and file.exists() and deleted & {file, file / "config.json", *file.parents}
        reason = f"since --overwrite True would delete {path} of --{option}"
        require(not is_lost, "output", f"another folder, {reason}", directory)


def clear(directory: Path) -> None:
    """Removes an earlier run from a run directory."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)


def read_resumed(file: Path) -> Any:
    """The JSON that an interrupted run has left in `file`.

    Raises:
        ValueError: there is no such run.
    """
    if not file.exists():
        raise ValueError(f"resume: expected an interrupted run, found no {file}")
    return json.loads(file.read_text("utf-8"))


def run_with_metrics(text: str) -> Path:
    """A run directory, on a command line."""
    if not (Path(text) / "metrics.jsonl").is_file():
        raise argparse.ArgumentTypeError(f"expected a run directory, found no {text}/metrics.jsonl")
    return Path(text)


def read_metrics(run: Path) -> tuple[dict[str, list[Record]], dict[str, Record]]:
    """Of a run's metrics.jsonl: the records of each stage, and the figures of finished stages."""
    histories: dict[str, list[Record]] = {}
    results: dict[str, Record] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "result" in record:
            results[record["stage"]] = record["result"]
        else:
            histories.setdefault(record["stage"], []).append(record)
    return histories, results
