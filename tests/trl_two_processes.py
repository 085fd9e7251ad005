"""Two processes, gloo on the CPU: whole trainings under DDP, single losses under FSDP2.

The processes are forked from a server that has imported everything once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch


def on_two(output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What stock TRL and our trainer do on two processes, with these options.

    Returns:
        "ddp": for each of the two, parameters before and after a training and the log, of rank 0,
        and whether the ranks agree; "fsdp": for each, loss, gradients and metrics of rank 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trl_training", "grpo_core.integrations.trl"])
    arguments = [(rank, port, output, options) for rank in (0, 1)]
    ranks = [context.Process(target=_rank, args=given) for given in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return torch.load(output / "found.pt", weights_only=False)


def _rank(rank: int, port: int, output: Path, options: dict[str, Any]) -> None:
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

    kinds = (GRPOTrainer, FusedGRPOTrainer)
    found = {
        "ddp": [_trained(kind, output, rank, options) for kind in kinds],
        "fsdp": [_sharded(kind, output, rank, options) for kind in kinds],
    }
    if rank == 0:
        torch.save(found, output / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _trained(kind: Any, output: Path, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """A training under DDP."""
    from tests.trl_training import logged, make_trainer, parameters, quick

    torch.manual_seed(rank)
    trainer = make_trainer(kind, output, max_steps=3, **options)
    assert trainer.accelerator.num_processes == 2
    before = parameters(trainer)
    with quick():
        trainer.train()
    after = parameters(trainer)
    flat = torch.cat([p.flatten() for p in after.values()])
    ranks = trainer.accelerator.gather(flat[None])
    return {
        "before": before,
        "after": after,
        "log": logged(trainer),
        "agree": bool((ranks[0] == ranks[1]).all()),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def _sharded(kind: Any, output: Path, rank: int, options: dict[str, Any]) -> Any:
    """A loss with all parameters sharded."""
    from torch.distributed.fsdp import fully_shard

    from tests.trl_training import Batch, make_trainer, micro_batch, outcome

    trainer = make_trainer(kind, output, **options)
    inputs = micro_batch(trainer, Batch(seed=rank, tools=True))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (*trainer.model.model.layers, trainer.model):
        fully_shard(layer, mesh=mesh)
    found = outcome(trainer, inputs, 2, True)
    gradients = {name: g.full_tensor() for name, g in found.gradients.items() if g is not None}
    return replace(found, gradients=gradients)
