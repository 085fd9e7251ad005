"""What is written down about a training step, and what it gives warning of."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from grpo_core.trainer.batch import Batch
from grpo_core.trainer.distributed import is_main, joined
from grpo_core.trainer.rollout import Rollout

Metrics = dict[str, Any]
Logger = Callable[[Metrics], None]  # takes each step's record

# Above this share of cut-off completions the reward mostly measures the length limit.
TRUNCATED_LIMIT = 0.2
# Groups whose rewards are all equal teach nothing; warn when nearly all are, this many steps in a
# row.
ZERO_STD_LIMIT = 0.9
ZERO_STD_PATIENCE = 5
# nats; bfloat16 attention is up to 0.06 from itself on single tokens, 6e-5 on average
MISMATCH_LIMIT = 0.1
# of the tokens with an advantage
CLIP_LIMIT = 0.5


def warn(message: str) -> None:
    """As a warning of Python's, by the main process."""
    if is_main():
        warnings.warn(message, stacklevel=2)


class Watch:
    """Warns of what otherwise fails in silence; each kind of trouble once per run.

    An update that is skipped is trouble every time.

    Attributes:
        tell: what a warning is given to.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.zero_std_streak = 0
        self.skipped = 0
        self.tell: Callable[[str], None] = warn

    @property
    def state(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint."""
        remembered = {"zero_std_streak": self.zero_std_streak, "skipped": self.skipped}
        return {"warned": sorted(self.warned), **remembered}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.warned = set(state["warned"])
        self.zero_std_streak = state["zero_std_streak"]
        self.skipped = state.get("skipped", 0)

    def __call__(self, metrics: Metrics) -> None:
        """Looks at one step's metrics, and leaves what it warns of under "warnings"."""
        found = {kind: message for kind, message in self._troubles(metrics)}
        new = [message for kind, message in found.items() if kind not in self.warned]
        self.warned |= found.keys() - {"skipped"}
        if new:
            metrics["warnings"] = new
        for message in new:
            self.tell(message)

    def _troubles(self, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """Their kinds, and what there is to say."""
        if metrics["truncated"] > TRUNCATED_LIMIT:
            yield (
                "truncated",
                f"{metrics['truncated']:.0%} of the completions ran into max_new_tokens; with a "
                "higher limit the reward would measure answers and not length",
            )
        if metrics.get("unscored"):
            yield (
                "unscored",
                f"no reward applies to {metrics['unscored']} completions of step "
                f"{metrics['step']}; they are left out of the update",
            )
        streak = self.zero_std_streak + 1 if metrics["zero_std"] > ZERO_STD_LIMIT else 0
        self.zero_std_streak = streak
        if streak >= ZERO_STD_PATIENCE:
            yield (
                "zero_std",
                f"for {streak} steps more than {ZERO_STD_LIMIT:.0%} of the groups had equal rewards"
                f" ({metrics['reward']:.3f} on average); solved or hopeless, they teach nothing",
            )
        if metrics.get("groups_missing"):
            yield (
                "groups_missing",
                f"{metrics['groups_missing']} groups were missing after {metrics['resamples']} "
                "further rounds of prompts: the others had equal rewards",
            )
        total, before = metrics["skipped_updates"], self.skipped
        self.skipped = total
        if total > before:
            yield (
                "skipped",
                f"step {metrics['step']}: an update was skipped, {total} so far; its loss or "
                "gradient was not finite, or a ratio was above e^max_log_ratio; the weights are as "
                "they were",
            )
        if metrics.get("sampler_mismatch", 0.0) > MISMATCH_LIMIT:
            yield (
                "sampler_mismatch",
                f"the sampler's log-probabilities are {metrics['sampler_mismatch']:.2f} nats from "
                "the trainer's on average; with dropout, in another precision or from old weights "
                "it samples another policy",
            )
        rate = metrics.get("clip_fraction", 0.0)
        if rate > CLIP_LIMIT:
            yield (
                "clip_fraction",
                f"{rate:.0%} of the tokens with an advantage were clipped and taught nothing; a "
                "lower learning rate, or fewer updates of a rollout, would keep the policy closer",
            )


def rollout_metrics(drawn: Rollout, rewards: Tensor, group_size: int) -> Metrics:
    """Means over a step's completions; `zero_std` is the share of groups with equal rewards.

    Args:
        drawn: the completions of this process.
        rewards: [S], of all processes; NaN for a completion that no reward applies to.
        group_size: completions of a prompt.
    """
    unscored = int(rewards.isnan().sum())
    counted = {"unscored": unscored} if unscored else {}
    return {
        "reward": rewards.nanmean().item(),
        "length": joined(drawn.completion_mask.sum(1)).float().mean().item(),
        "truncated": joined(drawn.truncated).float().mean().item(),
        "zero_std": (~varied(rewards, group_size)).float().mean().item(),
        **counted,
    }


def varied(rewards: Tensor, group_size: int) -> Tensor:
    """[S] bool: the completions [S] in groups whose rewards, without NaN, are not all equal."""
    groups = rewards.view(-1, group_size)
    lacking = groups.isnan()
    highest, lowest = (groups.masked_fill(lacking, at) for at in (-math.inf, math.inf))
    return (highest.amax(1) > lowest.amin(1)).repeat_interleave(group_size)


def means(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every reward over the completions it applies to; without one it has no mean."""
    return {name: part.nanmean().item() for name, part in parts.items() if not part.isnan().all()}


def sampler_mismatch(minibatches: Sequence[Batch]) -> Metrics:
    """Distance of the sampler's log-probabilities from the trainer's, of the same weights.

    With d = log π_old − log π_sampler of each token: mean and largest |d|, nats; the KL of the
    sampler to the trainer as the mean of e^d − 1 − d, nats; the largest ratio e^d. Tokens of which
    one is not finite are left out and counted, if there are any.

    Nothing where the trainer did not need its own before an update, or took the sampler's for its
    own: then the ratio of the first update holds the distance.
    """
    gaps = [
        batch.old_logp - batch.sampler_logp
        for batch in minibatches
        if batch.old_logp is not None and batch.old_logp is not batch.sampler_logp
    ]
    if not gaps:
        return {}
    gap = joined(torch.cat(gaps)).double()
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
    """All updates of a step in one: sums of counts, the largest maximum, means of the rest."""
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
# by Rust, by Python within another error, and by torch's zip writer
FULL_SAID = re.compile(rf"\b(os error|Errno) ({'|'.join(map(str, FULL))})\b|inline_container")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file or folder: the error of a full disk names it.

    torch's writer raises RuntimeError then, without a path or a reason, and others do alike.

    Raises:
        OSError: in the place of theirs; an error of another cause is raised as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        *_, said = str(error).strip().splitlines() or [""]
        number = getattr(error, "errno", None)
        if number not in FULL and not FULL_SAID.search(str(error)):
            raise
        parents = (folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(next(parents)).free / 2**20
        raise OSError(
            f"{path}: could not be written; is the disk full ({free:.0f} MiB are free), or a quota "
            f"used up? ({said})"
        ) from error


def append_json(path: Path, record: Metrics) -> None:
    """One more line of a JSON-lines file, made with its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_records(path: Path, wanted: Callable[[Metrics], bool]) -> None:
    """Takes out of a JSON-lines file what is not wanted, and half a line if there is one.

    A run that goes on from a checkpoint does again what came after it.
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
    """A file in one go: whoever looks finds what it was, or all of what it is now."""
    beside = path.with_suffix(".part")
    with writing(path):
        beside.write_text(text, "utf-8")
        beside.replace(path)
