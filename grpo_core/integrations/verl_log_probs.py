"""verl's log-probabilities by our operator, in every process that loads this module.

    VERL_USE_EXTERNAL_MODULES=grpo_core.integrations.verl,grpo_core.integrations.verl_log_probs

To load it is to ask for it: the workers of verl are processes of their own, and the variable is
what reaches them. See `grpo_core.integrations.verl_head`.
"""

from grpo_core.integrations.verl_head import patch_log_probs

PATCH = patch_log_probs()
