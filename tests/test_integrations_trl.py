"""Our losses inside the real TRL: the same losses, gradients, metrics and trained parameters.

Stock TRL and ours start from the same model and are given the same batches; `tests/trl_training`
makes them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _cast_forward_inputs

pytest.importorskip("trl")

import trl
from datasets import Dataset
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from bench import trl_head
from grpo_core import Objective, clip
from grpo_core.integrations import trl_hook, trl_loss
from grpo_core.integrations.presets.trl import AGGREGATIONS
from grpo_core.integrations.trl import SUPPORTED, FusedGRPOTrainer, patch_log_probs
from grpo_core.integrations.trl_loss import TrlLossRequest
from tests.combinations import pairwise
from tests.trl_training import (
    Batch,
    Outcome,
    _copy,
    home,
    logged,
    make_trainer,
    micro_batch,
    outcome,
    parameters,
    quick,
)
from tests.trl_two_processes import on_two

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.xdist_group("trl"),
    pytest.mark.slow,
]
# float32, sums in another order
CLOSE = 2e-5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often our loss and our log-probabilities were asked for."""
    count = {"fused_linear_loss": 0, "linear_scores": 0}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(trl_loss, "fused_linear_loss")
    counted(trl_hook, "linear_scores")
    yield count


def lora(**options: Any) -> Any:
    """An adapter that does something from the start."""
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


def pair(output: Path, **options: Any) -> tuple[GRPOTrainer, FusedGRPOTrainer]:
    """Stock TRL's trainer and ours, with the same parameters."""
    with mock.patch.object(grpo_trainer, "VLLMGeneration"):
        stock, ours = (make_trainer(k, output, **options) for k in (GRPOTrainer, FusedGRPOTrainer))
    ours.model.load_state_dict(stock.model.state_dict())
    return stock, ours


def assert_equal(ours: Outcome, theirs: Outcome, what: object = "") -> None:
    """The same loss, gradients and metrics, within float32's rounding."""
    sizes = [float(g.abs().max()) for g in theirs.gradients.values() if g is not None]
    largest = max(sizes, default=0.0)
    assert abs(ours.loss - theirs.loss) <= CLOSE * max(abs(theirs.loss), largest, 1e-6), what
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, wanted in theirs.gradients.items():
        found = ours.gradients[name]
        if wanted is None or found is None:
            # what has no part in a graph, and a zero
            others = [g for g in (wanted, found) if g is not None]
            assert all((g == 0).all() for g in others), (name, what)
            continue
        assert float((found - wanted).abs().max()) <= CLOSE * max(largest, 1e-6), (name, what)
    assert list(ours.metrics) == list(theirs.metrics), what
    for name, wanted in theirs.metrics.items():
        assert ours.metrics[name] == pytest.approx(wanted, rel=CLOSE, abs=CLOSE, nan_ok=True), (
            name,
            what,
        )


ENTROPY = {
    "none": {},
    "bonus": {"entropy_coef": 0.02},
    "quantile": {"top_entropy_quantile": 0.4},
    "bonus of a quantile": {"entropy_coef": 0.02, "top_entropy_quantile": 0.4},
    "adaptive": {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 2.9},
}
VLLM = {
    "none": {},
    **{
        mode: {
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.2,
        }
        for mode in ("token_truncate", "token_mask", "sequence_mask", "sequence_truncate")
    },
}
BATCHES = [
    Batch(),
    Batch(tools=True),
    Batch(lengths=(5, 0, 2, 4), seed=1),
    Batch(lengths=(0, 0, 0, 0)),
    Batch(per_token=True, tools=True, seed=2),
    Batch(old=False, seed=3),
]
GRID = {
    "loss_type": list(AGGREGATIONS),
    "importance_sampling_level": ["token", "sequence"],
    "beta": [0.0, 0.04],
    "use_bias_correction_kl": [True, False],
    "delta": [None, 1.6],
    "off_policy_mask_threshold": [None, 0.1],
    "entropy": list(ENTROPY),
    "vllm": list(VLLM),
    "batch": BATCHES,
    "window": [1, 3],
    "training": [True, False],
    "lora": [False, True],
    "temperature": [1.0, 0.7],
    "cast_lm_head_to_fp32": [False, True],
    "model": ["qwen2", "tied"],
}


