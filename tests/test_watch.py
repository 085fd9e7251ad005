"""What is warned of: at which figure, how often, and after a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_core.trainer.monitor import Watch


def metrics(**changes: Any) -> dict[str, Any]:
    """A step with nothing to say to."""
    quiet = {"step": 1, "reward": 0.5, "truncated": 0.1, "zero_std": 0.5, "skipped_updates": 0}
    return {**quiet, "clip_fraction": 0.01, "sampler_mismatch": 1e-4, **changes}


def watched() -> tuple[Watch, list[str]]:
    """A watch, and what it says."""
    watch, said = Watch(), []
    watch.tell = said.append
    return watch, said


def test_a_quiet_step_is_passed_over() -> None:
    watch, said = watched()
    step = metrics(truncated=0.2, zero_std=0.9, clip_fraction=0.5)
    before = dict(step)
    for _ in range(9):
        watch(step)
    assert not said and step == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncated": 0.21}, "21% of the completions ran into max_new_tokens"),
        ({"clip_fraction": 0.6}, "60% of the tokens with an advantage were clipped"),
        ({"sampler_mismatch": 0.3}, "the sampler's log-probabilities differ by 0.30 nats"),
    ],
)
def test_each_trouble_is_told_once(changes: dict[str, Any], message: str) -> None:
    watch, said = watched()
    steps = [metrics(**changes) for _ in range(3)]
    for step in steps:
        watch(step)
    assert len(said) == 1 and said[0].startswith(message)
    assert [step.get("warnings") for step in steps] == [said, None, None]


def test_equal_rewards_are_told_after_several_steps_in_a_row() -> None:
    watch, said = watched()
    for share in (1, 1, 1, 1, 0.5, 1, 1, 1, 1):
        watch(metrics(zero_std=share))
    assert not said
    watch(metrics(zero_std=0.95))
    assert len(said) == 1 and "for 5 steps more than 90% of the groups had equal" in said[0]
    watch(metrics(zero_std=1))
    assert len(said) == 1


def test_every_skipped_update_is_told() -> None:
    watch, said = watched()
    for step, total in enumerate((0, 2, 2, 3), 1):
        watch(metrics(step=step, skipped_updates=total))
    assert [message.split(";")[0] for message in said] == [
        "step 2: an update was skipped, 2 so far",
        "step 4: an update was skipped, 3 so far",
    ]


def test_a_run_that_goes_on_does_not_tell_again() -> None:
    watch, said = watched()
    for _ in range(4):
        watch(metrics(zero_std=1, truncated=0.5, skipped_updates=1))
    assert len(said) == 2
    later, more = watched()
    later.state = watch.state
    later(metrics(zero_std=1, truncated=0.5, skipped_updates=1))
    assert len(more) == 1 and "for 5 steps" in more[0]
