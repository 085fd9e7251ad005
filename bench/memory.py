"""Peak memory of the loss of a batch, by way to the loss, vocabulary and length: counted.

    python -m bench.memory                  # all heads; some minutes on one core
    python -m bench.memory --head 151936 1024
    python -m bench.memory --model 7b --ranks 64    # a whole step with FSDP2, see `bench.ranks`

From hidden states [T, D] to the gradients of both factors, in bfloat16: forward and backward, the
returned gradients included. On a CPU every allocation is counted; on a GPU its allocator counts.
Peaks lie on a line over the tokens, which a third count checks (to a hundredth: the scratch of
matrix products differs a little), so what is longer is read off the line.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bench.batch import TRAINED, Batch, Recipe, Terms
from bench.contenders import Contender, hidden_naive, hidden_ours, ours
from bench.machine import DEVICE
from bench.meter import peak_extra_bytes
from bench.ranks import MODELS, report
from bench.table import with_table
from grpo_core.cli.options import Parser
from grpo_core.runs.report import markdown

# (V, D) of output matrices of public models
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
DOCUMENT = Path(__file__).parents[1] / "docs/training.md"
HEADER = ("vocabulary x hidden size", "tokens", "logits", "naive", "in place", "from hidden states")


def from_logits(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """All logits, whose gradient `fused_loss` writes over them."""
    return ours(hidden @ lm_head.t(), batch, recipe, inplace=True)


PATHS = {"naive": hidden_naive, "in place": from_logits, "hidden states": hidden_ours}


def peaks(V: int, D: int, tokens: int, device: str = DEVICE) -> dict[str, int]:
    """Peak bytes of every path."""
    batch = Batch.draw(tokens, V, torch.bfloat16, device, D)
    return {
        name: peak_extra_bytes(Contender(name, path).call(batch, TRAINED), device)
        for name, path in PATHS.items()
    }


def on_line(name: str, counts: dict[int, int], tokens: int) -> float:
    """The peak of `tokens` on the line through the first and the last of three counts.

    Raises:
        ValueError: the count between does not lie on it.
    """
    (few, low), (between, middle), (many, high) = counts.items()
    slope = (high - low) / (many - few)
    expected = low + slope * (between - few)
    if abs(expected - middle) > TOLERANCE * middle:
        raise ValueError(f"{name}: expected {expected:.0f} at {between} of a line, got {counts}")
    return low + slope * (tokens - few)


def rows_of(V: int, D: int) -> list[tuple[str, ...]]:
    """A head's rows of the table, GiB."""
    counts = {tokens: peaks(V, D, tokens) for tokens in COUNTED}
    by_path = {path: {tokens: counts[tokens][path] for tokens in COUNTED} for path in PATHS}
    rows = []
    for tokens in SHOWN:
        sizes = [2 * tokens * V, *(on_line(path, by_path[path], tokens) for path in PATHS)]
        shown = "" if rows else f"{HEADS.get((V, D), '')}: {V:,} x {D:,}"
        rows.append((shown, f"{tokens:,}", *(f"{size / 2**30:.2f}" for size in sizes)))
    return rows


def main() -> None:
    """Counts, and prints the table; on a CPU that of all heads goes into docs/training.md."""
    parser = Parser("bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--head", type=int, nargs=2, metavar=("V", "D"), help="only this one")
    parser.add_argument("--model", choices=MODELS, help="a step of this model instead")
    parser.add_argument("--ranks", type=int, default=8, help="of --model")
    given = parser.parse_args()
    if given.model:
        print(report(given.model, given.ranks))
        return
    heads = [given.head] if given.head else HEADS
    table = markdown([HEADER, *(row for V, D in heads for row in rows_of(V, D))])
    print(table, end="")
    if DEVICE == "cpu" and not given.head:
        DOCUMENT.write_text(with_table(DOCUMENT, "bench.memory", table), "utf-8")


if __name__ == "__main__":
    main()