def test_the_grid(tmp_path: Path, calls: dict[str, int]) -> None:
    """Any two choices of `GRID` meet in some case; loss, gradients and metrics are stock TRL's."""
    cases = pairwise(GRID)
    fast = 0
    for case in cases:
        options = dict(case)
        batch, window, training = (options.pop(n) for n in ("batch", "window", "training"))
        options |= ENTROPY[options.pop("entropy")] | VLLM[options.pop("vllm")]
        if options["loss_type"] == "vespo" and "sequence" in options.get(
            "vllm_importance_sampling_mode", ""
        ):
            options["vllm_importance_sampling_mode"] = "token_mask"
        if options.pop("lora"):
            options["peft"] = lora()
            # TRL itself raises for all three
            options["model"] = "qwen2" if options["cast_lm_head_to_fp32"] else options["model"]
        if options.get("use_vllm"):
            # TRL then always has them
            batch = dataclasses.replace(batch, old=True)
        options["epsilon_high"] = 0.28
        stock, ours = pair(tmp_path, gradient_accumulation_steps=3, **options)
        inputs = micro_batch(stock, batch)
        before = calls["fused_linear_loss"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for _ in range(2):
                found = outcome(ours, inputs, window, training)
                wanted = outcome(stock, inputs, window, training)
                assert_equal(found, wanted, case)
        fast += calls["fused_linear_loss"] - before
        assert ours.entropy_coef == stock.entropy_coef
    assert len(cases) >= 40 and fast == 2 * len(cases)


@pytest.mark.parametrize("model", ["gemma2", "cohere", "mixtral"])
@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "rows of the mask"])
def test_other_heads(tmp_path: Path, calls: dict[str, int], model: str, compact: bool) -> None:
    """A soft cap, a scale, a router's loss; and only the rows that TRL's GPU path hands over."""
    stock, ours = pair(tmp_path, model=model, beta=0.04, entropy_coef=0.01, temperature=0.8)
    assert stock.aux_loss_enabled == (model == "mixtral")
    for batch in BATCHES:
        inputs = micro_batch(stock, batch)
        with mock.patch("trl.trainer.utils._use_triton", lambda device: compact, create=True):
            found, wanted = (outcome(t, inputs, 2, True) for t in (ours, stock))
        assert_equal(found, wanted, batch)
    assert calls["fused_linear_loss"] == len(BATCHES)


@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "rows of the mask"])
def test_a_batch_without_tokens_touches_every_parameter(tmp_path: Path, compact: bool) -> None:
    """Else a rank would wait for the others' gradients for ever."""
    _, ours = pair(tmp_path)
    inputs = micro_batch(ours, Batch(lengths=(0, 0, 0, 0)))
    with mock.patch("trl.trainer.utils._use_triton", lambda device: compact, create=True):
        found = outcome(ours, inputs, 1, True)
    assert found.loss == 0
    assert all(g is not None and (g == 0).all() for g in found.gradients.values())


