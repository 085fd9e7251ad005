"""The measurements as a picture: how wrong a gradient is as its token grows certain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.accuracy.document import DOCUMENT
from bench.accuracy.measure import Measured
from bench.batch import dtype_name
from grpo_core.runs.plots import INK, QUIET, STYLE

PICTURE = DOCUMENT.parent / "images/accuracy.png"
# the chunked contenders would lie on the lines of their libraries
LINES = {
    "ours, Triton": ("ours, Triton", "#d1495b", "-", 2.4),
    "ours, PyTorch": ("ours, PyTorch", "#e39aa4", "-", 2.0),
    "PyTorch, float32": ("PyTorch, float32 softmax", "#2e6f95", "-", 1.6),
    "PyTorch, logits' dtype": ("PyTorch, bfloat16 softmax", "#7fa8c2", "-", 1.6),
    "Liger, Triton": ("Liger", "#5b9279", "-", 1.6),
    "TRL, Triton": ("TRL", "#c58b2a", (0, (4, 2)), 1.6),
}
LOWEST, HIGHEST = 3e-8, 3.0


def plot(found: Sequence[Measured], path: Path = PICTURE) -> None:
    """Relative error of the gradient over the margin, float32 and bfloat16 logits side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 0.86))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, dtype in zip(panels, (torch.float32, torch.bfloat16), strict=True):
            for name, (label, colour, dashes, width) in LINES.items():
                if dtype == torch.float32 and name == "PyTorch, logits' dtype":
                    continue
                curve = [
                    (f.margin, float(f.errors["dlogits"].amax()))
                    for f in found
                    if (f.contender, f.dtype, f.offset) == (name, dtype, 0)
                ]
                front = 3 if name.startswith("ours") else 2
                axes.plot(
                    *zip(*curve, strict=True),
                    color=colour,
                    linestyle=dashes,
                    linewidth=width,
                    label=label,
                    zorder=front,
                )
            axes.set_yscale("log")
            axes.set_ylim(LOWEST, HIGHEST)
            axes.set_xlim(0, 30)
            axes.minorticks_off()
            axes.set_title(f"{dtype_name(dtype)} logits", loc="left", fontsize=10.5, color=INK)
            axes.set_xlabel("nats that the target lies above all other tokens together")
            axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.text(0.4, 1.15, "no gradient left", color=QUIET, fontsize=8.5, va="bottom")
        panels[0].set_ylabel("relative error of dloss/dlogits")
        rounding = torch.finfo(torch.bfloat16).eps / 2
        panels[1].text(
            29.6,
            rounding * 0.35,
            "one rounding to bfloat16",
            color=QUIET,
            fontsize=8.5,
            ha="right",
            va="top",
        )
        panels[1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.05))
        figure.text(
            0.012,
            0.97,
            "How wrong the gradient of a confident token is",
            fontsize=13.5,
            weight="bold",
            color=INK,
            va="top",
        )
        figure.text(
            0.012,
            0.905,
            "Worst of eight rows of 2,501 logits, against float64; Triton kernels interpreted "
            "with a GPU's rounding",
            fontsize=9.5,
            color=QUIET,
            va="top",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
