"""The vLLM engines against a stand-in for the package and for its server, see `fake_vllm`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from grpo_core.reinforce import main
from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.rollout import Sampling, rollout
from grpo_core.trainer.vllm import engine as vllm_engine
from grpo_core.trainer.vllm import files as vllm_files
from grpo_core.trainer.vllm import server as vllm_server
from grpo_core.trainer.vllm.common import Completion, check_ends, in_threads
from grpo_core.trainer.vllm.engine import VllmEngine
from grpo_core.trainer.vllm.server import VllmServer
from grpo_core.trainer.weights import ModelWeights
from tests import fake_vllm
from tests.fake_vllm import LLM, Worker
from tests.fake_vllm_server import server
from tests.micro import EOS, MAX_NEW_TOKENS, VOCABULARY, micro_model
from tests.test_checkpoint_format import adapted
from tests.test_reinforce import files, options, records  # noqa: F401
from tests.test_rollouts import LARGER, ONE_UPDATE, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
    pytest.mark.filterwarnings("ignore:.*groups were missing"),
]

PROMPTS = [[5], [3, 9, 4]] * 3
SHORT = ["--steps", "2", "--group_size", "2", "--minibatches", "1"]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, and a GPU for the model."""
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    # as the entry point does
    monkeypatch.setattr(fake_vllm.WeightTransferEngineFactory, "_registry", {})
    import_module("grpo_core.trainer.vllm.folder").register()
    monkeypatch.setattr(vllm_engine, "sending_gpu", lambda model: fake_vllm.GPU)
    monkeypatch.setattr(vllm_server, "ABORT_TIMEOUT", 2.0)
    monkeypatch.setattr(vllm_server.time, "sleep", lambda seconds: None)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A checkpoint that vLLM loads: other weights than the trainer's."""
    micro_model(seed=9).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(params=["ipc", "nccl", "folder", "servers"])
def engine(request: pytest.FixtureRequest, vllm: None, path: str, tmp_path: Path) -> Iterator[Any]:
    """Every way for weights, in float32, with a worker as `worker`.

    In the trainer's process (ipc, folder), a server (nccl), two servers that read files (servers).
    """
    folder = str(tmp_path / "weights")
    if request.param in ("ipc", "folder"):
        shared = None if request.param == "ipc" else folder
        found: Any = VllmEngine(path, micro_model(), dtype=torch.float32, folder=shared)
        found.worker = LLM.made.worker
        found.worker.calls.clear()
        yield found
        return
    with ExitStack() as opened:
        count = 1 if request.param == "nccl" else 2
        backend = "nccl" if request.param == "nccl" else "grpo_folder"
        workers = [Worker(micro_model(seed=9), backend) for _ in range(count)]
        url = ",".join(opened.enter_context(server(worker)) for worker in workers)
        found = VllmServer(url, micro_model(), folder=None if backend == "nccl" else folder)
        found.worker, found.workers = workers[-1], workers
        # those of the start, which close what another trainer has left open
        for worker in workers:
            assert worker.calls == ["pause", "start", "finish None", "resume"]
            worker.calls.clear()
        yield found
        assert own(workers[0].calls)[-3:] == own(found.worker.calls)[-3:]


