"""The directory of a run: its files, whether a run may be written there, the records in it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_core.cli.options import check_unchanged

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


def check_output(config: Any) -> None:
    """Creates the run directory `config.output`, or checks that the run in it can be resumed.

    Raises:
        ValueError: it holds a run and neither `resume` nor `overwrite` is set; there is no run to
            resume, or one with other options; it cannot be written to.
    """
    if not config.output:
        raise ValueError("output: expected a folder, got nothing")
    directory = Path(config.output)
    resume = getattr(config, "resume", False)
    if resume and config.overwrite:
        raise ValueError("overwrite: expected False with --resume True, got True")
    if resume:
        file = directory / "config.json"
        before = read_resumed(file)
        check_unchanged(asdict(config), before.get("options", before), file, FREE)
    elif not config.overwrite:
        present = [name for name in (*FILES, *FOLDERS) if (directory / name).exists()]
        if present:
            resuming = "continue it by --resume True, " if hasattr(config, "resume") else ""
            raise ValueError(
                f"output: expected a folder without a run, found {directory / present[0]}; "
                f"{resuming}name another folder by --output, or delete that run by "
                "--overwrite True"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output: expected a folder that can be made, got {directory} ({error.strerror})"
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"output: expected a folder that can be written to, got {directory}")


def check_kept(output: str, *paths: tuple[str, str]) -> None:
    """Raises ValueError if overwriting the run in `output` would delete what an option reads.

    Args:
        output: the run directory.
        paths: pairs of an option and the file or folder that it names, or "".
    """
    deleted = {(Path(output) / name).resolve() for name in (*FILES, *FOLDERS)}
    for option, path in paths:
        read = Path(path).resolve()
        # a model's folder is lost with its config.json
        if path and read.exists() and deleted & {read, read / "config.json", *read.parents}:
            raise ValueError(
                f"output: expected another folder, since --overwrite True would delete {path} of "
                f"--{option}, got {output}"
            )


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
