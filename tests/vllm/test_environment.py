"""Several turns over the real server: what the environment says is context, and not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.environment import Episodes
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.vllm.server import VllmServer
from tests.vllm.real import Command, RealServer, differences, model_like, over, records, save_files

pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
]
LIMIT = 1e-5  # nats
SAID = [9, 4, 11]
TURNS = 3
# an end token is likely enough to be drawn, not so likely that it always is
LIKELY_END = 0.3
ENVIRONMENT = """
class Short:
    def reset(self, problem):
        self.turns = 0

    def step(self, turn):
        self.turns += 1
        return "3.5", sum(c.isdigit() for c in turn) / 8, self.turns == 3
"""


class Talker:
    """Says the same three tokens after every turn but the third."""

    def reset(self, problem: Problem) -> None:
        self.turns = 0

    def step(self, turn: list[int]) -> tuple[list[int], float, bool]:
        self.turns += 1
        return SAID, float(len(turn)), self.turns == TURNS


def ending(model: Any) -> Any:
    """The model, with an end token that is more likely."""
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] += LIKELY_END
    return model


def check_layout(drawn: Any, end: int) -> None:
    """Turns that end with the end token, and between them what was said, in full."""
    columns = drawn.completions(), drawn.sampled.tolist(), drawn.turns.tolist()
    for ids, sampled, turns in zip(*columns, strict=True):
        sampled = sampled[: len(ids)]
        said = [token for token, own in zip(ids, sampled, strict=True) if not own]
        assert said == SAID * (turns - 1)
        for n, own in enumerate(sampled):
            if not own and sampled[n - 1]:
                assert ids[n - 1] == end and ids[n : n + len(SAID)] == SAID


def test_turns(server: RealServer, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Also after an update: keys and values of a context are not those of old weights."""
    model = ending(model_like())
    sync = EngineSync(model, VllmServer(server.url, model, folder=str(tmp_path)))
    problems = [Problem(tuple(prompt)) for prompt in [[5, 6, 7], [9], [20, 12]] * 8]
    prompts = [problem.prompt for problem in problems]
    worst, later, old = 0.0, 0.0, float("inf")
    for version in range(3):
        torch.manual_seed(version)
        drawn = Episodes(Talker, max_turns=TURNS).play(
            model,
            lambda contexts, sampling, version=version: sync.draw(contexts, sampling, version),
            problems,
            Sampling(24),
            "step 1",
        )
        assert drawn.weight_version == version
        assert drawn.turns is not None and drawn.earned is not None and drawn.sampled is not None
        counts = drawn.turns.bincount(minlength=TURNS + 1)
        assert counts[TURNS] > 2 and counts[1:TURNS].sum() > 2
        assert not drawn.sampler_logp[~drawn.is_sampled].any()
        check_layout(drawn, model.config.eos_token_id)
        own = differences(model, prompts, drawn)
        worst = max(worst, torch.cat(own).abs().max().item())
        for each, turns in zip(own, drawn.turns.tolist(), strict=True):
            if turns == TURNS:
                later = max(later, each[-1].abs().item())
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        old = min(old, torch.cat(differences(model, prompts, drawn)).abs().max().item())
    figure(
        f"several turns: mismatch at most {worst:.1e} nats over 3 updates, {later:.1e} of the last "
        f"token of the last turn (other weights: {old:.1f})"
    )
    assert worst <= LIMIT < 1e-2 < old


def test_the_command_learns(
    server: RealServer, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    files = save_files(tmp_path)
    ending(model_like()).save_pretrained(files / "model")
    (files / "short.py").write_text(ENVIRONMENT)
    words = over(server.url, files, tmp_path, "--environment", f"{files / 'short.py'}:Short")
    # all rewards come from the environment
    at = words.index("--rewards")
    del words[at : at + 2]
    words += ["--max_new_tokens", "24", "--max_turns", "3", "--held_out", "4"]
    run = Command(words)
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 16))
    first, last = found[0], found[-1]
    mean = max(record["sampler_mismatch"] for record in found)
    figure(
        f"command in several turns: reward {first['reward']:.2f} to {last['reward']:.2f}, turns "
        f"{first['turns']:.2f} to {last['turns']:.2f} in 15 steps, mean mismatch of a step at most "
        f"{mean:.1e} nats"
    )
    for record in found:
        assert 1 < record["turns"] <= 3
        # "3.5" is three tokens
        assert record["observed"] == pytest.approx(3 * (record["turns"] - 1), abs=1e-4)
        assert record["environment"] == pytest.approx(record["reward"], abs=1e-6)
    assert mean <= LIMIT
    rewards = [record["reward"] for record in found]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