def same_weights(engine: Any, model: Any) -> bool:
    """The engine's worker has the model's, bit for bit."""
    state = model.state_dict()
    return all(torch.equal(w, state[n]) for n, w in engine.worker.model.named_parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_completions_come_with_what_the_trainer_would_say_of_them(
    engine: Any, temperature: float
) -> None:
    """Of its own weights, at the temperature they were drawn at."""
    run = trainer(engine, sampling=Sampling(MAX_NEW_TOKENS, temperature))
    metrics = run.step()
    assert metrics["sampler_mismatch_max"] < 1e-4
    assert same_weights(engine, micro_model())
    before = deepcopy(run.model)
    assert run.step()["sampler_mismatch_max"] < 1e-4
    assert same_weights(engine, before)
    if temperature == 1:
        # these completions had rewards to learn from
        assert not same_weights(engine, micro_model()) and not same_weights(engine, run.model)
    finishes = [call for call in engine.worker.calls if call.startswith("finish")]
    # before it, a server's end of what another trainer may have left open
    assert finishes[-2:] == ["finish 0", "finish 1"] and finishes.count("finish 0") == 1


def test_seeds_come_from_torchs_generator_and_differ_within_a_group(engine: Any) -> None:
    rollouts = EngineSync(micro_model(), engine)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append(rollouts.draw([[5, 6]] * 6, Sampling(MAX_NEW_TOKENS), 0))
        # a connection that breaks is tried again, with the same seed
        engine.worker.drops = 2
    assert torch.equal(drawn[0].completion, drawn[1].completion)
    assert torch.equal(drawn[0].sampler_logp, drawn[1].sampler_logp)
    assert len({tuple(ids) for ids in drawn[0].completions()}) > 3
    long = rollouts.draw(PROMPTS, Sampling(12), 0)
    for ids, cut in zip(long.completions(), long.truncated.tolist(), strict=True):
        assert cut == (EOS not in ids) and EOS not in ids[:-1]
    assert long.prompt[0].tolist()[-1:] == [5] and long.prompt_mask.sum(1).tolist() == [1, 3] * 3


def test_an_adapter_comes_merged(engine: Any) -> None:
    model = adapted()
    EngineSync(model, engine).draw([[5]], Sampling(2), 0)
    expected = dict(ModelWeights(model))
    for name, weight in engine.worker.model.named_parameters():
        assert torch.equal(weight, expected[name])


def test_an_update_is_finished_after_an_error_too(engine: Any) -> None:
    """By an empty one without a version; its cause is told, and the next one is made whole."""
    model = micro_model()
    rollouts = EngineSync(model, engine)
    rollouts.draw([[5]], Sampling(2), 0)
    worker = engine.worker
    worker.calls.clear()
    worker.fails = MemoryError("no room")
    # the worker has given up by itself; an empty update makes it ready for the next one
    with pytest.raises(Exception, match="no room"):
        rollouts.draw([[5]], Sampling(2), 1)
    assert own(worker.calls) == ["start", "update", "start", "finish None"]
    assert not worker.active and not worker.paused
    if worker.sent is not None:
        assert worker.calls[0] == "pause"
        worker.sent.queue.clear()
    worker.calls.clear()
    rollouts.draw([[5]], Sampling(2), 2)
    assert own(worker.calls) == ["start", "update", "reset", "finish 2"]
    assert same_weights(engine, model)


def own(calls: list[str]) -> list[str]:
    """Calls of an update; a server pauses as well."""
    return [call for call in calls if call not in ("pause", "resume")]


def test_an_error_of_the_trainers_is_the_one_that_is_raised(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that cannot be read, after some that could."""

    def broken(self: ModelWeights) -> Any:
        if next(count) == 3:
            raise OSError("unreadable")
        return advance(self)

    rollouts = EngineSync(micro_model(), engine)
    advance, count = ModelWeights.__next__, iter(range(100))
    monkeypatch.setattr(ModelWeights, "__next__", broken)
    # a worker that would otherwise wait for the rest
    monkeypatch.setattr(Worker, "received", lambda self, **_: [])
    engine.worker.calls.clear()
    with pytest.raises(OSError, match="unreadable"):
        rollouts.draw([[5]], Sampling(2), 0)
    # a server may get to the announcement, sent beside the weights, after it is told of the end
    assert engine.worker.calls.count("finish None") == 1 and not engine.worker.active
    assert rollouts.version is None


def test_another_trainer_on_the_same_engine_is_noticed(engine: Any) -> None:
    rollouts = EngineSync(micro_model(), engine)
    rollouts.draw([[5]], Sampling(2), 0)
    engine.worker.version = "another/0"
    with pytest.raises(RuntimeError, match="of step 0, got version None; does another run"):
        rollouts.draw([[5]], Sampling(2), 0)


def test_what_a_dead_trainer_has_left_is_closed(vllm: None, tmp_path: Path) -> None:
    """An open update, a pause, and the layers of an update that failed."""
    model, folder = micro_model(), str(tmp_path)
    for left in ({"active": True, "paused": True}, {"failed": 1}):
        worker = Worker(micro_model(seed=9), "grpo_folder", **left)
        with server(worker) as url:
            found: Any = VllmServer(url, model, folder=folder)
            assert not worker.active and not worker.failed and not worker.paused
            found.worker = worker
            EngineSync(model, found).draw([[5]], Sampling(2), 0)
            assert same_weights(found, model)


def test_several_servers_share_the_prompts(vllm: None, tmp_path: Path) -> None:
    """In order, by halves; the completions are those of a single server."""
    drawn, workers = [], [Worker(micro_model(seed=9), "grpo_folder") for _ in range(2)]
    with server(workers[0]) as first, server(workers[1]) as second:
        for url in (first, f"{first}, {second}"):
            sync = EngineSync(micro_model(), VllmServer(url, micro_model(), folder=str(tmp_path)))
            torch.manual_seed(4)
            drawn.append(sync.draw([[n, 5] for n in range(2, 9)], Sampling(MAX_NEW_TOKENS), 0))
        assert drawn[0].completions() == drawn[1].completions()
        assert torch.equal(drawn[0].sampler_logp, drawn[1].sampler_logp)
        assert [len(worker.asked) for worker in workers] == [7 + 3, 4]
        # one of them has other weights
        workers[1].version = "default"
        with pytest.raises(RuntimeError, match="of step 0, got version None"):
            sync.draw([[5]], Sampling(2), 0)
        workers[1].name = "larger"
        with pytest.raises(ValueError, match=r"of one model, got \['larger', 'micro'\]"):
            VllmServer(f"{first},{second}", micro_model(), folder=str(tmp_path))


@pytest.mark.slow
def test_the_end_of_the_program_waits_for_no_answer() -> None:
    """As after a second Ctrl-C."""
    program = (
        "import sys, time\n"
        "from grpo_core.trainer.engine import in_background\n"
        "from grpo_core.trainer.vllm.server import Server, Servers\n"
        "in_background(lambda: Servers([Server(sys.argv[1])]).post('pause', {}))\n"
        "sys.stdin.readline()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [sys.executable, "-c", program, url]
        with (
            subprocess.Popen(words, stdin=subprocess.PIPE) as process,
            silent.accept()[0] as connection,
        ):
            assert connection.recv(4) == b"POST"
            try:
                process.communicate(b"\n", timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        assert process.returncode == 0


def test_calls_in_threads() -> None:
    """Results in order, by no more threads than allowed; after an error no second calls."""
    running, most, begun = [], [], []

    def call(number: int) -> int:
        running.append(number)
        most.append(len(running))
        # the first ones end last
        threading.Event().wait(0.02 / (1 + number))
        running.remove(number)
        return number**2

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(f"number {number}")

    def fail_first(number: int) -> None:
        if number == 0:
            fail(number)
        begun.append(number)
        threading.Event().wait(0.05)

    assert in_threads(call, 4, range(12)) == [number**2 for number in range(12)]
    assert 1 < max(most) <= 4
    with pytest.raises(ValueError, match="number 0"):
        in_threads(fail, 1, range(12))
    assert begun == [0]
    # another thread goes on with what it has begun
    begun.clear()
    with pytest.raises(ValueError, match="number 0"):
        in_threads(fail_first, 2, range(12))
    assert {*begun} >= {0, 1} and len(begun) < 12
    # a server that fails does not keep others from being asked
    begun.clear()
    with pytest.raises(ValueError, match="number 0"):
        in_threads(fail, 4, range(12))
    assert sorted(begun) == [0, 1, 2, 3]
    assert in_threads(call, 4, []) == []


def test_one_of_two_servers_is_gone(vllm: None, tmp_path: Path) -> None:
    """The error names it, the other one is left as it should be, and a new one gets all weights."""
    model, path = micro_model(), str(tmp_path)
    workers = [Worker(micro_model(seed=9), "grpo_folder") for _ in range(3)]
    with server(workers[0]) as first, ExitStack() as gone:
        second = gone.enter_context(server(workers[1]))
        sync = EngineSync(model, VllmServer(f"{first},{second}", model, folder=path))
        sync.draw(PROMPTS, Sampling(2), 0)
        gone.close()
        for version in (0, 1):
            with pytest.raises(ConnectionError, match=rf"^{second}/.*is the server up"):
                sync.draw(PROMPTS, Sampling(2), version)
            assert not workers[0].active and not workers[0].paused
            assert workers[0].version.endswith("/0")
        with server(workers[2]) as third:
            sync = EngineSync(model, VllmServer(f"{first},{third}", model, folder=path))
            sync.draw(PROMPTS, Sampling(2), 1)
            assert workers[0].version == workers[2].version != workers[1].version


@pytest.mark.parametrize("url", ["", "http://a:1,", "http://a:1, http://a:1/"])
def test_a_server_given_twice_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout_url: expected one or several that differ, got"):
        VllmServer(url, micro_model(), folder=str(tmp_path))


def test_weights_have_the_dtype_of_the_server(vllm: None, tmp_path: Path) -> None:
    half = micro_model(seed=9).bfloat16()
    workers = [Worker(half, "nccl"), Worker(micro_model(), "nccl")]
    with server(workers[0]) as first, server(workers[1]) as second:
        found: Any = VllmServer(first, micro_model())
        EngineSync(micro_model(), found).draw([[5]], Sampling(2), 0)
        found.worker = workers[0]
        assert found.dtype == torch.bfloat16 and same_weights(found, micro_model().bfloat16())
        with pytest.raises(ValueError, match=r"one dtype, got \['bfloat16', 'float32'\]"):
            VllmServer(f"{first},{second}", micro_model())


def test_a_server_that_is_too_short_is_refused(vllm: None) -> None:
    worker = Worker(micro_model(), "nccl", longest=20)
    with server(worker) as url:
        VllmServer(url, micro_model(), longest=20)
        with pytest.raises(
            ValueError, match=r"at most 20 tokens with the longest prompt, .* got 21"
        ):
            VllmServer(url, micro_model(), longest=21)


def test_keys_of_old_weights_are_discarded_or_the_update_fails(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, asked = EngineSync(micro_model(), engine), []

    def reset(self: Worker) -> bool:
        asked.append(self)
        return len(asked) > refusals

    monkeypatch.setattr(Worker, "reset_prefix_cache", reset)
    refusals = 4
    rollouts.draw([[5]], Sampling(2), 0)
    assert len(asked) > 4
    refusals = 10**6
    with pytest.raises(RuntimeError, match="reset_prefix_cache: expected success"):
        rollouts.draw([[5]], Sampling(2), 1)
    assert rollouts.version is None and engine.worker.version.endswith("/0")
    assert not engine.worker.active and not engine.worker.paused


def test_files_come_in_pieces_and_go(
    vllm: None, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    engine: Any = VllmEngine(path, micro_model(), folder=str(folder))
    engine.worker, left = LLM.made.worker, folder / "grpo_core-1-0.safetensors.part"
    left.write_text("of a run that was killed")
    os.utime(left, (0, 0))
    other = folder / "grpo_core-2-0.safetensors"
    other.write_text("of a run beside this one")
    monkeypatch.setattr(vllm_files, "PIECE_BYTES", 1000)
    seen = []
    monkeypatch.setattr(
        LLM,
        "update_weights",
        spied(LLM.update_weights, lambda: seen.append(len([*folder.iterdir()]))),
    )
    EngineSync(micro_model(), engine).draw([[5]], Sampling(2), 0)
    assert same_weights(engine, micro_model())
    assert len(seen) > 3 and set(seen) == {2} and [*folder.iterdir()] == [other]


def spied(call: Any, before: Any) -> Any:
    """The method, with something to do before it."""

    def spy(*arguments: Any) -> Any:
        before()
        return call(*arguments)

    return spy


def test_files_elsewhere_are_refused(vllm: None, path: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    engine = VllmEngine(path, micro_model(), folder=str(folder))
    save_file(micro_model().state_dict(), tmp_path / "other.safetensors")
    (folder / "link").symlink_to(tmp_path / "other.safetensors")
    worker = LLM.made.worker
    for file in ("../other.safetensors", str(tmp_path / "other.safetensors"), "link", "."):
        worker.start_weight_update()
        with pytest.raises(ValueError, match=r"file: expected one in .*weights, got"):
            worker.update_weights({"file": file})
        engine.close_update()
    missing = {"folder": str(tmp_path / "nowhere")}
    with pytest.raises(ValueError, match="rollout_folder: expected one that vLLM shares"):
        worker.init_weight_transfer_engine(missing)


FILTERED = Sampling(MAX_NEW_TOKENS, 0.7, top_p=0.9, top_k=6, min_p=0.05)


@pytest.fixture(params=["colocated", "server"])
def keeping(request: pytest.FixtureRequest, vllm: None, path: str) -> Iterator[Any]:
    """Either one, started so that it returns what the filters kept."""
    if request.param == "colocated":
        found: Any = VllmEngine(path, micro_model(), dtype=torch.float32, keeps=True)
        found.worker = LLM.made.worker
        yield found
        return
    worker = Worker(micro_model(seed=9), "nccl", keeps=True)
    with server(worker) as url:
        found = VllmServer(url, micro_model(), keeps=True)
        found.worker = worker
        yield found


@pytest.mark.parametrize("sampling", [FILTERED, Sampling(MAX_NEW_TOKENS, top_p=0.8)])
def test_what_the_filters_kept_is_replayed(keeping: Any, sampling: Sampling) -> None:
    run = trainer(keeping, sampling=sampling, **ONE_UPDATE, **LARGER)
    for _ in range(2):
        metrics = run.step()
        assert metrics["sampler_mismatch_max"] <= 1e-5
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    drawn = EngineSync(micro_model(), keeping).draw(PROMPTS, sampling, 2)
    assert drawn.kept is not None
    sizes = drawn.kept.offsets.diff()
    assert len(sizes) == drawn.completion_mask.sum()
    assert sizes.min() >= 1 and 1 < sizes.max() < VOCABULARY


def test_evaluations_of_such_an_engine_are_greedy_or_filtered_and_carry_nothing(
    keeping: Any,
) -> None:
    """It refuses temperature 0, which is a top-k of 1."""
    rollouts = EngineSync(micro_model(), keeping)
    greedy = rollouts.draw(PROMPTS, Sampling(4, 0.0, top_p=0.9), 0)
    assert greedy.kept is None
    assert greedy.completions() == rollout(micro_model(), PROMPTS, Sampling(4, 0.0)).completions()
    assert rollouts.draw(PROMPTS, replace(FILTERED, replay=False), 0).kept is None


def test_an_engine_that_lost_the_masks_is_noticed(keeping: Any) -> None:
    keeping.worker.maskless = True
    with pytest.raises(RuntimeError, match="the kept ids of every token, got no sampling_mask"):
        EngineSync(micro_model(), keeping).draw([[5]], FILTERED, 0)


def test_an_engine_that_was_not_started_for_it_is_refused(engine: Any) -> None:
    with pytest.raises(RuntimeError, match="the kept ids of every token, got no sampling_mask"):
        EngineSync(micro_model(), engine).draw([[5]], FILTERED, 0)
    drawn = EngineSync(micro_model(), engine).draw([[5]] * 4, replace(FILTERED, replay=False), 0)
    assert drawn.kept is None


def test_a_server_that_was_started_otherwise_is_refused(vllm: None) -> None:
    with (
        server(Worker(micro_model(), "nccl")) as url,
        pytest.raises(
            ValueError, match=r"--return-sampling-mask, of vLLM 0\.28 or later.* without"
        ),
    ):
        VllmServer(url, micro_model(), keeps=True)
    with (
        server(Worker(micro_model(), "nccl", keeps=True)) as url,
        pytest.raises(ValueError, match=r"without --return-sampling-mask, since .*, got one with"),
    ):
        VllmServer(url, micro_model())
    with (
        server(Worker(micro_model(), "nccl")) as url,
        pytest.raises(ConnectionError, match=r"VLLM_SERVER_DEV_MODE=1 and --enable-scale-out\?"),
    ):
        vllm_server.Server(url).post("inference/v2/generate", {})


def test_large_weights_and_many_pieces(
    vllm: None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer holds the largest weight; vLLM's GPU memory is left in between, and no level 2."""
    monkeypatch.setattr(vllm_engine, "BUFFER_BYTES", 1)
    engine = VllmEngine(path, micro_model(), dtype=torch.bfloat16, sleep=True, longest=32)
    llm = LLM.made
    assert llm.asleep
    rollouts = EngineSync(micro_model(), engine)
    drawn = rollouts.draw(PROMPTS, Sampling(4), 0)
    assert llm.worker.calls.count("update") > 3 and llm.worker.calls[-1] == "finish 0"
    assert llm.asleep and llm.resets == 1
    state = micro_model().state_dict()
    for name, weight in llm.worker.model.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, state[name].bfloat16())
    assert drawn.sampler_logp.dtype == torch.float32


def test_a_server_that_cannot_serve_is_refused(vllm: None) -> None:
    worker = Worker(micro_model(), "nccl")
    with (
        server(worker, logprobs_mode="raw_logprobs") as url,
        pytest.raises(ValueError, match=r"--logprobs-mode processed_logprobs .* 'raw_logprobs'"),
    ):
        VllmServer(url, micro_model())
    with (
        server(worker, backend=None) as url,
        pytest.raises(ValueError, match=r"--weight-transfer-config .*nccl.*, got None"),
    ):
        VllmServer(url, micro_model())
    with pytest.raises(ConnectionError, match="is the server up"):
        VllmServer("http://127.0.0.1:9", micro_model())
    with (
        server(worker) as url,
        pytest.raises(ConnectionError, match=r"404, .*VLLM_SERVER_DEV_MODE=1"),
    ):
        VllmServer(f"{url}/elsewhere", micro_model())


def test_ends_that_the_trainer_does_not_know_are_an_error() -> None:
    check_ends([Completion([4, EOS], [], "stop"), Completion([4, 5], [], "length")], [EOS])
    for ids, reason in (([4, 5], "stop"), ([], "stop"), ([4], "abort"), ([4], None)):
        with pytest.raises(RuntimeError, match="expected one of the end tokens"):
            check_ends([Completion([EOS], [], "stop"), Completion(ids, [], reason)], [EOS])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for make in (lambda: VllmEngine(path, micro_model()), lambda: VllmServer("", micro_model())):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'vllm>=0\.28'$"):
            make()
    for name, module in fake_vllm.modules(version="0.27.1").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match=r"vllm: expected 0\.28 or later, got 0\.27\.1"):
        VllmServer("", micro_model())
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match=r"model: expected a model on a GPU, .* got cpu"):
        VllmEngine(path, micro_model())
    on_gpu: Any = type("Model", (), {"device": torch.device("cuda", 0)})
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION: expected 1"):
        vllm_engine.sending_gpu(on_gpu)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING: expected vLLM in"):
        vllm_engine.sending_gpu(on_gpu)
    with pytest.raises(ValueError, match=r"memory: expected a share between 0 and 1, got 1\.5"):
        VllmEngine(path, micro_model(), memory=1.5)


