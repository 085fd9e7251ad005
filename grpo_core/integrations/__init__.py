"""grpo_core in other trainers: TRL and verl; docs/integrations.md is the guide.

`presets/` has the losses of both frameworks by their option names; read it first. `trl` is a
trainer for TRL with the fused loss, which `trl_loss` computes inside the model's forward;
`trl_hook` replaces TRL's log-probabilities by `trl_scores`. `verl` registers policy losses;
`verl_head` replaces verl's log-probabilities, and `verl_log_probs` does so on import.
"""
