"""What each of four processes does in test_sharded: its columns of a vocabulary, in every case.

Two pairs of ranks share the cases of two shards; all four compute those of four.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

# the interpreter's rounding
import tests.conftest  # noqa: F401
from grpo_core import (
    RECIPES,
    LinearHead,
    LogpRequest,
    LossRequest,
    fused_linear_loss,
    fused_loss,
    linear_logp,
    linear_token_logp,
    token_logp,
    with_fused_head,
)
from tests.tiny_models import batch, tiny

RANKS = 4
B, T, D, R_LORA = 4, 10, 8, 2
DAPO = replace(RECIPES["dapo"], beta=0.0)
OBJECTIVES = {
    "token": DAPO,
    "sequence": replace(RECIPES["gspo"], beta=0.0),
    "bonus": replace(DAPO, entropy_coef=0.1),
    "exact": replace(DAPO, kl="exact", beta=0.3),
}


@dataclass(frozen=True)
class Case:
    """A call; `sizes` are the columns of each rank, in the order of the vocabulary."""

    kind: str = "token"
    sizes: tuple[int, ...] = (30, 7)
    backend: str = "cpu"
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    order: tuple[int, ...] | None = None  # which piece each rank holds; None: its own, no starts
    inplace: bool = False
    hidden: bool = False
    head: str = "plain"
    frozen: bool = False
    reduced: bool = True
    logp: bool = False  # through `linear_logp`

    @property
    def V(self) -> int:
        return sum(self.sizes)

    def piece(self, rank: int) -> tuple[slice, int | None]:
        """The columns of a rank, and what it says of the first."""
        nth = rank if self.order is None else self.order[rank]
        start = sum(self.sizes[:nth])
        return slice(start, start + self.sizes[nth]), None if self.order is None else start


FOUR = (1, 12, 17, 7)
BF16 = {"dtype": torch.bfloat16, "temperature": 0.7}
CASES = {
    **{kind: Case(kind) for kind in OBJECTIVES},
    **{f"{kind}, four": Case(kind, FOUR, temperature=0.7) for kind in OBJECTIVES},
    **{f"{kind}, bfloat16": Case(kind, **BF16) for kind in ("bonus", "exact")},
    "float16": Case("sequence", dtype=torch.float16),
    "torch": Case("exact", FOUR, "torch", temperature=0.7),
    "torch, bonus": Case("bonus", backend="torch"),
    "one column": Case("bonus", (36, 1)),
    "in another order": Case("token", FOUR, order=(2, 0, 3, 1)),
    "in place": Case("bonus", inplace=True, order=(1, 0)),
    "hidden": Case(hidden=True),
    "hidden, four": Case("bonus", FOUR, hidden=True, head="all"),
    "hidden, sequence": Case("sequence", hidden=True, head="lora"),
    "hidden, exact": Case("exact", FOUR, hidden=True, head="capped"),
    "hidden, frozen": Case("sequence", hidden=True, frozen=True),
    "hidden, partial": Case(hidden=True, reduced=False, head="lora"),
    "hidden, bfloat16": Case("bonus", hidden=True, dtype=torch.bfloat16, head="capped"),
    "logp": Case("bonus", hidden=True, head="all", logp=True),
    "logp, partial": Case(hidden=True, logp=True, reduced=False, order=(1, 0)),
}
# interpreted kernels
SLOW_CASES = {
    "triton, sequence": Case("sequence", backend="triton"),
    "triton, bfloat16": Case("exact", backend="triton", **BF16),
    "triton, one column": Case("bonus", (36, 1), "triton", temperature=0.7),
    "triton, hidden": Case("bonus", FOUR, "triton", hidden=True, head="all"),
}


def make(case: Case) -> dict[str, Any]:
    """The whole tensors of a case, the same on every rank."""
    torch.manual_seed(len(case.kind) + case.V)
    V = case.V
    made: dict[str, Any] = {
        "target": torch.randint(0, V, (B, T)),
        "advantage": torch.randn(B),
        "noise": 0.1 * torch.randn(B, T),
    }
    made["target"][1, 3:5] = -100
    if case.hidden:
        names = {"plain": (), "lora": ("lora_A", "lora_B"), "capped": ()}
        shapes = {"bias": (V,), "lora_A": (R_LORA, D), "lora_B": (V, R_LORA)}
        for name in names.get(case.head, tuple(shapes)):
            made[name] = torch.randn(shapes[name]).to(case.dtype)
        for name, shape in (("hidden", (B, T, D)), ("weight", (V, D))):
            made[name] = torch.randn(shape).to(case.dtype)
            made["ref_" + name] = torch.randn(shape).to(case.dtype)
        return made
    logits, target = 3 * torch.randn(B, T, V), made["target"]
    first = case.sizes[0]
    # targets on both sides of the first border, and their shard
    target[0, :5] = torch.tensor([0, first - 1, first, V - 1, first])
    logits[0, 0, 0] = 80.0 + logits[0, 0, 1:].amax()  # a confident target
    logits[0, 1, 1::3] = -math.inf  # in every shard, not the target
    logits[0, 2, :first] = -math.inf  # a shard without a token
    logits[0, 3, 0] += 30.0  # another token is certain
    logits[0, 4, first] = 40.0
    logits[1, 0] += 1000.0  # far from 0
    made["logits"] = logits.to(case.dtype)
    made["ref_logits"] = (3 * torch.randn(B, T, V)).to(case.dtype)
    return made


def options_of(case: Case) -> dict[str, Any]:
    """Numbers of the head."""
    if case.head == "all":
        return {"scale": 0.5, "lora_scaling": 0.7, "softcap": 5.0}
    return {"softcap": 4.0} if case.head == "capped" else {}


@contextmanager
def counted_bytes(counts: dict[str, list[int]]) -> Any:
    """Bytes that this rank gives to each kind of collective."""
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(parts: list[Tensor], tensor: Tensor, **options: Any) -> None:
        counts.setdefault("gathered", []).append(tensor.nbytes)
        gather(parts, tensor, **options)

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> None:
        counts.setdefault("reduced", []).append(tensor.nbytes)
        reduce(tensor, *args, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


def found_by(case: Case, group: Any, old_logp: Tensor) -> dict[str, Any]:
    """What a rank finds: vectors, its part of the gradients, bytes on the wire."""
    made, counts = make(case), {}
    columns, start = case.piece(group.rank())
    shared = {"temperature": case.temperature, "group": group, "vocabulary_start": start}
    shared["backend"] = case.backend
    policy = {"objective": OBJECTIVES[case.kind], "advantage": made["advantage"]}
    target, exact = made["target"], case.kind == "exact"
    if case.hidden:
        return _from_hidden(case, made, columns, shared, policy | {"old_logp": old_logp})
    logits = made["logits"][..., columns].clone()
    ref = {"ref_logits": made["ref_logits"][..., columns].clone()} if exact else {}
    known = token_logp(logits, target, **shared)
    few = token_logp(logits[:2, :3], target[:2, :3], **shared)
    on_policy = fused_loss(logits, target, **policy, **ref, old_logp=known.logp, **shared)
    leaf = logits.clone().requires_grad_()
    given = leaf.clone() if case.inplace else leaf
    with counted_bytes(counts):
        out = fused_loss(
            given, target, **policy, **ref, old_logp=old_logp, inplace=case.inplace, **shared
        )
        out.loss.backward()
    return {
        "loss": out.loss.detach(),
        "vectors": {"logp": out.logp, "entropy": out.entropy, "kl": out.kl},
        "gradients": {"logits": leaf.grad},
        "bits": [torch.equal(out.logp, known.logp), torch.equal(few.logp, known.logp[:2, :3])],
        "ratio": on_policy.ratio[target != -100],
        "bytes": counts,
    }


def _from_hidden(
    case: Case, made: dict[str, Any], columns: slice, shared: dict[str, Any], policy: dict[str, Any]
) -> dict[str, Any]:
    """The same from hidden states; the matrix has two more rows than the vocabulary."""
    leaves = {"hidden": made["hidden"].clone().requires_grad_()}
    for name in ("weight", "bias", "lora_A", "lora_B"):
        if name in made:
            part = made[name] if name == "lora_A" else made[name][columns]
            padding = part[:0] if name == "lora_A" else part.new_full((2, *part.shape[1:]), 9.0)
            leaves[name] = torch.cat([part, padding]).requires_grad_(not case.frozen)
    size, target, counts = columns.stop - columns.start, made["target"], {}
    given = {name: leaf for name, leaf in leaves.items() if name != "hidden"}
    head = LinearHead(**given, vocabulary=size, **options_of(case))
    ref = {}
    if case.kind == "exact":
        ref_head = LinearHead(made["ref_weight"][columns], **options_of(case))
        ref = {"ref_hidden": made["ref_hidden"], "ref_lm_head": ref_head}
    arguments = {key: value for key, value in policy.items() if key != "old_logp"}
    # room for fewer rows than there are, and for fewer in the larger shard
    if case.dtype == torch.float32:
        shared = shared | {"memory_budget": 4000 if not case.logp else 3000}
    known = linear_token_logp(leaves["hidden"], head, target, **shared)
    # in chunks of the same size: products of others may sum in another order
    with torch.no_grad():
        on_policy = fused_linear_loss(
            leaves["hidden"], head, target, **arguments, **ref, old_logp=known.logp, **shared
        )
    reduced, found = {"reduce_dhidden": case.reduced}, {}
    with counted_bytes(counts):
        if case.logp:
            logp, entropy = linear_logp(leaves["hidden"], head, target, **shared, **reduced)
            weights = torch.where(target == -100, 0.0, policy["old_logp"])
            loss = (weights * logp).sum() + (weights.cos() * entropy)[target != -100].sum()
        else:
            out = fused_linear_loss(
                leaves["hidden"], head, target, **policy, **ref, **shared, **reduced
            )
            logp, entropy, loss, found = out.logp, out.entropy, out.loss, {"kl": out.kl}
        loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    found |= {"logp": logp.detach(), "entropy": entropy.detach()}
    padding = [gradients[k][size:] for k in ("weight", "bias", "lora_B") if k in gradients]
    for name in gradients:
        if name not in ("hidden", "lora_A"):
            gradients[name] = gradients[name][:size]
    return {
        "loss": loss.detach(),
        "vectors": found,
        "gradients": gradients,
        "padding": [bool((part == 0).all()) for part in padding],
        "bits": [torch.allclose(found["logp"], known.logp, rtol=0, atol=4e-6)],
        "ratio": on_policy.ratio[target != -100],
        "bytes": counts,
    }


def refused(group: Any) -> dict[str, str]:
    """The error that this rank raises in each wrong call."""
    rank, found = group.rank(), {}
    case = Case()
    made, (columns, _) = make(case), case.piece(rank)
    logits, target, A = made["logits"][..., columns], made["target"], made["advantage"]
    hidden, weight = torch.randn(B, T, D), torch.randn(30, D)
    elsewhere = torch.where(torch.tensor(rank == 1) & (target == target[0, 1]), 0, target)

    def attempt(name: str, function: Any, *args: Any, **options: Any) -> None:
        try:
            options = {"group": group} | options
            function(*args, **options)
            found[name] = "none"
        except (ValueError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    attempt("rows", token_logp, logits[rank:], target[rank:])
    attempt("length", token_logp, logits[:, rank:], target[:, rank:])
    attempt("packed", token_logp, *((logits[:, 0], target[:, 0]) if rank else (logits, target)))
    attempt("temperature", token_logp, logits, target, temperature=1.0 + rank)
    attempt("overlap", token_logp, logits, target, vocabulary_start=29 * rank)
    attempt("gap", token_logp, logits, target, vocabulary_start=31 * rank)
    attempt("some starts", token_logp, logits, target, vocabulary_start=30 if rank else None)
    attempt("targets", token_logp, logits, elsewhere)
    attempt("outside", token_logp, logits, target.masked_fill(target == target[0, 1], case.V))
    attempt("no group", token_logp, logits, target, group="tp")
    attempt("start alone", token_logp, logits, target, group=None, vocabulary_start=3)
    attempt("advantage", fused_loss, logits, target, objective=DAPO, advantage=A + rank)
    mask = target != target[0, rank]
    attempt("mask", linear_token_logp, hidden[:, :, :D], weight, target, mask=mask)
    width = D - rank
    attempt("width", linear_token_logp, hidden[..., :width], weight[:, :width], target)
    moving = hidden.clone().requires_grad_(rank == 0)
    attempt("gradient", linear_logp, moving, weight, target)
    bonus = replace(DAPO, entropy_coef=0.1 * rank)
    attempt("objective", fused_loss, logits, target, objective=bonus, advantage=A)
    attempt("lean", linear_logp, hidden, weight, target, plan="lean")
    attempt("plan", linear_logp, hidden, weight, target, plan="quick")
    # what one rank alone can see: the other must not wait for it
    attempt("its target", token_logp, logits, target[:, rank:])
    attempt("its matrix", linear_logp, hidden, weight[:, rank:], target)
    attempt("its dtype", token_logp, logits.double() if rank else logits, target)
    attempt("its start", token_logp, logits, target, vocabulary_start="x" if rank else None)
    attempt("its strides", fused_loss, logits.mT.contiguous().mT, target, inplace=bool(rank))
    exact = {"objective": OBJECTIVES["exact"], "advantage": A}
    ref = logits[..., rank:].clone()
    attempt("its reference", fused_loss, logits, target, **exact, ref_logits=ref)
    mixed = replace(OBJECTIVES["exact"], interpolation=0.5) if rank else OBJECTIVES["exact"]
    policy = {"objective": mixed, "advantage": A, "ref_logits": logits.clone()}
    attempt("its objective", fused_loss, logits, target, **policy)
    attempt("its plan", linear_logp, hidden, weight, target, plan="lean" if rank else None)
    attempt("its kept", token_logp, logits, target, kept=torch.ones(B) if rank else None)
    named = "dapo" if rank == 0 else "dapoo"
    attempt("its recipe", fused_loss, logits, target, objective=named, advantage=A)
    attempt("its other recipe", fused_linear_loss, hidden, weight, target, objective=named)
    attempt("its backend", token_logp, logits, target, backend="none" if rank else None)
    return found


def broken(group: Any) -> dict[str, Any]:
    """Rows that are not finite, by shards."""
    case = Case("exact")
    logits, ref, arguments = broken_rows(case)
    columns, _ = case.piece(group.rank())
    leaf = logits[..., columns].clone().requires_grad_()
    out = fused_loss(leaf, ref_logits=ref[..., columns].clone(), group=group, **arguments)
    out.loss.backward()
    return {"loss": out.loss.detach(), "logp": out.logp, "dropped": out._dropped, "of": leaf.grad}


def broken_rows(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Whole logits, those of the reference, and the other arguments."""
    made = make(case)
    logits, ref, target = made["logits"], made["ref_logits"], made["target"]
    target[2] = torch.randint(1, 29, (T,))
    for n, value in enumerate((math.nan, math.inf)):
        logits[2, 2 * n, 33], logits[2, 2 * n + 1, 0] = value, value
    logits[2, 4] = -math.inf
    ref[2, 5, 31] = -math.inf
    ref[2, 6, 30:] = -math.inf
    logits[2, 7, target[2, 7]] = -math.inf
    logits[2, 8, target[2, 8]] = math.inf
    # a masked token with cross-entropy alone, whose KL is infinite
    ref[3, 1, 31] = -math.inf
    mask = torch.ones(B, T)
    mask[3, 1] = 0
    given = {"target": target, "advantage": made["advantage"], "objective": OBJECTIVES["exact"]}
    return logits, ref, given | {"mask": mask, "nll_weight": 0.2 * (1 - mask)}


