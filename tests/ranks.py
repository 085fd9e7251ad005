"""What each of two processes does in test_distributed: a wrapped model, its half of a batch.

Every rank divides by its share of the global count, since wrappers average over the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grpo_core import LogpRequest, LossRequest, with_fused_head, without_fused_head
from tests.tiny_models import batch, tiny

RANKS = 2
HALVES = (slice(0, 2), slice(2, 4))
# the float32 that a lower precision would round away shows in a ratio
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)


def plain(model: Any) -> nn.Module:
    """As it is."""
    return model


def parallel(model: Any, **options: Any) -> nn.Module:
    """Replicated."""
    return DistributedDataParallel(model, **options)


def sharded(model: Any, *, head: bool = False, together: bool = False, **options: Any) -> nn.Module:
    """In shards: each layer, the rest as the root; or the head apart, or with its embedding."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard(model.lm_head, **options)
    if together:
        fully_shard([model.model.embed_tokens, model.model.norm, model.lm_head], **options)
    return fully_shard(model, **options)


# name -> (wrapper, its options, options of the model, of the batch)
Case = tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any], dict[str, Any]]
TIED, CHECKPOINTED = {"tie_word_embeddings": True}, {"checkpointed": True}
CASES: dict[str, Case] = {
    "replicas": (parallel, {}, {}, {}),
    "replicas, tied": (parallel, {}, TIED, {}),
    "replicas, unused parameters": (parallel, {"find_unused_parameters": True}, {}, {}),
    "replicas, static graph": (parallel, {"static_graph": True}, CHECKPOINTED, {}),
    "replicas, a rank without rows": (parallel, {}, {}, {"masked": True}),
    "replicas, accumulated": (parallel, {}, {}, {"accumulate": True}),
    "replicas, scaled": (parallel, {}, {}, {"scale": 0.25}),
    "replicas, sequences": (parallel, {}, TIED, {"objective": "gspo"}),
    "shards": (sharded, {}, {}, {}),
    "shards, tied": (sharded, {}, TIED, {}),
    "shards, head first": (sharded, {}, {}, {"head_first": True}),
    "shards, head apart": (sharded, {"head": True}, {}, {}),
    "shards, head kept": (sharded, {"head": True, "reshard_after_forward": False}, {}, {}),
    "shards, tied, together": (sharded, {"together": True}, TIED, {}),
    "shards, checkpointed": (sharded, {"head": True}, CHECKPOINTED, {}),
    "shards, capped": (
        sharded,
        {"head": True},
        {"family": "Gemma2"} | {"tie_word_embeddings": False},
        {},
    ),
    "shards, a rank without rows": (sharded, {"head": True}, {}, {"masked": True}),
    "shards, tied, a rank without rows": (sharded, {}, TIED, {"masked": True}),
    "shards, accumulated": (sharded, {"head": True}, {}, {"accumulate": True}),
    "shards, scaled": (sharded, {"head": True}, {}, {"scale": 0.25}),
    "shards, sequences": (sharded, {"head": True}, {}, {"objective": "gspo"}),
}


def make(case: Case) -> tuple[Any, Tensor, dict[str, Any]]:
    """(model, ids, arguments of the loss over the whole batch), the same on every rank."""
    _, _, options, given = case
    torch.manual_seed(0)
    options = dict(options)
    checkpointed = options.pop("checkpointed", False)
    model = tiny(**options).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, arguments = batch()
    arguments["objective"] = given.get("objective", "dapo")
    if given.get("masked"):
        arguments["target"][HALVES[1]] = -100
    counted = arguments["target"] != -100
    if arguments["objective"] == "gspo":
        counted = counted.any(1)
    return model, ids, arguments | {"normalizer": float(counted.sum())}


