"""The fused heads of verl with our operator: real models, patched as verl patches them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("verl", reason="needs verl: make test-verl")

import transformers
import verl
from verl.models.transformers import dense_common, monkey_patch
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as kernel

import grpo_core.integrations.verl as ours
from grpo_core.integrations import verl_head

T = 0.7
SIZES = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
}


@pytest.fixture(autouse=True)
def forwards_stay() -> Iterator[None]:
    """verl replaces the forward of a class for good; every test has its own again."""
    classes = [getattr(transformers, f"{kind}ForCausalLM") for kind, _ in MODELS.values()]
    before = [kind.forward for kind in classes]
    yield
    for kind, forward in zip(classes, before, strict=True):
        kind.forward = forward


def build(name: str) -> nn.Module:
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        # logits far from uniform
        model.lm_head.weight.mul_(30)
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 67, (2, 9))
    present = torch.ones_like(ids)
    present[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": present}


def from_logits(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What verl does without a fused head, in float64 after the logits."""
    logits = model(**given).logits.double() / T
    log_p = torch.log_softmax(logits, -1)
    label = given["input_ids"].roll(-1, -1)
    return log_p.gather(-1, label[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def a_loss(log_probs: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
    return ((log_probs.exp() * 3 - 0.2 * entropy.square()) * mask)[:, :-1].sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_text_models(name: str, backend: str) -> None:
    """Values and the gradient of every parameter, those of the model's own logits."""
    model, given = build(name), inputs()
    mask = given["attention_mask"]
    exact = from_logits(model, given)
    wanted = gradients(model, a_loss(*exact, mask))
    with ours.patch_log_probs():
        monkey_patch.patch_forward_with_backends(
            model, use_fused_kernels=True, fused_kernels_backend=backend
        )
    assert type(model).forward is verl_head.forward_with_torch_backend
    out = model(**given, temperature=T, return_dict=True, use_cache=False)
    assert isinstance(out, dense_common.CausalLMOutputForPPO)
    for found, theirs in zip((out.log_probs, out.entropy), exact, strict=True):
        assert found.shape == (2, 9) and found.dtype == torch.float32
        assert float((found - theirs).detach().abs().max()) < 2e-5
    found = gradients(model, a_loss(out.log_probs, out.entropy, mask))
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert float((found[key] - gradient).abs().max()) < 1e-5 * size + 1e-7, key
    # what the engine gives packed sequences
    label = torch.randint(1, 67, (2, 9))
    given_labels = model(**given, temperature=T, return_dict=True, shift_labels=label)
    same = model(**given, temperature=T, return_dict=True, labels=label.roll(1, -1))
    assert torch.equal(given_labels.log_probs, same.log_probs)
    assert not torch.equal(given_labels.log_probs, out.log_probs)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_verls_own_forward_is_the_yardstick(name: str) -> None:
    """Equal where the head is a matrix; verl's leaves a soft cap out, ours does not."""
    model, given = build(name), inputs()
    exact = from_logits(model, given)[0]
    monkey_patch.patch_forward_with_backends(
        model, use_fused_kernels=True, fused_kernels_backend="torch"
    )
    theirs = model(**given, temperature=T, return_dict=True).log_probs
    assert (float((theirs - exact).abs().max()) < 2e-5) == (name == "llama")


def test_a_vision_language_model_by_the_operator() -> None:
    """verl gives it a forward of its own, which asks for the operator at every call.

    That forward is verl's; what it calls before the head is replaced by given states.
    """
    from verl.models.transformers import qwen2_vl

    assert "FusedLinearForPPO" in qwen2_vl.forward_with_torch_backend.__code__.co_names

    class Owner(nn.Module):
        _verl_fused_kernels_backend = "torch"

        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(16, 67, bias=False)
            self.states = nn.Parameter(torch.randn(2, 9, 16))

    owner, ids = Owner(), inputs()["input_ids"]

    def run(function: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = (owner.states,)
        with pytest.MonkeyPatch.context() as patch:
            # all but the head: no tower, no language model
            patch.setattr(qwen2_vl, "qwen2_vl_forward", lambda *a, **k: outputs_of(outputs))
            out = function(owner, ids, temperature=T)
        loss = out.log_probs.square().sum() + out.entropy.float().sum()
        return out.log_probs.detach(), gradients(owner, loss)

    def outputs_of(states: tuple[Tensor, ...]) -> Any:
        kind = transformers.modeling_outputs.BaseModelOutputWithPast
        return kind(last_hidden_state=states[0])

    plain = run(qwen2_vl.forward_with_torch_backend)
    with ours.patch_log_probs():
        by_ours = run(qwen2_vl.forward_with_torch_backend)
        by_kernel = run(qwen2_vl.forward_with_triton_backend)
    for found in (by_ours, (by_kernel[0].view(2, 9), by_kernel[1])):
        assert torch.allclose(found[0], plain[0], atol=1e-5)
        for key, gradient in plain[1].items():
            assert torch.allclose(found[1][key], gradient, 1e-4, 1e-5), key


def test_threads_share_a_head() -> None:
    """Each thread gets its own labels' values, and the head keeps its own forward."""
    model = build("llama")
    given = [inputs() for _ in range(4)]

    def score(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out = verl_head.forward_with_torch_backend(model, **batch, return_dict=True)
        return out.log_probs

    alone = [score(batch) for batch in given]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(score, given * 25))
    assert all(torch.equal(a, b) for a, b in zip(alone * 25, together, strict=True))
    assert "forward" not in vars(model.lm_head)


def test_the_two_operators() -> None:
    """Beside verl's module; the kernel's function has its shapes, [N] for any labels."""
    hidden, weight = torch.randn(2, 5, 16).requires_grad_(), torch.randn(67, 16).requires_grad_()
    label = torch.randint(0, 67, (2, 5))
    theirs = torch_functional.FusedLinearForPPO()(hidden, weight, label, temperature=T)
    mine = ours.FusedLinear(chunk_size=4)(hidden, weight, label, temperature=T)
    flat = ours.linear_cross_entropy(hidden, weight, label, T, "none", None)
    wanted = torch.autograd.grad(theirs[0].exp().sum() + theirs[1].sum(), [hidden, weight])
    for found in (mine, flat):
        for a, b in zip(found, theirs, strict=True):
            assert torch.allclose(a.view(2, 5), b, atol=1e-5)
        got = torch.autograd.grad(found[0].exp().sum() + found[1].sum(), [hidden, weight])
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, 1e-4, 1e-5)
    assert flat[0].shape == flat[1].shape == (10,)


def test_dweight_of_many_chunks_in_bfloat16() -> None:
    """Summed in float32 and rounded once, where verl's torch operator rounds at every chunk."""
    hidden = torch.randn(1024, 16).bfloat16().requires_grad_()
    weight = torch.randn(67, 16).bfloat16().requires_grad_()
    label, upstream = torch.randint(0, 67, (1024,)), torch.randn(1024)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    exact = exact.gather(1, label[:, None]).squeeze(1)
    (wanted,) = torch.autograd.grad((exact * upstream).sum(), weight)
    errors = []
    for operator in (ours.FusedLinear(), torch_functional.FusedLinearForPPO(chunk_size=32)):
        logp, _ = operator(hidden, weight, label)
        (got,) = torch.autograd.grad((logp * upstream).sum(), weight)
        assert got.dtype == torch.bfloat16
        gap = (got.double() - wanted).norm() / wanted.norm()
        errors.append((float(gap), float((logp - exact).detach().abs().max())))
    print(f"(dweight, logp): ours {errors[0]}, verl's {errors[1]}")
    assert errors[0][0] < 3e-3 < 2 * errors[1][0] and errors[0][0] < errors[1][0] / 2
    assert errors[0][1] < 1e-4 < errors[1][1]


def test_patching_and_undoing() -> None:
    places = [
        (torch_functional, "FusedLinearForPPO"),
        (kernel, "linear_cross_entropy"),
        (dense_common, "forward_with_torch_backend"),
        (dense_common, "forward_with_triton_backend"),
    ]
    before = [getattr(*place) for place in places]
    undo = ours.patch_log_probs()
    assert all(getattr(*p) is not b for p, b in zip(places, before, strict=True))
    with ours.patch_log_probs():
        # twice is no harm
        assert torch_functional.FusedLinearForPPO is ours.FusedLinear
    assert torch_functional.FusedLinearForPPO is ours.FusedLinear
    undo.close()
    assert [getattr(*place) for place in places] == before


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is patched before everything has been looked at."""

    def forward_with_triton_backend(self: Any, input_ids: Tensor, temperature: float) -> None: ...

    operator = torch_functional.FusedLinearForPPO
    changed = "forward_with_triton_backend"
    with monkeypatch.context() as patch:
        patch.setattr(dense_common, changed, forward_with_triton_backend)
        with pytest.raises(
            RuntimeError, match=rf"dense_common\.{changed}: expected the parameters"
        ):
            ours.patch_log_probs()
        assert torch_functional.FusedLinearForPPO is operator
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(ImportError, match=r"expected verl 0\.9\.1, got 0\.10\.0: pip install"):
        ours.patch_log_probs()
    monkeypatch.delitem(sys.modules, "grpo_core.integrations.verl")
    with pytest.raises(ImportError, match=r"got 0\.10\.0"):
        import grpo_core.integrations.verl  # noqa: F401


def test_heads_that_are_more_than_is_read_are_refused() -> None:
    model = build("llama")
    model.lm_head.base_layer = model.lm_head
    with pytest.raises(NotImplementedError, match="lm_head: an adapter"):
        verl_head.head_of(model)
    del model.lm_head.base_layer
    for name, message in (
        ("logits_scaling", "logits_scaling: not known for model_type 'llama'"),
        ("output_multiplier", "output_multiplier: not known for model_type 'llama'"),
    ):
        setattr(model.config, name, 2.0)
        with pytest.raises(NotImplementedError, match=message):
            verl_head.head_of(model)
        delattr(model.config, name)
    assert verl_head.head_of(model).weight is model.lm_head.weight
    with pytest.raises(NotImplementedError, match="return_dict: expected True"):
        verl_head.forward_with_torch_backend(model, inputs()["input_ids"])
    with pytest.raises(ValueError, match="shift_labels: expected it"):
        verl_head.forward_with_torch_backend(model, return_dict=True)
