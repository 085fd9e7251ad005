"""Two processes that `kill -9` meets in the middle of a sharded save, again and again.

    python -m tests.killed_ranks FOLDER

What is imported is imported once; every pair is forked from here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from grpo_core.trainer import checkpoint
from grpo_core.trainer.distributed import barrier
from grpo_core.trainer.trainer import Trainer
from tests.micro import micro_model
from tests.test_checkpoint import trainer
from tests.trainer_ranks import moments, weights

RANKS = 2
# where a run is killed, at the save of which step; the last pair is left alone
PLACES = (("inside a shard", 2), ("before the rename", 3), ("after the rename", 4), ("never", 0))


def sharded_run(folder: Path) -> Trainer:
    """Dropout draws numbers; a save after every step, of which one stays."""
    return trainer(folder, micro_model(attention_dropout=0.1), shard="fsdp", keep_checkpoints=1)


def end() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def lay_trap(place: str, step: int, rank: int) -> None:
    """Makes this process end at the given place of the given step's save."""
    name, synchronised, whole, renamed = f"{step:06d}", os.fsync, torch.save, Path.rename

    def half_a_shard(handle: int) -> None:
        """The second process writes nothing but its shards."""
        file = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if name in file.parts[-3] and file.suffix == ".distcp":
            size = os.fstat(handle).st_size
            assert size > 1000
            os.ftruncate(handle, size // 2)
            end()
        synchronised(handle)

    def half_a_state(state: Any, path: Any, **options: Any) -> None:
        whole(state, path, **options)
        if isinstance(path, Path) and name in path.parent.name:
            path.write_bytes(path.read_bytes()[:1000])
            end()

    def rename(self: Path, to: Path) -> Path:
        done = renamed(self, to)
        if name in to.name:
            end()
        return done

    if place == "inside a shard" and rank == 1:
        os.fsync = half_a_shard
    elif place == "before the rename" and rank == 0:
        checkpoint.torch.save = half_a_state
    elif place == "after the rename" and rank == 0:
        Path.rename = rename  # type: ignore[method-assign, assignment]


def work(rank: int, folder: str, number: int) -> None:
    """One process of a pair: goes on with the run, into its trap if there is one."""
    torch.set_num_threads(1)
    place = Path(folder)
    meeting = f"file://{folder}/meeting-{number}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    if number == 0:
        straight = sharded_run(place / "straight")
        straight.train()
        found |= {"weights": weights(straight.model), "moments": moments(straight)}
    run = sharded_run(place / "parts")
    found["resumed"] = run.resume()
    torch.save(found, place / f"before-{number}-{rank}.pt")
    barrier()
    lay_trap(*PLACES[number], rank)
    run.train()
    found = {"weights": weights(run.model), "moments": moments(run)}
    torch.save(found, place / f"after-{number}-{rank}.pt")
    dist.destroy_process_group()


def pair(folder: str, number: int) -> list[int | None]:
    """Exit codes of two processes; when one is killed the other is, unless it ends by itself."""
    context = torch.multiprocessing.start_processes(
        work, (folder, number), nprocs=RANKS, join=False, start_method="fork"
    )
    while all(process.is_alive() for process in context.processes):
        time.sleep(0.02)
    if any(process.exitcode == -signal.SIGKILL for process in context.processes):
        for process in context.processes:
            process.kill()
    for process in context.processes:
        process.join()
    return [process.exitcode for process in context.processes]


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    codes = [pair(sys.argv[1], number) for number in range(len(PLACES))]
    torch.save(codes, Path(sys.argv[1]) / "codes.pt")
