"""The trainer's ranks and vLLM servers as one Ray job on a cluster.

    pip install ray
    python examples/ray_cluster.py --ranks 64 --servers 8 -- run.yaml --shard fsdp

Ray places processes and ends them together; nothing else goes through it. A rank is a Ray actor
that runs `python -m grpo_core.reinforce`, with the environment that torchrun would give it and a
GPU of its own if the cluster has some. A server is an actor that runs `vllm serve`; the ranks get
the addresses of all servers. What follows `--` are options of `grpo_core.reinforce`; the run
directory must be a folder that all nodes share. Without `--servers` the model samples by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

TRAIN = f"{sys.executable} -m grpo_core.reinforce"
SERVE = "vllm serve {model} --logprobs-mode processed_logprobs --weight-transfer-config {transfer}"
# seconds until a server answers, and between questions
START, PAUSE = 1800.0, 2.0
# seconds for a checkpoint
GRACE = 60.0


@ray.remote
class Process:
    """A command on some node; it ends with the actor."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """This node's address, and a free port."""
        with socket.socket() as found:
            found.bind(("", 0))
            return ray.util.get_node_ip_address(), found.getsockname()[1]

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the command; what it prints goes to Ray's log of the actor."""
        self.process = subprocess.Popen([*command], env={**os.environ, **environment})

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def stop(self) -> None:
        """Ends the command as Ctrl-C does: a trainer saves a checkpoint first."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                # waits for a rank that has failed
                self.process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; returns the largest exit status of the ranks."""
    given, options = parse(sys.argv[1:] if arguments is None else arguments)
    ray.init(address=given.address, log_to_driver=True)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    bundle = {"CPU": given.cpus, **({"GPU": 1} if gpus else {})}
    group = placement_group([bundle] * (given.ranks + given.servers), strategy="PACK")
    ray.get(group.ready())
    actors = [
        Process.options(  # type: ignore[attr-defined]
            num_cpus=given.cpus,
            num_gpus=gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, nth),
        ).remote()
        for nth in range(given.ranks + given.servers)
    ]
    ranks, servers = actors[: given.ranks], actors[given.ranks :]
    try:
        if servers:
            options += ["--rollout", "vllm-server", "--rollout_url", start_servers(servers, given)]
        start_ranks(ranks, [*shlex.split(given.train), *options])
        return wait(ranks, servers)
    finally:
        ray.get([actor.stop.remote() for actor in actors])
        remove_placement_group(group)
        ray.shutdown()


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the job, and those of the trainer after `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--address", help="of the Ray cluster; None starts one on this machine")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train")
    parser.add_argument("--servers", type=int, default=0, help="vLLM servers")
    parser.add_argument("--cpus", type=int, default=1, help="CPU cores of a process")
    parser.add_argument("--model", default="", help="what the servers load at first")
    parser.add_argument("--backend", default="nccl", help="of vLLM's transfer of weights")
    parser.add_argument("--serve", default=SERVE, help="command of a server, without its address")
    parser.add_argument("--train", default=TRAIN, help="command of a rank, without its options")
    parser.add_argument("options", nargs="*", help="after --: those of grpo_core.reinforce")
    given = parser.parse_args(arguments)
    if given.servers and not given.model:
        parser.error("--model: expected the model that the servers load")
    return given, list(given.options)


def start_servers(servers: Sequence[Process], given: argparse.Namespace) -> str:
    """Starts vLLM, waits until all servers answer, and returns their URLs, joined by commas."""
    transfer = shlex.quote(json.dumps({"backend": given.backend}))
    words = shlex.split(given.serve.format(model=shlex.quote(given.model), transfer=transfer))
    urls = []
    for server in servers:
        host, port = ray.get(server.address.remote())
        place = ["--host", host, "--port", str(port)]
        ray.get(server.start.remote([*words, *place], {"VLLM_SERVER_DEV_MODE": "1"}))
        urls.append(f"http://{host}:{port}")
    ends = time.monotonic() + START
    for server, url in zip(servers, urls, strict=True):
        while not answers(f"{url}/health"):
            if ray.get(server.status.remote()) is not None or time.monotonic() > ends:
                raise RuntimeError(f"server: expected an answer at {url}, got none; see its log")
            time.sleep(PAUSE)
    return ",".join(urls)


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        with urllib.request.urlopen(url, timeout=PAUSE) as answer:
            return answer.status == 200
    except OSError:
        return False


def start_ranks(ranks: Sequence[Process], command: Sequence[str]) -> None:
    """Starts every rank with the environment that torchrun gives."""
    host, port = ray.get(ranks[0].address.remote())
    shared = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    for nth, one in enumerate(ranks):
        # Ray shows each actor only its own GPU
        environment = {**shared, "RANK": str(nth), "LOCAL_RANK": "0"}
        ray.get(one.start.remote(list(command), environment))


def wait(ranks: Sequence[Process], servers: Sequence[Process]) -> int:
    """The largest exit status once all ranks have ended; any process that fails ends the job.

    Raises:
        RuntimeError: a server has ended.
    """
    while True:
        statuses = ray.get([one.status.remote() for one in ranks])
        if any(statuses) or None not in statuses:
            return max(abs(status or 0) for status in statuses)
        if any(status is not None for status in ray.get([s.status.remote() for s in servers])):
            raise RuntimeError("server: expected one that runs, got one that has ended")
        time.sleep(PAUSE)


if __name__ == "__main__":
    raise SystemExit(main())