class Training(NamedTuple):
    """Parameters before and after, and what was logged, step by step."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    log: list[dict[str, float]]


TRAININGS: dict[str, dict[str, Any]] = {
    "dapo": {"beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2},
    "gspo, LoRA, adaptive": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "lora": True,
        "beta": 0.1,
        "use_adaptive_entropy": True,
        "entropy_target": 2.95,
        "num_iterations": 2,
    },
    "cispo, tied": {
        "loss_type": "cispo",
        "epsilon_high": 1.1,
        "model": "tied",
        "steps_per_generation": 3,
        "mask_truncated_completions": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "vespo, LoRA": {
        "loss_type": "vespo",
        "num_iterations": 3,
        "top_entropy_quantile": 0.5,
        "lora": True,
        "gradient_checkpointing": True,
    },
    "bf16": {"bf16": True, "loss_type": "bnpo", "num_iterations": 2, "delta": 1.5},
}


def train(kind: Any, output: Path, **options: Any) -> Training:
    """Three steps."""
    torch.manual_seed(0)
    trainer = make_trainer(kind, output, max_steps=3, **options)
    before = parameters(trainer)
    with quick():
        trainer.train()
    return Training(before, parameters(trainer), logged(trainer))


def assert_same_training(ours: Training, theirs: Training, tolerance: float) -> None:
    """The same parameters, as measured by how far the training went; the same log."""
    moved = [float((theirs.after[n] - x).abs().max()) for n, x in theirs.before.items()]
    assert max(moved) > 0.01
    for name, wanted in theirs.after.items():
        assert torch.equal(ours.before[name], theirs.before[name])
        gap = float((ours.after[name] - wanted).abs().max())
        assert gap <= tolerance * max(moved), name
    assert len(ours.log) == len(theirs.log) >= 3
    for mine, entry in zip(ours.log, theirs.log, strict=True):
        assert list(mine) == list(entry)
        assert mine == pytest.approx(entry, rel=5 * tolerance, abs=5 * tolerance, nan_ok=True)


@pytest.mark.parametrize("name", TRAININGS)
def test_whole_trainings(tmp_path: Path, calls: dict[str, int], name: str) -> None:
    """Three steps, rollouts included: the parameters and the log of stock TRL."""
    options = dict(TRAININGS[name])
    if options.pop("lora", False):
        options["peft"] = lora()
    theirs = train(GRPOTrainer, tmp_path, **options)
    before = dict(calls)
    ours = train(FusedGRPOTrainer, tmp_path, **options)
    assert calls["fused_linear_loss"] >= 3 > before["fused_linear_loss"] == 0
    # TRL rounds logits to bfloat16, we do not
    assert_same_training(ours, theirs, 0.02 if options.get("bf16") else CLOSE)


def test_an_adapter_that_goes_on_training(tmp_path: Path, calls: dict[str, int]) -> None:
    """TRL keeps a copy of it, "ref", and takes the reference from there."""
    from peft import get_peft_model

    def adapted() -> Any:
        torch.manual_seed(3)
        return get_peft_model(_copy(str(home())), lora())

    options = {"model": adapted, "beta": 0.5, "num_iterations": 2}
    theirs = train(GRPOTrainer, tmp_path, **options)
    ours = train(FusedGRPOTrainer, tmp_path, **options)
    assert calls["fused_linear_loss"] == 3
    assert_same_training(ours, theirs, CLOSE)
    assert any(".default." in name for name in ours.after)


PAIRS = [
    {"prompt": "w0 w1", "chosen": " w2 w3 w4", "rejected": " w5"},
    {"prompt": "w6", "chosen": " w7 w8", "rejected": " w9 w2 w11 w12"},
] * 4
OTHERS: dict[str, tuple[str, list[dict[str, Any]] | None, dict[str, Any]]] = {
    "RLOO": ("RLOO", None, {"beta": 0.1, "num_iterations": 2, "model": "gemma2"}),
    "DPO": ("DPO", PAIRS, {"use_weighting": True, "model": "cohere"}),
    "KTO": (
        "KTO",
        [{"prompt": "w0 w1", "completion": f" w{2 + i} w3", "label": i % 2 == 0} for i in range(8)],
        {},
    ),
    "SFT": ("SFT", [{"text": "w0 w1 w2 w3"}, {"text": "w4 w5"}] * 4, {}),
    "SFT, dft": ("SFT", [{"text": "w0 w1 w2 w3"}, {"text": "w4 w5"}] * 4, {"loss_type": "dft"}),
}


@pytest.mark.parametrize("name", ["GRPO", *OTHERS])
def test_the_safe_level_trains_as_stock(tmp_path: Path, calls: dict[str, int], name: str) -> None:
    """Three steps of each of TRL's trainers, with our log-probabilities at its hook."""
    kind, rows, options = OTHERS.get(name, ("GRPO", None, TRAININGS["dapo"]))
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    more = None if rows is None else {"train_dataset": Dataset.from_list(rows)}
    theirs = train(trainer, tmp_path, config=config, more=more, **options)
    assert not any(calls.values())
    with patch_log_probs():
        ours = train(trainer, tmp_path, config=config, more=more, **options)
    assert calls["linear_scores"] >= 3 and not calls["fused_linear_loss"]
    assert_same_training(ours, theirs, CLOSE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_hook_returns(biased: bool, frozen: bool) -> None:
    """All that TRL's own function returns, and the gradients that it makes."""
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g) for s in ((20, 16), (70, 16), (70,)))
    target = torch.randint(0, 70, (20,), generator=g)
    grad_outputs = torch.randn(2, 20, generator=g)
    results = []
    for wanted in (names, names[:1], names[2:4]):
        made = []
        for patch in (contextlib.nullcontext, patch_log_probs):
            h, w, b = hidden.clone().requires_grad_(), weight.clone(), bias.clone()
            trained = [] if frozen else [x.requires_grad_() for x in ([w, b] if biased else [w])]
            with patch():
                apply = trl.trainer.utils._ChunkedLogProbFunction.apply
                out = apply(h, w, b if biased else None, target, 0.7, 32, 3.0, 0.6, wanted)
            total = (out[0] * grad_outputs[0]).sum()
            total = total if out[1] is None else total + (out[1] * grad_outputs[1]).sum()
            made.append((out, torch.autograd.grad(total, [h, *trained])))
        results.append(made)
    for (theirs, their_grads), (ours, our_grads) in results:
        assert [x is None for x in ours] == [x is None for x in theirs]
        for x, y in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
            if x is not None:
                assert x.dtype == y.dtype and x.requires_grad == y.requires_grad
                assert torch.allclose(x.double(), y.double(), rtol=CLOSE, atol=CLOSE)


