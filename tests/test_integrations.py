"""Adapters for other trainers' losses, against their formulas transcribed in float64.

OpenRLHF and open-instruct need not be installed; what needs verl is in tests/verl.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.open_instruct_adapter import compute_grpo_loss
from examples.openrlhf_adapter import PolicyLoss
from grpo_core.integrations.verl_head import FusedLinear, linear_cross_entropy
from tests.oracles import dual_clip, logp_and_entropy, ppo_clip

SINGLE = 3e-6


def batch() -> dict[str, Tensor]:
    """[4, 6] in float32; ratios from 0.5 to 2, one sequence masked, rollout not quite the old."""
    mask = torch.rand(4, 6) < 0.8
    mask[0, 0], mask[2] = True, False
    logp = -2 * torch.rand(4, 6) - 0.1
    old = (logp + 0.35 * torch.randn(4, 6)).clamp(max=-0.02)
    return {
        "log_probs": logp,
        "old_log_probs": old,
        "advantages": torch.randn(4, 6),
        "action_mask": mask,
        "rollout_log_probs": (old + 0.15 * torch.randn(4, 6)).clamp(max=-0.02),
    }


def per_sequence(values: Tensor, mask: Tensor) -> list[Tensor]:
    return [values[i][mask[i]] for i in range(len(mask)) if mask[i].any()]


def openrlhf(b: dict[str, Tensor], options: dict[str, Any], counts: dict[str, Any]) -> Tensor:
    """The loss by its formulas: PPO and GSPO, dual clip, corrections, two means."""
    d, A, mask = b["log_probs"] - b["old_log_probs"], b["advantages"], b["action_mask"]
    low, high = options.get("clip_eps_low", 0.2), options.get("clip_eps_high", 0.2)
    kind = options.get("policy_loss_type", "ppo")
    corrects = options.get("is_correction_level", "off") != "off"
    ratio = d.exp()
    if kind == "gspo":
        d = b["log_probs"] - b["rollout_log_probs"] if corrects else d
        means = [d[i][mask[i]].mean() if mask[i].any() else d[i, 0] * 0 for i in range(len(mask))]
        ratio = torch.stack(means).exp()[:, None].expand_as(d)
    policy = ppo_clip(ratio, A, low, high)
    if "dual_clip" in options:
        policy = dual_clip(ratio, A, low, high, options["dual_clip"])
    if corrects and kind == "ppo":
        policy = policy * openrlhf_correction(b, options)[0]
    dp = counts.get("dp_size", 1)
    if options.get("token_level_loss", True) and kind == "ppo":
        n = counts.get("batch_num_tokens")
        return -policy[mask].sum() * dp / n if n else -policy[mask].mean()
    means = torch.stack([x.mean() for x in per_sequence(policy, mask)])
    n = counts.get("global_batch_size")
    return -means.sum() * dp / n if n else -means.mean()


def openrlhf_correction(b: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(weights, outside the threshold) of each token, one token at a time."""
    low, high = options["is_correction_threshold"]
    weights, outside = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.bool)
    old, rollout, mask = b["old_log_probs"], b["rollout_log_probs"], b["action_mask"]
    for i in range(4):
        statistics = []
        for t in range(6):
            q, p = math.exp(old[i, t]), math.exp(rollout[i, t])
            statistics.append(
                {
                    "ratio": math.log(q / p),
                    "tv": abs(p - q),
                    "binary_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
                }[options.get("is_correction_gating", "ratio")]
            )
        counted = [s for s, m in zip(statistics, mask[i].tolist(), strict=True) if m]
        if options["is_correction_level"] == "seq":
            mean = sum(counted) / len(counted) if counted else math.nan
            statistics = [mean] * 6
        if options.get("is_correction_gating", "ratio") == "ratio":
            statistics = [math.exp(s) for s in statistics]
        for t, s in enumerate(statistics):
            outside[i, t] = not low <= s <= high
            if options.get("is_correction_mode", "mask") == "clip":
                weights[i, t] = min(max(s, low), high)
            elif not outside[i, t]:
                weights[i, t] = math.exp(old[i, t] - rollout[i, t])
    return weights, outside


