"""Two real servers behind one trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.vllm.server import VllmServer
from tests.vllm.protocol import Talk
from tests.vllm.real import Command, RealServer, mismatch, model_like, over, records

pytestmark = pytest.mark.timeout(3000)
# an odd number, which is not divided evenly
PROMPTS = [[5, 6, 7], [9], [3, 4, 8, 8, 10, 11], [20, 12], [7]] * 3
LIMIT = 1e-5  # nats


@pytest.fixture(scope="module")
def second(process: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Another server of the same model, only for these tests: it takes 3 GB of memory."""
    found = RealServer(process.model, tmp_path_factory.mktemp("second") / "vllm.log")
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def pair(server: RealServer, second: RealServer) -> list[RealServer]:
    """Both, started again if a test has ended one."""
    if not second.is_up():
        second.stop()
        second.start()
    return [server, second]


def addresses(pair: list[RealServer]) -> str:
    """As `--rollout_url` takes them."""
    return ",".join(server.url for server in pair)


def versions(pair: list[RealServer]) -> list[str]:
    """Of the weights that each has."""
    return [server.ask("/weight_info")[1]["weight_version"] for server in pair]


def test_completions_are_those_of_one_server(
    pair: list[RealServer], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """For every version of the weights, which both get."""
    worst, drawn = 0.0, []
    for url in (pair[0].url, addresses(pair)):
        model = model_like()
        sync = EngineSync(model, VllmServer(url, model, folder=str(tmp_path)))
        torch.manual_seed(4)
        for version in range(3):
            drawn.append(sync.draw(PROMPTS, Sampling(12), version))
            worst = max(worst, mismatch(model, PROMPTS, drawn[-1], 1.0))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
    first, last = versions(pair)
    assert first == last and first.endswith("/2")
    for one, two in zip(drawn[:3], drawn[3:], strict=True):
        assert one.completions() == two.completions()
        torch.testing.assert_close(one.sampler_logp, two.sampler_logp, rtol=0, atol=LIMIT)
    assert drawn[0].completions() != drawn[1].completions()
    figure(f"two servers: completions of one, mismatch at most {worst:.1e} nats over 3 updates")
    assert worst <= LIMIT


def test_each_writes_a_part(pair: list[RealServer], tmp_path: Path) -> None:
    """Weights that only one of them has show in its part alone."""
    model = model_like()
    sync = EngineSync(model, VllmServer(addresses(pair), model, folder=str(tmp_path)))
    sync.draw(PROMPTS, Sampling(12), 0)
    version = versions(pair)[0]
    talk = Talk(pair[1].url, tmp_path, model_like(seed=3))
    assert talk.update(talk.save("other.safetensors"))[0] == 200
    assert talk.post("/finish_weight_update", weight_version=version)[0] == 200
    drawn = sync.draw(PROMPTS, Sampling(12), 0)
    half = len(PROMPTS) // 2
    own, other = drawn.select(slice(half)), drawn.select(slice(half, None))
    assert mismatch(model, PROMPTS[:half], own, 1.0) <= LIMIT
    assert mismatch(model_like(seed=3), PROMPTS[half:], other, 1.0) <= LIMIT


def test_one_that_is_killed(pair: list[RealServer], files: Path, tmp_path: Path) -> None:
    """The trainer names it in a line and ends, the other one is free; the run goes on later."""
    words = over(addresses(pair), files, tmp_path, "--steps", "10")
    run = Command(words)
    run.wait_for(2)
    pair[1].stop()
    assert run.wait() == 1
    (line,) = [each for each in run.output().splitlines() if "stopped:" in each]
    assert pair[1].url in line and "is the server up?" in line
    assert "Traceback" not in run.output()
    done = len(records(tmp_path / "run"))
    assert done < 10
    assert pair[0].ask("/is_paused") == (200, {"is_paused": False})
    assert Talk(pair[0].url, tmp_path, model_like()).complete()[0] == 200
    resumed = [*words, "--resume", "True"]
    # while it is down nothing begins, and nothing is lost
    run = Command(resumed)
    assert run.wait() != 0 and pair[1].url in run.output()
    assert len(records(tmp_path / "run")) == done
    pair[1].start()
    run = Command(resumed)
    assert run.wait() == 0, run.output()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 11))
    assert max(record["sampler_mismatch"] for record in found) <= LIMIT
    first, last = versions(pair)
    assert first == last and first.endswith("/9")
