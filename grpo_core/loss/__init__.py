"""From logits: `fused_loss`, `token_logp`, and `logp_loss` from log-probabilities.

Read `fused_loss` first (the public functions), then `inputs` (arguments, checked once), then
`autograd` (the two plans). `reference` is the same loss in float64; `metrics` its figures.
"""