def test_the_command_trains_with_vllm(
    vllm: None,
    files: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Held-out answers are the engine's, too; on a CPU it computes in float32."""
    more = ["--rollout", "vllm", "--sampler_correction", "truncate", "--held_out", "1", *SHORT]
    assert main(options(files, tmp_path / "run", *more)) == 0
    found = records(tmp_path / "run")[1:]
    assert all(0 < m["sampler_mismatch_max"] < 1e-4 for m in found)
    assert all(m["factor_mean"] == pytest.approx(1, abs=0.1) for m in found)
    calls = LLM.made.worker.calls
    assert [call for call in calls if "finish" in call] == [f"finish {n}" for n in range(3)]
    assert LLM.made.worker.model.dtype == torch.float32


@pytest.mark.parametrize("replayed", [True, False])
def test_the_command_trains_on_filtered_completions(
    vllm: None,
    files: Path,  # noqa: F811
    tmp_path: Path,
    replayed: bool,
) -> None:
    """Held-out ones are filtered alike, and greedy; the server is asked for sets only to replay."""
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    worker = Worker(model, "nccl", keeps=replayed)
    with server(worker) as url:
        more = ["--rollout", "vllm-server", "--rollout_url", url, "--held_out", "1"]
        more += ["--top_p", "0.8", "--top_k", "9", "--min_p", "0.01", *SHORT]
        if replayed:
            assert main(options(files, tmp_path / "run", *more)) == 0
        else:
            with pytest.warns(UserWarning, match="replay_sampling is off"):
                more += ["--replay_sampling", "False"]
                assert main(options(files, tmp_path / "run", *more)) == 0
    greedy = {"temperature": 1.0, "top_k": 1} if replayed else {"temperature": 0.0, "top_k": 9}
    for asked in worker.asked:
        assert (asked.top_p, asked.min_p) == (0.8, 0.01)
        assert {"temperature": asked.temperature, "top_k": asked.top_k} in (
            {"temperature": 1.0, "top_k": 9},
            greedy,
        )
    for metrics in records(tmp_path / "run")[1:]:
        assert (metrics["sampler_mismatch"] < 1e-4) == replayed
    written = json.loads((tmp_path / "run/config.json").read_text("utf-8"))
    assert [written[name] for name in ("top_p", "top_k", "min_p")] == [0.8, 9, 0.01]


def test_the_command_trains_with_a_server_and_draws_again(
    vllm: None,
    files: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """It goes on from a checkpoint with the weights of that, whatever the server has."""
    worker = Worker(AutoModelForCausalLM.from_pretrained(files / "model").eval(), "nccl")
    with server(worker) as url:
        more = ["--rollout", "vllm-server", "--rollout_url", url, "--held_out", "0"]
        more += ["--dynamic_sampling", "resample", "--max_resamples", "1", "--temperature", "0.8"]
        more += ["--sampler_correction", "reject", *SHORT]
        words = options(files, tmp_path / "run", *more)
        assert main(words) == 0
        found = records(tmp_path / "run")[1:]
        assert all(m["groups_drawn"] == 2 * (1 + m["resamples"]) for m in found)
        assert all(m["sampler_mismatch"] < 0.1 for m in found)
        worker.calls.clear()
        (tmp_path / "run/checkpoints/step-000002").rename(tmp_path / "elsewhere")
        assert main([*words, "--resume", "True"]) == 0
        assert [call for call in worker.calls if "finish" in call] == ["finish None", "finish 1"]
        again = records(tmp_path / "run")[1:]
        assert [record["step"] for record in again] == [1, 2]
        assert again == found


def test_a_server_that_is_restarted_ends_the_run_with_a_line(
    vllm: None,
    files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its weights are then the checkpoint's; the same command resumes."""

    def restarted(worker: Worker, weight_version: str | None = None) -> None:
        finish(worker, weight_version)
        if (weight_version or "").endswith("/1"):
            worker.version = "default"

    finish = Worker.finish_weight_update
    worker = Worker(AutoModelForCausalLM.from_pretrained(files / "model").eval(), "nccl")
    with server(worker) as url, monkeypatch.context() as patch:
        patch.setattr(Worker, "finish_weight_update", restarted)
        more = ["--rollout", "vllm-server", "--rollout_url", url, "--held_out", "0", *SHORT]
        words = options(files, tmp_path / "run", *more)
        assert main(words) == 1
        assert "stopped: weight_version: expected completions" in capsys.readouterr().err
        patch.undo()
        assert main([*words, "--resume", "True"]) == 0
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2]


def test_the_command_says_what_is_missing(
    files: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(options(files, tmp_path, "--rollout", "vllm"))
    assert (
        "--rollout: needs vllm, not installed: pip install 'vllm>=0.28'" in capsys.readouterr().err
    )
