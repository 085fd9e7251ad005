"""A model with a fused head against logits -> `fused_loss`; see test_distributed for many ranks."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_core import (
    LogpRequest,
    LossRequest,
    fused_loss,
    token_logp,
    with_fused_head,
    without_fused_head,
)
from grpo_core.linear.model import has_fused_head
from grpo_core.linear.model_head import options_of_config
from tests.combinations import slow
from tests.conftest import CPU_BACKEND
from tests.tiny_models import FAMILIES, V, batch, tiny

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    """What a backward gives to each trained parameter."""
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def dense(model: Any, ids: Tensor, arguments: dict[str, Any], V: int | None = None) -> Any:
    """The loss from the model's own logits."""
    return fused_loss(model(input_ids=ids).logits[..., :V], backend=CPU_BACKEND, **arguments)


def fused(model: Any, ids: Tensor, arguments: dict[str, Any]) -> Any:
    """The loss by a request."""
    return model(input_ids=ids, request=LossRequest(backend=CPU_BACKEND, **arguments))


def assert_close(ours: Gradients, plain: Gradients, tolerance: float = 2e-6) -> None:
    """Every gradient to a few roundings of its largest number."""
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        size = float(gradient.abs().amax())
        # a key's bias has no gradient but rounding
        error = float((ours[name] - gradient).abs().amax())
        assert error <= tolerance * size + 1e-8, f"{name}: {error} of {size}"


def assert_same_loss(model: Any, V: int | None = None) -> None:
    """Loss, log-probabilities and every gradient are those of logits -> `fused_loss`."""
    ids, arguments = batch()
    plain, ours = dense(model, ids, arguments, V), fused(model, ids, arguments)
    assert torch.allclose(ours.loss, plain.loss, rtol=2e-6, atol=1e-7)
    assert torch.allclose(ours.logp, plain.logp, rtol=0, atol=2e-6)
    found = gradients(model, ours.loss)
    assert any("embed" in name for name in found) or hasattr(model, "peft_config")
    assert_close(found, gradients(model, plain.loss))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Also log-probabilities alone, and the model's own logits as if nothing were."""
    model = tiny(family)
    ids, arguments = batch()
    before = model(input_ids=ids).logits
    assert with_fused_head(model) is model
    probed = model.fused_head
    if family == "HyperCLOVAX":
        with pytest.raises(NotImplementedError, match="logits_scaling: not known for model_type"):
            options_of_config(model.config)
    else:
        assert options_of_config(model.config) == probed
    assert torch.equal(model(input_ids=ids).logits, before)
    assert_same_loss(model)
    target = arguments["target"]
    asked = model(input_ids=ids, request=LogpRequest(target, temperature=0.9))
    scored = token_logp(before, target, temperature=0.9)
    assert torch.allclose(asked.logp, scored.logp, rtol=0, atol=2e-6)
    assert torch.allclose(asked.entropy, scored.entropy, rtol=0, atol=2e-6)
    assert asked.loss is None
    with pytest.raises(AttributeError, match="LogpRequest"):
        asked.ratio  # noqa: B018
    without_fused_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model) | vars(model.get_output_embeddings())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_tied_embeddings_get_both_gradients(family: str, tied: bool) -> None:
    model = with_fused_head(tiny(family, tie_word_embeddings=tied))
    weight = model.get_output_embeddings().weight
    assert (weight is model.get_input_embeddings().weight) is tied
    assert_same_loss(model)


def test_bias_and_padded_vocabulary() -> None:
    model = tiny()
    model.lm_head = nn.Linear(32, 128)
    model.get_output_embeddings().bias.data.normal_()
    with_fused_head(model, vocabulary=V)
    assert_same_loss(model, V)


