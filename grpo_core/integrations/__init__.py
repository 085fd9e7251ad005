"""grpo_core in other trainers: TRL and verl; docs/integrations.md is the guide.

`trl` is a trainer for TRL with the fused loss; `trl_hook` replaces TRL's log-probabilities. `verl`
registers policy losses; `verl_head` replaces verl's log-probabilities. `presets/` has the losses of
both frameworks by their option names. Read `presets` first, then `trl` and `verl`.
"""