def part(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The arguments of some sequences."""
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in arguments.items()}


def whole(value: Tensor) -> Tensor:
    """All of a gradient."""
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def synchronised(model: Any, on: bool) -> Any:
    """Whether a backward averages over the ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    elif not on:
        return model.no_sync()
    return nullcontext()


def found_by(case: Case, rank: int) -> dict[str, Any]:
    """Loss of all ranks, the whole gradients, and log-probabilities of this rank's half."""
    wrap, options, _, given = case
    model, ids, arguments = make(case)
    if given.get("head_first"):
        model = wrap(with_fused_head(model), **options)
    else:
        model = wrap(model, **options)
        with_fused_head(getattr(model, "module", model))
    half = HALVES[rank]
    steps = [slice(k, k + 1) for k in range(half.start, half.stop)]
    total = torch.zeros(())
    for rows in steps if given.get("accumulate") else [half]:
        here = part(arguments, rows) | {"normalizer": arguments["normalizer"] / RANKS}
        with synchronised(model, rows.stop == half.stop):
            out = model(input_ids=ids[rows], request=LossRequest(**here))
            (given.get("scale", 1.0) * out.loss).backward()
        total += out.loss.detach() / RANKS
    dist.all_reduce(total)
    module = getattr(model, "module", model)
    gradients = {k: whole(p.grad) for k, p in module.named_parameters()}
    with torch.no_grad():
        asked = model(input_ids=ids[half], request=LogpRequest(arguments["target"][half]))
    return {"loss": total, "gradients": gradients, "logp": asked.logp}


def alone(case: Case) -> dict[str, Any]:
    """The same by one process, over the whole batch."""
    model, ids, arguments = make(case)
    with_fused_head(model)
    out = model(input_ids=ids, request=LossRequest(**arguments))
    (case[3].get("scale", 1.0) * out.loss).backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    with torch.no_grad():
        asked = model(input_ids=ids, request=LogpRequest(arguments["target"]))
    return {"loss": out.loss.detach(), "gradients": gradients, "logp": asked.logp}


def mixed(rank: int) -> dict[str, Any]:
    """What a request carries, and gives, under mixed precision."""
    found = {}
    for name, policy in (("bfloat16", BF16), ("bfloat16 outputs", NARROW)):
        model, ids, arguments = make(CASES["shards"])
        model = with_fused_head(sharded(model, head=True, mp_policy=policy))
        half = HALVES[rank]
        here = part(arguments, half)
        out = model(input_ids=ids[half], request=LossRequest(**here))
        out.loss.backward()
        valid = here["target"] != -100
        ratio = torch.exp(out.logp - here["old_logp"])
        found[name] = {
            "loss": out.loss.dtype,
            "metrics": float(out.metrics["loss"]),
            "ratio_error": float((ratio - out.ratio)[valid].abs().amax()),
            "gradient": all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters()),
        }
    return found


def outside() -> str:
    """The error of a loss that is taken past the wrapper."""
    model, ids, arguments = make(CASES["shards"])
    model = with_fused_head(sharded(model))
    model(input_ids=ids, request=LogpRequest(arguments["target"]))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    around = model.fused_head
    try:
        LossRequest(**arguments).of(torch.randn(*ids.shape, 32), model.lm_head, around)
    except ValueError as error:
        return str(error)
    return "none"


def undone() -> dict[str, Any]:
    """A head that was there before the shards: taken off under them, and put on again."""
    model, ids, arguments = make(CASES["shards"])
    model = sharded(with_fused_head(model))
    request = LossRequest(**arguments)
    found = {"loss": model(input_ids=ids, request=request).loss.detach()}
    without_fused_head(model)
    found["logits"] = model(input_ids=ids).logits.shape
    try:
        model(input_ids=ids, request=request)
    except ValueError as error:
        found["error"] = str(error)
    found["again"] = with_fused_head(model)(input_ids=ids, request=request).loss.detach()
    return found


def work(rank: int, folder: str) -> None:
    """A rank: every case, results to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {name: found_by(case, rank) for name, case in CASES.items()}
    found |= {"mixed": mixed(rank), "outside": outside(), "undone": undone()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path) -> list[dict[str, Any]]:
    """What every rank found."""
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