def test_rows_become_packed_ones() -> None:
    """The same loss and gradient as the padded batch's."""
    model = with_fused_head(tiny())
    ids, arguments = batch()
    padded = fused(model, ids, arguments)
    rows = arguments["target"] != -100
    sequence = torch.arange(len(ids))[:, None].expand_as(ids)[rows]
    flat = {
        "target": arguments["target"][rows],
        "old_logp": arguments["old_logp"][rows],
        "advantage": arguments["advantage"][sequence],
        "sequence_id": sequence,
        "rows": rows,
    }
    packed = fused(model, ids, arguments | flat)
    assert torch.allclose(packed.loss, padded.loss, rtol=1e-6)
    assert torch.equal(packed.logp, padded.logp[rows])
    assert_close(gradients(model, packed.loss), gradients(model, padded.loss))
    assert packed.ratio.shape == packed.logp.shape
    assert packed.metrics["tokens"] == rows.sum()
    with pytest.raises(ValueError, match=r"rows: expected bool of shape \[4, 9\]"):
        fused(model, ids, arguments | flat | {"rows": rows[:, 1:]})


LORA: dict[str, dict[str, Any]] = {
    "backbone": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("where", LORA)
def test_adapters(where: str) -> None:
    """Merged, and switched off for a reference pass, too."""
    model = get_peft_model(tiny("Granite"), LoraConfig(r=3, lora_alpha=5, **LORA[where]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    with_fused_head(model)
    assert_same_loss(model)
    ids, arguments = batch()
    trained = gradients(model, fused(model, ids, arguments).loss)
    assert all("lora" in name or "modules_to_save" in name for name in trained)
    assert any("lm_head" in name for name in trained) is (where != "backbone")
    target = arguments["target"]
    with torch.no_grad(), model.disable_adapter():
        asked = model(input_ids=ids, request=LogpRequest(target))
        plain = token_logp(model(input_ids=ids).logits, target)
    assert torch.allclose(asked.logp, plain.logp, rtol=0, atol=2e-6)
    model.merge_adapter()
    merged = model(input_ids=ids, request=LogpRequest(target))
    assert torch.allclose(
        merged.logp, token_logp(model(input_ids=ids).logits, target).logp, rtol=0, atol=2e-6
    )
    without_fused_head(model)


def test_adapters_it_cannot_follow() -> None:
    """A clear error instead of another gradient."""
    head = {"r": 3, "target_modules": ["lm_head"]}
    with pytest.raises(
        ValueError, match="lm_head: expected a plain LoRA adapter, got one with a v"
    ):
        with_fused_head(get_peft_model(tiny(), LoraConfig(use_dora=True, **head)))
    model = with_fused_head(get_peft_model(tiny(), LoraConfig(lora_dropout=0.5, **head)).eval())
    ids, arguments = batch()
    fused(model, ids, arguments)
    with pytest.raises(ValueError, match="lm_head: expected a plain LoRA adapter, got one with dr"):
        fused(model.train(), ids, arguments)
    # an adapter of the head that came later would be left out
    model = get_peft_model(with_fused_head(tiny()), LoraConfig(**head))
    with pytest.raises(ValueError, match="model: expected the head that with_fused_head has seen"):
        fused(model, ids, arguments)


def shifted(model: PreTrainedModel) -> None:
    """Its forward adds to the logits."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = plain(*args, **kwargs)
        outputs.logits = outputs.logits + 0.5
        return outputs

    model.forward = forward


def squared(model: PreTrainedModel) -> None:
    """Its head is more than a matrix."""

    class Squared(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) ** 2

    model.lm_head = Squared(32, V, bias=False)


def uncapped(model: PreTrainedModel) -> None:
    """It caps by a number that its config does not name."""
    model.config.final_logit_softcapping = None
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = plain(*args, **kwargs)
        outputs.logits = 20 * torch.tanh(outputs.logits / 20)
        return outputs

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, r"model: expected logits = cap\(scale · lm_head\(hidden\)\)"),
        (uncapped, r"model: expected logits = cap\(scale · lm_head\(hidden\)\)"),
        (squared, "lm_head: expected a matrix, a bias and LoRA at most, got Squared"),
    ],
)
def test_a_head_that_does_something_else(
    change: Callable[[PreTrainedModel], None], message: str
) -> None:
    """Refused, and the model is as it was."""
    model = tiny()
    change(model)
    before = set(vars(model)) | set(vars(model.lm_head))
    with pytest.raises(ValueError, match=message):
        with_fused_head(model)
    assert set(vars(model)) | set(vars(model.lm_head)) == before


def test_misuse_is_told() -> None:
    ids, arguments = batch()
    model = tiny()
    with pytest.raises(ValueError, match="model: expected one with a fused head"):
        without_fused_head(model)
    with_fused_head(model)
    with pytest.raises(ValueError, match="model: expected one without a fused head"):
        with_fused_head(model)
    with pytest.raises(ValueError, match="labels: expected None with a request"):
        model(input_ids=ids, labels=ids, request=LossRequest(**arguments))
    with pytest.raises(TypeError, match="advantages"):
        LossRequest(arguments["target"], advantages=arguments["advantage"])
    with pytest.raises(TypeError, match="old_logp"):
        LogpRequest(arguments["target"], old_logp=arguments["old_logp"])
    for other in ("x", 1, arguments, LossRequest):
        with pytest.raises(TypeError, match="request: expected a LossRequest or a LogpRequest, go"):
            model(input_ids=ids, request=other)
    with pytest.raises(ValueError, match="target: expected shape"):
        fused(model, ids[:, :-1], arguments)
    # a request that failed is not left waiting
    assert model(input_ids=ids).logits.shape == (*ids.shape, V)
    with pytest.raises(ValueError, match=r"model: expected get_output_embeddings\(\) of Linear"):
        with_fused_head(nn.Linear(2, 3))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """Through torch's own file format."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def own_forward(model: nn.Module) -> nn.Module:
    """Something else had replaced the forwards of the model and of its head before."""
    model.forward = model.forward
    model.lm_head.forward = model.lm_head.forward
    return model


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "twice": lambda model: saved_and_loaded(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("before", [lambda model: model, own_forward], ids=["", "own forward"])
def test_a_copy_is_a_model_of_its_own(way: str, before: Callable[[Any], Any]) -> None:
    """It answers requests by its own weights, gives its head back, and takes another one."""
    model = with_fused_head(before(tiny("Gemma2")))
    ids, arguments = batch()
    other = COPIES[way](model)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    assert_same_loss(other)
    assert not torch.equal(fused(model, ids, arguments).loss, fused(other, ids, arguments).loss)
    found = gradients(other, fused(other, ids, arguments).loss)
    assert len(found) == len(list(other.parameters()))
    assert model.state_dict().keys() == tiny("Gemma2").state_dict().keys()
    assert type(without_fused_head(other)) is type(tiny("Gemma2"))
    assert type(other.lm_head) is nn.Linear and "fused_head" not in vars(other)
    assert_same_loss(with_fused_head(other))


def test_what_is_saved_is_loaded_as_a_plain_model(tmp_path: Any) -> None:
    """One of the fused class says so where it is asked for more, and takes a head."""
    model = with_fused_head(tiny())
    model.save_pretrained(tmp_path)
    ids, arguments = batch()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    same = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: expected one with a fused head"):
        fused(same, ids, arguments)
    for other in (loaded, same):
        assert not has_fused_head(other)
        found = fused(with_fused_head(other), ids, arguments)
        assert torch.equal(found.loss, fused(model, ids, arguments).loss)


@pytest.fixture
def bfloat16() -> Any:
    """Accelerate's mixed precision, without a trace afterwards."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("head_first", [True, False])
def test_accelerate_wraps_and_unwraps(bfloat16: Any, head_first: bool) -> None:
    """In bfloat16 while wrapped, and to the bit as before without the wrapper; copies too."""
    model = tiny()
    ids, arguments = batch()
    logits = model(input_ids=ids).logits
    plain = fused(with_fused_head(copy.deepcopy(model)), ids, arguments).loss
    for wrap in (with_fused_head, bfloat16.prepare)[:: 1 if head_first else -1]:
        model = wrap(model)
    for wrapped in (model, copy.deepcopy(model), bfloat16.unwrap_model(model)):
        loss = fused(wrapped, ids, arguments).loss
        assert not torch.equal(loss, plain) and torch.isclose(loss, plain, rtol=0.05, atol=0.01)
    bare = bfloat16.unwrap_model(model, keep_fp32_wrapper=False)
    for each in (bare, *(take(bare) for take in COPIES.values())):
        assert torch.equal(fused(each, ids, arguments).loss, plain)
        assert torch.equal(without_fused_head(each)(input_ids=ids).logits, logits)
        assert torch.equal(fused(with_fused_head(each), ids, arguments).loss, plain)


def test_the_head_can_be_taken_from_under_a_wrapper(bfloat16: Any) -> None:
    """Nothing answers a request then, and nothing ignores it."""
    model = bfloat16.prepare(with_fused_head(tiny()))
    ids, arguments = batch()
    asked = fused(model, ids, arguments).loss
    without_fused_head(model)
    assert model(input_ids=ids).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="model: expected one with a fused head"):
        fused(model, ids, arguments)
    assert torch.equal(fused(with_fused_head(model), ids, arguments).loss, asked)


@pytest.mark.parametrize("where", LORA)
@pytest.mark.parametrize("head_first", [True, False])
def test_an_adapter_comes_and_goes(where: str, head_first: bool) -> None:
    """The merged model answers, or says that its head is another one and takes it."""
    model, settings = tiny("Granite"), LoraConfig(r=3, **LORA[where])
    if head_first:
        adapted = get_peft_model(with_fused_head(model), settings)
        if where != "backbone":
            assert not has_fused_head(adapted)
            with_fused_head(adapted)
    else:
        adapted = with_fused_head(get_peft_model(model, settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.1)
    ids, arguments = batch()
    before = fused(adapted, ids, arguments).loss
    merged = adapted.merge_and_unload()
    if not has_fused_head(merged):
        with pytest.raises(ValueError, match="model: expected the head that with_fused_head has"):
            fused(merged, ids, arguments)
        with_fused_head(merged)
    assert torch.isclose(fused(merged, ids, arguments).loss, before, rtol=1e-5)
    assert_same_loss(merged.requires_grad_())
    assert type(without_fused_head(merged)) is transformers.GraniteForCausalLM


def test_a_request_that_nobody_honours_is_an_error() -> None:
    """Where another program has put its own forward into the model since."""
    model, ids, arguments = with_fused_head(tiny()), *batch()
    model.forward = MethodType(transformers.LlamaForCausalLM.forward, model)
    assert model(input_ids=ids).logits.shape == (*ids.shape, V)
    with pytest.raises(ValueError, match="model: expected the forward of with_fused_head"):
        fused(model, ids, arguments)
    assert_same_loss(with_fused_head(without_fused_head(model)))


def test_threads_do_not_get_each_others_answers() -> None:
    """All are in the forward before one asks the head, and all have asked before one returns."""
    model, (ids, arguments) = with_fused_head(tiny()), batch()
    changes = {"objective": "gspo", "temperature": 0.5, "backend": CPU_BACKEND}
    other = LossRequest(**arguments | changes)
    runs: tuple[Callable[[], Tensor], ...] = (
        lambda: fused(model, ids, arguments).logp,
        lambda: model(input_ids=ids, request=other).logp,
        lambda: model(input_ids=ids, request=LogpRequest(arguments["target"])).entropy,
        lambda: model(input_ids=ids).logits,
    )
    expected = [run() for run in runs]
    barrier = threading.Barrier(len(runs), timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    for module in (model.model.norm, model.lm_head):
        module.register_forward_hook(meet)
    with ThreadPoolExecutor(len(runs)) as pool:
        found = [each.result() for each in [pool.submit(run) for run in runs]]
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours, alone)


def test_generation_goes_on() -> None:
    """The forward's signature, which generation reads, is the model's own."""
    model = tiny().eval()
    ids, _ = batch()
    options = {"max_new_tokens": 4, "do_sample": False}
    mask = torch.ones_like(ids)
    before = model.generate(ids, attention_mask=mask, **options)
    with_fused_head(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)


def test_checkpointing_of_the_backbone() -> None:
    model = with_fused_head(tiny()).train()
    ids, arguments = batch()
    plain = gradients(model, fused(model, ids, arguments).loss)
    model.gradient_checkpointing_enable()
    assert_close(gradients(model, fused(model, ids, arguments).loss), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_whole_model(reentrant: bool) -> None:
    """Its forward runs again in the backward, here of another thread."""
    model = with_fused_head(tiny())
    ids, arguments = batch()
    plain = gradients(model, fused(model, ids, arguments).loss)
    start = torch.ones((), requires_grad=True)

    def run(one: Tensor) -> Tensor:
        return one * fused(model, ids, arguments).loss

    loss = torch.utils.checkpoint.checkpoint(run, start, use_reentrant=reentrant)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(gradients, model, loss).result()
    assert_close(again, plain)


@pytest.mark.parametrize("what", ["model", *slow("step", "in place")])
def test_a_compiled_model(what: str) -> None:
    """As one graph, given its head before or after, and with requests made in the graph."""
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1)
    ids, arguments = batch()
    plain = dense(model, ids, arguments)
    wanted = gradients(model, plain.loss)
    compiling: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    if what == "step":
        with_fused_head(model)
        run = torch.compile(lambda ids: fused(model, ids, arguments), **compiling)
    else:
        if what == "model":
            compiled = torch.compile(model, **compiling)
        else:
            compiled = model
            model.compile(**compiling)
        with_fused_head(compiled)
        run = lambda ids: fused(compiled, ids, arguments)  # noqa: E731
    for _ in range(2):
        found = run(ids)
        assert torch.allclose(found.logp, plain.logp, rtol=0, atol=2e-6)
        assert_close(gradients(model, found.loss), wanted)


def test_accumulation_and_scaled_and_second_backward() -> None:
    """Two halves under a global count add up; the loss may be scaled, and differentiated twice."""
    model = with_fused_head(tiny())
    ids, arguments = batch()
    whole = gradients(model, fused(model, ids, arguments).loss)
    count = float((arguments["target"] != -100).sum())
    total: Tensor | float = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        part = {k: v[half] if isinstance(v, Tensor) else v for k, v in arguments.items()}
        total = total + fused(model, ids[half], part | {"normalizer": count}).loss
    assert_close(gradients(model, total), whole)
    loss = fused(model, ids, arguments).loss
    model.zero_grad()
    (0.25 * loss).backward(retain_graph=True)
    loss.backward()
    twice = {k: p.grad for k, p in model.named_parameters()}
    assert_close(twice, {k: 1.25 * gradient for k, gradient in whole.items()})


def test_random_numbers_are_left_alone() -> None:
    model = tiny(attention_dropout=0.5).train()
    before = torch.random.get_rng_state()
    with_fused_head(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def test_router_losses_are_not_dropped_silently() -> None:
    config = transformers.MixtralConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    model = transformers.MixtralForCausalLM(config)
    ids, arguments = batch()
    with pytest.raises(ValueError, match="aux_loss"):
        fused(with_fused_head(model), ids, arguments)
    model.config.output_router_logits = False
    assert fused(model, ids, arguments).loss.requires_grad
