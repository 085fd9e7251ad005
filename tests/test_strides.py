"""Vectors that are views: a column, an expanded number and a transposed matrix change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_core
from grpo_core import (
    RECIPES,
    LinearHead,
    LogpRequest,
    LossRequest,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    fused_linear_loss,
    fused_loss,
    group_advantages,
    linear_logp,
    linear_token_logp,
    logp_loss,
    preset,
    token_logp,
    with_fused_head,
)
from grpo_core.integrations.trl_scores import linear_scores
from grpo_core.loss.dpo_loss import dpo_loss, sequence_logp
from grpo_core.objective.value import gae, rewards_with_kl, value_loss, whiten
from tests.conftest import HAS_TRITON
from tests.tiny_models import tiny

B, T, V, D = 4, 2, 40, 5
N = B * T
Answers = Iterable[Tensor | None]
SAMPLED = RECIPES["grpo"].replace(
    entropy_coef=0.01,
    factor=PolicyFactor(SamplerCorrection(), rejections=(Rejection(low=-2.0, high=2.0),)),
)
EXACT = RECIPES["gspo"].replace(kl="exact", beta=0.1)


def tokens(*shape: int) -> dict[str, Tensor]:
    """Every vector over tokens that a loss takes."""
    logp = -3.7 + 0.1 * torch.randn(3, *shape)
    return {
        "target": torch.randint(0, V, shape),
        "mask": torch.rand(shape) < 0.8,
        "old_logp": logp[0],
        "ref_logp": logp[1],
        "sampler_logp": logp[2],
        "advantage": torch.randn(shape),
    }


def of_groups(*shape: int) -> dict[str, Tensor]:
    """The same with rewards for advantages, and the tokens' sequences where they are packed."""
    given = tokens(*shape)
    del given["advantage"]
    given["rewards"], given["group_id"] = torch.randn(B), torch.tensor([0, 1, 0, 1])
    if len(shape) == 1:
        given["sequence_id"] = torch.arange(N) // T
    return given


def results(loss: Any, *leaves: Tensor) -> Answers:
    """What a loss returned, and the gradients."""
    loss.loss.backward()
    shown = [getattr(loss, name).detach() for name in ("loss", "logp", "entropy", "ratio", "kl")]
    return [*shown, *(leaf.grad for leaf in leaves)]


def leaf(*shape: int, seed: int = 1) -> Tensor:
    """The same numbers every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def whole_loss(objective: Any, *shape: int) -> Callable[..., Answers]:
    def call(backend: str, **given: Tensor) -> Answers:
        logits = leaf(*shape, V)
        return results(fused_loss(logits, objective=objective, backend=backend, **given), logits)

    return call


def exact_loss(backend: str, **given: Tensor) -> Answers:
    logits = leaf(N, V)
    ref = leaf(N, V, seed=2).detach()
    out = fused_loss(logits, ref_logits=ref, objective=EXACT, backend=backend, **given)
    return results(out, logits)


def hidden_loss(objective: Any, *shape: int, **options: Any) -> Callable[..., Answers]:
    def call(backend: str, **given: Tensor) -> Answers:
        hidden, head = leaf(*shape, D), leaf(V, D, seed=2)
        given_too = {"objective": objective, "backend": backend, **options}
        return results(fused_linear_loss(hidden, head, **given, **given_too), hidden, head)

    return call


def scores(function: Callable[..., Any], *shape: int, **options: Any) -> Callable[..., Answers]:
    """Of hidden states, with views as `grad_outputs`."""

    def call(backend: str, grad_output: Tensor, **given: Tensor) -> Answers:
        hidden, head = leaf(*shape, D), leaf(V, D, seed=2)
        logp, entropy, *_ = function(hidden, head, backend=backend, **given, **options)
        (logp * grad_output + entropy).sum().backward()
        return logp.detach(), entropy.detach(), hidden.grad, head.grad

    return call


def own_logp(backend: str, logp: Tensor, **given: Tensor) -> Answers:
    logp = logp.detach().requires_grad_()
    return results(logp_loss(logp, objective=SAMPLED, backend=backend, **given), logp)


def through_head(backend: str, **given: Tensor) -> Answers:
    """A model's own forward; its requests know nothing of a backend."""
    torch.manual_seed(3)
    model = with_fused_head(tiny())
    ids = torch.randint(0, V, (B, T))
    target = given.pop("target")
    logp = model(input_ids=ids, request=LogpRequest(target)).logp
    out = model(input_ids=ids, request=LossRequest(target, objective="dapo", **given))
    out.loss.backward()
    return logp, out.loss.detach(), model.lm_head.weight.grad


