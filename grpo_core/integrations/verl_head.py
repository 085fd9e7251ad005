"""verl's log-probabilities and entropies from hidden states, by our operator.

verl 0.9.1 with `model.use_fused_kernels=True` gets both from one of two operators: the module
`FusedLinearForPPO` (`fused_kernel_options.impl_backend=torch`) or `linear_cross_entropy` (triton),
called by forwards of its own. `patch_log_probs` puts ours in their places:

| where                                  | what differs from verl's                               |
|----------------------------------------|--------------------------------------------------------|
| either operator, every model family    | dweight summed in float32, logits in float32, entropy  |
|                                        | float32; rows without a gradient take no product       |
| forward of text models, `dense_common` | bias, soft cap and scale of the head take part, which  |
|                                        | verl's leave out; a head that FSDP2 shards apart (not  |
|                                        | tied) is gathered, where verl's fails                  |

Kept are arguments, shapes, and the wrapped label of the last position.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_core.linear.head import LinearHead
from grpo_core.linear.logp import linear_logp
from grpo_core.linear.model_probe import read_head, stated

VERSION = "0.9.1"
INSTALL = (
    f'pip install --no-deps verl=={VERSION}; pip install ray "tensordict>=0.8,<=0.10" hydra-core '
    'codetiming dill pandas datasets pillow peft accelerate "transformers>=5.5.3,<5.11"'
)
FORWARDS = "verl.models.transformers.dense_common"
OPERATORS = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
# these have taken the function's name for themselves where they are loaded
MEGATRON = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")


def require_verl() -> None:
    """Raises ImportError, with the command that helps, unless verl 0.9.1 can be imported."""
    try:
        found = import_module("verl").__version__
    except ImportError as missing:
        what = "it" if missing.name == "verl" else f"{missing.name}, which verl imports,"
        raise ImportError(
            f"grpo_core.integrations.verl needs verl {VERSION}; {what} is missing: {INSTALL}"
        ) from missing
    if found != VERSION:
        raise ImportError(
            f"grpo_core.integrations.verl: expected verl {VERSION}, got {found}: {INSTALL}"
        )


class FusedLinear(nn.Module):
    """`FusedLinearForPPO` of verl: hidden states and a matrix -> (log_probs, entropy).

    Args:
        chunk_size: without effect; chunks follow from a budget of memory.
        impl_backend: "torch". verl's "liger" is another program: do not patch then.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend != "torch":
            raise ValueError(
                "impl_backend: expected 'torch' or 'triton' with patch_log_probs, got "
                f"{impl_backend!r}"
            )

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every label, float32, shaped like `input_ids`."""
        _check_whole("vocab_weights", vocab_weights)
        found = linear_logp(
            hidden_states, vocab_weights, input_ids, temperature=_number(temperature)
        )
        return found.logp, found.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name: (log-probabilities, entropies) [N] of N labels, float32.

    Raises:
        ValueError: any `reduction` but "none".
        NotImplementedError: a matrix in parts, of tensor parallelism.
    """
    if reduction != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        size = torch.distributed.get_world_size(dist_process_group)
        raise NotImplementedError(
            f"dist_process_group: a head in {size} parts is not supported; use "
            "tensor_model_parallel_size=1, or verl's own kernel without patch_log_probs"
        )
    _check_whole("weight", weight)
    rows = hidden.reshape(-1, hidden.shape[-1])
    found = linear_logp(rows, weight, labels.reshape(-1), temperature=_number(temperature))
    return found.logp, found.entropy


