"""The stand-in for vLLM's server answers as the real one does, see `vllm.protocol`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests import fake_vllm
from tests.fake_vllm import Worker
from tests.fake_vllm_server import server
from tests.micro import micro_model
from tests.vllm import protocol
from tests.vllm.protocol import Talk

FOLDER = "grpo_core.trainer.vllm.folder"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """One with the backend of the package, which vLLM's plugin registers."""
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fake_vllm.WeightTransferEngineFactory, "_registry", {})
    # imported anew with the modules of this stand-in
    monkeypatch.delitem(sys.modules, FOLDER, raising=False)
    import_module(FOLDER).register()
    return Worker(micro_model(seed=9), "grpo_folder")


@pytest.fixture
def talk(worker: Worker, tmp_path: Path) -> Iterator[Talk]:
    """To the stand-in."""
    with server(worker) as url:
        yield Talk(url, tmp_path, micro_model(seed=3))


def test_a_new_server(talk: Talk) -> None:
    protocol.check_fresh(talk)


def test_its_configuration(talk: Talk, worker: Worker) -> None:
    protocol.check_configuration(talk, worker.longest)


def test_requests_that_it_refuses(talk: Talk, worker: Worker) -> None:
    protocol.check_requests(talk, worker.longest)


def test_updates(talk: Talk) -> None:
    protocol.check_updates(talk)


def test_updates_that_fail(talk: Talk) -> None:
    protocol.check_failed_updates(talk)


def test_a_pause(talk: Talk) -> None:
    protocol.check_pause(talk)


def test_the_cache_stays_while_requests_run(talk: Talk, worker: Worker) -> None:
    worker.running = 1
    assert talk.post("/reset_prefix_cache") == (200, {"success": False})
    worker.running = 0
    assert talk.post("/reset_prefix_cache") == (200, {"success": True})


def test_a_completion_during_an_update_ends_it(talk: Talk) -> None:
    protocol.check_death(talk)