def by_preset(backend: str, target: Tensor, **given: Tensor) -> Answers:
    logits = leaf(B, T, V)
    given = {name: value for name, value in given.items() if name in ("old_logp", "advantage")}
    objective = preset("trl", loss_type="dapo").objective
    out = fused_loss(logits, target, objective=objective, backend=backend, **given)
    return results(out, logits)


def scalars(function: Callable[..., Any], **options: Any) -> Callable[..., Answers]:
    """Functions without a backend."""

    def call(backend: str, **given: Tensor) -> Answers:
        found = function(**given, **options)
        if isinstance(found, Tensor):
            return (found,)
        values = found if isinstance(found, tuple) else vars(found).values()
        return [value for value in values if isinstance(value, Tensor)]

    return call


def batch(**extra: Tensor) -> dict[str, Tensor]:
    return {"mask": torch.rand(B, T) < 0.8, **extra}


def pairs() -> dict[str, Tensor]:
    names = ("logp_chosen", "logp_rejected", "ref_chosen", "ref_rejected", "weight")
    return {name: torch.rand(B) for name in names}


def values() -> dict[str, Tensor]:
    return {name: torch.rand(B, T) for name in ("values", "old_values", "returns", "weight")}


def scored(*shape: int) -> dict[str, Tensor]:
    given = tokens(*shape)
    return {name: given[name] for name in ("target", "mask")} | {"grad_output": torch.randn(shape)}


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if name not in names}


def some(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: given[name] for name in names}


CASES: dict[str, tuple[Callable[..., Answers], Callable[[], dict[str, Tensor]]]] = {
    "fused_loss": (whole_loss(SAMPLED, B, T), lambda: tokens(B, T)),
    "fused_loss, packed": (whole_loss(SAMPLED, N), lambda: of_groups(N)),
    "fused_loss, sequences": (
        whole_loss("gspo", N),
        lambda: without(of_groups(N), "sampler_logp"),
    ),
    "fused_loss, exact KL": (exact_loss, lambda: without(of_groups(N), "ref_logp")),
    "token_logp": (
        lambda backend, **given: token_logp(leaf(B, T, V), backend=backend, **given),
        lambda: some(tokens(B, T), "target", "mask"),
    ),
    "token_logp, packed, no mask": (
        lambda backend, **given: token_logp(leaf(N, V), backend=backend, **given),
        lambda: some(tokens(N), "target"),
    ),
    "fused_linear_loss": (hidden_loss(SAMPLED, B, T), lambda: tokens(B, T)),
    "fused_linear_loss, packed": (hidden_loss("gspo", N, plan="lean"), lambda: of_groups(N)),
    "linear_token_logp": (
        lambda backend, **given: linear_token_logp(
            leaf(N, D), leaf(V, D, seed=2), backend=backend, **given
        ),
        lambda: some(tokens(N), "target", "mask"),
    ),
    "linear_logp": (scores(linear_logp, N), lambda: scored(N)),
    "linear_logp, lean": (scores(linear_logp, B, T, plan="lean"), lambda: scored(B, T)),
    "linear_scores": (
        scores(linear_scores, N, further=("is_top1",)),
        lambda: without(scored(N), "mask"),
    ),
    "logp_loss": (
        own_logp,
        lambda: (
            without(of_groups(N), "target")
            | {"logp": -torch.rand(N), "entropy": torch.rand(N), "factor": torch.rand(N)}
        ),
    ),
    "group_advantages": (
        lambda backend, rewards: [group_advantages(rewards, 2, backend=backend)],
        lambda: {"rewards": torch.randn(B)},
    ),
    "with_fused_head": (
        through_head,
        lambda: some(tokens(B, T), "target", "mask", "old_logp", "advantage"),
    ),
    "preset": (by_preset, lambda: tokens(B, T)),
    "gae": (
        scalars(gae),
        lambda: batch(rewards=torch.randn(B, T), values=torch.randn(B, T)),
    ),
    "rewards_with_kl": (
        scalars(rewards_with_kl, beta=0.1),
        lambda: batch(rewards=torch.randn(B), logp=torch.randn(B, T), ref_logp=torch.randn(B, T)),
    ),
    "whiten": (scalars(whiten), lambda: batch(vector=torch.randn(B, T).double())),
    "value_loss": (scalars(value_loss, eps=0.2), values),
    "dpo_loss": (scalars(dpo_loss, beta=0.1), pairs),
    "sequence_logp": (
        scalars(sequence_logp, sequences=B),
        lambda: {
            "logp": torch.randn(N),
            "mask": torch.rand(N) < 0.8,
            "sequence_id": torch.arange(N) // T,
        },
    ),
}


