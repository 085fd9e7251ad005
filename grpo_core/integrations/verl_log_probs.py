"""Replaces verl's log-probabilities in every process that imports this module.

    VERL_USE_EXTERNAL_MODULES=grpo_core.integrations.verl,grpo_core.integrations.verl_log_probs

verl's workers are separate processes; this variable reaches them. See `verl_head`.
"""

from grpo_core.integrations.verl_head import patch_log_probs

PATCH = patch_log_probs()
