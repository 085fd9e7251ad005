"""A training over two processes, gloo on the CPU: what `test_two_processes` starts.

The processes are forked from a server that has imported everything once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch


def train_on_two(output: Path, kinds: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains with each kind of trainer, "stock" or "ours", one after the other.

    Returns:
        For each: parameters before and after, and the log, of rank 0, and whether all ranks agree.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trl_training", "grpo_core.integrations.trl"])
    ranks = [
        context.Process(target=_rank, args=(rank, port, output, kinds, options)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return torch.load(output / "trained.pt", weights_only=False)


def _rank(rank: int, port: int, output: Path, kinds: list[str], options: dict[str, Any]) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from trl import GRPOTrainer

    from grpo_core.integrations.trl import FusedGRPOTrainer
    from tests.trl_training import logged, make_trainer, parameters, quick

    found = []
    for name in kinds:
        kind = {"stock": GRPOTrainer, "ours": FusedGRPOTrainer}[name]
        torch.manual_seed(rank)
        trainer = make_trainer(kind, output, max_steps=3, **options)
        assert trainer.accelerator.num_processes == 2
        before = parameters(trainer)
        with quick():
            trainer.train()
        after = parameters(trainer)
        flat = torch.cat([p.flatten() for p in after.values()])
        ranks = trainer.accelerator.gather(flat[None])
        found.append(
            {
                "before": before,
                "after": after,
                "log": logged(trainer),
                "agree": bool((ranks[0] == ranks[1]).all()),
                "wrapped": type(trainer.model_wrapped).__name__,
            }
        )
    if rank == 0:
        torch.save(found, output / "trained.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
