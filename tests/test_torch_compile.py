"""`torch.compile(fullgraph=True)` of the public functions: no graph break, and the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from grpo_core import RECIPES, LossOutput, clip, fused_loss, token_logp
from grpo_core.loss import compile
from grpo_core.loss.fused_loss import logp_from_logits, loss_from_logits
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.row_inputs import RowInputs
from grpo_core.objective.objective import Objective, Surrogate, function_of
from tests.combinations import slow
from tests.conftest import BACKENDS, CPU_BACKEND, HAS_GPU, is_interpreted
from tests.test_fused_loss import OBJECTIVES, case, moved, needed

DEVICE = "cuda" if HAS_GPU else "cpu"
INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    ],
)


def is_common(backend: str, compiler: str, name: str = "") -> bool:
    """Inductor takes a minute of the C++ compiler, interpreted kernels seconds: a case of each."""
    on_cpu = backend == CPU_BACKEND
    if compiler == "eager":
        return name in (CASES if on_cpu else ("grpo", "sampler, mask, entropy, exact KL"))
    if compiler == "aot_eager":
        return name in (("dapo", "gspo", "") if on_cpu else ("gspo", ""))
    return on_cpu and name == "dapo"


# (backend, compiler, name) of `make quick`, each a second or two
QUICK = (
    (CPU_BACKEND, "eager", "sampler, mask, entropy, exact KL"),
    (CPU_BACKEND, "aot_eager", "gspo"),
    ("torch", "eager", "grpo"),
)


quick_on_cpu = pytest.mark.parametrize(
    "backend", [CPU_BACKEND, *slow("torch", "triton")], indirect=True
)


def over_compilers(*names: str) -> pytest.MarkDecorator:
    """Every backend, compiler and case; what is not common is rare."""
    cases = [
        pytest.param(
            *case,
            marks=[
                *(INDUCTOR.marks if case[1] == "inductor" else ()),
                *(() if is_common(*case) else (pytest.mark.rare,)),
                *(() if case in QUICK else (pytest.mark.slow,)),
            ],
        )
        for case in product(
            BACKENDS, ("eager", "aot_eager", "inductor"), *([names] if names else [])
        )
    ]
    arguments = ["backend", "compiler", *(["name"] if names else [])]
    return pytest.mark.parametrize(arguments, cases, indirect=["backend"])


SHOWN = ("logp", "entropy", "ratio", "kl", "factor")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Nothing is compiled yet, in no other process either: a graph on disk may be another's."""
    torch._dynamo.reset()
    counters.clear()
    with inductor_config.patch(force_disable_caches=True):
        yield


def step(logits: Tensor, arguments: dict[str, Any]) -> tuple[LossOutput, dict[str, Tensor]]:
    """What a training step would compile: logits of a model, the loss, and its metrics."""
    out = fused_loss(logits * 1.0, **arguments)
    return out, out.metrics


def differentiated(
    run: Any, logits: Tensor, arguments: dict[str, Any]
) -> tuple[LossOutput, dict[str, Tensor], Tensor]:
    """(output, metrics, gradient) of a step."""
    leaf = logits.clone().requires_grad_()
    out, metrics = run(leaf, arguments)
    out.loss.backward()
    return out, metrics, leaf.grad


def assert_same(
    ours: tuple[LossOutput, dict[str, Tensor], Tensor],
    plain: tuple[LossOutput, dict[str, Tensor], Tensor],
) -> None:
    """Loss, outputs and gradient bit for bit; metrics, which a compiler may sum anew, closely."""
    assert torch.equal(ours[0].loss, plain[0].loss)
    for name in SHOWN:
        assert torch.equal(getattr(ours[0], name), getattr(plain[0], name)), name
        assert not getattr(ours[0], name).requires_grad
    assert torch.equal(ours[2], plain[2])
    for metrics in (ours[1], ours[0].metrics):
        assert metrics.keys() == plain[1].keys()
        for name, value in plain[1].items():
            assert torch.allclose(metrics[name], value, rtol=1e-5, atol=1e-7), name