def test_patches_are_taken_back() -> None:
    """In the reverse order; a second time does nothing; an error inside does not matter."""
    utils = trl.trainer.utils
    before = utils._ChunkedLogProbFunction
    outer = patch_log_probs()
    with pytest.raises(ZeroDivisionError), patch_log_probs() as inner:
        assert utils._ChunkedLogProbFunction is not before
        with pytest.raises(RuntimeError, match="reverse order"):
            outer.undo()
        1 / 0  # noqa: B018
    inner.undo()
    outer.undo()
    outer.undo()
    assert utils._ChunkedLogProbFunction is before


def test_an_unknown_trl_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another version, another signature, something else at the hook, no TRL at all."""
    utils = trl.trainer.utils
    with monkeypatch.context() as changed:
        changed.setattr(trl, "__version__", "1.17.0")
        for call in (patch_log_probs, lambda: make_trainer(FusedGRPOTrainer, tmp_path)):
            with pytest.raises(RuntimeError, match=r"got 1\.17\.0; pip install 'trl==1\.16\.0'"):
                call()
    with monkeypatch.context() as changed:
        changed.setattr(trl, "__version__", "1.14.2")
        with pytest.raises(RuntimeError, match=r"to take .*last_hidden.* got .*outputs"):
            patch_log_probs()
    with monkeypatch.context() as changed:
        changed.setattr(utils, "_ChunkedLogProbFunction", Path)
        with pytest.raises(RuntimeError, match="something else put there"):
            patch_log_probs()
    with monkeypatch.context() as changed:
        changed.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(RuntimeError, match="got none"):
            patch_log_probs()
    with monkeypatch.context() as changed:
        for name in [name for name in sys.modules if name.startswith("trl.")]:
            changed.delitem(sys.modules, name)
        changed.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match=r"pip install 'trl==1\.16\.0'"):
            patch_log_probs()
    with pytest.raises(ValueError, match="outputs: expected"), patch_log_probs():
        utils._ChunkedLogProbFunction.apply(
            *[torch.zeros(1, 1)] * 2, None, None, 1, 1, None, 1, ("x",)
        )
    with patch_log_probs():
        pass


def test_every_option_of_trl_is_known() -> None:
    """An option that a later TRL adds is in no list, and so leads to the safe level."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(GRPOConfig)} - inherited
    assert own == SUPPORTED - inherited


