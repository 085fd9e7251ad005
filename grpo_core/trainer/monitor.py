"""Metrics of a training step, the files they are written to, and warnings about them."""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from grpo_core.trainer.batch import Batch
from grpo_core.trainer.distributed import all_gather_cat, is_main

Metrics = dict[str, Any]
Logger = Callable[[Metrics], None]  # takes each step's record

# above this share of truncated completions the reward mostly measures the length limit
TRUNCATED_LIMIT = 0.2
# share of groups with equal rewards, which have no gradient, and steps in a row before the warning
ZERO_STD_LIMIT = 0.9
ZERO_STD_PATIENCE = 5
# nats, mean over tokens; bfloat16 attention differs by 6e-5 on average and 0.06 at most
MISMATCH_LIMIT = 0.1
# of an engine that has just got the weights: these are others
MISMATCH_REFUSED = 0.5
# of the tokens with an advantage
CLIP_LIMIT = 0.5

# measured in TRL's issue 7269
NOT_REPLAYED = (
    "the trainer's log-probabilities are over the vocabulary, the sampler's over what top_p, top_k "
    "and min_p kept (replay_sampling is off): at top_p 0.8, 52% of the ratios leave [0.9, 1.1]"
)
# by kind; formatted with the metrics of the step
WARNINGS = {
    "truncated": "{truncated:.0%} of the completions ran into max_new_tokens (with an environment "
    "or max_turns); raise it, or set mask_truncated",
    "unscored": "no reward applies to {unscored} completions of step {step}; they are not trained "
    "on",
    "zero_std": f"for {{streak}} steps more than {ZERO_STD_LIMIT:.0%} of the groups had equal "
    "rewards ({reward:.3f} on average); such groups have no gradient",
    "groups_missing": "{groups_missing} groups are missing after {resamples} more rounds of "
    "prompts: the rewards of the other groups were equal",
    "sampler_mismatch": "the sampler's log-probabilities differ by {sampler_mismatch:.2f} nats "
    "from the trainer's on average; likely causes are dropout, another precision or old weights",
    "clip_fraction": "{clip_fraction:.0%} of the tokens with an advantage were clipped, so they "
    "had no gradient; lower the learning rate or make fewer updates per rollout",
    "skipped": "step {step}: an update was skipped, {skipped_updates} so far; its loss or gradient "
    "was not finite, or a ratio was above e^max_log_ratio",
}


def warn(message: str) -> None:
    """Raises a Python warning on rank 0."""
    if is_main():
        warnings.warn(message, stacklevel=2)


class Watch:
    """Warns of problems in a step's metrics: each kind once per run, skipped updates every time.

    Attributes:
        state: what a checkpoint saves.
        tell: called with each warning.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"warned": [], "zero_std_streak": 0, "skipped": 0}
        self.tell: Callable[[str], None] = warn

    def __call__(self, metrics: Metrics) -> None:
        """Checks the metrics of a step, and adds new warnings to them under "warnings"."""
        is_equal = metrics.get("zero_std", 0.0) > ZERO_STD_LIMIT
        streak = self.state["zero_std_streak"] + 1 if is_equal else 0
        has_skipped = metrics["skipped_updates"] > self.state["skipped"]
        self.state |= {"zero_std_streak": streak, "skipped": metrics["skipped_updates"]}
        problems = {
            "truncated": metrics["truncated"] > TRUNCATED_LIMIT,
            "unscored": metrics.get("unscored", 0) > 0,
            "zero_std": streak >= ZERO_STD_PATIENCE,
            "groups_missing": metrics.get("groups_missing", 0) > 0,
            "sampler_mismatch": metrics.get("sampler_mismatch", 0.0) > MISMATCH_LIMIT,
            "clip_fraction": metrics.get("clip_fraction", 0.0) > CLIP_LIMIT,
        }
        warned = self.state["warned"]
        new = [kind for kind, exists in problems.items() if exists and kind not in warned]
        warned += new
        told = [*new, "skipped"] if has_skipped else new
        messages = [WARNINGS[kind].format_map(metrics | {"streak": streak}) for kind in told]
        if messages:
            metrics["warnings"] = messages
        for message in messages:
            self.tell(message)


def sampler_mismatch(minibatches: Sequence[Batch]) -> Metrics:
    """Difference of the log-probabilities of sampler and trainer for the same weights.

    With d = log π_old − log π_sampler of each token: mean and largest |d|, nats; KL from sampler
    to trainer as the mean of e^d − 1 − d, nats; the largest ratio e^d. Tokens with a value that is
    not finite are excluded and counted.

    Empty if the trainer did not compute old_logp, or took the sampler's.
    """
    gaps = [
        batch.old_logp - batch.sampler_logp
        for batch in minibatches
        if batch.old_logp is not None and batch.old_logp is not batch.sampler_logp
    ]
    if not gaps:
        return {}
    gap = all_gather_cat(torch.cat(gaps)).double()
    known = gap[gap.isfinite()]
    unknown = len(gap) - len(known)
    counted = {"sampler_mismatch_unknown": unknown} if unknown else {}
    if not len(known):
        return counted
    return {
        "sampler_mismatch": known.abs().mean().item(),
        "sampler_mismatch_max": known.abs().max().item(),
        "sampler_mismatch_kl": (known.expm1() - known).mean().item(),
        "sampler_mismatch_ratio_max": known.max().exp().item(),
        **counted,
    }


def update_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Combines the metrics of a step's updates: sums of counts, maxima, means of the rest."""
    combined = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        if name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_rows") or name == "tokens":
            combined[name] = sum(values)
        else:
            combined[name] = sum(values) / len(values)
    return combined


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# messages of Rust, of Python inside another error, and of torch's zip writer
FULL_MESSAGE = re.compile(rf"\b(os error|Errno) ({'|'.join(map(str, FULL))})\b|inline_container")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context for writing a file or folder, in which the error of a full disk names the path.

    The writers of torch and safetensors raise errors without a path or a reason.

    Raises:
        OSError: the disk is full. Other errors pass unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        *_, message = str(error).strip().splitlines() or [""]
        number = getattr(error, "errno", None)
        if number not in FULL and not FULL_MESSAGE.search(str(error)):
            raise
        parents = (folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(next(parents)).free / 2**20
        raise OSError(
            f"{path}: could not be written; is the disk full ({free:.0f} MiB are free), or a quota "
            f"used up? ({message})"
        ) from error


def append_json(path: Path, record: Metrics) -> None:
    """Appends a line to a JSON-lines file; creates file and folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_records(path: Path, wanted: Callable[[Metrics], bool]) -> None:
    """Removes unwanted records, and an incomplete line, from a JSON-lines file.

    A resumed run repeats the steps after its checkpoint, whose records would otherwise be double.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if wanted(record):
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Replaces a file atomically: readers see the old text or the new text."""
    beside = path.with_suffix(".part")
    with writing(path):
        beside.write_text(text, "utf-8")
        beside.replace(path)