def packed(arguments: dict[str, Any], B: int, T: int) -> dict[str, Any]:
    """The arguments of a padded batch for its rows as packed ones, sequences mixed."""
    flat = {
        k: v.flatten(0, 1) if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in arguments.items()
    }
    return flat | {"sequence_id": torch.arange(B * T) % B}


CASES = {
    "dapo": OBJECTIVES["dapo"],
    "grpo": OBJECTIVES["grpo"],
    "gspo": OBJECTIVES["gspo"],
    "exact KL": OBJECTIVES["exact KL"],
    "exact KL of sequences": OBJECTIVES["exact KL of sequences"],
    "entropy": OBJECTIVES["entropy"],
    "sampler, mask, entropy, exact KL": OBJECTIVES["sampler, mask, entropy, exact KL"],
    "rewards of any groups": OBJECTIVES["rloo"],
}


@over_compilers(*CASES)
def test_the_same_bits_without_a_graph_break(
    backend: str, device: str, compiler: str, name: str
) -> None:
    """Loss, gradient and outputs of padded and packed rows; metrics inside and outside."""
    if compiler == "inductor" and name not in ("dapo", "gspo"):
        pytest.skip("an objective of each plan suffices: a minute of the C++ compiler each")
    both = compiler == "eager" or (compiler == "aot_eager" and name in ("dapo", "gspo"))
    buffer, arguments = case("odd V", torch.bfloat16)
    arguments = needed(CASES[name], buffer, arguments) | {
        "objective": CASES[name],
        "backend": backend,
    }
    if name.startswith("rewards"):
        arguments |= {"group_size": None, "group_id": torch.tensor([1, 0, 1, 0])}
    for of_rows in (False, True) if both else (False,):
        if of_rows:
            arguments = packed(arguments, *buffer.shape[:2])
            buffer = buffer.flatten(0, 1)
        there = moved(arguments, device)
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        plain = differentiated(step, buffer.to(device), there)
        assert_same(differentiated(compiled, buffer.to(device), there), plain)


@over_compilers()
def test_new_sizes_and_numbers_compile_once_more(backend: str, device: str, compiler: str) -> None:
    """The first change of a size or a number makes it dynamic; no later one compiles anything."""
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for k, B in enumerate((4, 2, 6, 8)):
        logits = torch.randn(B, 3, 40, device=device)
        arguments = {
            "target": torch.randint(0, 40, (B, 3), device=device),
            "objective": RECIPES["grpo"].replace(beta=0.1 + 0.1 * k),
            "rewards": torch.randn(B, device=device),
            "group_size": 2,
            "ref_logp": torch.full((B, 3), -3.0, device=device),
            "temperature": 0.7 + 0.1 * k,
            "normalizer": 5.0 + k,
            "backend": backend,
        }
        plain = differentiated(step, logits, arguments)
        assert_same(differentiated(compiled, logits, arguments), plain)
    assert counters["stats"]["unique_graphs"] == 2