GLOBAL = {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 9}
TOKEN, SEQ = {"is_correction_level": "token"}, {"is_correction_level": "seq"}
BAND = {"is_correction_threshold": [0.9, 1.1]}


@pytest.mark.parametrize("counts", [{}, GLOBAL])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_eps_high": 0.3, "token_level_loss": False},
        {"dual_clip": 1.5, "clip_eps_low": 0.1},
        {"policy_loss_type": "gspo", "clip_eps_low": 0.02, "clip_eps_high": 0.03},
        {"policy_loss_type": "gspo", "dual_clip": 1.25, "clip_eps_high": 0.1},
        TOKEN | BAND | {"is_correction_mode": "clip"},
        TOKEN | BAND | {"is_correction_mode": "clip", "token_level_loss": False, "dual_clip": 3.0},
        TOKEN | BAND,
        SEQ | {"is_correction_threshold": [0.97, 1.03]},
        TOKEN | {"is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 2e-3)},
        TOKEN | {"is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.03]},
        SEQ | {"is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 6e-3]},
        SEQ | {"is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.03]},
        TOKEN | {"policy_loss_type": "gspo", "clip_eps_high": 0.05},
    ],
    ids=str,
)
def test_openrlhf(options: dict[str, Any], counts: dict[str, Any]) -> None:
    torch.manual_seed(3)
    b = batch()
    exact = {k: v if v.dtype == torch.bool else v.double() for k, v in b.items()}
    exact["log_probs"].requires_grad_()
    wanted = openrlhf(exact, options, counts)
    (gradient,) = torch.autograd.grad(wanted, exact["log_probs"])
    log_probs = b["log_probs"].requires_grad_()
    # OpenRLHF's masks are of any dtype
    given = b | {"log_probs": log_probs, "action_mask": b["action_mask"].float()}
    loss_fn = PolicyLoss(**options)
    loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = loss_fn(**given, **counts)
    (ours,) = torch.autograd.grad(loss, log_probs)
    size = float(gradient.abs().max())
    assert size > 0 and float((ours - gradient).abs().max()) < SINGLE * size
    assert abs(float(loss.detach()) - float(wanted.detach())) < SINGLE
    # what it logs
    d, A, mask = log_probs.detach() - b["old_log_probs"], b["advantages"], b["action_mask"]
    assert torch.isclose(ppo_kl, -d[mask].mean(), atol=1e-6)
    assert loss_fn.out is not None and loss_fn.out.metrics["nonfinite_rows"] == 0
    is_ppo = options.get("policy_loss_type", "ppo") == "ppo"
    if is_ppo:
        low, high = options.get("clip_eps_low", 0.2), options.get("clip_eps_high", 0.2)
        bounded = d.exp().clamp(1 - low, 1 + high) * A < d.exp() * A
        assert torch.isclose(clip_ratio, bounded[mask].float().mean()) and clip_ratio > 0
    corrects = "is_correction_level" in options and is_ppo
    assert (vllm_kl is None) == (is_filter_ratio is None) != corrects
    if corrects:
        gap = b["rollout_log_probs"] - b["old_log_probs"]
        assert torch.isclose(vllm_kl, gap[mask].mean(), atol=1e-6)
        outside = openrlhf_correction(exact, options)[1]
        share = outside[:, 0] if options["is_correction_level"] == "seq" else outside[mask]
        assert torch.isclose(is_filter_ratio, share.float().mean())
        assert 0 < is_filter_ratio < 1


def test_openrlhf_takes_what_its_actor_gives() -> None:
    """The call of openrlhf/trainer/ray/ppo_actor.py in 0.11.2: by keyword, and five results."""
    loss_fn = PolicyLoss(
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        dual_clip=None,
        token_level_loss=True,
        policy_loss_type="ppo",
        is_correction_level="seq",
        is_correction_mode="mask",
        is_correction_gating="binary_kl",
        is_correction_threshold=[0.0, 0.05],
    )
    b = batch()
    counts = {"dp_size": 2, "batch_num_tokens": torch.tensor(37.0)}
    actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = loss_fn(
        b["log_probs"],
        b["old_log_probs"],
        b["advantages"],
        action_mask=b["action_mask"],
        rollout_log_probs=b["rollout_log_probs"],
        global_batch_size=torch.tensor(9.0),
        **counts,
    )
    for value in (actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio):
        assert value.ndim == 0 and value.isfinite()


def test_openrlhf_without_a_mask_and_without_tokens() -> None:
    b = batch()
    del b["rollout_log_probs"], b["action_mask"]
    loss = PolicyLoss()(**b, action_mask=None).loss
    ones = torch.ones(4, 6, dtype=torch.bool)
    exact = {k: v.double() for k, v in b.items()} | {"action_mask": ones}
    assert abs(float(loss) - float(openrlhf(exact, {}, {}))) < SINGLE
    empty = PolicyLoss()(**b, action_mask=torch.zeros(4, 6))
    assert empty.loss == 0 and empty.clip_ratio == 0 and empty.ppo_kl == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss_type": "reinforce"}, "policy_loss_type: expected one of"),
        ({"is_correction_level": "row"}, "is_correction_level: expected one of"),
        ({"is_correction_mode": "drop"}, "is_correction_mode: expected one of"),
        ({"is_correction_gating": "kl"}, "is_correction_gating: expected one of"),
        ({"dual_clip": 1.1}, r"dual_clip: expected None or at least 1 \+ clip_eps_high"),
        (SEQ | {"is_correction_mode": "clip"}, "is_correction_mode: expected 'mask' unless"),
        (TOKEN | {"is_correction_threshold": [0.5]}, r"is_correction_threshold: expected \(low, h"),
        (
            TOKEN | {"is_correction_gating": "tv"},
            "is_correction_threshold: expected low = 0 for tv",
        ),
    ],
)
def test_openrlhf_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)


