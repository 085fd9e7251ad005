"""TRL 1.13 and 1.14 on the CPU: `python -m tests.trl_older`, in an environment that has one.

    python -m venv older && older/bin/pip install trl==1.14.0 requests peft liger-kernel .
    older/bin/python -m tests.trl_older

The function at the hook returns what TRL's returns; what asks there is served, the rest is named;
the trainer of the fast level says which TRL it needs. TRL 1.15 runs tests/test_integrations_trl.py.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

# TRL's own kernels, and liger's, on a CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import trl
from trl import GRPOTrainer
from trl.trainer import grpo_trainer, utils

from grpo_core.integrations import trl_hook
from grpo_core.integrations.trl import FusedGRPOTrainer, patch_log_probs
from tests.trl_training import _copy, home, make_trainer, parameters, quick

CLOSE = 2e-5


def the_function() -> None:
    """Values and gradients of TRL's function and of ours."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g) for s in ((20, 16), (70, 16), (70,)))
    target, grad_outputs = torch.randint(0, 70, (20,), generator=g), torch.randn(2, 20, generator=g)
    for biased in (False, True):
        made = []
        for patched in (False, True):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 2 + biased]]
            patch = patch_log_probs() if patched else None
            function = utils._ChunkedLogProbFunction
            assert (function is grpo_trainer.__dict__.get("_ChunkedLogProbFunction")) == (
                trl.__version__ >= "1.14"
            )
            given = (*leaves, None)[:3]
            out = function.apply(*given, target, 0.7, 32, 3.0, 0.6)
            if patch is not None:
                patch.undo()
            total = (out[0] * grad_outputs[0]).sum() + (out[1] * grad_outputs[1]).sum()
            made.append([*out, *torch.autograd.grad(total, leaves)])
        for ours, theirs in zip(made[1], made[0], strict=True):
            assert torch.allclose(ours, theirs, rtol=CLOSE, atol=CLOSE)
    print("the function returns and differentiates as TRL's")


def the_model_of_async_grpo() -> None:
    """`patch_chunked_lm_head` is what AsyncGRPO gives its model."""
    ids = torch.randint(2, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for patched in (False, True):
        model = _copy(str(home("gemma2")))
        utils.patch_chunked_lm_head(model, chunk_size=8, temperature=0.9)
        patch = patch_log_probs() if patched else None
        out = model(input_ids=ids, labels=ids, completion_mask=(ids > 6).long())
        if patch is not None:
            patch.undo()
        (out["log_probs"].sum() + out["entropy"].sum()).backward()
        found.append([out["log_probs"], *(p.grad for p in model.parameters())])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert torch.allclose(ours, theirs, rtol=CLOSE, atol=CLOSE)
    print("AsyncGRPO's model is served")


def a_training(calls: list[int]) -> None:
    """GRPO in 1.14 asks at the hook with use_liger_kernel=True; liger's layers are left out."""
    layers = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    options: dict[str, Any] = {
        "use_liger_kernel": True,
        "liger_kernel_config": layers | {"fused_linear_cross_entropy": False},
        "num_iterations": 2,
        "beta": 0.04,
    }
    found = []
    for patched in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(GRPOTrainer, Path(tempfile.mkdtemp()), max_steps=3, **options)
        patch = patch_log_probs() if patched else None
        before, asked = parameters(trainer), len(calls)
        with quick():
            trainer.train()
        if patch is not None:
            patch.undo()
        assert (len(calls) > asked) == patched
        found.append(parameters(trainer))
    moved = max(float((found[0][n] - x).abs().max()) for n, x in before.items())
    gap = max(float((found[0][n] - found[1][n]).abs().max()) for n in before)
    assert gap <= CLOSE * moved
    print(f"GRPO with use_liger_kernel=True: parameters moved by {moved:.2g}, apart by {gap:.1e}")


def main() -> None:
    """All of it."""
    print("TRL", trl.__version__)
    warnings.simplefilter("ignore")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch_log_probs().undo()
    print(*(w.message for w in warned if "patch_log_probs" in str(w.message)))
    assert any(trl_hook.known_hook().unserved in str(w.message) for w in warned)
    the_function()
    the_model_of_async_grpo()
    calls: list[int] = []
    scores = trl_hook.linear_scores
    with mock.patch.object(
        trl_hook, "linear_scores", lambda *a, **k: (calls.append(1), scores(*a, **k))[1]
    ):
        if trl.__version__ >= "1.14":
            a_training(calls)
    try:
        make_trainer(FusedGRPOTrainer, Path(tempfile.mkdtemp()))
    except RuntimeError as error:
        print("FusedGRPOTrainer:", error)
    else:
        raise AssertionError("FusedGRPOTrainer: expected an error")


if __name__ == "__main__":
    main()