@quick_on_cpu
@pytest.mark.parametrize(
    # aot_eager traces as eager does
    "compiler",
    ["aot_eager", pytest.param("eager", marks=pytest.mark.rare), INDUCTOR],
)
def test_token_logp_compiles(backend: str, device: str, compiler: str) -> None:
    def both(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return tuple(token_logp(logits, target, temperature=temperature, backend=backend))

    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    for B, temperature in ((2, 1.0), (3, 0.9), (4, 0.8)):
        logits = torch.randn(B, 4, 50, device=device)
        target = torch.randint(0, 50, (B, 3), device=device)
        for ours, plain in zip(
            compiled(logits[:, :-1], target, temperature),
            both(logits[:, :-1], target, temperature),
            strict=True,
        ):
            assert torch.equal(ours, plain)
    assert counters["stats"]["unique_graphs"] == 2


@quick_on_cpu
def test_the_operators_keep_their_promises(backend: str, device: str) -> None:
    """Schema, fake results and autograd, by torch's own check."""
    empty = dict.fromkeys(field.name for field in fields(LossInputs))
    for name in ("gspo",) if is_interpreted(backend) else ("grpo", "exact KL, entropy", "gspo"):
        spec = OBJECTIVES[name]
        buffer, arguments = case("padded", torch.float32)
        arguments = moved(needed(spec, buffer, arguments), device)
        # a fake target has no values
        given = empty | arguments | {"objective": spec, "backend": backend, "validate": False}
        logits, inputs = buffer.to(device, copy=True), LossInputs(**given)
        leaf = logits.clone().requires_grad_()
        key, tensors, numbers = call = compile._flatten(loss_from_logits, (leaf,), (inputs,))
        torch.library.opcheck(compile._run, call)
        call = key, [tensor.detach() for tensor in tensors], numbers
        torch.library.opcheck(compile._differentiate, (*call, torch.tensor(2.0, device=device)))
    inputs = RowInputs(target=arguments["target"], temperature=0.9, backend=backend, validate=False)
    call = compile._flatten(logp_from_logits, (), (buffer.to(device), inputs))
    torch.library.opcheck(compile._run, call)


@quick_on_cpu
def test_a_second_backward_and_one_scaled(backend: str, device: str) -> None:
    """The logits are kept, so both are right; a gradient of a gradient is refused."""
    buffer, arguments = case("padded", torch.float32)
    arguments = moved(arguments, device) | {"objective": "dapo", "backend": backend}
    _, _, plain = differentiated(step, buffer.to(device), arguments)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaf = buffer.to(device).requires_grad_()
    out, _ = compiled(leaf, arguments)
    (2 * out.loss).backward(retain_graph=True)
    assert torch.equal(leaf.grad, 2 * plain)
    (2 * out.loss).backward()
    assert torch.equal(leaf.grad, 4 * plain)
    out, _ = compiled(leaf, arguments)
    with pytest.raises(RuntimeError, match=r"double backward|cannot be differentiated"):
        (gradient,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
        gradient.sum().backward()


def test_what_a_graph_cannot_do_is_said() -> None:
    """Values are still looked at; what must be known beforehand is refused by name."""
    logits = torch.randn(2, 3, 20, device=DEVICE)
    arguments = {
        "target": torch.randint(0, 20, (2, 3), device=DEVICE),
        "objective": "dapo",
        "advantage": torch.ones(2, device=DEVICE),
    }
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for bad, message in (
        ({"advantage": torch.ones(5, device=DEVICE)}, "advantage: expected shape"),
        ({"target": arguments["target"] + 20, "validate": True}, "target: expected -100"),
        ({"inplace": True}, "inplace: expected False inside torch.compile"),
        ({"normalizer": -1.0}, "normalizer: expected a finite number > 0"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(logits, arguments | bad)

    def made_inside(logits: Tensor, arguments: dict[str, Any]) -> Tensor:
        return fused_loss(logits, **arguments | {"objective": Objective(clip(0.2))}).loss

    with pytest.raises(Exception, match="made outside"):
        torch.compile(made_inside, fullgraph=True, backend="eager")(logits, arguments)


def test_an_objective_may_be_made_inside() -> None:
    logits = torch.randn(2, 3, 20, device=DEVICE)
    arguments = {
        "target": torch.randint(0, 20, (2, 3), device=DEVICE),
        "advantage": torch.ones(2, device=DEVICE),
    }

    def made_inside(logits: Tensor) -> Tensor:
        spec = RECIPES["dapo"].replace(entropy_coef=0.1)
        return fused_loss(logits, **arguments, objective=spec).loss

    compiled = torch.compile(made_inside, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), made_inside(logits))


def test_functions_of_one_name_are_told_apart() -> None:
    """As when a notebook's cell defines a surrogate anew."""

    def made(gains: bool) -> Objective:
        if gains:

            def surrogate(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Any:
                return -advantage * logp, -advantage, advantage * 0
        else:

            def surrogate(logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Any:
                return advantage * logp, advantage, advantage * 0

        return Objective(Surrogate(surrogate))

    first, second = made(True).surrogate, made(False).surrogate
    assert first.name != second.name
    assert function_of(second.name) is second.function
    assert first.name == Surrogate(first.function, (1.0,)).name