def test_openrlhf_needs_what_its_correction_is_of() -> None:
    b = batch() | {"rollout_log_probs": None}
    with pytest.raises(ValueError, match="rollout_log_probs: expected a tensor"):
        PolicyLoss(**TOKEN)(**b)


@pytest.mark.parametrize("found", ["0.11.1", "0.12.0"])
def test_openrlhf_of_another_version_is_refused(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import examples.openrlhf_adapter as module

    monkeypatch.setattr(module, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"expected openrlhf 0\.11\.2, got {found}"):
        module.check_version()


class LossType(str, Enum):
    """As open-instruct names its losses."""

    dapo = "dapo"
    cispo = "cispo"


@pytest.mark.parametrize("estimator", [0, 1, 2, 3, None])
@pytest.mark.parametrize("kind", [LossType.dapo, LossType.cispo, "dapo"])
def test_open_instruct(kind: str, estimator: int | None) -> None:
    """All three matrices, and the gradient of what the caller makes of them."""
    b, config = batch(), SimpleNamespace(clip_lower=0.2, clip_higher=0.272, kl_estimator=estimator)
    config.loss_fn = kind
    ref = None if estimator is None else b["rollout_log_probs"].clone()
    if ref is not None:
        # beyond ±40, where its KL is flat
        ref[0, 1], ref[1, 2] = -60.0, b["log_probs"][1, 2] + 40.5
    rho = 2 * torch.rand(4, 6)
    rho[3, 1] = 0.0

    x = b["log_probs"].double().requires_grad_()
    r, A, w = (x - b["old_log_probs"]).exp(), b["advantages"].double(), rho.double()
    if kind == "dapo":
        pg = -ppo_clip(r, A, 0.2, 0.272)
        clipped = (r.clamp(0.8, 1.272) * A < r * A) & (w != 0)
    else:
        pg, clipped = -r.clamp(max=1.272).detach() * A * x, (r > 1.272) & (w != 0)
    pg = w * pg
    kl = torch.zeros_like(pg)
    if ref is not None:
        gap = (x - ref.double()).clamp(-40, 40)
        kl = [gap, gap**2 / 2, (-gap).exp() - 1 + gap, r * gap][estimator or 0]
    mask = b["action_mask"]
    wave = torch.linspace(0.5, 2, 24, dtype=torch.float64).view(4, 6) * mask
    (gradient,) = torch.autograd.grad(((pg + 0.05 * kl) * wave).sum() / 17, x)

    leaf = b["log_probs"].requires_grad_()
    ratio = (leaf - b["old_log_probs"]).exp()
    found = compute_grpo_loss(leaf, ratio, b["advantages"], ref, config, rho)
    for ours, theirs in zip(found, (pg, clipped.double(), kl), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (4, 6)
        assert torch.allclose(ours.double(), theirs, 1e-5, 1e-6)
    total = ((found[0] + 0.05 * found[2]) * wave.float()).sum() / 17
    (ours,) = torch.autograd.grad(total, leaf)
    assert torch.allclose(ours.double(), gradient, 1e-5, SINGLE * float(gradient.abs().max()))
    assert clipped.any() and not found[1].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_fn": "grpo"}, r"loss_fn: expected one of \('dapo', 'cispo'\), got 'grpo'"),
        ({"kl_estimator": 4}, "kl_estimator: expected one of 0 to 3, got 4"),
    ],
)
def test_open_instruct_refuses(change: dict[str, Any], message: str) -> None:
    options = {"loss_fn": "dapo", "clip_lower": 0.2, "clip_higher": 0.2, "kl_estimator": 2}
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        compute_grpo_loss(x, x + 1, x, x, SimpleNamespace(**options | change), x)
    with pytest.raises(ValueError, match=r"rho_weights: expected shape \[2, 3\], got \[3\]"):
        compute_grpo_loss(x, x + 1, x, x, SimpleNamespace(**options), x[0])


