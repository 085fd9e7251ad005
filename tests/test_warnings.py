"""No deprecation of the installed torch, Triton or transformers reaches a user."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from grpo_core import RECIPES, fused_linear_loss, fused_loss, token_logp
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.compiled import ROOT
from tests.conftest import HAS_GPU, HAS_TRITON
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

BACKEND = "triton" if HAS_TRITON else "cpu"
DEVICE = "cuda" if HAS_GPU else "cpu"
KINDS = (DeprecationWarning, FutureWarning)


def from_logits(backend: str | None = BACKEND) -> None:
    logits = torch.randn(2, 3, 40, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 40, (2, 3), device=DEVICE)
    vectors = {"mask": target < 30, "advantage": torch.randn(2, device=DEVICE)}
    fused_loss(
        logits, target, objective=RECIPES["dapo"], backend=backend, **vectors
    ).loss.backward()
    token_logp(logits.detach(), target, backend=backend)


def from_hidden_states() -> None:
    hidden = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
    lm_head = torch.randn(40, 8, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 40, (2, 3), device=DEVICE)
    advantage = torch.randn(2, device=DEVICE)
    out = fused_linear_loss(
        hidden, lm_head, target, objective=RECIPES["dapo"], advantage=advantage, backend=BACKEND
    )
    out.loss.backward()


def compiled() -> None:
    # the default backend, since interpreted kernels are not traced
    torch.compile(from_logits, backend="aot_eager")(None)


def trained() -> None:
    settings = {"objective": RECIPES["dapo"], "sampling": Sampling(MAX_NEW_TOKENS)}
    config = TrainerConfig(steps=1, prompts_per_step=2, group_size=2, **settings)
    Trainer(micro_model(), draw_problems, share_of_sevens, config).train()


CALLS = (from_logits, from_hidden_states, compiled, trained)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_call_warns_of_what_will_go(call) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            warnings.simplefilter("error", kind)
        # Triton's interpreter runs in tests only; that of 3.6 uses what numpy will drop
        warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
        call()


def test_no_import_warns_of_what_will_go() -> None:
    """In a process that has imported nothing yet."""
    strict = [f"-Werror::{kind.__name__}" for kind in KINDS]
    modules = ["grpo_core.loss.fused_loss", "grpo_core.linear.loss", "grpo_core.trainer.trainer"]
    modules += ["grpo_core.backends.triton"] if HAS_TRITON else []
    code = f"import {', '.join(modules)}"
    done = subprocess.run(
        [sys.executable, *strict, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
