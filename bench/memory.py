"""What the loss of a batch holds at its peak, by way of loss, vocabulary and length: counted.

    python -m bench.memory                  # all heads; some minutes on one core
    python -m bench.memory --head 151936 1024

From hidden states [T, D] to the gradients of both factors, in bfloat16: forward and backward, the
returned gradients included. On a CPU every allocation is counted; on a GPU its allocator counts.
Peaks lie on a line over the tokens, which a third count checks (to a hundredth: the scratch of
matrix products differs a little), so what is longer is read off the line.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from bench.hidden import HiddenBatch, HiddenContender, naive, ours
from bench.machine import device_name, versions
from bench.meter import peak_extra_bytes
from grpo_core import fused_loss
from grpo_core.cli.options import Parser

# (V, D) of output matrices that are about
HEADS = {
    (49_152, 576): "SmolLM2-135M",
    (151_936, 1_024): "Qwen3-0.6B",
    (262_144, 640): "Gemma 3 270M",
    (128_256, 2_048): "Llama 3.2 1B",
}
# counted at the first and last of these; the one between has to lie on their line
COUNTED = (512, 768, 1024)
SHOWN = (1_024, 4_096, 16_384)
# of a count: what the row kernels' scratch differs by
TOLERANCE = 0.01
RESULTS = Path(__file__).parent / "results"


def from_logits(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor]:
    """All logits, whose gradient `fused_loss` writes over them."""
    tokens = batch.tokens
    out = fused_loss(
        hidden @ lm_head.t(),
        tokens.target,
        objective="dapo",
        advantage=tokens.advantage,
        old_logp=tokens.old_logp,
        sequence_id=tokens.sequence_id,
        inplace=True,
    )
    return out.loss, out.logp


PATHS = {"naive": naive, "in place": from_logits, "hidden states": ours}


def peaks(V: int, D: int, tokens: int, device: str) -> dict[str, int]:
    """Peak bytes of every path."""
    batch = HiddenBatch.draw(tokens, V, D, torch.bfloat16, device)
    return {
        name: peak_extra_bytes(HiddenContender(name, path).call(batch, "trained head"), device)
        for name, path in PATHS.items()
    }


class Line:
    """Peak bytes as a function of tokens, through the first and the last of three counts.

    Raises:
        ValueError: the one between does not lie on it.
    """

    def __init__(self, name: str, counts: dict[int, int]) -> None:
        (few, low), (between, middle), (many, high) = counts.items()
        self.slope = (high - low) / (many - few)
        self.start = low - self.slope * few
        if abs(self(between) - middle) > TOLERANCE * middle:
            raise ValueError(
                f"{name}: expected peaks on a line, got {counts} where {self(between):.0f} is on it"
            )

    def __call__(self, tokens: int) -> float:
        return self.start + self.slope * tokens


def lines_of(V: int, D: int, device: str, counted: tuple[int, ...] = COUNTED) -> dict[str, Line]:
    """Of every path, from three counts."""
    found = {tokens: peaks(V, D, tokens, device) for tokens in counted}
    return {
        name: Line(f"{name}, {V:,} words", {tokens: of[name] for tokens, of in found.items()})
        for name in PATHS
    }


def rows_of(V: int, D: int, lines: dict[str, Line]) -> list[str]:
    """A head's rows of the table, GiB."""
    model = HEADS.get((V, D), f"{V:,} x {D:,}")
    rows = []
    for tokens in SHOWN:
        sizes = [2 * tokens * V, *(line(tokens) for line in lines.values())]
        cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
        shown = f"{model}: {V:,} x {D:,}" if tokens == SHOWN[0] else ""
        rows.append(f"| {shown} | {tokens:,} | {cells} |")
    return rows


def head_lines() -> list[str]:
    """The table's head."""
    return [
        "| words x hidden size | tokens | logits | naive | in place | from hidden states |",
        "|---|---:|---:|---:|---:|---:|",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Counts, and prints the table; that of all heads goes into a file."""
    parser = Parser("bench.memory")
    parser.add_argument("--head", type=int, nargs=2, metavar=("V", "D"), help="one alone")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = [tuple(given.head)] if given.head else list(HEADS)
    table = head_lines()
    for V, D in heads:
        table += rows_of(V, D, lines_of(V, D, device))
        print("\n".join(table[-len(SHOWN) :]), flush=True)
    if not given.head:
        made = json.dumps({k: versions()[k] for k in ("torch", "triton")})
        text = f"GiB at the peak, {device_name()}, {made}.\n\n" + "\n".join(table) + "\n"
        name = "memory.md" if device == "cpu" else "memory-gpu.md"
        (RESULTS / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