def test_operators_of_verl() -> None:
    """Their shapes and values; beside the real ones in tests/verl."""
    hidden, weight = torch.randn(2, 5, 8), torch.randn(19, 8)
    label = torch.randint(0, 19, (2, 5))
    logp, entropy = logp_and_entropy(hidden.double() @ weight.double().T, label, 0.7)
    found = FusedLinear()(hidden, weight, label, temperature=torch.tensor(0.7))
    flat = linear_cross_entropy(hidden, weight, label, 0.7)
    for ours, theirs in zip((*found, *flat), (logp, entropy) * 2, strict=True):
        assert torch.allclose(ours.double().view(2, 5), theirs, atol=1e-5)
    assert flat[0].shape == (10,) and found[0].shape == (2, 5)
    with pytest.raises(ValueError, match="reduction: expected 'none', got 'mean'"):
        linear_cross_entropy(hidden, weight, label, 0.7, "mean")
    with pytest.raises(NotImplementedError, match="temperature: expected one number"):
        FusedLinear()(hidden, weight, label, temperature=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"impl_backend: expected 'torch'.*got 'liger'"):
        FusedLinear(impl_backend="liger")


@pytest.mark.parametrize("module", ["verl", "verl_log_probs"])
@pytest.mark.parametrize("missing", ["verl", "tensordict"])
def test_without_verl_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, missing: str
) -> None:
    """The package itself, or something that it imports."""

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "verl":
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for name in [n for n in sys.modules if n == "verl" or n.startswith("grpo_core.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    what = "it" if missing == "verl" else "tensordict, which verl imports,"
    message = f"needs verl 0.9.1; {what} is missing: pip install --no-deps verl==0.9.1"
    with pytest.raises(ImportError, match=re.escape(message)):
        importlib.import_module(f"grpo_core.integrations.{module}")