def column(vector: Tensor) -> Tensor:
    """Every second number of one with other legal numbers in between."""
    return torch.stack([vector, vector.flip(-1)], -1)[..., 0]


# an expanded vector repeats its first entries
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": column,
    "expanded": lambda vector: vector[:1].expand(vector.shape),
    "transposed": lambda vector: vector.t().contiguous().t(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_view_gives_what_its_copy_gives(name: str, backend: str) -> None:
    """Every vector argument in every layout; gradients, too."""
    function, make = CASES[name]
    given = make()
    for layout, view in LAYOUTS.items():
        if layout == "transposed" and all(vector.ndim < 2 for vector in given.values()):
            continue
        views = {name: view(vector) for name, vector in given.items()}
        assert not any(
            v.is_contiguous() for v in views.values() if v.ndim > 1 or layout == "column"
        )
        copies = {name: v.clone(memory_format=torch.contiguous_format) for name, v in views.items()}
        found, expected = (list(function(backend, **vectors)) for vectors in (views, copies))
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, equal_nan=True, msg=f"{name}, {layout}")


def test_every_public_function_is_among_them() -> None:
    """What is public, can be called and takes vectors; records and settings take none."""
    vectorless = {
        "RECIPES",
        "GroupNorm",
        "clip",
        "merge_metrics",
        "without_fused_head",
        *(name for name in grpo_core.__all__ if isinstance(getattr(grpo_core, name), type)),
    }
    tested = {name.split(",")[0] for name in CASES}
    assert set(grpo_core.__all__) - vectorless <= tested


def test_a_head_with_vectors_of_its_own(backend: str) -> None:
    """A bias and an adapter that are views."""
    hidden, bias = leaf(N, D), torch.randn(V, 2)[:, 0]
    pair = torch.randn(D, 2).t(), torch.randn(2, V).t()
    found = []
    for parts in ((bias, *pair), tuple(x.clone() for x in (bias, *pair))):
        weight, bias_too, a, b = leaf(V, D, seed=2), *parts
        head = LinearHead(weight, bias=bias_too, lora_A=a, lora_B=b, lora_scaling=0.5)
        target = torch.arange(N)
        found.append(linear_logp(hidden, head, target, backend=backend))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_no_launch_takes_a_vector_with_gaps() -> None:
    """The launcher refuses what a kernel would read at the wrong places."""
    from grpo_core.kernels.records import Rows
    from grpo_core.kernels.row_stats import row_stats

    target = torch.zeros(B, 2, dtype=torch.int64)[:, 0]
    expected = r"_row_stats_kernel: target_ptr: expected a contiguous tensor, got .* strides \(2,\)"
    with pytest.raises(ValueError, match=expected):
        row_stats(Rows(torch.zeros(B, V)), target)