@dataclasses.dataclass
class LaterConfig(GRPOConfig):
    """A TRL with another option."""

    sharpness: float = 1.0


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"config": LaterConfig, "sharpness": 2.0}, "sharpness: not known here"),
    "delta": ({"delta": 1.1}, "delta: "),
    "compiled": ({"torch_compile": True}, "torch_compile: "),
    "prompt": ({"prompt_tuning": True}, "peft_config: prompt learning"),
    "vespo": (
        {
            "loss_type": "vespo",
            "use_vllm": True,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 0.9,
        },
        "vllm_importance_sampling_clip_max: ",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported(tmp_path: Path, calls: dict[str, int], name: str) -> None:
    """One warning names the option, and the loss is TRL's over our log-probabilities."""
    options, message = UNSUPPORTED[name]
    options = dict(options)
    if options.pop("prompt_tuning", False):
        from peft import PromptTuningConfig

        options["peft"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match=message) as warned:
        stock, ours = pair(tmp_path, **options)
        inputs = micro_batch(stock, Batch())
        results = [outcome(t, inputs, 1, True) for t in (ours, ours, stock)]
    assert sum("FusedGRPOTrainer" in str(w.message) for w in warned) == 1
    assert_equal(results[0], results[2])
    assert_equal(results[1], results[2])
    assert not calls["fused_linear_loss"] and calls["linear_scores"] == 2


def test_batches_that_are_not_supported(tmp_path: Path, calls: dict[str, int]) -> None:
    """Inputs of images; log-probabilities that vLLM could not give, where sequences are judged."""
    options = VLLM["token_mask"] | {"off_policy_mask_threshold": 0.1}
    stock, ours = pair(tmp_path, **options)
    inputs = micro_batch(stock, Batch())
    unscored = inputs["sampling_per_token_logps"].clone()
    unscored[0, 0] = torch.nan
    cases = {
        "token_type_ids": {"token_type_ids": None},
        "sampling_per_token_logps": {"sampling_per_token_logps": unscored},
    }
    for name, change in cases.items():
        with pytest.warns(UserWarning, match=f"FusedGRPOTrainer: {name}: "):
            found = outcome(ours, inputs | change, 1, True)
        assert_equal(found, outcome(stock, inputs | change, 1, True))
    assert not calls["fused_linear_loss"]
    assert_equal(outcome(ours, inputs, 1, True), outcome(stock, inputs, 1, True))
    assert calls["fused_linear_loss"] == 1


def test_a_token_that_vllm_could_not_score(tmp_path: Path, calls: dict[str, int]) -> None:
    """Its ratio is 1 in TRL, and so it is here."""
    for loss_type in ("grpo", "vespo"):
        stock, ours = pair(tmp_path, loss_type=loss_type, **VLLM["token_truncate"])
        inputs = micro_batch(stock, Batch())
        inputs["sampling_per_token_logps"][0, 1] = torch.nan
        inputs["importance_sampling_ratio"][0, 1] = 1.0
        assert_equal(outcome(ours, inputs, 1, True), outcome(stock, inputs, 1, True))
    assert calls["fused_linear_loss"] == 2


def test_quantiles_of_many_processes_are_trls(tmp_path: Path) -> None:
    two = mock.patch("accelerate.Accelerator.num_processes", mock.PropertyMock(return_value=2))
    with two, pytest.warns(UserWarning, match="top_entropy_quantile: "):
        make_trainer(FusedGRPOTrainer, tmp_path, top_entropy_quantile=0.5)


def test_another_loss_than_trls_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two are compared in every micro-batch."""
    stock, ours = pair(tmp_path)
    inputs, theirs = micro_batch(stock, Batch()), GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *a: 1.05 * theirs(*a))
    with pytest.raises(RuntimeError, match="another loss"):
        outcome(ours, inputs, 1, True)
    assert ours._token_outputs is None


def test_options_may_change_between_steps(tmp_path: Path) -> None:
    """A callback may set what TRL reads anew each time."""
    stock, ours = pair(tmp_path)
    inputs = micro_batch(stock, Batch())
    before = outcome(ours, inputs, 1, True)
    for trainer in (stock, ours):
        trainer.epsilon_low = trainer.epsilon_high = 0.02
        trainer.args.delta = 1.3
    found = outcome(ours, inputs, 1, True)
    assert abs(found.loss - before.loss) > 1e-3
    assert_equal(found, outcome(stock, inputs, 1, True))


def test_fsdp_leaves_a_request_alone() -> None:
    """It rounds every floating-point tensor that it finds among a forward's arguments."""
    exact = torch.full((1, 1), 1.001)
    request = TrlLossRequest(Objective(clip(0.2)), exact > 0, 1.0, {"old_logp": exact})
    _, kwargs = _cast_forward_inputs(torch.bfloat16, mask=exact, request=request)
    assert kwargs["mask"].dtype == torch.bfloat16
    assert kwargs["request"] is request and request.vectors["old_logp"] is exact


def test_a_copied_model_computes_its_own_loss(tmp_path: Path) -> None:
    """Its loss has no gradient for the original's parameters."""
    _, ours = pair(tmp_path)
    copied = copy.deepcopy(ours.model)
    ids, mask = torch.tensor([[2, 3, 4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    request = TrlLossRequest(Objective(clip(0.2)), mask, 2.0, {"advantage": torch.ones(1, 2)})
    output = copied(input_ids=ids, labels=request.labels(ids), grpo_core_request=request)
    output.loss.backward()
    assert any(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_generate_and_the_plain_forward_are_untouched(tmp_path: Path) -> None:
    """Without a request the forward is TRL's and the model's own."""
    stock, ours = pair(tmp_path)
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        plain = [t.model(input_ids=ids).logits for t in (stock, ours)]
        words = [t.model.generate(ids, max_new_tokens=4, do_sample=False) for t in (stock, ours)]
    assert torch.equal(*plain) and torch.equal(*words)


def test_memory_and_products() -> None:
    """What docs/integrations.md says, at smaller sizes; and all four ways compute the same."""
    batch, ways = trl_head.draw(16, 3000, 4), trl_head.WAYS
    for trained, wanted in ((True, (3, 4, 4, 3)), (False, (2, 3, 2, 2))):
        assert tuple(trl_head.figures(way, batch, trained)[1] for way in ways) == wanted
    exact, *others = (trl_head.step(way, batch, True)() for way in ways)
    for made in others:
        assert torch.allclose(made.loss, exact.loss, rtol=1e-4, atol=1e-6)
        pairs = zip(made.gradients, exact.gradients, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    larger = trl_head.draw(128, 40_000, 8)
    logits, safe, fast = (
        trl_head.figures(way, larger, True)[0] for way in ("logits", "safe", "fast")
    )
    assert max(safe, fast) < 0.6 * logits


def test_two_processes(tmp_path: Path) -> None:
    """Gloo: a training under DDP and a loss under FSDP2 are stock TRL's on two processes."""
    options = TRAININGS["dapo"] | {"entropy_coef": 0.01, "per_device_train_batch_size": 2}
    found = on_two(tmp_path, options)
    stock, ours = found["ddp"]
    assert stock["wrapped"] == ours["wrapped"] == "DistributedDataParallel"
    assert stock["agree"] and ours["agree"]
    results = (Training(r["before"], r["after"], r["log"]) for r in (ours, stock))
    assert_same_training(*results, CLOSE)
    stock, ours = found["fsdp"]
    assert_equal(ours, stock)
