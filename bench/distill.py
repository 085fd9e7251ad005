"""Distillation, kept sets and sharded vocabularies beside PyTorch's and TRL's ways: one table.

    python -m bench.distill

Peaks, products and bytes on the wire are counted. Times are ratios to the first way of a block,
see `bench.machine.ratio`; that of a sharded vocabulary is the median of the first rank's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench.machine import clock, ratio
from bench.meter import Meter, one_thread, peak_extra_bytes
from grpo_core import RECIPES, Kept, fused_linear_loss, fused_loss
from grpo_core.cli.options import Parser

Way = Callable[[], tuple[Tensor, ...]]
MIB = 2**20
N, V, D, ROUNDS = 128, 32_000, 256, 3
BETAS = {"reverse KL": 1.0, "forward KL": 0.0, "JSD 0.5": 0.5}
HEADER = f"{'':<40}{'x first':>9}{'peak MiB':>10}{'products':>10}{'wire bytes':>12}"


def gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*fresh)
    return (value.detach(), *torch.autograd.grad(value, fresh))


def plain_divergence(x: Tensor, w: Tensor, y: Tensor, v: Tensor, beta: float) -> Tensor:
    """All logits of both, log_softmax, kl_div; beta as in TRL: 0 forward, 1 reverse."""
    p, q = (x @ w.t()).log_softmax(-1), (y @ v.t()).log_softmax(-1)
    kl = partial(F.kl_div, log_target=True, reduction="sum")
    if beta in (0.0, 1.0):
        return (kl(p, q) if beta == 0 else kl(q, p)) / len(x)
    mixture = torch.logaddexp(p + torch.tensor(1 - beta).log(), q + torch.tensor(beta).log())
    return (beta * kl(mixture, q) + (1 - beta) * kl(mixture, p)) / len(x)


def trl_divergence(x: Tensor, w: Tensor, y: Tensor, v: Tensor, beta: float) -> Tensor:
    """TRL's chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(x, w, None, y, v, None, beta, 1.0)[0].mean()


def our_divergence(x: Tensor, w: Tensor, y: Tensor, v: Tensor, beta: float) -> Tensor:
    """The recipe `opd`."""
    target = torch.zeros(1, len(x), dtype=torch.long)
    objective = RECIPES["opd"].replace(interpolation=beta)
    return fused_linear_loss(
        x[None], w, target, objective=objective, ref_hidden=y[None], ref_lm_head=v
    ).loss


def distillation(rows: int, vocabulary: int, beta: float) -> dict[str, Way]:
    """From hidden states to the loss and the gradients of hidden states and head."""
    torch.manual_seed(0)
    (x, w), (y, v) = ((torch.randn(rows, D), 0.1 * torch.randn(vocabulary, D)) for _ in range(2))
    ways = {"torch": plain_divergence, "ours": our_divergence}
    if find_spec("trl"):
        ways["trl"] = trl_divergence
    return {
        name: partial(gradients, lambda a, b, way=way: way(a, b, y, v, beta), x, w)
        for name, way in ways.items()
    }


def kept_sets(rows: int, vocabulary: int, size: int) -> dict[str, Way]:
    """From logits to the loss and their gradient, over `size` ids of each row."""
    torch.manual_seed(0)
    logits = torch.randn(1, rows, vocabulary)
    mask = torch.zeros(rows, vocabulary, dtype=torch.bool)
    mask.scatter_(1, logits[0].topk(size, dim=1).indices, True)
    target, kept = logits.argmax(-1), Kept.from_mask(mask)
    given: dict[str, Any] = {"objective": "dapo", "advantage": torch.ones(1)}
    given["old_logp"] = torch.zeros(1, rows)

    def ours(x: Tensor, **options: Any) -> Tensor:
        return fused_loss(x, target, **given, **options).loss

    def filled(x: Tensor) -> Tensor:
        logp = x.masked_fill(~mask, -torch.inf).log_softmax(-1)
        ratio = logp.gather(2, target[..., None]).exp()
        return -torch.minimum(ratio, ratio.clamp(0.8, 1.28)).mean()

    ways = {"torch, masked_fill": filled, "ours, no kept": ours, "ours": partial(ours, kept=kept)}
    return {name: partial(gradients, way, logits) for name, way in ways.items()}


def costs(way: Way, product: int) -> str:
    """Peak and products of a way; `product` is what one multiplies and adds, 0 without products."""
    with Meter() as meter, one_thread():
        way()
    products = f"{meter.products / product:.2f}" if product else "-"
    return f"{peak_extra_bytes(way, 'cpu') / MIB:>10.1f}{products:>10}"


def measure(title: str, ways: dict[str, Way], product: int) -> list[str]:
    """A block of the table; the first way is right and gives the unit of time."""
    lines, first = ["", title], next(iter(ways.values()))
    right = first()
    for name, way in ways.items():
        for a, b in zip(way(), right, strict=True) if "no kept" not in name else ():
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())):
                raise ValueError(f"{title}: {name}: expected torch's result")
        time = 1.0 if way is first else ratio(way, first, ROUNDS)
        lines.append(f"  {name:<38}{time:>9.2f}{costs(way, product)}{'-':>12}")
    return lines


def rank(nth: int, folder: str, ranks: int, rows: int, vocabulary: int) -> None:
    """One of the processes that share a vocabulary; the first writes its line."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=nth, world_size=ranks)
    torch.manual_seed(0)
    x, w = torch.randn(1, rows, D), 0.1 * torch.randn(vocabulary, D)
    first, last = (vocabulary * k // ranks for k in (nth, nth + 1))
    target, sent = torch.randint(0, vocabulary, (1, rows)), []
    given = {"objective": "dapo", "advantage": torch.ones(1), "old_logp": torch.zeros(1, rows)}

    def counting(collective: Any, at: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            sent.append(args[at].nbytes)
            return collective(*args, **options)

        return call

    dist.all_reduce, dist.all_gather = counting(dist.all_reduce, 0), counting(dist.all_gather, 1)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        parallel = {"group": dist.group.WORLD, "vocabulary_start": first}
        return fused_linear_loss(a, b, target, **given, **parallel).loss

    way = partial(gradients, loss, x, w[first:last])
    way()
    wire, seconds = sum(sent), []
    for _ in range(ROUNDS):
        dist.barrier()
        start = clock()
        way()
        seconds.append(clock() - start)
    # every process takes part in both calls
    line = f"{costs(way, 2 * rows * vocabulary * D)}{wire:>12,}"
    if nth == 0:
        Path(folder, "line").write_text(f"{median(seconds)} {line}")
    dist.destroy_process_group()


def sharded(rows: int, vocabulary: int) -> list[str]:
    """R = 1 and 2, per rank."""
    lines, found = ["", "vocabulary-parallel, dapo from hidden states, per rank"], []
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank, (folder, ranks, rows, vocabulary), nprocs=ranks)
            seconds, line = Path(folder, "line").read_text().split(" ", 1)
        found.append(float(seconds))
        lines.append(f"  {f'R = {ranks}':<38}{found[-1] / found[0]:>9.2f}{line}")
    return lines


def main() -> None:
    """Prints the table."""
    parser = Parser("bench.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=N, help="rows of logits (default: %(default)s)")
    rows = parser.parse_args().rows
    print(HEADER)
    for name, beta in BETAS.items():
        print("\n".join(measure(name, distillation(rows, V, beta), 2 * rows * V * D)))
    for size in (20, 1000, V):
        print("\n".join(measure(f"kept, K = {size:,}", kept_sets(rows, V, size), 0)))
    print("\n".join(sharded(rows, V)))


if __name__ == "__main__":
    main()
