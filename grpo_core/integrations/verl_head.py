"""verl's log-probabilities and entropies from hidden states, by `linear_logp`.

verl 0.9.1 with `model.use_fused_kernels=True` computes both by one of two operators: the module
`FusedLinearForPPO` (`fused_kernel_options.impl_backend=torch`) or `linear_cross_entropy` (triton),
called by its own forwards. `patch_log_probs` replaces them:

| replaced                               | differences from verl                                  |
|----------------------------------------|--------------------------------------------------------|
| either operator, every model family    | dweight summed in float32; float32 logits and entropy; |
|                                        | no product for rows without a gradient                 |
| forward of text models, `dense_common` | applies the bias, soft cap and scale of the head, which|
|                                        | verl ignores; gathers a head that FSDP2 shards apart   |
|                                        | (not tied), where verl fails                           |

Arguments, shapes and the wrapped label of the last position are the same. While the forward of a
text model runs its head, the head's own forward is replaced; a lock admits one thread at a time.
"""

from __future__ import annotations

import inspect
import sys
import threading
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
from grpo_core.linear.model_head import options_of_config, read_head

VERSION = "0.9.1"
INSTALL = (
    f'pip install --no-deps verl=={VERSION}; pip install ray "tensordict>=0.8,<=0.10" hydra-core '
    'codetiming dill pandas datasets pillow peft accelerate "transformers>=5.5.3,<5.11"'
)
FORWARDS = "verl.models.transformers.dense_common"
OPERATORS = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
# modules that import the function by name
MEGATRON = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")

# held while the forward of a head is replaced
_HEAD_LOCK = threading.Lock()


def require_verl() -> None:
    """Raises ImportError with an install command unless verl 0.9.1 can be imported."""
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
        chunk_size: ignored; the memory budget decides.
        impl_backend: "torch". With verl's "liger", do not patch.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend != "torch":
            want = "'torch' or 'triton' with patch_log_probs"
            raise ValueError(f"impl_backend: expected {want}, got {impl_backend!r}")

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Returns log-probability and entropy of every label, float32, shaped like `input_ids`."""
        return _scores(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of this name: (log-probabilities, entropies) [N] of N labels, float32.

    Raises:
        ValueError: a `reduction` other than "none".
        NotImplementedError: a matrix split by tensor parallelism.
    """
    if reduction != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    ranks = 1
    if dist_process_group is not None:
        ranks = torch.distributed.get_world_size(dist_process_group)
    if ranks > 1:
        raise NotImplementedError(
            f"dist_process_group: a head split over {ranks} ranks is not supported; use "
            "tensor_model_parallel_size=1, or verl's own kernel without patch_log_probs"
        )
    return _scores(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature)


def _scores(
    hidden: Tensor, lm_head: Tensor | LinearHead, label: Tensor, temperature: Any
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every label; verl passes numbers or tensors of one number.

    Raises:
        NotImplementedError: a matrix sharded by FSDP2, or a temperature for each sample.
    """
    if isinstance(lm_head, DTensor):
        raise NotImplementedError(
            "lm_head: expected a gathered matrix, got a DTensor: this forward of verl reads a head "
            "that FSDP2 shards apart from the model; verl's own operator also fails; set "
            "use_fused_kernels=False"
        )
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        raise NotImplementedError(
            "temperature: expected one number for all tokens with a fused head, got "
            f"{list(temperature.shape)}"
        )
    found = linear_logp(hidden, lm_head, label, temperature=float(temperature))
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
    """verl's forward of a text model with a fused head; the arguments are verl's.

    Returns:
        verl's `CausalLMOutputForPPO` with `log_probs` and `entropy`, [B, T] float32. Each position
        predicts the next; the label of the last position is the first token, as in verl.

    Raises:
        ValueError: neither `shift_labels` nor `labels` nor `input_ids`.
        NotImplementedError: no `return_dict`, or a head that `head_of` cannot read.
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

    def scores(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _scores(hidden, head_of(self), shift_labels, temperature)

    # called as the head's forward, so that the hooks of FSDP gather its matrix
    with _HEAD_LOCK, patch.object(self.lm_head, "forward", scores):
        logp, entropy = self.lm_head(outputs[0])
    return verl.CausalLMOutputForPPO(
        log_probs=logp,
        entropy=entropy,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


# the device of the tensors decides the backend, not its name
forward_with_triton_backend = forward_with_torch_backend


def head_of(model: Any) -> LinearHead:
    """Returns a model's output matrix with the bias, soft cap and scale in its config.

    Raises:
        NotImplementedError: an adapter on the head, or an unknown kind of scale.
    """
    return read_head(model.lm_head, options_of_config(model.config), adapters=False)


def patch_log_probs() -> ExitStack:
    """Replaces verl's operators in this process.

        with patch_log_probs(): ...          # or
        undo = patch_log_probs(); ...; undo.close()

    verl sets the forward of a model when it builds the model: patch before that. Closing does not
    change existing models.

    Raises:
        ImportError: verl is missing, or not 0.9.1.
        RuntimeError: a function of verl has other parameters.
    """
    require_verl()
    imported = [name for name in MEGATRON if name in sys.modules]
    places: list[tuple[str, str, Callable]] = [
        (OPERATORS, "FusedLinearForPPO", FusedLinear),
        *((module, "linear_cross_entropy", linear_cross_entropy) for module in (KERNEL, *imported)),
        (FORWARDS, "forward_with_torch_backend", forward_with_torch_backend),
        (FORWARDS, "forward_with_triton_backend", forward_with_triton_backend),
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
    """Raises RuntimeError unless both have the same parameters."""
    # `apply` of an autograd function has no named parameters, its forward does
    theirs = getattr(getattr(theirs, "__self__", None), "forward", theirs)
    found, expected = (list(inspect.signature(called).parameters) for called in (theirs, ours))
    found = found[1:] if found[:1] == ["ctx"] else found
    if found != expected:
        raise RuntimeError(f"{name}: expected the parameters {expected}, got {found}")
