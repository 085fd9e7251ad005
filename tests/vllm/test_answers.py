"""What the real server answers is what the stand-in of the quick suite answers, see `protocol`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm import protocol
from tests.vllm.protocol import Talk
from tests.vllm.real import LONGEST, RealServer, model_like

pytestmark = pytest.mark.timeout(3000)


@pytest.fixture
def talk(server: RealServer, tmp_path: Path) -> Talk:
    """To the real server."""
    return Talk(server.url, tmp_path, model_like(seed=3))


# the first test of the run: the server has not been told of a folder
def test_a_new_server(talk: Talk) -> None:
    protocol.check_fresh(talk)


def test_its_configuration(talk: Talk) -> None:
    protocol.check_configuration(talk, LONGEST)


def test_requests_that_it_refuses(talk: Talk) -> None:
    protocol.check_requests(talk, LONGEST)


def test_updates(talk: Talk) -> None:
    protocol.check_updates(talk)


def test_updates_that_fail(talk: Talk) -> None:
    protocol.check_failed_updates(talk)


def test_a_pause(talk: Talk) -> None:
    protocol.check_pause(talk)


def test_the_cache_stays_while_requests_run(talk: Talk) -> None:
    long = {"max_tokens": 30, "stop_token_ids": [], "ignore_eos": True}
    with ThreadPoolExecutor(16) as threads:
        running = [
            threads.submit(lambda seed: talk.complete(seed=seed, **long), n) for n in range(16)
        ]
        answers = []
        while not all(each.done() for each in running):
            answers.append(talk.post("/reset_prefix_cache"))
        assert (200, {"success": False}) in answers
        assert all(each.result()[0] == 200 for each in running)
    assert talk.post("/reset_prefix_cache") == (200, {"success": True})
