"""From logits: `fused_loss`, `token_logp`, and `logp_loss` from log-probabilities.

Read `fused_loss` first (the public functions), then `row_inputs` and `inputs` (the arguments,
checked once), `tokens` (the same as vectors over tokens) and `autograd` (the two plans).
`reference` is the same loss in plain PyTorch; `outputs` and `metrics` are what a loss returns;
`compile` makes it an operator of `torch.compile`.
"""