def of_models(groups: dict[str, Any]) -> dict[str, Any]:
    """Models whose head is ColwiseParallel: alone, and sharded over another axis besides."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = {"shards": {}, "whole": {"output_layouts": Replicate()}}
    layouts["DTensor"] = {"use_local_output": False}
    found: dict[str, Any] = {}
    for name, layout in (*layouts.items(), *(("FSDP2" + k, v) for k, v in layouts.items())):
        model, ids, arguments, rows = *model_and_batch(), slice(None)
        parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(**layout)})
        if name.startswith("FSDP2"):
            for module in (*model.model.layers, *[model.lm_head] * ("whole" in name), model):
                fully_shard(module, mesh=mesh["dp"])
            half = 2 * mesh["dp"].get_local_rank()
            rows = slice(half, half + 2)
            arguments["normalizer"] /= 2
        with_fused_head(model)
        here = {k: v[rows] if isinstance(v, Tensor) else v for k, v in arguments.items()}
        out = model(input_ids=ids[rows], request=LossRequest(**here))
        out.loss.backward()
        # before a forward that keeps the whole parameters
        gradients = {k: p.grad for k, p in model.named_parameters()}
        request = LogpRequest(here["target"], temperature=here["temperature"])
        with torch.no_grad():
            logp = model(input_ids=ids[rows], request=request).logp
        found[name] = {
            "logp": logp,
            "rows": rows,
            "bits": torch.equal(logp, out.logp),
            "gradients": {
                k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in gradients.items()
            },
        }
    return found


def model_and_batch() -> tuple[Any, Tensor, dict[str, Any]]:
    """A model, ids, and the arguments of its loss."""
    torch.manual_seed(0)
    model = tiny().train()
    ids, arguments = batch()
    return model, ids, arguments | {"normalizer": 20.0}


def compiled(group: Any) -> dict[str, list[bool]]:
    """Whether a compiled graph gives the bits of eager code."""
    case = Case("token", hidden=True)
    made, (columns, _) = make(case), case.piece(group.rank())
    arguments = {"objective": DAPO, "advantage": made["advantage"], "group": group}

    def losses(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
        logits = hidden @ weight.T
        first = fused_loss(logits, target, **arguments)
        second = fused_linear_loss(hidden, weight, target, **arguments)
        logp = token_logp(logits, target, group=group).logp
        return [first.loss + second.loss, logp, linear_token_logp(hidden, weight, target).logp]

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        hidden = made["hidden"].clone().requires_grad_()
        weight = made["weight"][columns].clone().requires_grad_()
        found = function(hidden, weight, made["target"] % 7)
        found[0].backward()
        results.append([found[0].detach(), *found[1:], hidden.grad, weight.grad])
    return {"same": [torch.equal(a, b) for a, b in zip(*results, strict=True)]}


def work(rank: int, folder: str, slow: bool) -> None:
    """A rank: every case, results to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: dict[str, Any] = {}
    old = torch.load(Path(folder) / "old_logp.pt")
    try:
        for nth, (name, case) in enumerate((SLOW_CASES if slow else CASES).items()):
            if len(case.sizes) == RANKS:
                found[name] = found_by(case, dist.group.WORLD, old[name])
            elif nth % 2 == rank // 2:
                found[name] = found_by(case, pairs[nth % 2], old[name])
        if slow:
            found["models"] = of_models({})
            found["compiled"] = compiled(pairs[rank // 2])
        elif rank < 2:
            found["refused"] = refused(pairs[0])
        else:
            found["broken"] = broken(pairs[1])
            alone = [dist.new_group([k], use_local_synchronization=True) for k in (rank,)]
            found["alone"] = of_one_rank(alone[0])
    except Exception:
        # the others wait for this rank: its error is the first
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def of_one_rank(group: Any) -> dict[str, Any]:
    """A group of one: no collective, and the bits of a call without a group."""
    made, counts = make(Case()), {}
    with counted_bytes(counts):
        given = (made["logits"], made["target"])
        found = [token_logp(*given, group=g).logp for g in (group, None)]
    return {"bytes": counts, "same": torch.equal(*found)}


def run(folder: Path, old_logp: dict[str, Tensor], *, slow: bool) -> list[dict[str, Any]]:
    """What every rank found."""
    torch.save(old_logp, folder / "old_logp.pt")
    multiprocessing.set_forkserver_preload(["tests.shards"])
    processes = torch.multiprocessing.start_processes(
        work, (str(folder), slow), nprocs=RANKS, join=False, start_method="forkserver"
    )
    try:
        while not processes.join(timeout=5):
            pass
    except Exception as failure:
        errors = [file.read_text() for file in sorted(folder.glob("*.txt"))]
        raise AssertionError("\n".join(errors)) from failure
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
