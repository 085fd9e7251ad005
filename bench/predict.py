"""What a card will measure, computed beforehand: python -m bench.predict.

    python -m bench.predict --found bench/results/DEVICE   # measured figures beside
    python -m bench.predict --write                        # the tables into their documents

A row kernel takes the longest of: its bytes through memory, where the caches have lost a row before
its second reading; the latency of its loads, one step of a program after another; the issue of its
instructions. Products take their operations over the rate that libraries reach, a share of the
bytes beside them, and what no product hides. Bytes, launches, instructions and registers are
counted; all else is given as (cautious, expected, hopeful), and so is every figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.batch import CASES, FROZEN, LOGP, TRAINED, Case
from bench.counted import RESULTS, published
from bench.experiments.second_reading import CANDIDATES
from bench.table import with_table
from grpo_core.cli.options import Parser
from grpo_core.kernels.launch import LOAD_BYTES, REGISTERS, choose_layout
from grpo_core.linear.matmuls import GPU_BYTES, SLICE_BYTES, _rows_within
from grpo_core.runs.report import markdown

ONE_PASS, TWO_PHASES, FORWARD = CASES
N, V, D = 8192, 151_936, 4096
# rows that count: the last of each sequence of 128 is masked
SCORED = N - N // 128
# microseconds of a load from a busy memory, and from the level-2 cache
LATENCY, NEAR = (1.0, 0.8, 0.6), 0.3
# usable share of that cache: each half of it also holds what the other half owns
CACHE = (0.5, 0.75, 1.0)
# of the bandwidth with one program to a processor (QuACK: 0.84 of a copy), and with several
ALONE, TOGETHER = (0.84, 0.92, 1.0), (0.94, 0.97, 1.0)
# microseconds of a row between its loops: sums across threads, logarithms, first loads
GAP = (4.0, 3.0, 2.0)
# microseconds of a launch and of an operation on vectors, which the row kernel partly hides
OPERATION = (8.0, 4.0, 2.0)
# of a library's product: one in Triton, and the library's own over slices of 2,048 columns
TRITON, SLICED = (0.8, 0.9, 1.0), (0.55, 0.8, 0.95)
# an epilogue of statistics, of a product at D = 4,096: 2,800 of 78,000 cycles of a 128 x 256 tile
EPILOGUE = 0.036
# share of the bytes beside a product that its arithmetic does not hide
BESIDE = (0.5, 0.25, 0.0)
# of a copy's bandwidth, by kernels of others
OTHERS = (0.5, 0.8, 0.95)


class Card(NamedTuple):
    """Published, or measured by others."""

    name: str
    processors: int
    ghz: float
    copy: float  # TB/s, read and written
    read: float  # TB/s
    cache: float  # MB of level 2
    products: tuple[float, float, float]  # TFLOP/s of bfloat16 at the sizes of a head


H100 = Card("H100", 132, 1.755, 3.0, 3.15, 50, (690, 730, 765))
H200 = Card("H200", 132, 1.98, 4.3, 4.5, 60, (700, 755, 800))
B200 = Card("B200", 148, 1.85, 7.0, 7.2, 126, (1300, 1475, 1600))


class Kernel(NamedTuple):
    """A row kernel for bfloat16 as Triton 3.7.1 compiles it for sm_90 (`grpo_core.inspect`)."""

    registers: int
    forward: float = 0  # instructions per logit of the loop that sums
    gradient: float = 0  # of the loop that writes


STATS, LOSS, DLOGITS = Kernel(64, 6.34), Kernel(100, 6.34, 5.44), Kernel(56, gradient=5.44)


class Head(NamedTuple):
    """A way from hidden states to the loss: what it computes and moves."""

    products: int
    rows: int  # of a chunk
    beside: int  # bytes of a logit that products write and read
    row_kernel: int = 0  # bytes of a logit through the row kernel
    own: int = 0  # products by a Triton kernel with an epilogue
    trained: bool = True
    summed: bool = True  # dweight in float32, rounded at the end
    sliced: bool = False  # the logits' product


class Model(NamedTuple):
    """Times and rates on a card; `likely` is 0 for cautious, 1 for expected, 2 for hopeful."""

    card: Card
    likely: int

    def reread(self, rows: int, row_bytes: int, inplace: bool, backwards: bool) -> float:
        """Share of the second readings that the level-2 cache serves, of `rows` read at a time.

        Between two readings of a logit half a cycle passes: every program reads half a row again
        and half a row anew, and writes half a row, in place over what it reads. Backwards it is
        from nothing to a whole cycle. Lines are replaced at random by those that miss; if hopeful
        by age, where that is better.
        """
        size = 1e6 * self.card.cache * CACHE[self.likely]
        again, fresh = rows * row_bytes / 2, rows * row_bytes * (0.5 if inplace else 1)
        hit = 0.5
        for _ in range(50):
            lost = (fresh + (1 - hit) * again) / size
            hit = (1 - math.exp(-2 * lost)) / (2 * lost) if backwards else math.exp(-lost)
        share = size / (again + fresh)
        by_age = min(1.0, share / 2) if backwards else float(share >= 1)
        return max(hit, by_age) if self.likely == 2 else hit

    def row_kernel(
        self, kernel: Kernel, V: int = V, way: Any = None, inplace: bool = False
    ) -> float:
        """Seconds over N rows of bfloat16; `way` is a candidate of `second_reading`."""
        card, layout, likely, row_bytes = self.card, way or choose_layout(V, 2), self.likely, 2 * V
        step = 32 * LOAD_BYTES * layout.tiles * layout.warps
        registers = -(-kernel.registers // 8) * 8 * 32 * layout.warps
        programs = max(1, min(64 // layout.warps, REGISTERS // registers))
        hit, waits, both = 0.0, [LATENCY[likely]] * 2, kernel.forward and kernel.gradient
        if both:
            backwards, held = (way.backwards, way.held) if way else (False, 0)
            # a gradient that the caches give up first takes no room
            alone = inplace or bool(way and way.kept)
            hit = self.reread(programs * card.processors, row_bytes, alone, backwards)
            # a thread's load of 16 bytes is a tile
            hit += (1 - hit) * held * step / layout.tiles / row_bytes
            waits[1] = hit * NEAR + (1 - hit) * waits[0]
        moved = row_bytes * (1 + (1 - hit) * bool(both) + bool(kernel.gradient))
        speed = card.copy if kernel.gradient else card.read
        own = GAP[likely]
        for instructions, wait in zip(kernel[1:], waits, strict=True):
            if instructions:
                issue = instructions * layout.tiles * LOAD_BYTES / 2 / (1e3 * card.ghz)
                own += row_bytes / step * max(wait + issue, programs * layout.warps / 4 * issue)
        memory = 1e-12 * N * moved / (speed * (TOGETHER if programs > 1 else ALONE)[likely])
        return max(memory, 1e-6 * own * math.ceil(N / (card.processors * programs)))

    def step(self, contender: str, case: Case, kernels: float, V: int = V) -> float:
        """TB/s of a step from logits, of the readings and writings that its case takes at least.

        Args:
            kernels: seconds of what goes over the logits; the rest is counted.
        """
        counted = published()[contender, case.name, "bfloat16"]
        beside = OPERATION[self.likely] * (counted["operations"] + counted["kernels"] - 1)
        return 2e-12 * case.floor * N * V / (kernels + 1e-6 * beside)

    def ours(self, case: Case, V: int = V, inplace: bool = False) -> float:
        """TB/s of our step."""
        kernels = {ONE_PASS: [LOSS], TWO_PHASES: [STATS, DLOGITS], FORWARD: [STATS]}[case]
        seconds = sum(self.row_kernel(kernel, V, inplace=inplace) for kernel in kernels)
        return self.step("ours-triton", case, seconds, V)

    def others(self, contender: str) -> float:
        """TB/s of a step of others, forward and backward, which memory limits."""
        nbytes = N * V * published()[contender, ONE_PASS.name, "bfloat16"]["distinct"]
        seconds = 1e-12 * nbytes / (self.card.copy * OTHERS[self.likely])
        return self.step(contender, ONE_PASS, seconds)

    def again(self, name: str) -> float:
        """TB/s of the one pass alone, by a way to read a row again."""
        way = CANDIDATES[name]
        return 4e-12 * N * V / self.row_kernel(Kernel(way.registers or 56, 4.9, 5.7), V, way)

    def products(self, count: float, n: int = SCORED, V: int = V, D: int = D) -> float:
        """Milliseconds of bare products of 2·n·V·D operations."""
        return 2e-9 * count * n * V * D / self.card.products[self.likely]

    def head(self, head: Head, n: int = SCORED, V: int = V, D: int = D) -> float:
        """Milliseconds from hidden states to the loss and its gradients."""
        slow = (1 + EPILOGUE * 4096 / D) / TRITON[self.likely] - 1
        products = head.products + head.own * slow + head.sliced * (1 / SLICED[self.likely] - 1)
        chunks, trained = math.ceil(n / head.rows), head.trained
        # the matrix is read by every product but dweight's, which reads and writes its sum
        matrix = 2 * chunks * (head.products - trained)
        matrix += trained * (8 * chunks - 4 if head.summed else 2)
        beside = (matrix * V * D + n * V * head.beside) * 1e-9 / self.card.copy
        milliseconds = self.products(products, n, V, D) + BESIDE[self.likely] * beside
        exposed = n * V * head.row_kernel + 6 * V * D * (trained and head.summed)
        alone = 1e-9 * exposed / (self.card.copy * TOGETHER[self.likely])
        alone += 1e-3 * OPERATION[self.likely] * (40 + chunks * (head.products + 1))
        return max(milliseconds, beside) + alone


def chunk_rows(n: int, V: int, logit_bytes: int) -> int:
    """Rows of a chunk by the default budget on a GPU."""
    return _rows_within(GPU_BYTES, V * logit_bytes, n)


def today(products: int, n: int = SCORED, V: int = V, D: int = D) -> Head:
    """Our functions by default: float32 logits, dlogits in bfloat16; 2 products if frozen."""
    sliced = SLICE_BYTES // (4 * D) < V
    if products == 1:
        return Head(1, chunk_rows(n, V, 4), 4, 4, trained=False, sliced=sliced)
    # 4 bytes written and read twice; a gradient of 2 written, and read by its products
    rows, trained = chunk_rows(n, V, 6), products == 3
    return Head(products, rows, 2 + 2 * products, 10, trained=trained, sliced=sliced)


def designs(card: Card, n: int, V: int, D: int) -> dict[str, Head]:
    """Ways to a trained head, and to log-probabilities alone."""
    now, logp, half = today(3, n, V, D), today(1, n, V, D), chunk_rows(n, V, 2)
    near = max(16, int(5e5 * card.cache / (2 * V)) // 16 * 16)
    return {
        "float32 chunk, its product by slices (today)": now,
        "float32 chunk": now._replace(sliced=False),
        "bfloat16 chunk, in place": Head(3, half, 6, 6),
        "one bfloat16 chunk, dweight not summed": Head(3, n, 6, 6, summed=False),
        "bfloat16 chunk that stays in the cache": Head(3, near, 0),
        "epilogue: statistics; then logits again": Head(4, half, 6, own=2),
        "epilogue: powers and their sums, once": Head(3, half, 6, own=1),
        "logp alone: float32 chunk": logp._replace(sliced=False),
        "logp alone: epilogue": Head(1, n, 0, own=1, trained=False),
    }


class Figure(NamedTuple):
    """A figure that a card will show, and where `gpu.sh` leaves it."""

    name: str
    value: Callable[[Model], float]
    part: str
    key: tuple[Any, ...]

    @property
    def unit(self) -> str:
        """Of the value."""
        return "ms" if self.key[-1] in ("ms", "products") else "TB/s"


def _at(contender: str, case: Case = ONE_PASS, V: int = V, what: Any = None) -> tuple[Any, ...]:
    """Of a step of a contender: "ms", or readings and writings, of which TB/s are counted."""
    return contender, case.name, V, what or ("ms" if case.from_hidden else case.floor)


OURS, INPLACE, FAST, SPREAD = "ours-triton", "ours-triton-inplace", "ours-fast", (0.95, 1, 1.05)
# all logits, and 36 bytes of each through operations of PyTorch
NAIVE = Head(3, SCORED, 6, 36, summed=False)
ODD_V, SMALL_V = 151_669, 32_000
FIGURES = [
    Figure("copying", lambda m: m.card.copy * SPREAD[m.likely], "ceilings", ("copy_",)),
    Figure("reading", lambda m: m.card.read * SPREAD[m.likely], "ceilings", ("read",)),
    Figure("forward", lambda m: m.ours(FORWARD), "head", _at(OURS, FORWARD)),
    Figure("both", lambda m: m.ours(ONE_PASS), "head", _at(OURS)),
    Figure("both, in place", lambda m: m.ours(ONE_PASS, inplace=True), "head", _at(INPLACE)),
    Figure("both, Liger", lambda m: m.others("liger"), "head", _at("liger")),
    Figure("both, TRL", lambda m: m.others("trl"), "head", _at("trl")),
    Figure("both, naive", lambda m: m.others("naive"), "head", _at("naive")),
    Figure("three products", lambda m: m.products(3), "head", _at(FAST, TRAINED, what="products")),
    Figure("hidden states, naive", lambda m: m.head(NAIVE), "head", _at("naive", TRAINED)),
    Figure("hidden states, trained head", lambda m: m.head(today(3)), "head", _at(FAST, TRAINED)),
    Figure("hidden states, frozen head", lambda m: m.head(today(2)), "hidden", _at("ours", FROZEN)),
    Figure("hidden states, logp", lambda m: m.head(today(1)), "hidden", _at("ours", LOGP)),
    Figure("both, GSPO", lambda m: m.ours(TWO_PHASES), "bench", _at(OURS, TWO_PHASES)),
    Figure("both, V = 32,000", lambda m: m.ours(ONE_PASS, SMALL_V), "bench", _at(OURS, V=SMALL_V)),
    Figure("both, V = 151,669", lambda m: m.ours(ONE_PASS, ODD_V), "bench", _at(OURS, V=ODD_V)),
    Figure("both, compiled", lambda m: m.others("compiled"), "peers", _at("compiled")),
    *(
        Figure(f"again: {name}", partial(Model.again, name=name), "tune", (name,))
        for name in CANDIDATES
    ),
]


def measured(folder: Path, figure: Figure) -> float | None:
    """The figure as a part of `gpu.sh` has left it; None if it has not."""
    file = folder / f"{figure.part}.json"
    record, (name, *key) = json.loads(file.read_text()) if file.exists() else {}, figure.key
    if record.get("dry_run"):
        return None
    if figure.part == "tune":
        return record.get("second_reading", {}).get(name, {}).get("TB/s")
    if figure.part == "ceilings":
        some = (one for one in record.get("ceilings", ()) if name in one["name"])
        return max((1e-12 * one["moved_bytes"] / one["seconds"] for one in some), default=None)
    case, V, what = key
    for run in record.get("benchmarks", ()):
        info, seconds = run["extra_info"], run["stats"]["median"]
        if [info[k] for k in ("contender", "case", "V")] == [name, case, V] and info["D"] in (0, D):
            if figure.unit == "ms":
                return 1e3 * (info["products_seconds"] if what == "products" else seconds)
            return 2e-12 * what * info["N"] * V / seconds
    return None


def predictions(card: Card = H200, folder: Path | None = None) -> str:
    """The table of figures; with a folder, what was measured beside them."""
    rows = [["figure", "part", "predicted", "range", *["measured"] * bool(folder)]]
    for figure in FIGURES:
        values = [figure.value(Model(card, likely)) for likely in range(3)]
        low, high = min(values), max(values)
        range_ = f"{low:.2f} to {high:.2f}"
        rows.append([figure.name, figure.part, f"{values[1]:.2f} {figure.unit}", range_])
        if folder:
            found = measured(folder, figure)
            shown = "-" if found is None else f"{found:.2f}"
            rows[-1].append(shown if found is None or low <= found <= high else f"{shown} outside")
    return markdown(rows)


# card, rows, vocabulary, hidden size
SHAPES = (
    (H100, 2048, 128_256, D),
    (H200, 2048, 128_256, D),
    (B200, 8192, 128_256, D),
    (H200, 8192, V, 1024),
)


def comparison() -> str:
    """The table of ways from hidden states, milliseconds; launches are those of the first shape."""
    names = [f"{card.name}: {n:,} x {D:,} x {V:,}" for card, n, V, D in SHAPES]
    rows = [["", "products", "bytes", "launches", *names]]
    of_shapes, (_, n, V, D) = [designs(*shape) for shape in SHAPES], SHAPES[0]
    for name, first in of_shapes[0].items():
        launches = first.products + 1 + first.sliced * (4 * V * D // SLICE_BYTES)
        counts = (
            first.products,
            first.beside + first.row_kernel,
            math.ceil(n / first.rows) * launches,
        )
        rows.append([name, *map(str, counts)])
        for (card, *size), ways in zip(SHAPES, of_shapes, strict=True):
            most, likely, least = (Model(card, k).head(ways[name], *size) for k in range(3))
            rows[-1].append(f"{likely:.1f} ({least:.1f} to {most:.1f})")
    return markdown(rows)


# where a table belongs, and the command in its markers
COMMAND = "bench.predict --write"
PLACES = {RESULTS / "OPEN.md": predictions, RESULTS.parents[1] / "docs/performance.md": comparison}


def main() -> None:
    """Prints both tables, or writes them."""
    parser = Parser("bench.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--found", type=Path, metavar="FOLDER", help="results of bench/gpu.sh")
    parser.add_argument("--write", action="store_true", help="the tables into their documents")
    given = parser.parse_args()
    for path, table in PLACES.items() if given.write else ():
        path.write_text(with_table(path, COMMAND, table()))
    print(predictions(folder=given.found), end="" if given.found else f"\n{comparison()}")


if __name__ == "__main__":
    main()
