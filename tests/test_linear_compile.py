"""`torch.compile(fullgraph=True)` of the loss from hidden states: no graph break, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from grpo_core import LinearHead, LossOutput, fused_linear_loss, linear_token_logp
from grpo_core.linear.logp import logp_from_hidden
from grpo_core.linear.loss import loss_from_hidden
from grpo_core.linear.workspace import LinearOptions
from grpo_core.loss import compile
from grpo_core.loss.inputs import LossInputs
from grpo_core.loss.row_inputs import RowInputs
from tests.combinations import slow
from tests.conftest import CPU_BACKEND
from tests.test_fused_loss import OBJECTIVES
from tests.test_linear_loss import FEW, HEADS, case, make_head, needed
from tests.test_torch_compile import SHOWN

COMPILERS = ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
TENSORS = ("weight", "bias", "lora_A", "lora_B")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    yield


def step(
    hidden: Tensor, head: LinearHead, arguments: dict[str, Any]
) -> tuple[LossOutput, dict[str, Tensor]]:
    """What a training step would compile: hidden states of a model, the loss, and its metrics."""
    out = fused_linear_loss(hidden * 1.0, head, backend=CPU_BACKEND, **arguments)
    return out, out.metrics


def differentiated(
    run: Any, hidden: Tensor, head: LinearHead, arguments: dict[str, Any], frozen: bool = False
) -> tuple[LossOutput, dict[str, Tensor], dict[str, Tensor]]:
    """(output, metrics, gradients) of a step whose loss is scaled."""
    leaves = {"hidden": hidden.clone().requires_grad_()}
    for name in TENSORS:
        if (tensor := getattr(head, name)) is not None:
            leaves[name] = tensor.clone().requires_grad_(not frozen)
    matrix = replace(head, **{k: v for k, v in leaves.items() if k != "hidden"})
    out, metrics = run(leaves["hidden"], matrix, arguments)
    (0.5 * out.loss).backward()
    return out, metrics, {k: v.grad for k, v in leaves.items() if v.grad is not None}


def assert_same(ours: Any, plain: Any) -> None:
    """Loss, outputs and gradients bit for bit; metrics closely."""
    assert torch.equal(ours[0].loss, plain[0].loss)
    for name in SHOWN:
        assert torch.equal(getattr(ours[0], name), getattr(plain[0], name)), name
        assert not getattr(ours[0], name).requires_grad
    assert ours[2].keys() == plain[2].keys()
    for name, gradient in plain[2].items():
        assert ours[2][name].dtype == gradient.dtype
        assert torch.equal(ours[2][name], gradient), name
    assert ours[1].keys() == plain[1].keys()
    for name, value in plain[1].items():
        assert torch.allclose(ours[1][name], value, rtol=1e-5, atol=1e-7), name


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "matrix": ("dapo", "matrix", {"memory_budget": FEW}),
    "everything": ("grpo", "everything", {"plan": "lean"}),
    "sequences": ("gspo", "bias", {"memory_budget": FEW}),
    "all logp": ("dapo", "soft cap", {"all_logp": True}),
    "exact KL": ("exact KL", "adapter", {}),
    "sampler": ("sampler, mask, entropy, exact KL", "padded", {}),
    "narrow logits": ("entropy", "scale", {"logits_dtype": torch.bfloat16}),
}
QUICK = ("everything", "sequences", "sampler")


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in CASES if name not in QUICK))])
def test_the_same_bits_without_a_graph_break(compiler: str, name: str) -> None:
    """Both plans, every kind of head, groups of equal rewards left out."""
    if compiler != "eager" and name not in ("matrix", "everything", "sampler"):
        pytest.skip("a plan of each kind suffices")
    objective, kind, options = CASES[name]
    head = make_head(**HEADS[kind])
    hidden, arguments = case(head)
    arguments["rewards"][2:] = 0.5
    arguments, reference = needed(OBJECTIVES[objective], head, hidden, arguments)
    arguments |= {"objective": OBJECTIVES[objective], **options}
    if reference is not None:
        arguments |= {"ref_hidden": reference[0], "ref_lm_head": reference[1]}
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    plain = differentiated(step, hidden, head, arguments)
    assert_same(differentiated(compiled, hidden, head, arguments), plain)
    if name == "matrix":
        assert plain[1]["skipped_rows"] > 20


@pytest.mark.parametrize(
    ("compiler", "dtype"), [("eager", torch.bfloat16), *slow(("aot_eager", torch.float16))]
)
def test_frozen_and_narrow_heads(compiler: str, dtype: torch.dtype) -> None:
    """Only what asks for a gradient gets one; a loss scale comes before float16 rounds."""
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    head = make_head(dtype=dtype)
    hidden, arguments = case(head, dtype)
    arguments |= {"objective": OBJECTIVES["dapo"], "normalizer": 1e6}
    del arguments["ref_logp"]
    for frozen in (True, False):
        plain = differentiated(step, hidden, head, arguments, frozen)
        assert plain[2].keys() == ({"hidden"} if frozen else {"hidden", "weight"})
        assert_same(differentiated(compiled, hidden, head, arguments, frozen), plain)
    with torch.no_grad():
        out, _ = compiled(hidden.clone().requires_grad_(), head, arguments)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_policies_and_log_probabilities(compiler: str) -> None:
    """From hidden states, packed; under autocast."""

    def run(
        hidden: Tensor, head: LinearHead, arguments: dict[str, Any]
    ) -> tuple[LossOutput, dict[str, Tensor]]:
        scored = linear_token_logp(hidden, head, arguments["target"], backend=CPU_BACKEND)
        out, metrics = step(hidden, head, arguments)
        return out, metrics | {"logp": scored.logp, "entropies": scored.entropy}

    head = make_head(bias=True)
    hidden, arguments = case(head)
    B, T = hidden.shape[:2]
    mask = arguments.pop("mask").flatten()
    packed = {
        "target": arguments["target"].flatten(),
        "mask": mask,
        "rewards": arguments["rewards"],
        "group_size": 2,
        "sequence_id": torch.arange(B).repeat_interleave(T),
        "old_logp": arguments["old_logp"].flatten(),
        "ref_hidden": hidden.flatten(0, 1) - 0.1,
        "ref_lm_head": make_head(),
        "temperature": 0.9,
        "objective": OBJECTIVES["grpo"],
        "normalizer": torch.tensor(3.0),
    }
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    flat = hidden.flatten(0, 1)
    plain = differentiated(run, flat, head, packed)
    assert plain[0].ratio.std() > 0 and plain[0].kl.std() > 0
    assert_same(differentiated(compiled, flat, head, packed), plain)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = differentiated(run, flat, head, packed)
        assert_same(differentiated(compiled, flat, head, packed), narrow)
    assert not torch.equal(narrow[0].logp, plain[0].logp)


def test_new_sizes_and_numbers_compile_once_more() -> None:
    """The first change of a size or a number makes it dynamic; no later one compiles anything."""
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    head = make_head(softcap=3.0)
    for k, B in enumerate((4, 2, 6, 8)):
        arguments = {
            "target": torch.randint(0, head.V, (B, 3)),
            "objective": OBJECTIVES["dapo"],
            "advantage": torch.randn(B),
            "temperature": 0.7 + 0.1 * k,
            "normalizer": 5.0 + k,
        }
        hidden = torch.randn(B, 3, head.D)
        plain = differentiated(step, hidden, head, arguments)
        assert_same(differentiated(compiled, hidden, head, arguments), plain)
    assert counters["stats"]["unique_graphs"] == 2


def test_bad_input_is_told_as_ever() -> None:
    compiled = torch.compile(step, backend="eager")
    head = make_head()
    hidden, arguments = case(head)
    with pytest.raises(Exception, match="target: expected shape"):
        compiled(hidden[:, :-1], head, arguments)
    with pytest.raises(Exception, match="ref_hidden: expected None with ref_logp"):
        compiled(hidden, head, arguments | {"ref_hidden": hidden})


def test_the_operators_keep_their_promises() -> None:
    """Schema, fake results and autograd, by torch's own check."""
    head = make_head(bias=True, lora=2)
    hidden, arguments = case(head)
    head = replace(head, **{name: getattr(head, name).requires_grad_() for name in TENSORS})
    given = dict.fromkeys(field.name for field in fields(LossInputs)) | {
        "target": arguments["target"],
        "objective": OBJECTIVES["dapo"],
        "advantage": torch.randn(len(hidden)),
        "old_logp": arguments["old_logp"],
        "temperature": 0.9,
        "backend": CPU_BACKEND,
        # a fake target has no values
        "validate": False,
    }
    leaves, values = (hidden.requires_grad_(), head), (LossInputs(**given), LinearOptions())
    call = compile._flatten(loss_from_hidden, leaves, (*values, None, None, False), True)
    torch.library.opcheck(compile._run, call)
    head = replace(head, **{name: getattr(head, name).detach() for name in TENSORS})
    named = {"temperature": 0.9, "backend": CPU_BACKEND, "validate": False}
    values = (RowInputs(target=arguments["target"], **named), LinearOptions())
    call = compile._flatten(logp_from_hidden, (), (hidden.detach(), head, *values))
    torch.library.opcheck(compile._run, call)
