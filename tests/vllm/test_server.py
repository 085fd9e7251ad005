"""`VllmServer` over the real server: weights, completions, and updates that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.vllm.server import VllmServer
from tests.vllm.protocol import Talk, check_death
from tests.vllm.real import LONGEST, RealServer, mismatch, model_like

pytestmark = pytest.mark.timeout(3000)
PROMPTS = [[5, 6, 7], [9], [3, 4, 8, 8, 10, 11], [20, 12]] * 4
LIMIT = 1e-5  # nats


def connect(server: RealServer, folder: Path, model: Any, **more: Any) -> EngineSync:
    """Completions by the server, with the model's weights."""
    return EngineSync(model, VllmServer(server.url, model, folder=str(folder), **more))


def disturb(model: Any) -> None:
    """Other weights, not much larger."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


def check_exact(rollouts: EngineSync, model: Any, version: int) -> None:
    """The server completes with the model's weights."""
    drawn = rollouts.draw(PROMPTS, Sampling(8), version)
    assert mismatch(model, PROMPTS, drawn, 1.0) <= LIMIT


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_weights_arrive(
    server: RealServer, tmp_path: Path, figure: Callable[[str], None], temperature: float
) -> None:
    """All of them, at every update; that of other weights is a thousand times larger."""
    model = model_like()
    rollouts = connect(server, tmp_path, model)
    worst, old, seconds = 0.0, float("inf"), []
    for version in range(5):
        disturb(model)
        begin = time.monotonic()
        rollouts.draw([[5]], Sampling(1, temperature), version)
        seconds.append(time.monotonic() - begin)
        drawn = rollouts.draw(PROMPTS, Sampling(12, temperature), version)
        assert drawn.weight_version == version
        worst = max(worst, mismatch(model, PROMPTS, drawn, temperature))
        before = model_like()
        before.load_state_dict(model.state_dict())
        disturb(before)
        old = min(old, mismatch(before, PROMPTS, drawn, temperature))
    figure(
        f"temperature {temperature}: mismatch at most {worst:.1e} nats over 5 updates (other "
        f"weights: {old:.1f}), {min(seconds):.2f} s an update with a token"
    )
    assert worst <= LIMIT < 1e-2 < old
    assert not list(tmp_path.iterdir())


def test_equal_seeds_make_equal_completions(server: RealServer, tmp_path: Path) -> None:
    model = model_like()
    rollouts = connect(server, tmp_path, model)
    prompts, drawn = [[5, 6, 7]] * 16, []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        drawn.append(rollouts.draw(prompts, Sampling(8), 0).completions())
    assert drawn[0] == drawn[1] != drawn[2]
    # within a group too
    assert len(set(map(tuple, drawn[0]))) > 8


def test_completions_end_with_the_end_token_or_at_the_limit(
    server: RealServer, tmp_path: Path
) -> None:
    model = model_like()
    with torch.no_grad():
        # likely enough to be drawn, not so likely that it always is
        model.lm_head.weight[model.config.eos_token_id] += 0.3
    rollouts = connect(server, tmp_path, model)
    end, ends = model.config.eos_token_id, []
    for limit in (1, 6, 30):
        drawn = rollouts.draw(PROMPTS, Sampling(limit), 0)
        for ids, cut in zip(drawn.completions(), drawn.truncated.tolist(), strict=True):
            assert cut == (end not in ids) and end not in ids[:-1]
            assert len(ids) == limit if cut else 1 <= len(ids) <= limit
            ends.append(cut)
        assert mismatch(model, PROMPTS, drawn, 1.0) <= LIMIT
    assert 0.1 < sum(ends) / len(ends) < 0.9


def test_greedy_completions_are_those_of_the_model(server: RealServer, tmp_path: Path) -> None:
    """Evaluations ask for them."""
    model = model_like()
    greedy = Sampling(8, 0.0)
    found = connect(server, tmp_path, model).draw(PROMPTS, greedy, 0).completions()
    assert found == EngineSync(model).draw(PROMPTS, greedy, 0).completions()


def test_a_server_that_is_too_short_is_refused(server: RealServer, tmp_path: Path) -> None:
    connect(server, tmp_path, model_like(), longest=LONGEST)
    with pytest.raises(ValueError, match=rf"at most {LONGEST} tokens.* got {LONGEST + 1}"):
        connect(server, tmp_path, model_like(), longest=LONGEST + 1)


def test_a_server_for_other_weights_is_refused(server: RealServer) -> None:
    with pytest.raises(ValueError, match=r'expected a server with .*"nccl".* got \'grpo_folder\''):
        VllmServer(server.url, model_like())


def test_completions_of_others_wait_during_updates(server: RealServer, tmp_path: Path) -> None:
    """Without a pause the first of them would end the server."""
    model = model_like()
    rollouts, talk = connect(server, tmp_path, model), Talk(server.url, tmp_path, model)
    over, statuses = threading.Event(), []

    def ask_on() -> None:
        while not over.is_set():
            statuses.append(talk.complete()[0])

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in range(10):
            disturb(model)
            check_exact(rollouts, model, version)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200} and len(statuses) > 10


def test_an_update_that_a_dead_trainer_left_open(server: RealServer, tmp_path: Path) -> None:
    """Paused, started, and with a part of the weights."""
    model = model_like(seed=3)
    talk = Talk(server.url, tmp_path, model)
    talk.open()
    assert talk.post("/pause?mode=wait")[0] == 200
    assert talk.update(talk.save("left.safetensors"))[0] == 200
    check_exact(connect(server, tmp_path, model_like()), model_like(), 0)


def test_an_update_of_a_dead_trainer_that_failed(server: RealServer, tmp_path: Path) -> None:
    model = model_like(seed=3)
    talk = Talk(server.url, tmp_path, model)
    talk.open()
    assert talk.update(talk.save("left.safetensors", x=torch.zeros(2)))[0] == 500
    check_exact(connect(server, tmp_path, model_like()), model_like(), 0)


def test_the_cause_of_a_failed_update_is_told_and_the_next_one_is_exact(
    server: RealServer, tmp_path: Path
) -> None:
    """Weights of a second layer, which the server's model does not have."""
    model, deeper = model_like(), model_like(num_hidden_layers=2)
    rollouts = connect(server, tmp_path, model)
    check_exact(rollouts, model, 0)
    rollouts.model = deeper
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"update_weights: status 500.*layers\.1"):
            rollouts.draw(PROMPTS, Sampling(8), 1)
    rollouts.model = model
    disturb(model)
    check_exact(rollouts, model, 1)


def test_another_trainer_on_the_same_server_is_noticed(server: RealServer, tmp_path: Path) -> None:
    first = connect(server, tmp_path, model_like())
    check_exact(first, model_like(), 0)
    second = connect(server, tmp_path, model_like(seed=3))
    check_exact(second, model_like(seed=3), 0)
    with pytest.raises(RuntimeError, match="of step 0, got version None; does another run"):
        first.draw(PROMPTS, Sampling(8), 0)


# the last test with this server
def test_a_completion_during_an_update_ends_the_server(server: RealServer, tmp_path: Path) -> None:
    """Without a pause; the trainer says that it cannot be reached."""
    model = model_like()
    rollouts = connect(server, tmp_path, model)
    check_exact(rollouts, model, 0)
    check_death(Talk(server.url, tmp_path, model))
    with pytest.raises(ConnectionError, match="is the server up"):
        rollouts.draw(PROMPTS, Sampling(8), 1)