def forward_with_torch_backend(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    cache_position: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,
    **loss_kwargs: Any,
) -> Any:
    """The forward that verl gives a text model whose head is fused; arguments are verl's.

    Returns:
        verl's `CausalLMOutputForPPO` with `log_probs` and `entropy`, [B, T] float32, each position
        predicting the next; the last one's label is the first, as in verl.

    Raises:
        ValueError: neither `shift_labels` nor `labels` nor `input_ids`.
        NotImplementedError: without `return_dict`, or a head that is more than `head_of` reads.
    """
    verl = import_module(FORWARDS)
    if not return_dict:
        raise NotImplementedError("return_dict: expected True with a fused head, got False")
    if shift_labels is None:
        rolled = input_ids if labels is None else labels
        if rolled is None:
            raise ValueError("shift_labels: expected it, or labels, or input_ids, got none")
        shift_labels = torch.roll(rolled, shifts=-1, dims=-1)
    outputs = verl.forward_base_model(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        cache_position=cache_position,
    )
    target, T = shift_labels, _number(temperature)

    def scored(hidden: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_logp(hidden, head_of(self), target, temperature=T)
        return found.logp, found.entropy

    # as the head's own forward: where FSDP shards it apart, its hooks gather the matrix
    with patch.object(self.lm_head, "forward", scored):
        logp, entropy = self.lm_head(outputs[0])
    return verl.CausalLMOutputForPPO(
        log_probs=logp,
        entropy=entropy,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


# where tensors are decides what computes, not the name of the backend
forward_with_triton_backend = forward_with_torch_backend


def head_of(model: Any) -> LinearHead:
    """A model's output matrix with the bias, soft cap and scale that its config names.

    Raises:
        NotImplementedError: an adapter on the head, or a scale whose meaning is not known.
    """
    return read_head(model.lm_head, stated(model.config), adapters=False)


def patch_log_probs() -> ExitStack:
    """Puts our operator where verl looks its own up, in this process.

        with patch_log_probs(): ...          # or
        undo = patch_log_probs(); ...; undo.close()

    A model takes its forward when verl builds it: patch before, and closing leaves it as it is.

    Raises:
        ImportError: verl is missing, or not 0.9.1.
        RuntimeError: something of verl's does not look as it does there.
    """
    require_verl()
    places: list[tuple[str, str, Callable]] = [
        (OPERATORS, "FusedLinearForPPO", FusedLinear),
        (KERNEL, "linear_cross_entropy", linear_cross_entropy),
        (FORWARDS, "forward_with_torch_backend", forward_with_torch_backend),
        (FORWARDS, "forward_with_triton_backend", forward_with_triton_backend),
    ]
    places += [
        (m, "linear_cross_entropy", linear_cross_entropy) for m in MEGATRON if m in sys.modules
    ]
    for module, name, ours in places:
        theirs = getattr(import_module(module), name)
        if theirs is not ours:
            _check_parameters(f"{module}.{name}", theirs, ours)
    with ExitStack() as stack:
        for module, name, ours in places:
            stack.enter_context(patch.object(import_module(module), name, ours))
        return stack.pop_all()


def _check_parameters(name: str, theirs: Any, ours: Any) -> None:
    """Raises RuntimeError unless both are called in the same way."""
    # the `apply` of an autograd function shows no names, its forward does
    theirs = getattr(getattr(theirs, "__self__", None), "forward", theirs)
    found, expected = (list(inspect.signature(called).parameters) for called in (theirs, ours))
    found = found[1:] if found[:1] == ["ctx"] else found
    if found != expected:
        raise RuntimeError(f"{name}: expected the parameters {expected}, got {found}")


def _check_whole(name: str, weight: Tensor) -> None:
    """Raises NotImplementedError for a matrix that FSDP2 has not gathered."""
    if isinstance(weight, DTensor):
        raise NotImplementedError(
            f"{name}: expected a gathered matrix, got a DTensor: this forward of verl reads a head "
            "that FSDP2 shards apart from the model, where its own operator fails, too; set "
            "use_fused_kernels=False"
        )


def _number(temperature: Any) -> float:
    """A temperature as the operator takes it; verl's engine gives no tensor to a fused head."""
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        raise NotImplementedError(
            "temperature: expected one number for all tokens with a fused head, got "
            f"{list(temperature.shape)}"
        )
    return float(temperature)
