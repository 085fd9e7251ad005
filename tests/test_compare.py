"""The comparison of DPO, PPO and GRPO, on a run short enough to learn nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grpo_core import RECIPES
from grpo_core.compare import main
from grpo_core.runs.compare import DISTILLED, METHODS, SMALL_BASE, KLInRewardTrainer
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.forward import packed_logp
from grpo_core.trainer.measure import LiveBytes
from grpo_core.trainer.rollout import Sampling, rollout
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]


@pytest.mark.slow
def test_a_comparison_leaves_behind_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method and seed, with what it held: PPO three models, GRPO two, one of them trained.

    A distilled model is a sixth of its teacher, which is held beside it for `opd` only.
    """
    options = ["--output", str(tmp_path), "--seeds", "1", "--steps", "2", "--prompts", "4"]
    assert main([*options, "--base_steps", "60", "--held_out", "24"]) == 0
    outcomes = json.loads((tmp_path / "compare.json").read_text())
    assert [outcome["method"] for outcome in outcomes] == [
        *("base", *METHODS, SMALL_BASE),
        *DISTILLED,
    ]
    found = {outcome["method"]: outcome for outcome in outcomes}
    size = found["GRPO"]["trained"]
    held = {method: found[method]["held"] / size for method in METHODS}
    online = {"GRPO": 2, "GRPO, KL in the reward": 2, "R1": 2}
    assert held == {"SFT": 1, "DPO": 2, "PPO": 3} | online
    by_sft, by_opd = (found[method] for method in DISTILLED)
    small = by_sft["held"]
    assert small == by_sft["trained"] == by_opd["trained"] < size / 5
    assert by_opd["held"] == pytest.approx(small + size)
    assert found["PPO"]["trained"] == 2 * size
    assert {found[m]["samples"] for m in (*METHODS[1:], *DISTILLED)} == {2 * 4 * 8}
    assert found["PPO"]["peak_mib"] > found["GRPO"]["peak_mib"] > 0
    assert (tmp_path / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = (tmp_path / "compare.md").read_text()
    assert table.count("\n") == 2 + len(outcomes)
    shown = capsys.readouterr().out
    assert all(outcome["method"] in shown for outcome in outcomes)


def test_the_kl_comes_off_the_reward_before_groups_are_compared() -> None:
    """By hand: with β large, what was likelier under the start is better."""
    config = TrainerConfig(objective=RECIPES["dapo"], sampling=Sampling(MAX_NEW_TOKENS), epochs=1)
    trainer = KLInRewardTrainer(
        micro_model(), draw_problems, share_of_sevens, config, beta=2.0, label="x"
    )
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    torch.manual_seed(0)
    drawn = rollout(trainer.model, [[3, 4, 5]] * 8, Sampling(MAX_NEW_TOKENS))
    rewards = torch.arange(8.0)
    first, second = trainer.minibatches(drawn, rewards, torch.arange(8))
    prices, advantages = [], []
    for (part,) in (first, second):
        ref = packed_logp(trainer.start, part.rows, trainer.config)
        gap = part.old_logp - ref
        for sequence in range(4):
            mine = part.rows.sequence == sequence
            prices.append(gap[mine].sum())
            advantages.append(part.advantage[mine][0])
    worth = rewards - 2 * torch.stack(prices)
    expected = (worth - worth.mean()) / (worth.std() + 1e-4)
    torch.testing.assert_close(torch.stack(advantages), expected, rtol=1e-4, atol=1e-5)


def test_live_bytes_are_counted() -> None:
    """Two tensors at once, then one; what is freed within comes off."""
    with LiveBytes() as live:
        first = torch.empty(1000, dtype=torch.float32)
        second = first + 1
        del first
        third = torch.empty(500, dtype=torch.float32)
    assert 8000 <= live.peak < 9000
    assert second.numel() + third.numel() == 1500
